"""Caches built by Dask workers: the same bits for any number of workers, and whoever dies."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers import assert_same_run, edit, files_of

from gim_stagewise import Pipeline, Workers
from gim_stagewise.cache import BuildFolder, Cache
from gim_stagewise.errors import ConfigError, NonFiniteError, WorkersLostError
from gim_stagewise.stage import extraction_plan, parallel
from gim_stagewise.stage.cluster import local_cluster

SLOW = """
import time
from torch import nn

class Slow(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3)
    def forward(self, x):
        if not self.training:
            time.sleep(0.15)
        return self.conv(x)
"""


@pytest.fixture
def slow(tiny: Path, tmp_path: Path) -> Path:
    """A pipeline of one module that takes its time over each of eight blocks."""
    (tmp_path / "slow_nets.py").write_text(SLOW)
    edit(
        tiny, 'build = "residual"\noptions = { stem = 4, channels = 6 }', 'build = "slow_nets:Slow"'
    )
    edit(tiny, "[extract]\nbatch = 50", "[extract]\nbatch = 200")
    tiny.write_text(
        tiny.read_text().partition("[module.2]")[0].replace("max_epochs = 3", "max_epochs = 1")
    )
    return tiny


@pytest.fixture
def undisturbed(slow: Path, tmp_path: Path) -> Path:
    Pipeline.from_file(slow, folder=tmp_path / "undisturbed", device="cpu").run(workers=Workers(0))
    return tmp_path / "undisturbed"


def wait_until(condition: object, seconds: float = 60) -> None:
    """Wait for something that must happen; failing to happen is the test's failure."""
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.02)


def blocks_done(cache: Path) -> int:
    journal = BuildFolder(cache).path / "journal.jsonl"
    return journal.read_text().count("sha256") if journal.exists() else 0


@pytest.mark.parametrize("count", [pytest.param(1, marks=pytest.mark.slow), 2])
def test_any_number_of_workers_gives_the_same_bits(tiny: Path, tmp_path: Path, count: int) -> None:
    if count > len(os.sched_getaffinity(0)):
        pytest.skip("more workers than cores")
    for workers in (0, count):
        pipeline = Pipeline.from_file(tiny, folder=tmp_path / str(workers), device="cpu")
        pipeline.run(workers=Workers(workers), until=2)
    assert_same_run(tmp_path / str(count), tmp_path / "0")


def test_work_that_takes_long_moves_to_a_cluster_by_itself(
    slow: Path, tmp_path: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[int] = []
    cluster = local_cluster

    def watched(count: int, scratch: Path, *, threads: int) -> object:
        started.append(count)
        return cluster(count, scratch, threads=threads)

    monkeypatch.setattr(parallel, "local_cluster", watched)
    monkeypatch.setattr(parallel, "WORTH_A_CLUSTER_SECONDS", 0.3)
    monkeypatch.setattr(extraction_plan, "usable_cores", lambda: 2)
    Pipeline.from_file(slow, folder=tmp_path / "out", device="cpu").run()
    assert started == [2]
    assert_same_run(tmp_path / "out", undisturbed)


def test_too_many_workers_are_refused_with_the_number_that_fits(slow: Path, tmp_path: Path) -> None:
    pipeline = Pipeline.from_file(slow, folder=tmp_path / "out", device="cpu")
    stage = pipeline.stage(1)
    weights, _ = stage.train()
    cores = len(os.sched_getaffinity(0))
    with pytest.raises(ConfigError, match=rf"--workers: is 1000.*use {cores} or less"):
        stage.extract(weights, workers=Workers(1000))
    with pytest.raises(ConfigError, match=r"--scheduler: .* no Dask scheduler answers"):
        stage.extract(weights, workers=Workers(scheduler="tcp://127.0.0.1:9"))


def test_a_scheduler_that_does_not_answer_is_refused_before_any_work(
    slow: Path, tmp_path: Path
) -> None:
    """Above all before what is there is forgotten."""
    pipeline = Pipeline.from_file(slow, folder=tmp_path / "out", device="cpu")
    pipeline.stage(1).train()
    before = files_of(tmp_path / "out")
    with pytest.raises(ConfigError, match=r"--scheduler: .* no Dask scheduler answers"):
        pipeline.run(start=1, workers=Workers(scheduler="tcp://127.0.0.1:9"))
    assert files_of(tmp_path / "out") == before


def test_an_error_in_a_worker_arrives_as_itself(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bad_nets.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "class Bad(nn.Module):\n"
        "    def __init__(self, in_channels):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(in_channels, 4, 3)\n"
        "    def forward(self, x):\n"
        "        z = self.conv(x)\n"
        "        return z / 0 if len(x) == 50 else z  # the piece of an extraction\n"
    )
    edit(tiny, 'build = "residual"\noptions = { stem = 4, channels = 6 }', 'build = "bad_nets:Bad"')
    pipeline = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu")
    stage = pipeline.stage(1)
    weights, _ = stage.train()
    with pytest.raises(NonFiniteError, match="samples: train/"):
        stage.extract(weights, workers=Workers(1))


@pytest.fixture
def scheduler(tmp_path: Path) -> Iterator[str]:
    """A real Dask scheduler in a process of its own, without workers."""
    file = tmp_path / "scheduler.json"
    process = start_scheduler(file)
    try:
        yield json.loads(file.read_text())["address"]
    finally:
        process.kill()
        process.wait()


def start_scheduler(file: Path) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        dask("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", file),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_until(lambda: file.exists() and file.read_text().strip().endswith("}"))
    return process


def dask(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "dask", *map(str, arguments), "--no-dashboard"]


def start_worker(address: str, folder: Path) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        dask("worker", address, "--no-nanny", "--nthreads", "1", "--local-directory", folder),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def test_workers_of_a_running_cluster_may_die_and_join(
    slow: Path, tmp_path: Path, undisturbed: Path, scheduler: str
) -> None:
    workers = [start_worker(scheduler, tmp_path) for _ in range(2)]
    pipeline = Pipeline.from_file(slow, folder=tmp_path / "out", device="cpu")
    failures: list[BaseException] = []

    def build() -> None:
        try:
            pipeline.run(workers=Workers(scheduler=scheduler))
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=build)
    thread.start()
    try:
        wait_until(lambda: blocks_done(tmp_path / "out" / "m1.zarr") >= 1 or failures)
        workers[0].kill()
        workers.append(start_worker(scheduler, tmp_path))
        thread.join(120)
        assert not thread.is_alive()
        assert failures == []
        assert_same_run(tmp_path / "out", undisturbed)
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


