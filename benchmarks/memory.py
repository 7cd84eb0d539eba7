"""Memory of one training step of the paper's network, module by module.

    python benchmarks/memory.py            # a quarter of an hour, writes results/memory.md, or
                                           # results/memory-gpu.md where there is a GPU
    python benchmarks/memory.py --quick    # module 3 and the counts alone, writes nothing
    python benchmarks/memory.py --json     # one JSON object on stdout

ResNet-50 v2 in three modules, 16 images of 7×7 patches of 16×16 (784 patches), float32, Adam, exact
gradients, second step. *Counted* follows every tensor storage on fake tensors, as in the paper's
comparison of training methods (Table 2); *measured* is the high-water mark of a fresh process over
its baseline (on a GPU: of the allocator); *projected* is what `gim-stage plan` says beforehand.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch
from conditions import conditions

from gim_stagewise.config import parse_pipeline
from gim_stagewise.memory import (
    Budget,
    PeakMeter,
    use_allocator,
    warm_up,
)
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.processes import usable_cores
from gim_stagewise.stage.freeze import resolve_device
from gim_stagewise.stage.optimize import make_optimizer
from gim_stagewise.stage.project import StepMemory, count_step, project_step
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.spec import StepSpec
from gim_stagewise.stage.step import Corruption, MicroBatches, accumulate_gradients
from gim_stagewise.windows import Span

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent
GRID = (16, 7, 7)
CELLS = ((1, 16, 16), (256, 16, 16), (512, 8, 8))
CHANNELS = (256, 512, 1024)
GOALS = (100e6, 130e6, 250e6)  # counted bytes of the modules, one after the other
ONE_PASS = (1294e6, 1312e6, 1209e6)
ALL_AT_ONCE = 3080e6
SIZES = (7, 28, 49, 98, 784)
# Steps on a GPU that are not timed: kernels are loaded and algorithms chosen in them.
WARM_UP = 3
TEXT = """
name = "resnet50"
[source]
kind = "npy"
[patches]
size = 16
stride = 8
[objective]
prediction_steps = 5
negatives = 16
[train]
batch = 16
lr = 1.5e-4
[module.1]
build = "resnet50"
options = { blocks = [1, 3] }
[module.2]
build = "resnet50"
options = { blocks = [4, 7] }
[module.3]
build = "resnet50"
options = { blocks = [8, 13] }
"""


@dataclass
class RandomPatches:
    """A batch that is made where it is read, so that none of it is held."""

    shape: tuple[int, ...]
    cell: tuple[int, ...]

    @property
    def rows(self) -> int:
        return self.shape[0] * self.shape[1] * self.shape[2]

    def read(self, rows: Span, device: torch.device) -> torch.Tensor:
        return torch.rand(len(rows), *self.cell, device=device)


def fresh(function: Callable[..., T], *args: Any, **kwargs: Any) -> T:
    """Call a function of this file in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *args, **kwargs).result()


def spec_of(*modules: int, micro_batch: int, device: str, lean: bool = True) -> StepSpec:
    """The step of a module, or of several at once with gradients blocked between them."""
    config = parse_pipeline(TEXT, file="benchmarks/memory.py")
    mode = "iterative" if len(modules) == 1 else "simultaneous"
    cells = [*CELLS, CELLS[-1]]  # what the last one makes of it does not matter
    return StepSpec(
        config=config.model_copy(update={"mode": mode}),
        code_folder=None,
        indexes=modules,
        shapes=tuple(
            Shape(GRID[1:], GRID[1:], cells[m - 1], cells[m], CHANNELS[m - 1]) for m in modules
        ),
        classes=0,
        label_steps=0,
        forward_cell=CELLS[modules[0] - 1],
        shape=GRID,
        piece=256,
        micro_batch=micro_batch,
        device=device,
        threads=torch.get_num_threads(),
        lean=lean,
    )


def run_steps(spec: StepSpec, *, steps: int) -> tuple[int, float]:
    """Peak bytes and seconds of a whole step, for a fresh process; the first few are slower."""
    device = resolve_device(spec.device)
    torch.set_num_threads(spec.threads)
    use_allocator(lean=spec.lean)
    warm_up(device)
    seconds = []
    with PeakMeter(device) as meter:
        module, objective = spec.parts()
        module, objective = module.to(device).train(), objective.to(device)
        optimizer = make_optimizer(module, objective, spec.trains)
        corruptions = [Corruption.of(train) for train in spec.trains]
        for step in range(steps):
            started = time.monotonic()
            accumulate_gradients(
                module,
                objective,
                RandomPatches(spec.shape, spec.cell),
                MicroBatches(spec.micro_batch, lambda n: n, device, corruptions),
                generator=torch.Generator().manual_seed(step),
            )
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.monotonic() - started)
    return meter.peak, statistics.median(seconds[WARM_UP:] if device.type == "cuda" else seconds)


