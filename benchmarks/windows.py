"""Images larger than memory: peak memory and time per pixel against the size of the image.

    python benchmarks/windows.py            # a quarter of an hour, writes results/windows.md
    python benchmarks/windows.py --quick    # two small images, under a minute, writes nothing
    python benchmarks/windows.py --json     # one JSON object on stdout

Three stages of two residual blocks each (receptive fields of 17, 15 and 15 positions that overlap)
in dense encoding on one uint8 image, a mosaic of photographs, trained for an epoch and extracted in
float32, each size in a process of its own. That is limited to 2 GB above what it has when all is
imported: by a memory cgroup (version 1) where one can be made, else by RLIMIT_DATA. *Peak* is the
most memory of the process and its children over that baseline, sampled: what the cgroup counts as
resident without the page cache, else the proportional set size (PSS).
Caches of the largest image take about 15 GB below --folder; they are removed at the end.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import distributed  # noqa: F401 - part of the baseline, as in any run
import psutil
import torch
from conditions import conditions

from gim_stagewise import Workers
from gim_stagewise.memory import Budget, resident_bytes, warm_up
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.plan import plan_pipeline
from gim_stagewise.progress import Silent, Task
from gim_stagewise.stage.project import load_counting
from gim_stagewise.units import format_bytes

ROOT = Path(__file__).resolve().parent.parent
SIDES = (2_000, 5_000, 10_000, 20_000)
QUICK_SIDES = (1600, 3200)
# What takes seconds is done several times; the median counts.
REPEATS = {2_000: 9, 5_000: 5, 10_000: 3}
ALLOWED = 2_000_000_000
MOST_GROWTH = 1.05
MOST_SLOWDOWN = 1.10
MOST_OVERHEAD = 1.15
CGROUPS = Path("/sys/fs/cgroup/memory")

PIPELINE = """
name = "windows"
encoding = "dense"
[source]
kind = "mosaic"
options = {{ side = {side} }}
[augment]
mean = [0.45]
std = [0.25]
[windows]
samples = 96
[objective]
prediction_steps = 2
skip = 2
pool = 8
[train]
batch = 16
window = 96
max_epochs = 1
shuffle_window = "64MB"
[cache]
precision = "float32"
[extract]
threads = {threads}
[module.1]
build = "residual"
options = {{ stem = 16, channels = 32, blocks = 2, stride = 2 }}
objective.pool = 4
[module.2]
build = "residual"
options = {{ channels = 64, blocks = 2, stride = 2 }}
[module.3]
build = "residual"
options = {{ channels = 64, blocks = 2, stride = 2 }}
"""


class Stopwatch(Silent):
    """Seconds of each task."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def task(self, label: str, *, total: int, unit: str, done: int = 0) -> Iterator[Task]:
        started = time.perf_counter()
        with super().task(label, total=total, unit=unit, done=done) as task:
            yield task
        self.seconds[label] = time.perf_counter() - started

    def extraction(self) -> float:
        """Seconds of the last extraction of all modules."""
        return sum(taken for label, taken in self.seconds.items() if label.endswith("extract"))


def child(side: int, folder: Path, allowed: int) -> None:
    """Run the pipeline in this process, limited; prints what was found as JSON."""
    # All that a first run loads, before it is said what there is without it.
    warm_up(torch.device("cpu"))
    load_counting()
    file = folder / "windows.toml"
    threads = len(os.sched_getaffinity(0))
    file.write_text(PIPELINE.format(side=side, threads=threads))
    os.chdir(folder)
    base = Pipeline.from_file(file, folder=folder / "out", device="cpu")
    extent = base.source.items()[0].extent
    limit = _limit(allowed)
    baseline = resident_bytes()
    print(json.dumps({"baseline": tree_pss(os.getpid())}), flush=True)
    watch = Stopwatch()
    pipeline = Pipeline.from_file(
        file,
        folder=folder / "out",
        device="cpu",
        progress=watch,
        budget=Budget(host=baseline + allowed),
    )
    plan = plan_pipeline(pipeline)
    result = pipeline.run(workers=Workers(0))
    extraction = [watch.extraction()]
    for _ in range(REPEATS.get(side, 1) - 1):
        for index in pipeline.config.module:
            stage = pipeline.stage(index)
            stage.extract(stage.load_weights(), force=True)
        extraction.append(watch.extraction())
    windows = [stage.windows for stage in plan.stages]
    found = {
        "side": extent[0],
        "limit": limit,
        "projected_disk": plan.disk.needed("all"),
        "projected_host": max(stage.host_mem for stage in plan.stages),
        "cached": sum(stage.cache_bytes for stage in result.stages),
        "halo": [own.halo for own in windows if own],
        "plan": [asdict(own) for own in windows if own],
        "extraction": extraction,
        "training": [asdict(stage.record)["measured_mem"] for stage in result.stages],
    }
    print(json.dumps(found), flush=True)


def _limit(allowed: int) -> str:
    """Limit this process and those that it starts; says how."""
    group = CGROUPS / f"gim-windows-{os.getpid()}"
    try:
        group.mkdir()
        # Memory that it has already stays charged to where it was.
        (group / "memory.limit_in_bytes").write_text(str(allowed))
        (group / "cgroup.procs").write_text(str(os.getpid()))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        data = psutil.Process().memory_info().data + allowed
        resource.setrlimit(resource.RLIMIT_DATA, (data, data))
        return "RLIMIT_DATA"
    return f"memory cgroup of {format_bytes(allowed)}"


