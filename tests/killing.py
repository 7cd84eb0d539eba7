"""Runs that are killed at a point, each in a process of its own."""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from typing import Any

from helpers import edit, shorten
from warm import warm


def run_and_die(request: dict[str, Any]) -> None:
    """Run a pipeline; with ``kill_at``, die without warning at that point of writing.

    Points are numbered in the order in which they come: before and after each operation on the
    disk. With ``log``, each is noted there as it comes.
    """
    from gim_stagewise import durable
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.report.record import save_record
    from gim_stagewise.stage.extraction_plan import Workers

    count = 0
    log = Path(request["log"]) if request.get("log") else None

    def observe(when: str, name: str, path: Path) -> None:
        nonlocal count
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps([when, name, str(path)]) + "\n")
        if count == request.get("kill_at"):
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1

    durable.observers.append(observe)
    pipeline = Pipeline.from_file(request["file"], folder=request["folder"], device="cpu")
    result = pipeline.run(workers=Workers(request.get("workers", 0)))
    save_record(pipeline, result)


def small_pipeline(file: Path) -> Path:
    """Two modules, four training steps in two epochs, three blocks each."""
    shorten(file, modules=2, batch=18, epochs=2, chunk=20)
    edit(file, "checkpoint_every = 2", "checkpoint_every = 1")
    return file


def count_beforehand(request: dict[str, Any]) -> None:
    """What every run of a pipeline counts first is the same: children find it counted."""
    from gim_stagewise.pipeline import Pipeline

    if request["file"] not in _counted:
        pipeline = Pipeline.from_file(request["file"], device="cpu")
        pipeline.check_budget(pipeline.check())
        _counted.add(request["file"])


_counted: set[str] = set()


def run_warm(file: Path, folder: Path, *, kill_after: float = 3600, **options: Any) -> int:
    """The exit status of one run (see `run_and_die`): 0 if it is done, -9 if it was killed."""
    request = {"file": str(file), "folder": str(folder), **options}
    return warm()("killing:run_and_die", request, before="count_beforehand", kill_after=kill_after)


def points_of(log: Path) -> list[tuple[str, str, str]]:
    """The points of a run's log: when, operation, and what kind of file it was."""
    points = []
    for line in log.read_text().splitlines():
        when, name, path = json.loads(line)
        points.append((when, name, kind_of(Path(path))))
    return points


def kind_of(path: Path) -> str:
    """A path without what differs between runs and blocks."""
    parts = []
    for part in path.parts[-3:]:
        if part.startswith(("block-", "staging-")):
            part = part.split("-")[0]
        elif ".trash-" in part or part.endswith(".tmp"):
            part = part.split(".")[1] + ("-trash" if ".trash-" in part else "-tmp")
        elif part.startswith("c."):
            part = "c"
        elif part.endswith(".npy"):
            part = "error"
        elif "." in part and part.lstrip(".")[:1] == "m" and part.lstrip(".")[1:2].isdigit():
            part = part.replace(part.lstrip(".").split(".")[0], "m", 1)
        parts.append(part)
    return "/".join(parts[-2:])


def one_of_each(points: list[tuple[str, str, str]], seed: int) -> list[int]:
    """For each kind of point, the number of one of them.

    Of those after something changed on the disk: what is there then is there before the next
    operation as well, and a flush changes nothing that a kill could show.
    """
    draw = random.Random(seed)
    places: dict[tuple[str, str, str], list[int]] = {}
    for number, point in enumerate(points):
        if point[0] == "before" or point[1] == "fsync":
            continue
        places.setdefault(point, []).append(number)
    return sorted(draw.choice(numbers) for numbers in places.values())