@pytest.mark.slow
def test_a_worker_that_served_old_code_computes_with_the_new(
    slow: Path, tmp_path: Path, scheduler: str
) -> None:
    worker = start_worker(scheduler, tmp_path)
    out = tmp_path / "out"
    try:
        for factor in ("1", "2"):
            (tmp_path / "slow_nets.py").write_text(
                SLOW.replace("self.conv(x)", f"self.conv(x) * {factor}")
            )
            sys.modules.pop("slow_nets", None)  # as a new process would
            pipeline = Pipeline.from_file(slow, folder=out, device="cpu")
            pipeline.run(workers=Workers(scheduler=scheduler))
    finally:
        worker.kill()
        worker.wait()
    Pipeline.from_file(slow, folder=tmp_path / "fresh", device="cpu").run(workers=Workers(0))
    assert_same_run(out, tmp_path / "fresh")


def test_a_lost_scheduler_is_said_and_done_blocks_stay(slow: Path, tmp_path: Path) -> None:
    file = tmp_path / "own_scheduler.json"
    process = start_scheduler(file)
    address = json.loads(file.read_text())["address"]
    worker = start_worker(address, tmp_path)
    out = tmp_path / "out"

    def kill_later() -> None:
        wait_until(lambda: blocks_done(out / "m1.zarr") >= 1)
        process.kill()

    thread = threading.Thread(target=kill_later)
    thread.start()
    try:
        pipeline = Pipeline.from_file(slow, folder=out, device="cpu")
        with pytest.raises(WorkersLostError, match="blocks that are done stay"):
            pipeline.run(workers=Workers(scheduler=address))
    finally:
        thread.join()
        for child in (worker, process):
            child.kill()
            child.wait()
    assert blocks_done(out / "m1.zarr") >= 1


RUN = """
import sys
from gim_stagewise import Pipeline, Workers
# Without a guard for __main__, as people write scripts.
Pipeline.from_file(sys.argv[1], folder=sys.argv[2], device="cpu").run(workers=Workers(1))
"""


def test_a_coordinator_that_is_killed_leaves_blocks_that_stay(
    slow: Path, tmp_path: Path, undisturbed: Path
) -> None:
    script = tmp_path / "run.py"
    script.write_text(RUN)
    cache = tmp_path / "out" / "m1.zarr"
    process = subprocess.Popen([sys.executable, script, slow, tmp_path / "out"])
    wait_until(lambda: blocks_done(cache) >= 2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "run.json").exists()
    kept = {file: file.stat().st_ino for file in (cache / "activations").glob("c.*")}
    assert len(kept) >= 2
    Pipeline.from_file(slow, folder=tmp_path / "out", device="cpu").run(workers=Workers(1))
    assert_same_run(tmp_path / "out", undisturbed)
    recorded = {file for file in kept if file.stat().st_ino == kept[file]}
    # A block that was in place but not yet in the journal is written again; no others are.
    assert len(kept) - len(recorded) <= 1
    assert Cache(cache).manifest.sealed


@pytest.mark.parametrize("workers", [pytest.param("0", marks=pytest.mark.slow), "1"])
def test_ctrl_c_ends_at_once_with_130_and_says_how_to_go_on(
    slow: Path, tmp_path: Path, undisturbed: Path, workers: str
) -> None:
    command = [sys.executable, "-m", "gim_stagewise.cli", "run", slow, "--dir", tmp_path / "out"]
    process = subprocess.Popen(
        [*map(str, command), "--workers", workers],
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore it, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: blocks_done(tmp_path / "out" / "m1.zarr") >= 2)
    children = descendants(process.pid)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "interrupted: what is done stays; give the same command again" in stderr
    assert "Traceback" not in stderr
    wait_until(lambda: not any(alive(pid) for pid in children), 10)
    Pipeline.from_file(slow, folder=tmp_path / "out", device="cpu").run(workers=Workers(0))
    assert_same_run(tmp_path / "out", undisturbed)


def descendants(pid: int) -> list[int]:
    children = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        listed = (task / "children").read_text().split() if (task / "children").exists() else []
        for child in map(int, listed):
            children += [child, *descendants(child)]
    return children


def alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2]
    except FileNotFoundError:
        return False
