"""Progress on the terminal: bars where there is one, plain lines where there is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

from gim_stagewise.progress import Task


class TerminalProgress:
    """Shows work on stderr; stdout is for results.

    Parameters
    ----------
    console : Console
        On stderr.
    """

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def task(self, label: str, *, total: int, done: int = 0, unit: str) -> Iterator[Task]:
        if not self._console.is_terminal:
            lines = _Lines(self._console, label, total, done, unit)
            yield lines
            lines.finish()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(unit + "s"),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console) as progress:
            task_id = progress.add_task(label, total=total, completed=done, figures="")
            yield _Bar(progress, task_id)

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)


class _Bar(Task):
    def __init__(self, progress: Progress, task_id: TaskID) -> None:
        self._progress = progress
        self._task_id = task_id
        self._figures: dict[str, float] = {}

    def advance(self, count: int = 1, **figures: float) -> None:
        self._figures |= figures
        shown = _spell(self._figures)
        self._progress.update(self._task_id, advance=count, figures=shown)


class _Lines(Task):
    """A line now and then, for logs."""

    SECONDS_BETWEEN = 10.0

    def __init__(self, console: Console, label: str, total: int, done: int, unit: str) -> None:
        self._console = console
        self._label, self._total, self._done, self._unit = label, total, done, unit
        self._figures: dict[str, float] = {}
        self._last = time.monotonic()

    def advance(self, count: int = 1, **figures: float) -> None:
        self._done += count
        self._figures |= figures
        if time.monotonic() - self._last >= self.SECONDS_BETWEEN:
            self._last = time.monotonic()
            self._print()

    def finish(self) -> None:
        self._print()

    def _print(self) -> None:
        line = f"{self._label}: {self._done}/{self._total} {self._unit}s {_spell(self._figures)}"
        self._console.print(line.rstrip(), highlight=False, soft_wrap=True)


def _spell(figures: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )
