"""What became of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gim_stagewise.config import Mode
from gim_stagewise.errors import ConfigError
from gim_stagewise.probe.probe import ProbeScores
from gim_stagewise.stage.checkpoint import TrainingRecord


@dataclass(frozen=True)
class StageResult:
    """What became of one stage.

    ``trained`` and ``extracted`` say whether work was done now. ``cache`` is None where all modules
    are trained in one step.
    """

    module: int
    record: TrainingRecord
    trained: bool
    extracted: bool
    cache: Path | None
    cache_bytes: int


@dataclass(frozen=True)
class RunResult:
    """What became of a run.

    ``skipped`` says why items of the dataset were left out, by id, and ``notices`` how it was read,
    such as recordings that were resampled.

    ``probes`` has the accuracies of all modules for each kind of labels that the dataset has; none
    where it has no labels.
    """

    pipeline: str
    mode: Mode
    folder: Path
    stages: list[StageResult]
    probes: list[ProbeScores]
    seconds: float
    skipped: dict[str, str] = field(default_factory=dict)
    notices: tuple[str, ...] = ()

    def scores(self, labels: str | None = None) -> ProbeScores | None:
        """Accuracies for labels of that name, by default the first; None if there are none."""
        found = (own for own in self.probes if labels in (None, own.labels))
        return next(found, None)

    def accuracy(
        self, module: int, *, labels: str | None = None, random: bool = False
    ) -> float | None:
        """Test accuracy of a module's features, in [0, 1].

        Parameters
        ----------
        module : int
            Its number, from 1.
        labels : str, optional
            Name of the labels; by default the first that the dataset has.
        random : bool
            Of the module before it was trained.

        Returns
        -------
        float or None
            None where there are no such labels, or they do not fit the module.

        Raises
        ------
        ConfigError
            If the run has no such module.
        """
        if module not in range(1, len(self.stages) + 1):
            there = f"this run has modules 1 to {len(self.stages)}"
            raise ConfigError(f"is {module}; {there}", key="module")
        scores = self.scores(labels)
        if scores is None:
            return None
        found = (scores.random if random else scores.trained)[module - 1]
        return None if found is None else found.test

    def baseline(self, name: str, *, labels: str | None = None) -> float | None:
        """Test accuracy of features that nothing was learned for (see `ProbeScores`), in [0, 1]."""
        scores = self.scores(labels)
        found = None if scores is None else scores.baselines.get(name)
        return None if found is None else found.test
