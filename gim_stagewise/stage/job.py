"""All that training needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from gim_stagewise.config import TrainConfig
from gim_stagewise.objectives import Objective
from gim_stagewise.sources import Source, Split
from gim_stagewise.stage.labels import Labels


@dataclass
class TrainJob:
    """What is trained, on what, how, and where it is kept.

    Parameters
    ----------
    label : str
        What messages call the modules.
    stage : int
        The (first) module's number, from 1.
    module : nn.Module
        With initial weights; trained in place. A `gim_stagewise.models.Stack` of all modules with a
        `gim_stagewise.objectives.Joint` objective, where they are trained in one step.
    objective : Objective
    source : Source
        Samples of one size: the stage's input, or windows of it.
    grid : tuple of int
        Rows and columns of its patches to train on.
    trains : sequence of TrainConfig
        Of each module.
    micro_batch : int
        Patches in memory at a time.
    seed : int
        The pipeline's seed.
    device : torch.device
    checkpoint : Path
        Where training state is kept until the module is frozen.
    logs : sequence of Path
        Folders of the metrics logs, one for each loss.
    run : str
        Digest of what is trained on what; only a checkpoint with the same is taken up.
    split : str
        Which samples of the source to train on.
    labels : Labels, optional
        For supervised objectives; samples without one are left out.
    on_step : callable, optional
        Called with the number of steps done in all, after each step.
    """

    label: str
    stage: int
    module: nn.Module
    objective: Objective
    source: Source
    grid: tuple[int, ...]
    trains: Sequence[TrainConfig]
    micro_batch: int
    seed: int
    device: torch.device
    checkpoint: Path
    logs: Sequence[Path]
    run: str
    split: Split = "unlabeled"
    labels: Labels | None = None
    on_step: Callable[[int], None] | None = field(default=None)

    @property
    def config(self) -> TrainConfig:
        """What the tables of all modules have in common."""
        return self.trains[0]

    @property
    def key(self) -> str:
        """The table of the pipeline file, for messages."""
        return f"module.{self.stage}.train" if len(self.trains) == 1 else "train"

    @property
    def ids(self) -> list[str]:
        """Samples to train on and to hold out."""
        ids = self.source.split(self.split)
        return [i for i in ids if self.labels is None or i in self.labels.ids]