def count_all_at_once() -> int:
    """All three modules trained in one step, gradients blocked between them, counted."""
    return count_step(spec_of(1, 2, 3, micro_batch=784, device="cpu")).count


def projected(specs: list[StepSpec]) -> Iterator[StepMemory]:
    """What is projected for steps; on a GPU for several at once, which takes long one by one."""
    if specs[0].device == "cpu":
        yield from map(project_step, specs)
        return
    with ProcessPoolExecutor(usable_cores(), mp_context=get_context("spawn")) as pool:
        yield from list(pool.map(project_step, specs))


def steps_table(
    device: str, modules: tuple[int, ...], sizes: tuple[int, ...]
) -> list[dict[str, Any]]:
    """Counted, projected and measured bytes of each module at each micro-batch."""
    sizes = tuple(sorted(sizes, reverse=True))
    projections = projected(
        [spec_of(module, micro_batch=size, device=device) for module in modules for size in sizes]
    )
    rows = []
    for module in modules:
        one_pass = None
        for size in sizes:
            spec = spec_of(module, micro_batch=size, device=device)
            steps = WARM_UP + 5 if device == "cuda" else 3 if size == 784 else 2
            measured, seconds = fresh(run_steps, spec, steps=steps)
            one_pass = one_pass or seconds
            memory = next(projections)
            fast, fast_seconds = (
                fresh(run_steps, replace(spec, lean=False), steps=2)
                if device == "cpu"
                else (None, None)
            )
            rows.append(
                {
                    "module": module,
                    "micro_batch": size,
                    "counted": memory.count,
                    "projected": memory.total,
                    "measured": measured,
                    "seconds": seconds,
                    "time_ratio": seconds / one_pass,
                    "default_allocator": fast,
                    "default_allocator_seconds": fast_seconds,
                }
            )
            print(rows[-1], file=sys.stderr)
    return rows


def counts() -> dict[str, Any]:
    """What is counted without running anything."""
    found: list[dict[str, Any]] = []
    for module in (1, 2, 3):
        by_size = {
            size: count_step(spec_of(module, micro_batch=size, device="cpu")).count
            for size in (14, *SIZES)
        }
        found.append({"module": module, "counted": by_size, "goal": GOALS[module - 1]})
    worst = max(row["counted"][7] for row in found)
    together = count_all_at_once()
    return {"modules": found, "all_at_once": together, "worst": worst, "ratio": together / worst}


