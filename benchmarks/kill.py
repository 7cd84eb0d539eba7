"""Kill runs at random moments, hundreds of times, and compare with a run that was left alone.

A small pipeline (two modules, three blocks each) is run in a folder, killed with SIGKILL, and begun
again by the same command until it is done; then the folder is compared, byte by byte, with that of
a run that nothing happened to. Most kills come at a numbered operation on the disk, the others
after a random time; some runs extract with a Dask worker.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conditions import conditions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from conftest import write_tiny  # noqa: E402 - the tests' own pipeline and server
from helpers import assert_same_files, results_of  # noqa: E402
from killing import points_of, run_warm, small_pipeline  # noqa: E402

KILLS_A_FOLDER = 4


def one_folder(
    file: Path, undisturbed: Path, folder: Path, draw: random.Random, seconds: float
) -> Counter[str]:
    """Kill runs in one folder, then let one end; returns how often each kind of kill hit."""
    points = len(points_of(file.parent / "log"))
    hits: Counter[str] = Counter()
    for _ in range(KILLS_A_FOLDER):
        workers = int(draw.random() < 0.1)
        if draw.random() < 0.7:
            options: dict[str, float] = {"kill_at": draw.randrange(points // 2)}
            kind = "at an operation"
        else:
            options = {"kill_after": draw.uniform(0.05, 3 * seconds if workers else seconds)}
            kind = "after a time"
        status = run_warm(file, folder, workers=workers, **options)
        assert status in (0, -signal.SIGKILL), (status, options)
        if status:
            hits[kind + (", with a Dask worker" if workers else "")] += 1
    assert run_warm(file, folder) == 0
    assert_same_files(folder, undisturbed)
    assert results_of(folder) == results_of(undisturbed)
    left = [path.name for path in folder.rglob(".*") if path.name != ".lock"]
    assert not left, left
    return hits


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; writes nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--kills", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    wanted = 20 if arguments.quick else arguments.kills
    draw = random.Random(arguments.seed)
    hits: Counter[str] = Counter()
    folders, started = 0, time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        file = small_pipeline(write_tiny(Path(place)))
        undisturbed = Path(place) / "undisturbed"
        assert run_warm(file, undisturbed, log=str(Path(place) / "log")) == 0
        again = time.monotonic()
        assert run_warm(file, Path(place) / "again") == 0
        seconds = time.monotonic() - again
        while hits.total() < wanted:
            folder = Path(place) / str(folders)
            hits += one_folder(file, undisturbed, folder, draw, seconds)
            shutil.rmtree(folder)
            folders += 1
            print(f"{hits.total()} kills in {folders} folders", file=sys.stderr)
    result = {
        "kills": hits.total(),
        "by kind": dict(hits),
        "folders": folders,
        "folders that ended in other bytes": 0,
        "seconds": time.monotonic() - started,
    }
    if arguments.json:
        print(json.dumps(result | {"conditions": conditions()}, indent=2))
        return
    text = markdown(result, conditions())
    print(text)
    if not arguments.quick:
        (ROOT / "benchmarks" / "results" / "kill.md").write_text(text)


def markdown(result: dict[str, object], about: dict[str, str]) -> str:
    """The result with its conditions; a folder that ended in other bytes would have stopped it."""
    kinds = result["by kind"]
    assert isinstance(kinds, dict)
    lines = [
        "# Runs killed at random moments",
        "",
        "A pipeline of two modules, killed with SIGKILL and begun again by the same command, "
        f"{KILLS_A_FOLDER} times in each folder, then left to end. Weights, probes and every byte "
        "of every file of both caches are compared with those of a run that nothing happened to; "
        "one difference, or one file left over, ends this benchmark.",
        "",
        "| killed | times |",
        "|---|---|",
        *(f"| {kind} | {times} |" for kind, times in sorted(kinds.items())),
        f"| in all | {result['kills']} |",
        "",
        f"{result['folders']} folders, {result['folders that ended in other bytes']} of them with "
        "any difference.",
        "",
        "Conditions: " + "; ".join(f"{key} {value}" for key, value in about.items()) + ".",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
