"""Pipelines over items of any size: the same results as if items were read whole."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import torch
from helpers import assert_same_files, assert_same_run, edit, one_error, results_of, run_and_record
from killing import run_warm
from numpy.typing import NDArray
from warm import gim_stage

from gim_stagewise.cache import TiledCache, find_damage
from gim_stagewise.clean import removable
from gim_stagewise.config import Mode, parse_pipeline
from gim_stagewise.errors import ConfigError, OverBudgetError
from gim_stagewise.memory import Budget
from gim_stagewise.models import CellMean
from gim_stagewise.models.residual import residual_module
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.plan import plan_pipeline
from gim_stagewise.progress import Silent
from gim_stagewise.report.plans import plan_report
from gim_stagewise.sources import Request
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.encoder import load_encoder
from gim_stagewise.stage.extraction_plan import Workers, plan_extraction
from gim_stagewise.stage.fit import smallest_training
from gim_stagewise.stage.left_out import leave_out
from gim_stagewise.stage.needs import chain_needs
from gim_stagewise.stage.tiling import chosen_tile
from gim_stagewise.verify import mend
from gim_stagewise.windows import Geometry, Region, Span, halo_overhead

LARGE = """
name = "large"
seed = 5
encoding = "dense"

[source]
kind = "large"
root = "{root}"
splits.unlabeled = {{ files = "*.*" }}

[augment]
mean = [0.5]
std = [0.25]

[windows]
tile = 12
samples = 24
zones = 3

[objective]
prediction_steps = 2
negatives = 4
pool = 2

[train]
batch = 6
window = 16
max_epochs = 2
validation = 0.2
checkpoint_every = 1

[cache]
precision = "float32"
stored_operation = "none"

[module.1]
build = "residual"
options = {{ stem = 4, channels = 6, blocks = 2, stride = 2 }}

[module.2]
build = "residual"
options = {{ channels = 5, blocks = 1, stride = 2 }}
train.window = 12
objective.pool = 1
"""
# Neither is a multiple of any tile or stride.
SIZES = {"a.npy": (131, 90), "b.tif": (97, 163)}


def image(shape: tuple[int, ...], seed: int) -> NDArray[np.uint8]:
    """Waves with noise: neighbours are alike."""
    rows, columns = np.indices(shape)
    draw = np.random.default_rng(seed)
    waves = np.sin(rows / (5 + seed)) + np.cos(columns / 7 + seed)
    values: NDArray[np.uint8] = ((waves + 2) * 50 + draw.random(shape) * 40).astype(np.uint8)
    return values


def write_large(folder: Path) -> Path:
    """A pipeline file over two images of different sizes, and these beside it."""
    data = folder / "images"
    data.mkdir(parents=True)
    for seed, (name, shape) in enumerate(SIZES.items()):
        if name.endswith(".npy"):
            np.save(data / name, image(shape, seed))
        else:
            tifffile.imwrite(data / name, image(shape, seed), tile=(32, 32))
    file = folder / "large.toml"
    file.write_text(LARGE.format(root=data))
    return file


def as_patches(file: Path) -> Path:
    """The same pipeline with a grid of patches."""
    edit(file, 'encoding = "dense"', 'encoding = "patch"\npatches = { size = 8, stride = 5 }')
    edit(file, "\npool = 2\n", "\n")
    edit(file, "train.window = 12\nobjective.pool = 1\n", "")
    edit(file, "zones = 3", "zones = 2")
    edit(file, "window = 16", "window = 5")
    edit(file, "tile = 12", "tile = 7")
    return file


@pytest.fixture
def large(tmp_path: Path) -> Path:
    return write_large(tmp_path)


@pytest.fixture(scope="module", params=["dense", "patch"])
def done(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a finished run; its folder is ``out`` beside it."""
    file = write_large(tmp_path_factory.mktemp(request.param))
    if request.param == "patch":
        as_patches(file)
    run_and_record(file, file.parent / "out")
    return file


def whole(file: Path, name: str) -> torch.Tensor:
    """An image as module 1 sees it, read whole: [1, channel, height, width]."""
    source = Pipeline.from_file(file).source
    return torch.from_numpy(source.read([Request(f"unlabeled/{name}")])[0])[None]


def test_tiles_together_are_the_outputs_of_the_whole_image(done: Path) -> None:
    encoder = load_encoder(done.parent / "out")
    dense = "dense" in done.read_text()
    for name in SIZES:
        z = whole(done, name)
        grid = () if dense else z.shape[1:3]
        z = z if dense else z.flatten(0, 2)
        for index, module in enumerate(encoder, start=1):
            with torch.no_grad():
                z = module(z)
            cache = TiledCache(done.parent / "out" / f"m{index}.zarr")
            assert cache.layout.block_count > 15
            (stored,) = cache.read([Request(f"unlabeled/{name}")])
            pooled = cache.read_pooled(f"unlabeled/{name}")
            if dense:
                expected, means = z[0], CellMean(3 - index)(z)[0]
            else:
                expected, means = z.unflatten(0, grid), z.mean((2, 3)).unflatten(0, grid)
            assert stored.shape == expected.shape
            scale = float(expected.abs().max())
            np.testing.assert_allclose(stored, expected.numpy(), atol=1e-5 * scale)
            np.testing.assert_allclose(pooled, means.numpy(), atol=1e-5 * scale)


def test_no_pixel_is_left_out(done: Path) -> None:
    """The remainder at the right and bottom has outputs as well."""
    cache = TiledCache(done.parent / "out" / "m1.zarr")
    for name, shape in SIZES.items():
        extent = cache.layout.extent(f"unlabeled/{name}")
        if cache.layout.dense:
            assert extent == tuple(-(-length // 2) for length in shape)
        else:
            # The last patch begins at a multiple of the stride, and reaches the end or beyond.
            assert all((n - 1) * 5 + 8 >= length for n, length in zip(extent, shape, strict=True))
            assert all((n - 2) * 5 + 8 < length for n, length in zip(extent, shape, strict=True))


def test_a_run_again_has_nothing_to_do(done: Path) -> None:
    result = Pipeline.from_file(done, folder=done.parent / "out").run(workers=Workers(0))
    assert [(stage.trained, stage.extracted) for stage in result.stages] == [(False, False)] * 2


@pytest.mark.parametrize(
    "done", ["dense", pytest.param("patch", marks=pytest.mark.slow)], indirect=True
)
def test_workers_give_the_same_bytes(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    Pipeline.from_file(done, folder=folder, device="cpu").run(workers=Workers(2))
    assert_same_files(folder, done.parent / "out")


@pytest.mark.parametrize("share", [0.2, pytest.param(0.55, marks=pytest.mark.slow), 0.9])
def test_a_killed_run_goes_on_to_the_same_bytes(done: Path, tmp_path: Path, share: float) -> None:
    log = done.parent / "log"
    if not log.exists():
        assert run_warm(done, done.parent / "logged", log=str(log)) == 0
    points = len(log.read_text().splitlines())
    assert run_warm(done, tmp_path / "out", kill_at=int(share * points)) == -9
    assert run_warm(done, tmp_path / "out") == 0
    assert_same_files(tmp_path / "out", done.parent / "out")
    assert results_of(tmp_path / "out") == results_of(done.parent / "out")


def test_a_damaged_tile_is_found_and_computed_again(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run_and_record(done, folder)
    chunk = sorted(folder.glob("m2.zarr/activations/*/c.*"))[5]
    content = bytearray(chunk.read_bytes())
    content[len(content) // 2] ^= 4
    chunk.write_bytes(content)
    damage = find_damage(folder / "m2.zarr", Silent())
    assert [one.file for one in damage] == [chunk.relative_to(folder / "m2.zarr").as_posix()]
    mend(Pipeline.from_file(done, folder=folder), folder / "m2.zarr", damage)
    assert_same_files(folder, done.parent / "out")


def test_module_2_is_trained_from_the_cache_alone(done: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    cache = tmp_path / "elsewhere" / "m1.zarr"
    (done.parent / "out" / "m1.zarr").rename(cache)
    try:
        found = gim_stage("train", "--module", "2", "--input", cache)
        assert found.returncode == 0, found.stderr
        trained = FrozenWeights.load(tmp_path / "elsewhere" / "m2.safetensors")
        expected = FrozenWeights.load(done.parent / "out" / "m2.safetensors")
        assert trained.digest == expected.digest
    finally:
        cache.rename(done.parent / "out" / "m1.zarr")


def test_the_file_decides(done: Path, tmp_path: Path) -> None:
    """What is changed names what becomes stale."""
    folder = done.parent / "out"
    file = tmp_path / "changed.toml"
    for old, new, reasons in (
        ("tile = 12", "tile = 10", {1: "", 2: "windows.tile"}),
        ("tile = 7", "tile = 6", {1: "", 2: "windows.tile"}),
        ("samples = 24", "samples = 30", {1: "windows.samples"}),
        ("window = 16", "window = 20", {1: "train.window"}),
        ("pool = 2", "pool = 1", {1: "objective.pool"}),
    ):
        if old not in done.read_text():
            continue
        file.write_text(done.read_text().replace(old, new))
        pipeline = Pipeline.from_file(file, folder=folder)
        _, why = pipeline.stage(1).current_weights()
        assert reasons[1] in why, (new, why)
        assert bool(reasons[1]) == bool(why)
        with pytest.raises(Exception, match=re.escape(reasons.get(2, reasons[1]))):
            pipeline.stage(2)


# What pipelines of this kind need, and cannot have


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('encoding = "dense"\n', "", "patches: missing"),
        ('encoding = "dense"', 'encoding = "dense"\npatches = {size = 8, stride = 4}', "patches:"),
        ('kind = "large"', 'kind = "npy"', 'encoding: is "dense"'),
        ("window = 16\n", "", "module.1.train.window: missing"),
        ('precision = "float32"', 'materialize = "never"', "module.1.cache.materialize"),
        ('precision = "float32"', "chunk = 3", "module.1.cache.chunk"),
        ("mean = [0.5]", "mean = [0.5]\nflip = 0.5", "augment.flip"),
        ("[windows]", "[extract]\nbatch = 4\n[windows]", "extract.batch"),
        ("tile = 12", "tile = 0", "windows.tile"),
        ("zones = 3", "zones = 0", "windows.zones"),
    ],
)
def test_what_cannot_be_meant_is_refused(old: str, new: str, said: str) -> None:
    text = LARGE.format(root="x")
    assert old in text
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_pipeline(text.replace(old, new), file="x.toml")


def test_windows_are_for_large_items_alone(tiny: Path) -> None:
    for old, new, key in (
        ("[objective]", "[windows]\nzones = 2\n\n[objective]", "windows"),
        ("batch = 8", "batch = 8\nwindow = 3", r"module\.1\.train\.window"),
        ("negatives = 4", "negatives = 4\npool = 3", r"module\.1\.objective\.pool"),
    ):
        assert old in tiny.read_text()
        with pytest.raises(ConfigError, match=f"{key}: has no meaning"):
            parse_pipeline(tiny.read_text().replace(old, new), file="x.toml")


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("window = 16", "window = 50", "no zone that is held out"),
        ("window = 16", "window = 100", "smaller than a window of module 1"),
        (
            "tile = 12",
            "tile = 13",
            "no multiple of the 2 positions that share an embedding of module 1",
        ),
        ("prediction_steps = 2", "prediction_steps = 4", "a larger train.window"),
        ("samples = 24", "samples = 6", "samples are left to train on"),
        ("pool = 2", "pool = 20", "module.1.objective.prediction_steps"),
    ],
)
def test_what_does_not_fit_is_refused_before_work(
    large: Path, tmp_path: Path, old: str, new: str, said: str
) -> None:
    edit(large, old, new)
    found = gim_stage("run", large, "--dir", tmp_path / "out")
    assert said in one_error(found, 2)
    assert not (tmp_path / "out").exists()


def test_the_plan_says_how_windows_are_read(large: Path) -> None:
    edit(large, "tile = 12", 'tile = "auto"')
    stages = plan_pipeline(Pipeline.from_file(large)).stages
    first, second = (stage.windows for stage in stages)
    assert first is not None
    assert second is not None
    assert first.pixels == (16, 16)
    # stem 3×3, four 3×3 of which the first has stride 2: 12 outputs see 11 · 2 + 17 pixels.
    assert second.pixels == (39, 39)
    assert first.halo <= 1.15
    assert second.halo <= 1.15


# What there is at a place of many channels in float32, with so large a halo, takes more than a tile
# may have; the last one has a byte a channel.
@pytest.mark.parametrize(
    ("channels", "blocks", "place_bytes"), [(6, 1, 24), (256, 4, 1024), (512, 4, 512)]
)
def test_a_large_halo_gets_a_larger_tile(channels: int, blocks: int, place_bytes: int) -> None:
    module = residual_module(4, channels=channels, blocks=blocks)
    geometry = (Geometry.of_chain(module.geometry),) * 2
    side = chosen_tile(geometry, axes=2, place_bytes=place_bytes, pool=8)
    assert side % 8 == 0
    assert halo_overhead(geometry, (side, side)) <= 1.15


def test_a_plan_looks_at_regions_that_the_whole_chain_can_take(large: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images" / "a.npy", image((1500, 1500), 0))
    (tmp_path / "images" / "b.tif").unlink()
    (tmp_path / "wide_nets.py").write_text(WIDE)
    text = large.read_text().partition("[module.1]")[0].replace("pool = 2", "pool = 1")
    modules = [
        f'[module.{n}]\nbuild = "wide_nets:wide"\noptions = {{ stride = {stride} }}\n'
        f"train.window = {window}\n"
        for n, stride, window in ((1, 8, 80), (2, 1, 45))
    ]
    large.write_text(text.replace("window = 16\n", "") + "".join(modules))
    assert len(plan_pipeline(Pipeline.from_file(large)).stages) == 2


WIDE = """
from torch import nn

def wide(in_channels, stride):
    return nn.Conv2d(in_channels, 3, 31, stride=stride)
"""


def test_an_extraction_over_the_budget_names_the_tile(large: Path) -> None:
    np.save(large.parent / "images" / "c.npy", image((900, 900), 7))
    edit(large, "tile = 12", "tile = 400")
    edit(large, "window = 16", "window = 16\nmicro_batch = 1")
    pipeline = Pipeline.from_file(large)
    needs = chain_needs(pipeline.workspace, pipeline.source, pipeline.check())[0]
    training = smallest_training(needs).device
    assert training is not None
    with pytest.raises(OverBudgetError, match=r"for extraction.*smaller tiles \(windows\.tile\)"):
        plan_extraction(needs, budget=Budget(device=training))


def test_windows_that_show_no_more_than_those_below_are_said(large: Path) -> None:
    assert not [
        part
        for part in plan_report(plan_pipeline(Pipeline.from_file(large)))
        if "no more" in str(part)
    ]
    edit(large, "window = 16", "window = 39")
    edit(large, "zones = 3", "zones = 2")
    said = [str(part) for part in plan_report(plan_pipeline(Pipeline.from_file(large)))]
    assert "windows of module 2 show no more of an item" in " ".join(said)


def test_a_window_beyond_all_items_is_not_tried_out(large: Path, tmp_path: Path) -> None:
    edit(large, "window = 16", "window = 1000000")
    found = gim_stage("plan", large)
    assert "smaller than a window of module 1" in one_error(found, 2)


def test_items_to_train_on_are_asked_for(large: Path) -> None:
    edit(large, "splits.unlabeled", "splits.test")
    assert "nothing to train on" in one_error(gim_stage("plan", large), 2)


# Activations that were removed


def test_what_needs_removed_activations_is_refused_and_nothing_is_lost(
    large: Path, tmp_path: Path
) -> None:
    edit(large, "seed = 5", 'seed = 5\nkeep = "last"')
    folder = tmp_path / "out"
    run_and_record(large, folder)
    assert not TiledCache(folder / "m1.zarr").materialized
    found = gim_stage("run", large, "--dir", folder)
    assert found.stderr.count("nothing to do") == 2
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("c.*")}
    again = ("run", large, "--dir", folder, "--from", "2")
    force = ("extract", "--module", "2", "--input", folder / "m1.zarr", "--force")
    for command in (again, force):
        assert "--from 1" in one_error(gim_stage(*command), 2)
        assert {file: file.stat().st_mtime_ns for file in folder.rglob("c.*")} == before
    chunk = next(iter(folder.glob("m2.zarr/activations/*/c.*")))
    chunk.unlink()
    mending: list[tuple[str | Path, ...]]
    mending = [("run", large, "--dir", folder), ("verify", folder, "--repair")]
    for other in mending:
        found = gim_stage(*other)
        assert found.returncode in (2, 4)
        assert "--from 1" in found.stderr
        assert "Traceback" not in found.stderr


# Modules whose outputs depend on more than a window


NETS = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self, in_channels, kind):
        super().__init__()
        self.kind = kind
        mode = "circular" if kind == "circular" else "zeros"
        side = 5 if kind == "declared" else 3
        places = kind == "position"
        self.conv = nn.Conv2d(in_channels + places, 4, side, padding=side // 2, padding_mode=mode)
        if kind in ("declared", "circular"):
            self.geometry = [(3, 1, 1)]

    def forward(self, x):
        if self.kind == "position":
            rows = torch.linspace(-1, 1, x.shape[2])[:, None].expand(x.shape[2:])
            x = torch.cat([x, rows.expand(len(x), 1, *rows.shape)], dim=1)
        if self.kind == "even":
            x = nn.functional.pixel_unshuffle(x, 2)[:, :1]
        z = self.conv(x)
        if self.kind == "share":
            z = z * (1 + (x > 0).float().mean((1, 2, 3), keepdim=True))
        return z
"""


@pytest.mark.parametrize("kind", ["declared", "circular", "position", "share", "even", "plain"])
def test_modules_that_see_more_than_a_window_are_refused(
    large: Path, tmp_path: Path, kind: str
) -> None:
    (tmp_path / "own_nets.py").write_text(NETS)
    text = large.read_text().partition("[module.1]")[0]
    large.write_text(f'{text}[module.1]\nbuild = "own_nets:Own"\noptions = {{ kind = "{kind}" }}\n')
    found = gim_stage("plan", large)
    if kind == "plain":
        assert found.returncode == 0, found.stderr
        return
    assert "module.1: " in one_error(found, 2)


# Items that cannot be used


def broken_tiff(path: Path) -> None:
    tifffile.imwrite(path, image((128, 128), 3), tile=(32, 32), compression="zlib")
    content = bytearray(path.read_bytes())
    with tifffile.TiffFile(path) as opened:
        page: Any = opened.pages[0]
        start = page.dataoffsets[7]
    content[start : start + 8] = b"\xff" * 8
    path.write_bytes(content)


def truncated_tiff(path: Path) -> None:
    tifffile.imwrite(path, image((128, 128), 3), tile=(32, 32))
    path.write_bytes(path.read_bytes()[:9000])


def save_npy(values: NDArray[Any]) -> Callable[[Path], None]:
    return lambda path: np.save(path.with_suffix(".npy"), values)


NAN = np.where(np.indices((128, 128)).sum(0) == 99, np.nan, 0.5).astype(np.float32)
BROKEN: dict[str, Callable[[Path], None]] = {
    "c.tif": broken_tiff,
    "d.tif": truncated_tiff,
    "nan.npy": save_npy(NAN),
    "three.npy": save_npy(np.zeros((3, 128, 128), np.uint8)),
    "small.npy": save_npy(image((20, 9), 0)),
}


@pytest.mark.parametrize("name", BROKEN)
def test_an_item_that_cannot_be_used_is_named(large: Path, tmp_path: Path, name: str) -> None:
    BROKEN[name](tmp_path / "images" / name)
    found = gim_stage("run", large, "--dir", tmp_path / "out")
    assert f"unlabeled/{name}" in one_error(found, 2)
    edit(large, 'kind = "large"', 'kind = "large"\non_error = "skip"')
    found = gim_stage("run", large, "--dir", tmp_path / "out", "--json")
    assert found.returncode == 0, found.stderr
    assert list(json.loads(found.stdout)["skipped"]) == [f"unlabeled/{name}"]
    assert f"left out: sample unlabeled/{name}" in found.stderr
    assert list(TiledCache(tmp_path / "out" / "m2.zarr").ids) == [
        "unlabeled/a.npy",
        "unlabeled/b.tif",
    ]


@pytest.mark.parametrize("on_error", ["stop", "skip"])
def test_a_file_that_disappears_during_the_run(large: Path, tmp_path: Path, on_error: str) -> None:
    edit(large, 'kind = "large"', f'kind = "large"\non_error = "{on_error}"')
    np.save(tmp_path / "images" / "gone.npy", image((120, 120), 4))
    gone = tmp_path / "images" / "gone.npy"

    def remove(module: int, step: int) -> None:
        if (module, step) == (1, 2) and gone.exists():
            # As on a disk that is taken away: what is open cannot be read any more, either.
            content = gone.read_bytes()
            gone.write_bytes(content[:200])
            gone.unlink()

    pipeline = Pipeline.from_file(large, folder=tmp_path / "out", device="cpu", on_step=remove)
    if on_error == "stop":
        with pytest.raises(Exception, match=r"unlabeled/gone\.npy"):
            pipeline.run(workers=Workers(0))
        return
    result = pipeline.run(workers=Workers(0))
    assert list(result.skipped) == ["unlabeled/gone.npy"]
    without = tmp_path / "without"
    Pipeline.from_file(large, folder=without, device="cpu").run(workers=Workers(0))
    assert_same_files(tmp_path / "out", without)


def test_a_tile_that_turns_out_corrupt_during_the_run(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where only samples of the data were looked at beforehand."""
    monkeypatch.setattr("gim_stagewise.sources.large._SIDE", 16)
    edit(large, 'kind = "large"', 'kind = "large"\non_error = "skip"\ndigest = "sampled"')
    broken_tiff(tmp_path / "images" / "c.tif")
    pipeline = Pipeline.from_file(large, folder=tmp_path / "out", device="cpu")
    assert not pipeline.skipped
    result = pipeline.run(workers=Workers(0))
    assert list(result.skipped) == ["unlabeled/c.tif"]
    # Later runs know it, though nothing they look at beforehand says so.
    later = Pipeline.from_file(large, folder=tmp_path / "out", device="cpu")
    assert list(later.skipped) == ["unlabeled/c.tif"]
    assert removable(later) == []
    again = later.run(workers=Workers(0))
    assert not any(stage.trained or stage.extracted for stage in again.stages)
    elsewhere = Pipeline.from_file(large, folder=tmp_path / "elsewhere", device="cpu")
    elsewhere.stage(2, tmp_path / "out" / "m1.zarr")
    all_again = Pipeline.from_file(large, folder=tmp_path / "out", device="cpu")
    anew = all_again.run(start=1, workers=Workers(0))
    assert list(anew.skipped) == ["unlabeled/c.tif"]
    assert all(stage.trained and stage.extracted for stage in anew.stages)
    shutil.copy(tmp_path / "images" / "b.tif", tmp_path / "images" / "c.tif")
    mended = Pipeline.from_file(large, folder=tmp_path / "out", device="cpu")
    assert not mended.skipped
    (tmp_path / "images" / "c.tif").unlink()
    without = tmp_path / "without"
    Pipeline.from_file(large, folder=without, device="cpu").run(workers=Workers(0))
    assert_same_run(tmp_path / "out", without)


def test_what_was_left_out_is_tried_again_with_module_1(
    large: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gim_stagewise.sources.large._SIDE", 16)
    edit(large, 'kind = "large"', 'kind = "large"\non_error = "skip"\ndigest = "sampled"')
    pipeline = Pipeline.from_file(large, folder=tmp_path / "out", device="cpu")
    leave_out(tmp_path / "out", pipeline.source, "unlabeled/a.npy", "a disk was away")
    pipeline = Pipeline.from_file(large, folder=tmp_path / "out", device="cpu")
    assert pipeline.skipped == {"unlabeled/a.npy": "a disk was away"}
    small = Budget(host=1_000_000)
    refused = Pipeline.from_file(large, folder=tmp_path / "out", device="cpu", budget=small)
    with pytest.raises(OverBudgetError):
        refused.run(start=1, until=1, workers=Workers(0))
    pipeline = Pipeline.from_file(large, folder=tmp_path / "out", device="cpu")
    assert pipeline.skipped == {"unlabeled/a.npy": "a disk was away"}
    assert not pipeline.run(start=1, until=1, workers=Workers(0)).skipped
    assert not Pipeline.from_file(large, folder=tmp_path / "out", device="cpu").skipped


# Where windows lie


def places(file: Path, index: int, *, epochs: int = 40) -> tuple[list[Request], list[Request]]:
    """Windows that a module is trained on, and those that it is judged on."""
    windows: Any = Pipeline.from_file(file, folder=file.parent / "out").stage(index).samples
    held = windows.held_out
    training: list[Request] = []
    validation: list[Request] = []
    for item_id in windows.ids:
        for view in range(1, epochs):
            target = validation if item_id in held else training
            target.append(windows.place(Request(item_id, view)))
    return training, validation


def overlap(one: Region, other: Region) -> bool:
    return all(a.start < b.stop and b.start < a.stop for a, b in zip(one, other, strict=True))


def test_validation_windows_share_nothing_with_training_windows(done: Path) -> None:
    for index in (1, 2):
        training, validation = places(done, index, epochs=12)
        for held in validation:
            assert held.region is not None
            for own in training:
                assert own.region is not None
                assert own.id != held.id or not overlap(own.region, held.region)


def test_what_is_held_out_is_the_same_in_every_stage(done: Path) -> None:
    found = []
    for index in (1, 2):
        stage = Pipeline.from_file(done, folder=done.parent / "out").stage(index)
        windows: Any = stage.samples
        found.append(windows.zones.held_out)
    assert found[0] == found[1]


def test_items_count_by_their_area(large: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "images" / "c.npy", image((400, 300), 9))
    training, _ = places(large, 1, epochs=60)
    share = np.mean([request.id == "unlabeled/c.npy" for request in training])
    areas = {name: h * w for name, (h, w) in {**SIZES, "c.npy": (400, 300)}.items()}
    assert abs(share - areas["c.npy"] / sum(areas.values())) < 0.08


def test_windows_are_somewhere_else_in_every_view_and_reproducible(large: Path) -> None:
    once, again = places(large, 1, epochs=5), places(large, 1, epochs=5)
    assert once == again
    assert len({(r.id, r.region) for r in once[0]}) > 0.9 * len(once[0])


def test_all_places_are_reached(large: Path) -> None:
    """Places of windows spread evenly over what is not held out."""
    training, _ = places(large, 1, epochs=200)
    rows = [r.region[0].start for r in training if r.region and r.id == "unlabeled/a.npy"]
    counts, _ = np.histogram(rows, bins=5, range=(0, 131 - 16 + 1))
    assert counts.min() > 0
    assert min(rows) <= 2
    assert max(rows) >= 131 - 16 - 2


def test_blank_windows_are_drawn_again(large: Path, tmp_path: Path) -> None:
    blank = image((400, 400), 1)
    blank[:, 100:] = 7
    np.save(tmp_path / "images" / "blank.npy", blank)

    def blank_share() -> float:
        windows: Any = Pipeline.from_file(large).stage(1).samples
        values = windows.read([Request(item_id, 1) for item_id in windows.ids])
        return float(np.mean([v.std() < 1e-5 for v in values]))

    edit(large, "samples = 24", "samples = 120")
    before = blank_share()
    edit(large, "samples = 120", "samples = 120\nmin_variance = 0.3")
    assert before > 0.4
    assert blank_share() < 0.05


def test_span_of_a_window_is_what_was_asked_for(large: Path) -> None:
    training, validation = places(large, 1, epochs=3)
    for request in training + validation:
        assert request.region is not None
        assert [len(span) for span in request.region] == [16, 16]
        assert all(isinstance(span, Span) for span in request.region)


@pytest.mark.parametrize("mode", ["supervised", "greedy_supervised"])
def test_supervised_modes_say_that_large_items_have_no_labels(large: Path, mode: Mode) -> None:
    with pytest.raises(ConfigError, match="no training sample has one") as caught:
        Pipeline.from_file(large, device="cpu", mode=mode).run()
    assert caught.value.key == "mode"
