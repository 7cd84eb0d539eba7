"""Many runs, as many at once as there are cores, each kept in a file as it ends."""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from conditions import conditions
from scipy import stats

from gim_stagewise.processes import usable_cores

Run = dict[str, Any]
# What is kept of the conditions of each run, besides its device.
_KEPT = ("date", "python", "torch", "zarr")


def one_thread() -> None:
    """Keep PyTorch to one thread: as many processes run as there are cores."""
    torch.set_num_threads(1)


def known(file: Path) -> list[Run]:
    """Runs that were made before."""
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def device_name(device: str) -> str:
    """What runs say they were made on."""
    about = conditions()
    return about["GPU"] if device == "cuda" else f"a core of {about['processor']}"


def make(
    file: Path, measure: Callable[..., Run], wanted: Sequence[tuple[Any, ...]], *, device: str
) -> None:
    """Make runs, and add each to the file when it ends.

    ``measure`` gets what is wanted, a folder of its own, and ``device``; what it gives begins with
    what is wanted. Several runs share a GPU.
    """
    about = {"device": device_name(device)}
    about |= {name: value for name, value in conditions().items() if name in _KEPT}
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder,
        ProcessPoolExecutor(
            usable_cores(), mp_context=get_context("spawn"), initializer=one_thread
        ) as pool,
    ):
        tasks = []
        for number, one in enumerate(wanted):
            own = Path(folder) / str(number)
            own.mkdir()
            tasks.append(pool.submit(partial(measure, device=device), *one, own))
        try:
            for task in as_completed(tasks):
                run = task.result() | about
                with file.open("a") as target:
                    target.write(json.dumps(run) + "\n")
                print(list(run.values())[:4], file=sys.stderr)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def arguments(doc: str, data: Sequence[str]) -> argparse.Namespace:
    """The command line of such a benchmark."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--data", choices=data, help="one of the datasets")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--table", action="store_true", help="write the table, run nothing")
    parser.add_argument("--quick", action="store_true", help="under a minute; writes nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser.parse_args()


def paired(runs: Sequence[Run], others: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Runs with those of the same seed, where there are both; in the order of seeds."""
    by_seed = {run["seed"]: run for run in others}
    own = sorted(runs, key=lambda run: run["seed"])
    return [(run, by_seed[run["seed"]]) for run in own if run["seed"] in by_seed]


def interval(differences: list[float], digits: int) -> str:
    """Mean of paired differences, with a 95 % interval."""
    mean = statistics.mean(differences)
    count = len(differences)
    if count < 2 or not any(differences):
        return f"{mean:+.{digits}f}"
    half = stats.t.ppf(0.975, count - 1) * statistics.stdev(differences) / count**0.5
    return f"{mean:+.{digits}f} ± {half:.{digits}f}"


def show(given: argparse.Namespace, runs: list[Run], text: str, target: Path, **more: Any) -> None:
    """Print the result, and write its table unless it is a quick one.

    ``more`` stands beside the runs in JSON.
    """
    here = conditions()
    devices = Counter(run.get("device", device_name("cpu")) for run in runs)
    made = ", ".join(f"{count} on {name}" for name, count in devices.most_common())
    # Those of the runs, of which many were made elsewhere, or earlier.
    about = {"runs": made}
    for name in _KEPT:
        about[name] = " and ".join(sorted({run.get(name, here[name]) for run in runs}))
    text += "\nConditions: " + "; ".join(f"{name} {value}" for name, value in about.items()) + ".\n"
    if not given.quick:
        target.write_text(text)
    print(json.dumps({"runs": runs, **more, "conditions": about}) if given.json else text)