def tree_pss(pid: int) -> int:
    """Proportional set size of a process and its children, in bytes."""
    total = 0
    with suppress(psutil.Error):
        process = psutil.Process(pid)
        for one in [process, *process.children(recursive=True)]:
            with suppress(psutil.Error):
                total += one.memory_full_info().pss
    return total


def resident_over(pid: int, baseline: int) -> int:
    """Bytes that a process and its children hold beyond the baseline."""
    try:
        text = (CGROUPS / f"gim-windows-{pid}" / "memory.stat").read_text()
    except OSError:
        return tree_pss(pid) - baseline
    return next(int(line.split()[1]) for line in text.splitlines() if line.startswith("total_rss "))


def measure(side: int, place: Path) -> dict[str, Any]:
    """Run one size in a fresh process, and watch its memory."""
    with tempfile.TemporaryDirectory(dir=place, prefix="windows-") as name:
        command = [sys.executable, __file__, "--child", str(side), name]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        peak = 0
        over = threading.Event()

        def watch() -> None:
            nonlocal peak
            while not over.is_set():
                peak = max(peak, resident_over(process.pid, baseline))
                time.sleep(0.02)

        baseline = json.loads(process.stdout.readline())["baseline"]
        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            text = process.stdout.readline()
            status = process.wait()
        finally:
            over.set()
            watcher.join()
            with suppress(OSError):
                (CGROUPS / f"gim-windows-{process.pid}").rmdir()
        if status:
            raise SystemExit(f"the run on {side} pixels ended with {status}")
        found: dict[str, Any] = json.loads(text)
    extraction = statistics.median(found["extraction"])
    found["peak"] = peak
    found["baseline"] = baseline
    found["nanoseconds_per_pixel"] = 1e9 * extraction / side**2
    return found


def checks(found: list[dict[str, Any]], *, quick: bool) -> dict[str, bool]:
    """Figures that are to be reached."""
    smaller, largest = found[-2:]
    times = [one["nanoseconds_per_pixel"] for one in found]
    return {
        "peak within the limit": all(one["peak"] <= ALLOWED for one in found),
        "peak with 4 times the area": largest["peak"] <= MOST_GROWTH * smaller["peak"],
        "time per pixel": max(times) <= MOST_SLOWDOWN * min(times),
        "halo overhead": max(max(one["halo"]) for one in found) <= MOST_OVERHEAD,
        "cached over allowed": quick or largest["cached"] >= 4 * ALLOWED,
    }


def report(found: list[dict[str, Any]], reached: dict[str, bool]) -> str:
    """The result as Markdown."""
    lines = ["# Images larger than memory", ""]
    lines += [f"- {name}: {value}" for name, value in conditions().items()]
    lines += [
        f"- limit: {found[0]['limit']} above the baseline of {format_bytes(found[0]['baseline'])}",
        "",
        "Three stages of two residual blocks, one float32 image cache each, in one process with",
        "as many threads as cores. Peak: resident memory over the baseline, of planning, training",
        "and extraction together. Small images are extracted several times; the median counts.",
        "",
        "| image | peak | projected host | cached | projected | halo overhead, by module "
        "| extraction, ns a pixel |",
        "|---|---|---|---|---|---|---|",
    ]
    for one in found:
        halo = ", ".join(f"{own:.3f}" for own in one["halo"])
        lines.append(
            f"| {one['side']}² | {format_bytes(one['peak'])} "
            f"| {format_bytes(one['projected_host'])} | {format_bytes(one['cached'])} "
            f"| {format_bytes(one['projected_disk'])} | {halo} "
            f"| {one['nanoseconds_per_pixel']:.0f} |"
        )
    growth = found[-1]["peak"] / found[-2]["peak"]
    times = [one["nanoseconds_per_pixel"] for one in found]
    lines += [
        "",
        f"With 4 times the area the peak is {growth:.3f} times as high (at most {MOST_GROWTH}).",
        f"Time per pixel: slowest over fastest {max(times) / min(times):.3f} (at most "
        f"{MOST_SLOWDOWN}).",
        f"Cached: {found[-1]['cached'] / ALLOWED:.1f} times the memory allowed (at least 4).",
        "",
        "Reached: " + "; ".join(f"{name}: {'yes' if ok else 'NO'}" for name, ok in reached.items()),
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(int(arguments.child[0]), Path(arguments.child[1]), ALLOWED)
        return
    sides = QUICK_SIDES if arguments.quick else SIDES
    print("disk: about 40 bytes a pixel of the largest image", file=sys.stderr)
    found = []
    for side in sides:
        found.append(measure(side, arguments.folder))
        print(f"{side}: {json.dumps(found[-1])}", file=sys.stderr)
    reached = checks(found, quick=arguments.quick)
    if arguments.json:
        print(json.dumps({"conditions": conditions(), "sizes": found, "reached": reached}))
    else:
        print(report(found, reached))
    if not arguments.quick:
        (ROOT / "benchmarks" / "results" / "windows.md").write_text(report(found, reached))


if __name__ == "__main__":
    main()
