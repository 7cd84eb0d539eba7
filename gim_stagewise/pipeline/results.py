"""What became of a run."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from gim_stagewise.config import Mode
from gim_stagewise.stage.checkpoint import TrainingRecord


@dataclass(frozen=True)
class StageResult:
    """What became of one stage.

    ``trained`` and ``extracted`` say whether work was done now. Accuracies are in [0, 1], or None
    where samples have no labels: ``probe_accuracy`` and ``random_probe_accuracy`` on test samples,
    ``probe_validation_accuracy`` on those by which the probe made its choices. ``cache`` is None
    where all modules are trained in one step.
    """

    module: int
    record: TrainingRecord
    trained: bool
    extracted: bool
    cache: Path | None
    cache_bytes: int
    probe_accuracy: float | None = None
    probe_validation_accuracy: float | None = None
    random_probe_accuracy: float | None = None


@dataclass(frozen=True)
class RunResult:
    """What became of a run; ``skipped`` says why items of the dataset were left out, by id.

    ``raw_probe_accuracy`` is that of pixels, and ``statistics_probe_accuracy`` of their statistics
    (see `gim_stagewise.stage.probe`); None where samples have no labels.
    """

    pipeline: str
    mode: Mode
    folder: Path
    stages: list[StageResult]
    raw_probe_accuracy: float | None
    statistics_probe_accuracy: float | None
    seconds: float
    skipped: dict[str, str] = field(default_factory=dict)
