"""Blocks per second of an extraction against the number of workers, start-up apart.

    python benchmarks/extract.py            # writes benchmarks/results/extract.md
    python benchmarks/extract.py --quick    # under a minute, writes nothing
    python benchmarks/extract.py --json     # one JSON object on stdout

All settings are run in turn, several times, in one call; the ratios are medians over the rounds.
Start-up is the time until the first block is committed, less the time of a block.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from conditions import conditions

from gim_stagewise import Pipeline, Workers
from gim_stagewise.cache import discard_cache
from gim_stagewise.progress import Silent, Task

ROOT = Path(__file__).resolve().parent.parent

PIPELINE = """
name = "extract"
[source]
kind = "npy"
root = "{root}"
splits.unlabeled = {{ images = "images.npy" }}
[patches]
size = 8
stride = 4
[train]
max_epochs = 1
batch = 16
[cache]
chunk = 16
[extract]
batch = 784
[module.1]
build = "residual"
options = {{ stem = 32, channels = {channels}, blocks = 2 }}
"""


class Stopwatch(Silent):
    """Notes when each block was committed."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @contextmanager
    def task(self, label: str, *, total: int, done: int = 0, unit: str) -> Iterator[Task]:
        times = self.times

        class Ticks(Task):
            def advance(self, count: int = 1, **figures: float) -> None:
                times.append(time.monotonic())

        yield Ticks()


def measure(pipeline: Pipeline, watch: Stopwatch, workers: int) -> dict[str, float]:
    """Extract once from nothing; seconds and blocks per second."""
    stage = pipeline.stage(1)
    weights = stage.load_weights()
    discard_cache(pipeline.workspace.cache_path(1))
    watch.times.clear()
    started = time.monotonic()
    stage.extract(weights, workers=Workers(workers))
    ended = time.monotonic()
    times = watch.times
    # The last blocks may leave workers idle, so the rate is that of the middle of the work.
    rate = (len(times) - 1) / (times[-1] - times[0])
    return {
        "startup": times[0] - started - 1 / rate,
        "rate": rate,
        "total": ended - started,
        "blocks": len(times),
    }


def summarise(rounds: list[dict[int, dict[str, float]]]) -> list[dict[str, Any]]:
    rows = []
    for workers in rounds[0]:
        runs = [one[workers] for one in rounds]
        ratios = [one[workers]["rate"] / one[0]["rate"] for one in rounds]
        rows.append(
            {
                "workers": workers,
                "startup_seconds": statistics.median(run["startup"] for run in runs),
                "blocks_per_second": statistics.median(run["rate"] for run in runs),
                "ratio_to_in_process": statistics.median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                "total_seconds": statistics.median(run["total"] for run in runs),
            }
        )
    return rows


def markdown(rows: list[dict[str, Any]], about: dict[str, str], setting: str) -> str:
    lines = [
        "# Extraction: blocks per second against workers",
        "",
        setting,
        "",
        "| workers | start-up (s) | blocks/s | against in process (min to max) | whole (s) |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['workers'] or '0 (in process)'} | {row['startup_seconds']:.1f} | "
        f"{row['blocks_per_second']:.2f} | {row['ratio_to_in_process']:.2f}× "
        f"({row['ratio_min']:.2f} to {row['ratio_max']:.2f}) | {row['total_seconds']:.1f} |"
        for row in rows
    ]
    lines += [
        "",
        "Conditions: " + "; ".join(f"{key} {value}" for key, value in about.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; writes nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    samples, channels, repeats = (160, 32, 1) if arguments.quick else (640, 64, 3)
    counts = sorted({0, 1, len(os.sched_getaffinity(0))})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        draw = np.random.default_rng(0)
        images = draw.integers(0, 256, (samples, 32, 32), dtype=np.uint8)
        np.save(folder / "images.npy", images)
        file = folder / "extract.toml"
        file.write_text(PIPELINE.format(root=folder, channels=channels))
        watch = Stopwatch()
        pipeline = Pipeline.from_file(file, folder=folder / "out", device="cpu", progress=watch)
        pipeline.stage(1).train()
        rounds = []
        for number in range(repeats):
            rounds.append({count: measure(pipeline, watch, count) for count in counts})
            print(f"round {number}: {rounds[-1]}", file=sys.stderr)
    rows = summarise(rounds)
    about = conditions() | {"rounds": str(repeats)}
    setting = (
        f"{samples} images of 32×32, 7×7 patches of 8×8, a residual module of 2 blocks and "
        f"{channels} channels, {samples // 16} blocks of 16 images, one thread an operation, fsync "
        "and checksums on."
    )
    if not arguments.quick:
        target = ROOT / "benchmarks" / "results" / "extract.md"
        target.write_text(markdown(rows, about, setting))
    if arguments.json:
        print(json.dumps({"rows": rows, "conditions": about, "setting": setting}, indent=2))
    else:
        print(markdown(rows, about, setting))


if __name__ == "__main__":
    main()
