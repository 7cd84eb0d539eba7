"""The whole journey: pipeline file to caches and probes, and single stages from a path."""

from __future__ import annotations

import gc
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import dask.array as da
import numpy as np
import pytest
import torch
import zarr
from helpers import (
    Heard,
    assert_same_run,
    caches_of,
    edit,
    live_parameters,
    shorten,
    weights_of,
)

from gim_stagewise.cache import Cache, read_manifest
from gim_stagewise.errors import ConfigError, FolderInUseError, StaleCacheError
from gim_stagewise.models import pool
from gim_stagewise.models.build import forget_user_code
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.probe.probe import probe_cache
from gim_stagewise.progress import Silent, Task
from gim_stagewise.report.record import save_record
from gim_stagewise.sources import Request
from gim_stagewise.stage.checkpoint import FrozenWeights


def run(file: Path, folder: Path) -> tuple[Pipeline, list[str]]:
    notes = Heard()
    pipeline = Pipeline.from_file(file, folder=folder, device="cpu", progress=notes)
    save_record(pipeline, pipeline.run())
    return pipeline, notes.notes


def test_run_leaves_sealed_caches_weights_and_a_record(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    record = json.loads((tmp_path / "out" / "run.json").read_text())
    assert record["pipeline"] == "tiny"
    assert [stage["module"] for stage in record["modules"]] == [1, 2, 3]
    for stage in record["modules"]:
        assert stage["state"] == "sealed"
        assert 1 <= stage["epochs"] <= 3
        assert 0 <= stage["probe_accuracy"] <= 1
        assert 0 <= stage["random_probe_accuracy"] <= 1
        files = [f for f in Path(stage["cache"]).rglob("*") if f.is_file()]
        assert stage["cache_bytes"] == sum(f.stat().st_size for f in files)
    assert record["probes"][0]["baselines"]["raw pixels"] > 0.8
    left = sorted(path.name for path in (tmp_path / "out").iterdir())
    expected = [".lock", "checkpoints", "logs", "probe.json", "run.json"]
    for module in (1, 2, 3):
        expected += [f"m{module}.safetensors", f"m{module}.zarr"]
    assert left == sorted(expected)


def test_accuracies_are_of_modules_that_there_are(tiny: Path, tmp_path: Path) -> None:
    result = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run(workers=0)
    assert result.accuracy(3) is not None
    for module in (0, -1, 4):
        with pytest.raises(ConfigError, match="modules 1 to 3"):
            result.accuracy(module)


@pytest.mark.parametrize("split", ["train", "test"])
def test_labels_of_one_split_alone_give_no_accuracies_and_it_is_said(
    tiny: Path, tmp_path: Path, split: str
) -> None:
    edit(tiny, f', labels = "{split}_labels.npy"', "")
    pipeline, notes = run(tiny, tmp_path / "out")
    assert any(f"(source.splits.{split})" in note for note in notes)
    assert pipeline.run(until=1).probes == []


def test_a_cache_is_read_by_plain_zarr_and_dask(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    group: Any = zarr.open_group(str(tmp_path / "out" / "m2.zarr"), mode="r")
    activations = group["activations"]
    assert activations.shape == (1, 52, 5, 5, 8, 2, 2)
    assert activations.metadata.dimension_names == (
        "view",
        "sample",
        "grid_row",
        "grid_col",
        "channel",
        "height",
        "width",
    )
    lazy = da.from_zarr(str(tmp_path / "out" / "m2.zarr"), component="activations")  # type: ignore[no-untyped-call]
    np.testing.assert_array_equal(lazy[0, 3:9].compute(), activations[0, 3:9])
    assert group["ids"][0] == "train/0"
    splits = group["splits"]
    assert splits.attrs["flag_meanings"] == "unlabeled train test"
    assert splits[0] == 0b011
    assert splits[51] == 0b100
    labels = np.load(tmp_path / "test_labels.npy")
    np.testing.assert_array_equal(group["labels/class"][40:], labels)


def test_cached_activations_are_those_of_the_stacked_modules(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "[cache]\n", '[cache]\nprecision = "float32"\n')
    pipeline, _ = run(tiny, tmp_path / "out")
    cache = Cache(tmp_path / "out" / "m3.zarr")
    item = cache.items()[17].id
    x = torch.from_numpy(pipeline.source.read([Request(item)])[0]).flatten(0, 1)
    for index in (1, 2, 3):
        module = pipeline.workspace.build(index, x.shape[1])
        weights = FrozenWeights.load(pipeline.workspace.weights_path(index))
        module.load_state_dict(weights.tensors)
        with torch.no_grad():
            x = module(x)
    stored = torch.from_numpy(cache.read([Request(item)])[0]).flatten(0, 1)
    torch.testing.assert_close(stored, x, rtol=1e-5, atol=1e-6)
    pooled = torch.from_numpy(cache.read_pooled([item])[0]).flatten(0, 1)
    torch.testing.assert_close(pooled, pool(module, stored), rtol=1e-6, atol=1e-7)


def test_two_runs_of_one_file_are_equal_to_the_last_bit(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "one")
    run(tiny, tmp_path / "two")
    assert_same_run(tmp_path / "one", tmp_path / "two")


def test_a_stage_is_trained_from_a_cache_alone(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    elsewhere = tmp_path / "moved" / "here"
    elsewhere.mkdir(parents=True)
    shutil.move(tmp_path / "out" / "m1.zarr", elsewhere / "anything.zarr")
    for file in ("tiny.toml", "train.npy", "test.npy"):
        (tmp_path / file).unlink()
    pipeline = Pipeline.from_cache(elsewhere / "anything.zarr", device="cpu")
    stage = pipeline.stage(2, elsewhere / "anything.zarr")
    weights, trained = stage.train()
    assert trained
    stage.extract(weights)
    assert (elsewhere / "m2.zarr").is_dir()
    expected = weights_of(tmp_path / "out")
    for name, tensor in weights.tensors.items():
        assert torch.equal(tensor, expected[f"m2.{name}"])
    module, pooling, accuracy, _ = probe_cache(elsewhere / "m2.zarr")
    assert (module, pooling) == (2, "mean")
    assert 0 <= accuracy <= 1


def test_a_second_run_has_nothing_to_do(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("m*/**/*")}
    _, notes = run(tiny, tmp_path / "out")
    assert [note for note in notes if "nothing to do" in note] == notes
    assert len(notes) == 3
    assert {f: f.stat().st_mtime_ns for f in (tmp_path / "out").glob("m*/**/*")} == before


def test_a_change_in_module_2_keeps_module_1(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    edit(tiny, "options = { channels = 8, stride = 2 }", "options = { channels = 9, stride = 2 }")
    _, notes = run(tiny, tmp_path / "out")
    assert notes[0] == "module 1: nothing to do, weights and cache match"
    assert notes[1] == "module 2: trained again: module.2.options.channels 8 → 9"
    assert "module 3: trained again: module.2.options.channels 8 → 9" in notes
    run(tiny, tmp_path / "fresh")
    assert_same_run(tmp_path / "out", tmp_path / "fresh")


def test_a_fourth_module_trains_only_itself(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    tiny.write_text(tiny.read_text() + '\n[module.4]\nbuild = "residual"\noptions.channels = 4\n')
    _, notes = run(tiny, tmp_path / "out")
    assert [note.partition(":")[0] for note in notes] == ["module 1", "module 2", "module 3"]
    assert (tmp_path / "out" / "m4.zarr").is_dir()


def test_settings_that_decide_nothing_make_nothing_stale(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    edit(tiny, "checkpoint_every = 2", "checkpoint_every = 5")
    moved = tmp_path / "data"
    moved.mkdir()
    for file in tmp_path.glob("*.npy"):
        shutil.move(file, moved / file.name)
    edit(tiny, f'root = "{tmp_path}"', f'root = "{moved}"')
    _, notes = run(tiny, tmp_path / "out")
    assert all("nothing to do" in note for note in notes)


def test_changed_data_is_noticed(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    images = np.load(tmp_path / "train.npy")
    images[5, 3, 3] ^= 1
    np.save(tmp_path / "train.npy", images)
    _, notes = run(tiny, tmp_path / "out")
    assert "the data of its input changed" in notes[0]


def test_a_cache_of_other_settings_is_refused(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    edit(tiny, "lr = 3e-3", "lr = 2e-3")
    pipeline = Pipeline.from_file(tiny, folder=tmp_path / "other", device="cpu")
    with pytest.raises(StaleCacheError, match=r"train\.lr 0\.003 → 0\.002"):
        pipeline.stage(2, tmp_path / "out" / "m1.zarr")
    with pytest.raises(ConfigError, match="holds the outputs of module 1; module 3"):
        pipeline.stage(3, tmp_path / "out" / "m1.zarr")


def test_only_one_module_is_in_memory(tiny: Path, tmp_path: Path) -> None:
    # Each stage's own numbers: its weights, and the objective's K matrices of channels².
    sizes: dict[int, tuple[int, int]] = {}
    seen: dict[str, set[int]] = {}
    gc.collect()  # leftovers of other tests; nothing is collected on purpose from here on
    before = live_parameters()

    class Counting(Silent):
        @contextmanager
        def task(self, label: str, *, total: int, done: int = 0, unit: str) -> Iterator[Task]:
            class Counter(Task):
                def advance(self, count: int = 1, **figures: float) -> None:
                    seen.setdefault(label, set()).add(live_parameters() - before)

            yield Counter()

    pipeline = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu", progress=Counting())
    channels = 1
    for index, (width, embedding) in enumerate([(6, 6), (8, 8), (5, 5)], start=1):
        module = pipeline.workspace.build(index, channels)
        sizes[index] = (sum(p.numel() for p in module.parameters()), 2 * embedding**2)
        channels = width
        del module
    pipeline.run()
    for index, (module_size, objective_size) in sizes.items():
        assert seen[f"module {index}: train"] == {module_size + objective_size}
        assert seen[f"module {index}: extract"] == {module_size}


OWN = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, in_channels, width):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1)
    def forward(self, x):
        return torch.tanh(self.conv(x))
    def pool(self, z):
        return z.amax((2, 3))
"""


def test_a_module_of_ones_own_is_trained(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "[cache]\n", '[cache]\nprecision = "float32"\n')
    (tmp_path / "own_nets.py").write_text(OWN)
    edit(
        tiny,
        'build = "residual"\noptions = { channels = 8, stride = 2 }',
        'build = "own_nets:Block"\noptions = { width = 7 }',
    )
    run(tiny, tmp_path / "out")
    group: Any = zarr.open_group(str(tmp_path / "out" / "m2.zarr"), mode="r")
    activations = np.asarray(group["activations"][0])
    # Module 3 begins with a ReLU, after which its input is stored.
    pooled = np.maximum(group["pooled"][0], 0)
    np.testing.assert_allclose(pooled, activations.max((-2, -1)), rtol=1e-6)

    # Its code is not imported because a cache says so.
    from_cache = Pipeline.from_cache(tmp_path / "out" / "m1.zarr", device="cpu")
    with pytest.raises(ConfigError, match="--pipeline FILE"):
        from_cache.stage(2, tmp_path / "out" / "m1.zarr").train(force=True)

    # Code that changes without changing results is kept; code that computes else is not.
    (tmp_path / "own_nets.py").write_text(OWN + "\n# a remark\n")
    _, notes = run_reloaded(tiny, tmp_path / "out")
    assert any("changed, but not its results" in note for note in notes)
    (tmp_path / "own_nets.py").write_text(OWN.replace("torch.tanh", "torch.sigmoid"))
    _, notes = run_reloaded(tiny, tmp_path / "out")
    assert any("computes something else now" in note for note in notes)


def test_a_cache_is_computed_with_the_threads_that_are_asked_for(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "noting.py").write_text(
        "import torch\n"
        "class Block(torch.nn.Conv2d):\n"
        "    def forward(self, x):\n"
        "        return 0 * super().forward(x) + torch.get_num_threads()\n"
        "def block(in_channels):\n"
        "    return Block(in_channels, 4, 3)\n"
    )
    built_in = 'build = "residual"\noptions = { stem = 4, channels = 6 }'
    edit(tiny, built_in, 'build = "noting:block"')
    edit(tiny, "[cache]\n", '[cache]\nprecision = "float32"\n')
    edit(tiny, "[extract]\n", "[extract]\nthreads = 2\n")
    shorten(tiny, modules=1, batch=8, epochs=1, chunk=7, probe=False)
    before = torch.get_num_threads()
    assert before != 2
    run(tiny, tmp_path / "out")
    assert {*caches_of(tmp_path / "out")["m1/activations"].flat} == {2}
    assert torch.get_num_threads() == before


def test_code_that_is_imported_late_is_code_of_the_module(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "own_nets.py").write_text(
        "from torch import nn\n"
        "def block(in_channels):\n"
        "    from own_parts.layers import last\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), last())\n"
    )
    (tmp_path / "own_parts").mkdir()
    layers = tmp_path / "own_parts" / "layers.py"
    layers.write_text("from . import deeper\nlast = lambda: deeper.make()\n")
    (tmp_path / "own_parts" / "__init__.py").touch()
    deeper = tmp_path / "own_parts" / "deeper.py"
    deeper.write_text("from torch import nn\ndef make():\n    return nn.ReLU()\n")
    edit(
        tiny, 'build = "residual"\noptions = { stem = 4, channels = 6 }', 'build = "own_nets:block"'
    )
    tiny.write_text(tiny.read_text().partition("[module.2]")[0])
    run(tiny, tmp_path / "out")
    _, notes = run_reloaded(tiny, tmp_path / "out")
    assert any("nothing to do" in note for note in notes)
    deeper.write_text(deeper.read_text().replace("ReLU", "Tanh"))
    _, notes = run_reloaded(tiny, tmp_path / "out")
    assert any("computes something else now" in note for note in notes)


def test_code_that_trains_otherwise_is_noticed_also_if_frozen_results_are_the_same(
    tiny: Path, tmp_path: Path
) -> None:
    code = (
        "from torch import nn\n"
        "def block(in_channels, keep=0.0):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.Dropout(keep))\n"
    )
    (tmp_path / "own_nets.py").write_text(code)
    edit(
        tiny, 'build = "residual"\noptions = { stem = 4, channels = 6 }', 'build = "own_nets:block"'
    )
    tiny.write_text(tiny.read_text().partition("[module.2]")[0])
    run(tiny, tmp_path / "out")
    (tmp_path / "own_nets.py").write_text(code.replace("keep=0.0", "keep=0.5"))
    _, notes = run_reloaded(tiny, tmp_path / "out")
    assert any("computes something else now" in note for note in notes)


def test_an_input_cache_of_other_code_weights_or_data_is_not_trained_on(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "own_nets.py").write_text(OWN)
    edit(
        tiny,
        'build = "residual"\noptions = { stem = 4, channels = 6 }',
        'build = "own_nets:Block"\noptions = { width = 7 }',
    )
    out = tmp_path / "out"
    run(tiny, out)

    def refusal() -> str:
        sys.modules.pop("own_nets", None)
        with pytest.raises(StaleCacheError) as caught:
            Pipeline.from_file(tiny, folder=out, device="cpu").stage(3)
        return str(caught.value)

    (tmp_path / "own_nets.py").write_text(OWN.replace("torch.tanh", "torch.sigmoid"))
    assert "m1.zarr below it: the code of 'own_nets:Block' computes something else" in refusal()
    (tmp_path / "own_nets.py").write_text(OWN)
    images = np.load(tmp_path / "train.npy")
    np.save(tmp_path / "train.npy", images[:, ::-1])
    assert "the data of its source changed" in refusal()
    np.save(tmp_path / "train.npy", images)
    shutil.copy(out / "m1.safetensors", out / "m2.safetensors")
    assert "it was made with other weights than m2.safetensors" in refusal()


def test_another_codec_stores_again_and_trains_nothing(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    edit(tiny, "[cache]\nchunk = 7", '[cache]\nchunk = 7\ncodec = "zstd"')
    _, notes = run(tiny, tmp_path / "out")
    assert notes == [
        f'module {n}: cache built again: module.{n}.cache.codec "lz4" → "zstd"' for n in (1, 2, 3)
    ]


def test_a_sealed_cache_that_lost_a_chunk_gets_that_again(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "out")
    run(tiny, tmp_path / "whole")
    next((tmp_path / "out" / "m2.zarr" / "activations").glob("c.0.3.*")).unlink()
    _, notes = run(tiny, tmp_path / "out")
    assert any(note.startswith("module 2: cache mended: activations/c.0.3.") for note in notes)
    assert_same_run(tmp_path / "out", tmp_path / "whole")


def test_two_runs_in_one_folder_exclude_each_other(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from gim_stagewise.lock import exclusive\n"
        "with exclusive(Path(sys.argv[1])):\n"
        "    print('held', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        with pytest.raises(FolderInUseError, match=f"process {other.pid} on .* since 2"):
            run(tiny, out)
        other.kill()
    run(tiny, out)  # a lock left by a dead process holds nobody up


def run_reloaded(file: Path, folder: Path) -> tuple[Pipeline, list[str]]:
    """Run as a new process would, with the user's code imported anew."""
    forget_user_code()
    return run(file, folder)


def test_random_views_are_stored_for_unlabeled_samples_only(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "[cache]\n", '[cache]\nprecision = "float32"\n')
    edit(tiny, "[patches]", "[augment]\ncrop = 10\nflip = 0.5\nviews = 2\n\n[patches]")
    edit(tiny, "prediction_steps = 2", "prediction_steps = 1")
    pipeline, _ = run(tiny, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out" / "m1.zarr")
    assert manifest.layout.views == 3
    cache = Cache(tmp_path / "out" / "m1.zarr")
    # Samples 40 to 51 are for testing; chunks of 7 from 42 on hold nothing else.
    files = {f.name.split(".")[2] for f in (cache.path / "activations").glob("c.1.*")}
    assert files == {str(chunk) for chunk in range(6)}
    stored = cache.read([Request("train/3", view) for view in (0, 1, 2)])
    module = pipeline.workspace.build(1, 1)
    module.load_state_dict(FrozenWeights.load(pipeline.workspace.weights_path(1)).tensors)
    for view, activations in enumerate(stored):
        patches = torch.from_numpy(pipeline.source.read([Request("train/3", view)])[0])
        with torch.no_grad():
            expected = module(patches.flatten(0, 1)).relu()  # as module 2 begins
        actual = torch.from_numpy(activations).flatten(0, 1)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