def digits() -> list[dict[str, Any]]:
    """Projected and measured bytes of the digits pipeline, each module in a fresh process."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for module in (1, 2, 3):
            rows.append(fresh(train_digits, module, Path(folder)))
            print(rows[-1], file=sys.stderr)
    return rows


def train_digits(module: int, folder: Path) -> dict[str, Any]:
    """Train and extract one module, for a fresh process."""
    pipeline = Pipeline.from_file(
        ROOT / "pipelines" / "digits.toml",
        folder=folder,
        device="cpu",
        budget=Budget(host=8_000_000_000),
    )
    stage = pipeline.stage(module)
    weights, _ = stage.train()
    stage.extract(weights)
    record = weights.record
    return {"module": module, "projected": record.projected_mem, "measured": record.measured_mem}


def within(projected: int, measured: int) -> bool:
    """Whether a projection is good enough: not below, and not far above."""
    return measured * 0.98 - 32e6 <= projected <= measured * 1.25 + 192e6


def markdown(result: dict[str, Any], about: dict[str, str]) -> str:
    """The result as tables with their conditions; on a GPU what is measured there alone."""
    on_cpu = result["device"] == "cpu"
    lines = [
        "# Memory of a training step" + ("" if on_cpu else " on a GPU"),
        "",
        "ResNet-50 v2 in three modules, 16 images (784 patches of 16×16), float32, Adam, exact "
        "gradients, second step. MB = 10^6 bytes.",
        "",
        *(counted_table(result["counts"]) if on_cpu else []),
        *measured_table(result["steps"], result["device"]),
        "",
    ]
    if on_cpu:
        lines += [
            "With a memory budget given, large buffers go back to the system as soon as they are "
            "free; the default allocator keeps them for speed, and holds more than is in use.",
            "",
            *digits_table(result["digits"]),
            "",
            "On a GPU: [memory-gpu.md](memory-gpu.md).",
            "",
        ]
    return "\n".join(
        [*lines, "Conditions: " + "; ".join(f"{k} {v}" for k, v in about.items()) + ".", ""]
    )


def counted_table(counted: dict[str, Any]) -> list[str]:
    lines = [
        "## Counted, tensor by tensor, on fake tensors",
        "",
        "| module | one pass (784) | 98 | 49 | 28 | 14 | 7 | goal | reached in micro-batches of |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in counted["modules"]:
        sizes = [f"{row['counted'][size] / 1e6:.0f} MB" for size in (784, 98, 49, 28, 14, 7)]
        within_goal = [size for size, count in row["counted"].items() if count <= row["goal"]]
        reached = f"{max(within_goal)} and less" if within_goal else "none"
        lines.append(
            f"| {row['module']} | {' | '.join(sizes)} | {row['goal'] / 1e6:.0f} MB | {reached} |"
        )
    at_28 = max(row["counted"][28] for row in counted["modules"])
    return [
        *lines,
        "",
        f"All modules in one step: {counted['all_at_once'] / 1e6:.0f} MB (the reference "
        f"implementation: {ALL_AT_ONCE / 1e6:.0f}). The worst module in micro-batches of 7, "
        f"{counted['worst'] / 1e6:.0f} MB, is {counted['ratio']:.1f} times below (the reference's "
        f"count: {ALL_AT_ONCE / counted['worst']:.1f}; goal 12; the paper's Table 2: 2.8); in "
        f"micro-batches of 28, {at_28 / 1e6:.0f} MB, {counted['all_at_once'] / at_28:.1f} times "
        f"({ALL_AT_ONCE / at_28:.1f}). What "
        "steps in micro-batches of these sizes take of time and of real memory is in the next "
        "table.",
        "",
    ]


def measured_table(rows: list[dict[str, Any]], device: str) -> list[str]:
    """Projected and measured bytes; the default allocator is a question of the CPU alone."""
    on_cpu = device == "cpu"
    more = " default allocator: measured | time |" if on_cpu else ""
    lines = [
        f"## Projected and measured on {device}",
        "",
        "Projected: the count, and the workspace of real micro-batches in a fresh process. "
        "Measured: whole steps in a fresh process. Good: never below measured - (2 % + 32 MB), at "
        "most 25 % + 192 MB above. Time: of a step, against one pass.",
        "",
        f"| module | micro-batch | counted | projected | measured | good | time |{more}",
        "|---|---|---|---|---|---|---|" + ("---|---|" if on_cpu else ""),
    ]
    for row in rows:
        one = next(r for r in rows if r["module"] == row["module"] and r["micro_batch"] == 784)
        cells = [
            str(row["module"]),
            str(row["micro_batch"]),
            *(f"{row[name] / 1e6:.0f} MB" for name in ("counted", "projected", "measured")),
            "yes" if within(row["projected"], row["measured"]) else "no",
            f"{row['time_ratio']:.2f}",
        ]
        if on_cpu:
            ratio = row["default_allocator_seconds"] / one["default_allocator_seconds"]
            cells += [f"{row['default_allocator'] / 1e6:.0f} MB", f"{ratio:.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def digits_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## The digits pipeline, a fresh process for each module",
        "",
        "| module | projected | measured | good |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['module']} | {row['projected'] / 1e6:.0f} MB | {row['measured'] / 1e6:.0f} MB | "
        f"{'yes' if within(row['projected'], row['measured']) else 'no'} |"
        for row in rows
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; writes nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    started = time.monotonic()
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # as the command line does
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(1)
    steps = (
        steps_table(device, (3,), (49,))
        if arguments.quick
        else steps_table(device, (1, 2, 3), SIZES)
    )
    result: dict[str, Any] = {
        "device": device,
        "steps": steps,
        "counts": counts() if device == "cpu" else None,
        "digits": digits() if device == "cpu" and not arguments.quick else [],
    }
    about = conditions() | {"threads": "1", "seconds": f"{time.monotonic() - started:.0f}"}
    if arguments.json:
        print(json.dumps(result | {"conditions": about}, indent=2))
    if arguments.quick:
        if not arguments.json:
            print(json.dumps(result, indent=2))
        return
    text = markdown(result, about)
    name = "memory.md" if device == "cpu" else "memory-gpu.md"
    (ROOT / "benchmarks" / "results" / name).write_text(text)
    if not arguments.json:
        print(text)


if __name__ == "__main__":
    main()
