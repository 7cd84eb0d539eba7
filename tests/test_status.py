"""Status, inspect, clean and plot tell the truth and touch nothing else."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from helpers import StopError, edit

import gim_stagewise.stage.extract as extract_room
from gim_stagewise import Pipeline
from gim_stagewise.clean import Removable, removable, remove
from gim_stagewise.errors import CacheNotFoundError, ConfigError
from gim_stagewise.lock import exclusive
from gim_stagewise.report import curves
from gim_stagewise.report.curves import matplotlib_figure, plot_curves
from gim_stagewise.report.inspect import inspect_cache
from gim_stagewise.report.record import save_record
from gim_stagewise.stage.metrics import read_metrics
from gim_stagewise.stage.storing import compute_block
from gim_stagewise.status import pipeline_status


def open_pipeline(file: Path, folder: Path) -> Pipeline:
    return Pipeline.from_file(file, folder=folder, device="cpu")


def states(file: Path, folder: Path) -> list[tuple[str, str]]:
    found = pipeline_status(open_pipeline(file, folder))
    return [(stage.state, stage.why) for stage in found]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, new_tiny: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("made")
    open_pipeline(new_tiny(folder), folder / "out").run()
    return folder / "out"


@pytest.fixture
def done(made: Path, tmp_path: Path) -> Path:
    """A finished run of this test's own."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def listing(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in sorted(folder.rglob("*"))}


def stop_at_7(module: int, step: int) -> None:
    if step == 7:
        raise StopError


def test_each_state_is_named_on_the_way(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    waits = [("missing", f"waits for module {below}, which is missing") for below in (1, 2)]
    assert states(tiny, out) == [("missing", ""), *waits]

    with pytest.raises(StopError):
        Pipeline.from_file(tiny, folder=out, device="cpu", on_step=stop_at_7).run()
    assert states(tiny, out)[0] == ("training", "epoch 2 of at most 3")

    stage = open_pipeline(tiny, out).stage(1)
    weights, _ = stage.train()
    assert states(tiny, out)[0] == ("frozen", "its cache is not there yet")

    blocks = iter(range(3))
    compute = compute_block

    def fails_later(*arguments: object) -> object:
        if next(blocks, None) is None:
            raise StopError
        return compute(*arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(extract_room, "compute_block", fails_later)
        with pytest.raises(StopError):
            stage.extract(weights)
    status = pipeline_status(open_pipeline(tiny, out))[0]
    assert (status.state, status.why, status.done) == ("partial", "3 of 8 blocks", 3 / 8)

    open_pipeline(tiny, out).run()
    assert states(tiny, out) == [("sealed", "")] * 3


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            lambda file, out: edit(file, "lr = 3e-3", "lr = 1e-3"),
            [
                ("stale", "module.1.train.lr 0.003 → 0.001"),
                ("stale", None),
                ("stale", None),
            ],
        ),
        (
            lambda file, out: edit(file, "channels = 5 }", "channels = 6 }"),
            [("sealed", ""), ("sealed", ""), ("stale", "module.3.options.channels 5 → 6")],
        ),
        (
            lambda file, out: edit(file, "[cache]\nchunk = 7", "[cache]\nchunk = 8"),
            [("stale", "module.1.cache.chunk 7 → 8"), ("stale", None), ("stale", None)],
        ),
        (
            lambda file, out: (out / "m2.zarr" / "zarr.json").write_text("{"),
            [
                ("sealed", ""),
                ("corrupt", None),
                ("waiting", "waits for module 2, which is corrupt"),
            ],
        ),
        (
            lambda file, out: (out / "m3.safetensors").write_bytes(b"nothing"),
            [("sealed", ""), ("sealed", ""), ("corrupt", None)],
        ),
    ],
)
def test_what_is_stale_or_damaged_says_why(
    tiny: Path, done: Path, change: Callable[[Path, Path], object], expected: list[object]
) -> None:
    change(tiny, done)
    before = listing(done)
    for found, wanted in zip(states(tiny, done), expected, strict=True):
        if isinstance(wanted, tuple):
            assert found[0] == wanted[0]
            assert wanted[1] is None or found[1] == wanted[1]
    assert listing(done) == before
    # And `run` agrees with what was said.
    open_pipeline(tiny, done).run()
    assert states(tiny, done) == [("sealed", "")] * 3


