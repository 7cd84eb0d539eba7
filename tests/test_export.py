"""The stacked encoder as one file: what it computes is what the caches hold."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import LOOKS_AT_VALUES, edit, one_error
from safetensors.torch import save_file
from test_audio import write_speech
from test_windowed import write_large
from warm import gim_stage

from gim_stagewise import load_encoder
from gim_stagewise.cache import Cache
from gim_stagewise.errors import ConfigError, CorruptCacheError, StaleCacheError
from gim_stagewise.models import INPUT_OPERATIONS
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.sources import Request, read_stacked
from gim_stagewise.stage.extraction_plan import Workers
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward

USED_ELSEWHERE = """
import sys, torch
program = torch.export.load(sys.argv[1])
rows = torch.load(sys.argv[2])
torch.save(program.module()(rows), sys.argv[3])
assert "gim_stagewise" not in sys.modules
"""

# Bottlenecks whose shortcut is of another width (block 1), none, or of another size (block 4).
RESNET50 = """[module.1]
build = "resnet50"
options = { blocks = [1, 1], width = 4 }

[module.2]
build = "resnet50"
options = { blocks = [2, 4], width = 4 }
"""

pytestmark = pytest.mark.filterwarnings("ignore:The given buffer is not writable")


@pytest.fixture(scope="module", params=["float32", "uint8"])
def done(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    new_tiny: Callable[[Path], Path],
) -> Path:
    """The file of a finished run; its folder is ``out`` beside it."""
    file = new_tiny(tmp_path_factory.mktemp(request.param))
    if request.param == "resnet50":
        file.write_text(file.read_text().partition("[module.1]")[0] + RESNET50)
    else:
        edit(file, "chunk = 7", f'chunk = 7\nprecision = "{request.param}"')
    Pipeline.from_file(file, folder=file.parent / "out", device="cpu").run(workers=Workers(0))
    return file


def test_it_computes_what_the_caches_hold(done: Path, tmp_path: Path) -> None:
    target = tmp_path / "new" / "encoder.safetensors"
    found = gim_stage("export", done, "--to", target, "--dir", done.parent / "out", "--json")
    assert found.returncode == 0, found.stderr
    assert json.loads(found.stdout)["modules"] == 3
    encoder = load_encoder(target)
    pipeline = Pipeline.from_file(done, folder=done.parent / "out", device="cpu")
    recorded = 0.0
    for index in (1, 2, 3):
        cache = Cache(done.parent / "out" / f"m{index}.zarr")
        manifest = cache.manifest
        # In the pieces of extraction, which is what bits depend on: blocks of 7 samples.
        ids = list(cache.ids)[:7]
        samples = read_stacked(pipeline.source, [Request(item_id) for item_id in ids])
        z = torch.from_numpy(samples).flatten(0, 2)
        for module in list(encoder)[:index]:
            frozen = FrozenModule(module, torch.device("cpu"))
            z, _ = frozen_forward(frozen, z, pipeline.config.extract)
        if manifest.stored_operation is not None:
            z = INPUT_OPERATIONS[manifest.stored_operation](z)
        stored = np.stack(cache.read([Request(item_id) for item_id in ids]))
        expected = z.numpy().reshape(stored.shape)
        if manifest.precision.lossless:
            np.testing.assert_array_equal(stored, expected)
        else:
            assert manifest.error is not None
            error = np.linalg.norm(stored - expected) / np.linalg.norm(expected)
            # Modules above the first got their input as it was stored, whose error they pass on.
            recorded += manifest.error["relative_l2"]
            assert error < 1.2 * recorded + 1e-6


@pytest.mark.parametrize("done", ["float32", "resnet50"], indirect=True)
def test_a_program_runs_without_this_package(done: Path, tmp_path: Path) -> None:
    target = tmp_path / "encoder.pt2"
    found = gim_stage("export", done, "--to", target, "--dir", done.parent / "out")
    assert found.returncode == 0, found.stderr
    assert f"parameters: {target}" in found.stdout
    rows = torch.randn(11, 1, 4, 4)
    torch.save(rows, tmp_path / "rows.pt")
    command = [sys.executable, "-c", USED_ELSEWHERE, str(target)]
    used = [*command, str(tmp_path / "rows.pt"), str(tmp_path / "z.pt")]
    subprocess.run(used, check=True, capture_output=True, cwd=tmp_path)
    expected = load_encoder(done.parent / "out")(rows)
    torch.testing.assert_close(torch.load(tmp_path / "z.pt"), expected, rtol=0, atol=1e-6)


def test_a_dense_encoder_takes_images_of_any_size(tmp_path: Path) -> None:
    file = write_large(tmp_path)
    Pipeline.from_file(file, folder=tmp_path / "out", device="cpu").run(workers=Workers(0))
    for name in ("encoder.pt2", "encoder.safetensors"):
        found = gim_stage("export", file, "--to", tmp_path / name, "--dir", tmp_path / "out")
        assert found.returncode == 0, found.stderr
    program = torch.export.load(tmp_path / "encoder.pt2").module()
    encoder = load_encoder(tmp_path / "encoder.safetensors")
    for shape in ((1, 1, 57, 90), (3, 1, 40, 33)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), encoder(x), rtol=0, atol=1e-6)
    with pytest.raises(ConfigError, match=r"'large', whose items are read in windows"):
        encoder.features(np.zeros((1, 1, 40, 33), np.float32))
    extra = {"pipeline.toml": ""}  # how patches are made
    torch.export.load(tmp_path / "encoder.pt2", extra_files=extra)
    assert extra["pipeline.toml"] == file.read_text()


def test_a_program_for_one_length_alone_is_refused(tmp_path: Path) -> None:
    file = write_speech(tmp_path)
    Pipeline.from_file(file, folder=tmp_path / "out", device="cpu").run(workers=Workers(0))
    found = gim_stage("export", file, "--to", tmp_path / "e.pt2", "--dir", tmp_path / "out")
    assert "use a file that ends in .safetensors" in one_error(found, 2)
    assert not (tmp_path / "e.pt2").exists()


@pytest.mark.parametrize("done", ["float32"], indirect=True)
def test_what_cannot_be_exported_is_said(done: Path, tmp_path: Path) -> None:
    out = done.parent / "out"
    message = one_error(gim_stage("export", done, "--to", "x.onnx", "--dir", out), 2)
    assert "--to: is x.onnx, expected a file that ends in .safetensors or .pt2" in message
    for taken in ("m1.safetensors", "m2.zarr/e.pt2"):
        before = (out / "m1.safetensors").read_bytes()
        found = gim_stage("export", done, "--to", out / taken, "--dir", out)
        assert "where a run has its own weights or a cache" in one_error(found, 2)
        assert (out / "m1.safetensors").read_bytes() == before
    target = tmp_path / "e.safetensors"
    found = gim_stage("export", done, "--to", target, "--dir", tmp_path / "none")
    assert "no frozen modules" in one_error(found, 2)
    changed = tmp_path / "changed.toml"
    changed.write_text(done.read_text().replace("lr = 3e-3", "lr = 1e-3"))
    message = one_error(gim_stage("export", changed, "--to", target, "--dir", out), 2)
    assert "m1.safetensors is stale: module.1.train.lr 0.003 → 0.001" in message
    more = tmp_path / "more.toml"
    more.write_text(
        f'{done.read_text()}\n[module.4]\nbuild = "residual"\noptions = {{ channels = 5 }}\n'
    )
    message = one_error(gim_stage("export", more, "--to", target, "--dir", out), 2)
    assert "module 4 of 4 is not trained yet" in message
    assert not target.exists()


@pytest.mark.parametrize("done", ["float32"], indirect=True)
def test_modules_that_are_no_more_in_the_file_are_left_out(done: Path, tmp_path: Path) -> None:
    fewer, out = tmp_path / "fewer.toml", done.parent / "out"
    fewer.write_text(done.read_text().partition("[module.3]")[0])
    found = gim_stage("export", fewer, "--to", tmp_path / "e.safetensors", "--dir", out)
    assert found.returncode == 0, found.stderr
    rows = torch.randn(5, 1, 4, 4)
    expected = list(load_encoder(out))[:2]
    for encoder in (load_encoder(tmp_path / "e.safetensors"), load_encoder(out, pipeline=fewer)):
        assert len(list(encoder)) == 2
        torch.testing.assert_close(encoder(rows), expected[1](expected[0](rows)), rtol=0, atol=0)


@pytest.mark.parametrize("done", ["float32"], indirect=True)
def test_an_exported_file_is_not_cut_to_a_shorter_pipeline(done: Path, tmp_path: Path) -> None:
    target = tmp_path / "encoder.safetensors"
    assert gim_stage("export", done, "--to", target, "--dir", done.parent / "out").returncode == 0
    shorter = tmp_path / "shorter.toml"
    shorter.write_text(done.read_text().partition("[module.3]")[0])
    with pytest.raises(StaleCacheError, match="has 3 modules, and the pipeline file 2"):
        load_encoder(target, pipeline=shorter)
    assert len(load_encoder(done.parent / "out", pipeline=shorter)) == 2


def test_files_that_are_no_encoder_are_refused(done: Path, tmp_path: Path) -> None:
    out = done.parent / "out"
    with pytest.raises(ConfigError, match=f"of module 2 alone; give the run's folder {out}, or"):
        load_encoder(out / "m2.safetensors")
    save_file({"x": torch.zeros(2)}, tmp_path / "other.safetensors")
    with pytest.raises(CorruptCacheError, match="no encoder that `gim-stage export` wrote"):
        load_encoder(tmp_path / "other.safetensors")
    (tmp_path / "e.safetensors").write_bytes(b"nothing")
    with pytest.raises(CorruptCacheError, match="damaged"):
        load_encoder(tmp_path / "e.safetensors")


def test_modules_of_ones_own_need_the_pipeline_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "traced_nets.py").write_text(LOOKS_AT_VALUES)
    text = tiny.read_text().partition("[module.1]")[0]
    tiny.write_text(f'{text}[module.1]\nbuild = "traced_nets:Own"\n')
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run(workers=Workers(0))
    target = tmp_path / "e.safetensors"
    found = gim_stage("export", tiny, "--to", target, "--dir", tmp_path / "out")
    assert found.returncode == 0, found.stderr
    with pytest.raises(ConfigError, match="never imported on the word"):
        load_encoder(target)
    assert load_encoder(target, pipeline=tiny)(torch.zeros(2, 1, 4, 4)).shape == (2, 4, 4, 4)
    # Its forward looks at values, which no program can be made of.
    found = gim_stage("export", tiny, "--to", tmp_path / "e.pt2", "--dir", tmp_path / "out")
    assert "cannot be made" in one_error(found, 2)
    assert not (tmp_path / "e.pt2").exists()
