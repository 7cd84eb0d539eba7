"""The runs that tables and figures are made of: those that are missing are made."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from gim_stagewise.config import PipelineConfig, load_pipeline
from gim_stagewise.durable import write_atomic
from gim_stagewise.errors import OverBudgetError
from gim_stagewise.memory import Budget
from gim_stagewise.pipeline import Pipeline, RunResult, check_stages, run_name
from gim_stagewise.processes import usable_cores
from gim_stagewise.progress import Progress, Silent
from gim_stagewise.report.record import save_record, versions

# What a table says of a mode that needs more memory than is allowed.
DOES_NOT_FIT = "does not fit"


@dataclass(frozen=True)
class Reproduction:
    """A pipeline whose runs, in several modes and with several seeds, are compared.

    Parameters
    ----------
    file : Path
        The pipeline file.
    base : Path
        Folder of the runs' folders.
    target : Path
        Folder that tables and figures are written to.
    seeds : int
        Runs of each mode, with the file's seed and those that follow it.
    device : str
    progress : Progress
    budget : Budget
    """

    file: Path
    base: Path
    target: Path
    seeds: int = 1
    device: str = "auto"
    progress: Progress = field(default_factory=Silent)
    budget: Budget = field(default_factory=Budget)
    _made: list[RunResult] = field(default_factory=list, init=False, repr=False)

    def pipeline(
        self,
        mode: str,
        number: int = 0,
        *,
        changes: Mapping[str, Any] | None = None,
        suffix: str = "",
    ) -> Pipeline:
        """The pipeline in a mode, with the file's seed or one of those that follow it.

        ``changes`` are other values of the file (see `gim_stagewise.config.with_values`), and
        ``suffix`` what such a run's folder is called after.
        """
        config, _ = load_pipeline(self.file, {"mode": mode})
        seed = config.seed + number
        name = run_name(config) + suffix + (f"-seed{seed}" if number else "")
        return Pipeline.from_file(
            self.file,
            folder=self.base / name,
            device=self.device,
            progress=self.progress,
            budget=self.budget,
            mode=mode,
            seed=seed,
            changes=changes,
        )

    def check(self, modes: Sequence[str]) -> None:
        """Refuse modes that the pipeline cannot be trained in, before any of them is.

        Raises
        ------
        GimStageError
            For whatever does not fit.
        """
        for mode in modes:
            pipeline = self.pipeline(mode)
            if pipeline.config.iterative:
                check_stages(pipeline, last=len(pipeline.config.module))
            else:
                pipeline.joint_stage().check()

    def run(self, mode: str, number: int = 0, *, labels: str | None = None) -> RunResult:
        """A run; what is there of it already is kept.

        ``labels`` are those that supervised modes are trained on, if not the first.
        """
        pipeline = self.pipeline(
            mode, number, changes={"labels": labels}, suffix=f"-{labels}" if labels else ""
        )
        self.progress.note(f"{mode}, seed {pipeline.config.seed}: {pipeline.workspace.folder}")
        result = pipeline.run()
        save_record(pipeline, result)
        self._made.append(result)
        return result

    def runs(self, mode: str, *, labels: str | None = None) -> list[RunResult]:
        """Runs of a mode with all seeds; none if it does not fit the memory that is allowed.

        Raises
        ------
        OverBudgetError
            If that is the iterative mode.
        """
        try:
            return [self.run(mode, number, labels=labels) for number in range(self.seeds)]
        except OverBudgetError as error:
            if mode == "iterative":
                raise
            self.progress.note(f"{mode}: left out: {error}")
            return []

    def write(self, name: str, text: str) -> Path:
        """Write a text file below the target, atomically."""
        path = self.target / name
        write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
        return path

    def conditions(self) -> str:
        """Under which a result was measured, for its last line.

        Devices are those that modules were trained on, which may have been elsewhere.
        """
        pipeline = self.pipeline("iterative")
        device = pipeline.workspace.device
        own = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        trained = {
            str(stage.record.numerics["device"])
            for result in self._made
            for stage in result.stages
            if stage.record.epochs
        }
        first = pipeline.config.seed
        parts = {
            "pipeline": str(self.file),
            "seeds": f"{first} to {first + self.seeds - 1}" if self.seeds > 1 else f"{first}",
            "device": ", ".join(sorted(trained)) or own,
            "cores": str(usable_cores()),
            **versions(),
            "date": datetime.now(UTC).date().isoformat(),
        }
        return "Conditions: " + "; ".join(f"{name} {value}" for name, value in parts.items()) + "."


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over runs."""
    if len(values) == 1:
        return f"{values[0]:.1f}"
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


def over_seeds(seeds: int) -> str:
    """What a caption says of them."""
    return f" Mean ± standard deviation over {seeds} seeds." if seeds > 1 else ""


def how_iterative(config: PipelineConfig) -> str:
    """What a caption says of iterative training, which is not all as in the paper."""
    upper = [number for number in config.module if number > 1]
    if not upper:
        return ""
    means = {
        f"{config.stage(n - 1).cache.precision} with dropout {config.stage(n).train.dropout:g} and "
        f"noise {config.stage(n).train.noise:g}"
        for n in upper
    }
    views = config.augment.views
    seen = "1 view" if views == 1 else f"{views} views"
    return (
        f"In iterative training, modules above the first see {seen} of a sample, stored as "
        f"{'; '.join(sorted(means))}."
    )


def markdown_table(names: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table as Markdown."""
    lines = [list(names), ["---"] * len(names), *map(list, rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"
