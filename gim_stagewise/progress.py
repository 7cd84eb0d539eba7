"""How work tells what it is doing, without knowing who listens."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol


class Task:
    """One piece of work under way; the base class listens to nothing."""

    def advance(self, count: int = 1, **figures: float) -> None:
        """``count`` more units are done; ``figures`` are worth showing, such as ``loss``."""

    def report(self, **figures: float) -> None:
        """A part of the work is done, such as an epoch, and these are its figures."""


class Progress(Protocol):
    """Listens to work."""

    def task(
        self, label: str, *, total: int, done: int = 0, unit: str
    ) -> AbstractContextManager[Task]:
        """Work on ``total`` units, of which ``done`` were done by an earlier run."""

    def note(self, text: str) -> None:
        """Something that a person should know."""


class Silent:
    """Shows nothing."""

    def task(
        self, label: str, *, total: int, done: int = 0, unit: str
    ) -> AbstractContextManager[Task]:
        return nullcontext(Task())

    def note(self, text: str) -> None:
        pass
