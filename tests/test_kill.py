"""Whatever a run is killed at, the same command goes on and ends in the same bits."""

from __future__ import annotations

import json
import random
import re
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers import assert_same_files, results_of
from killing import one_of_each, points_of, run_warm, small_pipeline

from gim_stagewise.cache import Block, read_manifest
from gim_stagewise.windows import even_ranges

RANDOM_MOMENTS = 5
WITH_DASK = 1


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, new_tiny: Callable[[Path], Path]) -> Path:
    """See `small_pipeline`; all tests here run it."""
    return small_pipeline(new_tiny(tmp_path_factory.mktemp("small")))


@pytest.fixture(scope="module")
def undisturbed(small: Path) -> Path:
    folder = small.parent / "undisturbed"
    assert run_warm(small, folder, log=str(small.parent / "log")) == 0
    return folder


def test_a_run_is_the_same_twice(small: Path, undisturbed: Path) -> None:
    assert run_warm(small, small.parent / "twice") == 0
    assert_same_files(small.parent / "twice", undisturbed)


PARTS = 7


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))]
)
def test_killed_at_every_kind_of_point(
    small: Path, undisturbed: Path, tmp_path: Path, part: int
) -> None:
    points = points_of(small.parent / "log")
    named = {(when, name) for when, name, _ in points}
    for name in ("write", "fsync", "rename", "append", "remove"):
        assert {("before", name), ("after", name)} <= named
    chosen = one_of_each(points, seed=0)
    assert len(chosen) > 25
    for number in chosen[part::PARTS]:
        kill_and_finish(small, undisturbed, tmp_path / str(number), [number])


@pytest.mark.slow
def test_killed_at_every_point(small: Path, undisturbed: Path, tmp_path: Path) -> None:
    for number in range(len(points_of(small.parent / "log"))):
        kill_and_finish(small, undisturbed, tmp_path / str(number), [number])


@pytest.mark.slow
def test_killed_again_and_again(small: Path, undisturbed: Path, tmp_path: Path) -> None:
    total = len(points_of(small.parent / "log"))
    for seed in range(RANDOM_MOMENTS):
        draw = random.Random(seed)
        kills = [draw.randrange(total // 2) for _ in range(draw.randrange(2, 6))]
        kill_and_finish(small, undisturbed, tmp_path / str(seed), kills)


def kill_and_finish(file: Path, undisturbed: Path, folder: Path, kills: list[int]) -> None:
    """Kill runs in one folder at these points, one after the other, then let one end."""
    log = folder.with_name(f"{folder.name}.log")
    killed = 0
    for number in kills:
        status = run_warm(file, folder, kill_at=number, log=str(log))
        assert status in (0, -signal.SIGKILL)
        killed += status != 0
    assert run_warm(file, folder, log=str(log)) == 0, (folder, kills)
    assert_same_files(folder, undisturbed)
    assert results_of(folder) == results_of(undisturbed)
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"], "leftovers"
    once = Counter(work_of(file.parent / "log"))
    for what, times in Counter(work_of(log)).items():
        # Of what is in hand when a run is killed, nothing is done more than once again.
        assert times <= once[what] + killed, what
    repeated = (Counter(work_of(log)) - once).total()
    # A checkpoint follows every step; a block is computed while the one before it is written.
    assert repeated <= 2 * killed


def work_of(log: Path) -> Iterator[str]:
    """Steps and blocks, as they were done."""
    for line in log.read_text().splitlines():
        when, name, path = json.loads(line)
        if (when, name) != ("before", "write"):
            continue
        if block := re.search(r"(m\d)\.zarr\.build/staging-\w+/(block-\d+)-\w+/pooled", path):
            yield "/".join(block.groups())
        elif checkpoint := re.search(r"checkpoints/\.(m\d)", path):
            yield f"checkpoint {checkpoint[1]}"


@pytest.fixture(scope="module")
def with_dask(small: Path, undisturbed: Path) -> list[int]:
    """Points at which workers are at work: the coordinator commits blocks of either cache."""
    log = small.parent / "log with dask"
    assert run_warm(small, small.parent / "with dask", workers=1, log=str(log)) == 0
    assert_same_files(small.parent / "with dask", undisturbed)
    points = points_of(log)
    commits = [n for n, (_, name, kind) in enumerate(points) if name == "append"]
    assert len(commits) > 6, "no blocks were committed"
    return [n for n in range(len(points)) if any(abs(n - commit) < 10 for commit in commits[2:])]


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(WITH_DASK))
def test_killed_with_dask_workers(
    small: Path, undisturbed: Path, with_dask: list[int], tmp_path: Path, seed: int
) -> None:
    number = random.Random(seed).choice(with_dask)
    folder = tmp_path / "out"
    assert run_warm(small, folder, workers=1, kill_at=number) == -signal.SIGKILL
    done = {
        file: file.stat().st_ino
        for cache in folder.glob("m*.zarr")
        for block in committed(cache)
        for file in (cache / name for name in read_manifest(cache).layout.chunk_files(block))
    }
    assert run_warm(small, folder, workers=1) == 0
    assert_same_files(folder, undisturbed)
    assert results_of(folder) == results_of(undisturbed)
    assert not [path for path in folder.rglob(".*") if path.name != ".lock"], "leftovers"
    for file, inode in done.items():
        assert file.stat().st_ino == inode, "a block that was done was done again"


def committed(cache: Path) -> list[Block]:
    """Blocks that an unsealed cache's journal has."""
    manifest = read_manifest(cache)
    if manifest.sealed:
        return []
    journal = cache.with_name(f".{cache.name}.build") / "journal.jsonl"
    lines = journal.read_text().splitlines()[1:] if journal.exists() else []
    numbers = {json.loads(line)["block"] for line in lines}
    layout = manifest.sample_layout
    spans = even_ranges(layout.samples, layout.chunk)  # there is one view
    return [Block(number, 0, spans[number]) for number in sorted(numbers)]
