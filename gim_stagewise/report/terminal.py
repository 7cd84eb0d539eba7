"""Progress on the terminal: bars where there is one, plain lines where there is not."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
)

from gim_stagewise.progress import Task

SECONDS_BETWEEN_LINES = 10.0


class TerminalProgress:
    """Shows work on stderr; stdout is for results.

    Parameters
    ----------
    console : Console
        On stderr.
    verbose : bool
        A line for every epoch as well.
    """

    def __init__(self, console: Console, *, verbose: bool = False) -> None:
        self._console = console
        self._verbose = verbose

    @contextmanager
    def task(self, label: str, *, total: int, done: int = 0, unit: str) -> Iterator[Task]:
        figures = _Figures(label, total, done, unit)
        if not self._console.is_terminal:
            lines = _Lines(self._console, figures, self._verbose)
            yield lines
            lines.show()
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TextColumn("{task.fields[figures]}"),
        )
        with Progress(*columns, console=self._console) as progress:
            task_id = progress.add_task(label, total=total, completed=done, figures="")
            yield _Bar(progress, task_id, figures, self._verbose)
            progress.update(task_id, figures=figures.spell(left=False))

    def note(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True, markup=False)


class _Figures:
    """What is known of a task: how far, how fast, and the figures it told."""

    def __init__(self, label: str, total: int, done: int, unit: str) -> None:
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self._first = done
        self._started = time.monotonic()
        self._told: dict[str, float] = {}

    def advance(self, count: int, told: dict[str, float]) -> None:
        self.done += count
        self._told |= told

    def spell(self, *, left: bool = True) -> str:
        parts = [_spell(self._told)] if self._told else []
        seconds = time.monotonic() - self._started
        if self.done > self._first and seconds > 0.5:
            speed = (self.done - self._first) / seconds
            parts.append(
                f"{speed:.3g} {self.unit}s/s" if speed < 100 else f"{speed:.0f} {self.unit}s/s"
            )
            if left and self.done < self.total:
                minutes, seconds_left = divmod(round((self.total - self.done) / speed), 60)
                # Early stopping may end a training before its last epoch.
                bound = "≤ " if "loss" in self._told else ""
                parts.append(f"{bound}{minutes}:{seconds_left:02} left")
        return ", ".join(parts)


class _Bar(Task):
    def __init__(
        self, progress: Progress, task_id: TaskID, figures: _Figures, verbose: bool
    ) -> None:
        self._progress, self._task_id = progress, task_id
        self._figures, self._verbose = figures, verbose

    def advance(self, count: int = 1, **figures: float) -> None:
        self._figures.advance(count, figures)
        self._progress.update(self._task_id, advance=count, figures=self._figures.spell())

    def report(self, **figures: float) -> None:
        self._figures.advance(0, _outcome(figures))
        if self._verbose:
            self._progress.console.print(f"{self._figures.label}: {_spell(figures)}")


class _Lines(Task):
    """A line now and then, for logs."""

    def __init__(self, console: Console, figures: _Figures, verbose: bool) -> None:
        self._console, self._figures, self._verbose = console, figures, verbose
        self._last = time.monotonic()

    def advance(self, count: int = 1, **figures: float) -> None:
        self._figures.advance(count, figures)
        if time.monotonic() - self._last >= SECONDS_BETWEEN_LINES:
            self.show()

    def report(self, **figures: float) -> None:
        self._figures.advance(0, _outcome(figures))
        if self._verbose:
            self._print(f"{self._figures.label}: {_spell(figures)}")

    def show(self) -> None:
        self._last = time.monotonic()
        f = self._figures
        self._print(f"{f.label}: {f.done}/{f.total} {f.unit}s, {f.spell()}".rstrip(", "))

    def _print(self, line: str) -> None:
        self._console.print(line, highlight=False, soft_wrap=True, markup=False)


def _outcome(figures: dict[str, float]) -> dict[str, float]:
    """What stays in sight of an epoch's figures, next to the loss of the current step."""
    return {name: value for name, value in figures.items() if name == "validation_loss"}


def _spell(figures: dict[str, float]) -> str:
    return ", ".join(
        f"{name.replace('_', ' ')} {value:.3f}" if isinstance(value, float) else f"{name} {value}"
        for name, value in figures.items()
    )