def test_what_a_stale_cache_was_made_of_stays(tiny: Path, done: Path) -> None:
    """A cache that is stored in another way is built again, of the same weights."""
    edit(tiny, "chunk = 7", 'chunk = 7\ncodec = "zstd"')
    found = pipeline_status(open_pipeline(tiny, done))
    assert [(status.state, status.made_again) for status in found] == [("stale", "cache")] * 3
    assert all(status.record is not None for status in found)
    listed = removable(open_pipeline(tiny, done))
    assert [thing.path.name for thing in listed] == ["m1.zarr", "m2.zarr", "m3.zarr"]
    for thing in listed:
        remove(thing)
    assert not any(stage.trained for stage in open_pipeline(tiny, done).run().stages)


def test_what_run_would_not_touch_is_not_removed(tiny: Path, done: Path) -> None:
    zarr.create_group(done / "m9.zarr").attrs["mine"] = 1
    text = (done / "m3.zarr" / "zarr.json").read_text()
    newer = text.replace('"format_version": 1', '"format_version": 99')
    assert newer != text
    (done / "m3.zarr" / "zarr.json").write_text(newer)
    assert removable(open_pipeline(tiny, done)) == []


def test_hidden_files_of_the_user_stay(tiny: Path, done: Path) -> None:
    theirs = [".notes.tmp", "checkpoints/.draft.tmp", ".work.trash-me", ".m1.zarr.trash-old"]
    (done / "checkpoints").mkdir(exist_ok=True)
    for name in theirs:
        (done / name).write_text("mine")
    ours = done / ".m1.zarr.repair-00c0ffee"
    ours.mkdir()
    assert [thing.path for thing in removable(open_pipeline(tiny, done))] == [ours]
    open_pipeline(tiny, done).run(start=3)
    assert not ours.exists()
    assert all((done / name).read_text() == "mine" for name in theirs)


def test_clean_removes_what_it_listed_and_nothing_else(tiny: Path, done: Path) -> None:
    assert removable(open_pipeline(tiny, done)) == []
    (done / ".m1.zarr.trash-12345678").mkdir()
    (done / ".m2.safetensors.ab12cd34.tmp").write_bytes(b"torn")
    (done / "checkpoints").mkdir(exist_ok=True)
    (done / "checkpoints" / "m1.pt").write_bytes(b"old")
    (done / "m9.safetensors").write_bytes(b"of an older file")
    (done / "notes.txt").write_text("mine")
    edit(tiny, "channels = 5 }", "channels = 6 }")
    listed = removable(open_pipeline(tiny, done))
    names = sorted(str(thing.path.relative_to(done)) for thing in listed)
    assert names == [
        ".m1.zarr.trash-12345678",
        ".m2.safetensors.ab12cd34.tmp",
        "checkpoints/m1.pt",
        "m3.safetensors",
        "m3.zarr",
        "m9.safetensors",
    ]
    kept = {p for p in listing(done) if not any(p.is_relative_to(t.path) for t in listed)}
    for thing in listed:
        remove(thing)
    assert set(listing(done)) == kept
    assert removable(open_pipeline(tiny, done)) == []


def test_clean_refuses_a_pipeline_that_cannot_run(tiny: Path, done: Path) -> None:
    """Nobody knows what belongs to it: what was trained with great effort, perhaps."""
    edit(tiny, "channels = 5 }", "chanels = 5 }")
    with pytest.raises(ConfigError, match="chanels"):
        removable(open_pipeline(tiny, done))


def test_clean_leaves_measurements_that_go_on_alone(tiny: Path, done: Path) -> None:
    folders = [done / ".prove-abc", done / ".measure-abc"]
    for folder in folders:
        with exclusive(folder):
            assert removable(open_pipeline(tiny, done)) == []
        assert [thing.path for thing in removable(open_pipeline(tiny, done))] == [folder]
        shutil.rmtree(folder)


def test_clean_keeps_work_that_can_be_gone_on_with(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(StopError):
        Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu", on_step=stop_at_7).run()
    assert removable(open_pipeline(tiny, tmp_path / "out")) == []


def test_a_checkpoint_of_other_settings_is_told_of_and_can_go(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(StopError):
        Pipeline.from_file(tiny, folder=out, device="cpu", on_step=stop_at_7).run()
    edit(tiny, "lr = 3e-3", "lr = 1e-3")
    state, why = states(tiny, out)[0]
    assert state == "stale"
    assert "its checkpoint is damaged, or of other settings" in why
    listed = removable(open_pipeline(tiny, out))
    assert [thing.path.name for thing in listed] == ["m1.pt"]


@pytest.mark.parametrize("lost", ["m1.zarr", "m2.zarr/activations/c.0.1.0.0.0.0.0"])
def test_what_waits_for_a_lost_cache_is_kept(tiny: Path, done: Path, lost: str) -> None:
    whole = {path: path.read_bytes() for path in done.glob("m*.safetensors")}
    (shutil.rmtree if (done / lost).is_dir() else Path.unlink)(done / lost)
    listed = removable(open_pipeline(tiny, done))
    assert [thing.path.name for thing in listed] in ([], ["m2.zarr"])
    for thing in listed:
        remove(thing)
    result = open_pipeline(tiny, done).run()
    assert [stage.trained for stage in result.stages] == [False, False, False]
    assert {path: path.read_bytes() for path in done.glob("m*.safetensors")} == whole


@pytest.mark.parametrize(
    ("file", "removed"),
    [
        ("m1.zarr/labels/class/c.0", []),
        ("m1.zarr/ids/c.0", []),
        ("m3.zarr/checksums/pooled/c.0.0", []),
        ("m3.zarr/activations/c.0.1.0.0.0.0.0", []),
        ("m1.safetensors", ["m1.safetensors"]),
        ("m2.zarr/zarr.json", ["m2.zarr"]),
    ],
)
def test_clean_keeps_what_can_be_mended(
    tiny: Path, done: Path, file: str, removed: list[str]
) -> None:
    (done / file).unlink()
    if removed:
        (done / file).write_bytes(b"nonsense")
    found = states(tiny, done)
    number = int(file[1])
    assert found[number - 1][0] == "corrupt"
    assert {state for state, _ in found[: number - 1]} <= {"sealed"}
    assert [thing.path.name for thing in removable(open_pipeline(tiny, done))] == removed
    whole = {path: path.read_bytes() for path in done.glob("m*.zarr/pooled/c.*")}
    inodes = {path: path.stat().st_ino for path in whole if file.split("/")[0] not in removed}
    open_pipeline(tiny, done).run()
    assert states(tiny, done) == [("sealed", "")] * 3
    assert {path: path.read_bytes() for path in whole} == whole
    if file != "m2.zarr/zarr.json":
        again = [path for path, inode in inodes.items() if path.stat().st_ino != inode]
        assert len(again) <= 1, "built again as a whole"


def test_removing_is_exact(tmp_path: Path) -> None:
    for name in ("m1.zarr", "m1.zarr.backup"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text("x")
    remove(Removable(tmp_path / "m1.zarr", 1, "test"))
    assert [path.name for path in tmp_path.iterdir()] == ["m1.zarr.backup"]


def test_inspect_shows_a_sealed_cache(done: Path) -> None:
    found = inspect_cache(done / "m2.zarr")
    assert (found["state"], found["problems"]) == ("sealed", [])
    array = found["arrays"]["activations"]
    assert array["shape"] == [1, 52, 5, 5, 8, 2, 2]
    assert array["axes"][1] == "sample"
    assert array["stored_chunks"] == 8
    assert found["manifest"]["module"] == 2
    assert len(found["channels"]) == 8
    json.dumps(found)

    stored = np.asarray(zarr.open_array(str(done / "m2.zarr" / "activations"))[0])
    assert found["channels"][3]["mean"] == pytest.approx(stored[:, :, :, 3].mean(), rel=1e-4)
    assert found["channels"][3]["max"] == pytest.approx(stored[:, :, :, 3].max())


def test_what_is_no_cache_is_not_inspected(done: Path, tmp_path: Path) -> None:

    zarr.create_array(str(tmp_path / "other.zarr"), shape=(2,), dtype="uint8")
    places = [tmp_path, tmp_path / "nothing", tmp_path / "other.zarr", done]
    for path in (*places, done / "m2.zarr" / "activations"):
        with pytest.raises(CacheNotFoundError, match="give the folder of a module's cache"):
            inspect_cache(path)


@pytest.mark.parametrize("damage", ["chunk", "lost", "metadata", "group", "empty"])
def test_inspect_works_on_damaged_stores(done: Path, damage: str) -> None:
    cache = done / "m2.zarr"
    chunk = sorted((cache / "activations").glob("c.*"))[0]
    if damage == "chunk":
        chunk.write_bytes(chunk.read_bytes()[:-10])
    elif damage == "lost":
        chunk.unlink()
    elif damage == "metadata":
        (cache / "activations" / "zarr.json").write_text("{}")
    elif damage == "group":
        (cache / "zarr.json").write_bytes(b"\xff\x00")
    else:
        cache = done / "nothing.zarr"
        cache.mkdir()
    found = inspect_cache(cache)
    assert found["problems"]
    assert found["state"] == "corrupt"
    json.dumps(found)
    with pytest.raises(CacheNotFoundError):
        inspect_cache(done / "not_there.zarr")


def test_logs_have_every_step_and_epoch_once_also_after_a_stop(tiny: Path, tmp_path: Path) -> None:
    def stop(module: int, step: int) -> None:
        if (module, step) == (1, 7):
            raise StopError

    out = tmp_path / "out"
    with pytest.raises(StopError):
        Pipeline.from_file(tiny, folder=out, device="cpu", on_step=stop).run()
    pipeline = open_pipeline(tiny, out)
    record = save_record(pipeline, pipeline.run())["modules"][0]
    lines = read_metrics(out / "logs" / "m1" / "metrics.jsonl")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    epochs = [line for line in lines if "validation_loss" in line]
    assert [line["epoch"] for line in epochs] == [1, 2, 3]
    assert min(line["validation_loss"] for line in epochs) == record["validation_loss"]


def test_curves_are_those_of_the_frozen_weights(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where another training of the same module was begun and given up."""
    drawn: list[Any] = []

    def noted(width: float, height: float) -> Any:
        drawn.append(matplotlib_figure(width, height))
        return drawn[-1]

    monkeypatch.setattr(curves, "matplotlib_figure", noted)
    out = tmp_path / "out"
    open_pipeline(tiny, out).run()
    log = out / "logs" / "m1" / "metrics.jsonl"
    losses = [line["train_loss"] for line in read_metrics(log) if "train_loss" in line]

    other = Pipeline.from_file(
        tiny, folder=out, device="cpu", changes={"train.lr": 1e-4}, on_step=stop_at_7
    )
    with pytest.raises(StopError):
        other.run()
    assert not any(stage.trained for stage in open_pipeline(tiny, out).run().stages)
    plot_curves(out)
    (figure,) = drawn
    lines = {own.get_label(): own.get_ydata().tolist() for own in figure.axes[0].get_lines()}
    assert lines["train"] == losses
    assert len(lines["train, not finished"]) == 1
    assert lines["train, not finished"][0] != losses[0]
    assert {own.get_label() for own in figure.axes[1].get_lines()} == {"train", "validation"}


def test_curves_are_drawn(done: Path) -> None:
    picture = plot_curves(done)
    assert picture == done / "curves.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(CacheNotFoundError, match="no logs below"):
        plot_curves(done / "m1.zarr")
