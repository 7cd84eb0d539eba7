"""Everything that decides the memory of a module's training step and frozen forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gim_stagewise.cache import PLAIN, Precision
from gim_stagewise.config import PipelineConfig
from gim_stagewise.objectives import InfoNCE, build_objective
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.workspace import Workspace
from gim_stagewise.windows import Span


@dataclass(frozen=True)
class StepSpec:
    """Everything that decides the memory of a module's training step, for any process.

    Parameters
    ----------
    config : PipelineConfig
    code_folder : Path or None
    index : int
        The module's number.
    cell : tuple of int
        One row of its input: (channel, height, width) of a patch or a window, or (channel, time).
    forward_cell : tuple of int
        One row of the frozen forward's input: in dense encoding the largest window of a tile.
    shape : tuple of int
        Samples of a batch, and rows and columns of a sample's patches, if it has any.
    embedding : int
        Channels of an embedding.
    targets : int
        Channels of targets that are no embeddings.
    piece : int
        Rows in a piece of the frozen forward.
    micro_batch : int
        Patches in memory at a time.
    device : str
        "cpu" or "cuda".
    threads : int
        Within an operation, in training.
    lean : bool
        Whether the CPU's allocator keeps nothing back.
    """

    config: PipelineConfig
    code_folder: Path | None
    index: int
    cell: tuple[int, ...]
    forward_cell: tuple[int, ...]
    shape: tuple[int, ...]
    embedding: int
    targets: int
    piece: int
    micro_batch: int
    device: str
    threads: int
    lean: bool

    @property
    def rows(self) -> int:
        """Patches in a batch."""
        return math.prod(self.shape)

    @property
    def key(self) -> tuple[Any, ...]:
        """All of it, hashable."""
        own = (value for name, value in vars(self).items() if name != "config")
        return (self.config.model_dump_json(), *own)

    @property
    def input_precision(self) -> Precision:
        """The form in which the module's input is read."""
        if self.index == 1:
            return PLAIN
        name = self.config.stage(self.index - 1).cache.precision
        return Precision(name).with_any_scales(self.cell[0])

    @property
    def precision(self) -> Precision:
        """The form in which the module's outputs are stored."""
        return Precision(self.config.stage(self.index).cache.precision)

    def batch(self, on_read: Callable[[Tensor], None] = lambda _: None) -> AnyBatch:
        """A batch of numbers that do not matter."""
        return AnyBatch(self.shape, self.cell, self.input_precision, on_read)

    def module(self) -> nn.Module:
        space = Workspace(self.config, "", Path(), self.code_folder, torch.device(self.device))
        return space.build(self.index, self.cell[0])

    def objective(self) -> InfoNCE:
        return build_objective(
            self.config.stage(self.index).objective,
            channels=self.embedding,
            targets=self.targets,
            seed=self.config.seed,
            index=self.index,
        )


def step_spec(
    workspace: Workspace, index: int, shape: Shape, forward_cell: tuple[int, ...] | None = None
) -> StepSpec:
    """The training step of module ``index``, with a whole batch in one pass."""
    batch = (workspace.module_config(index).train.batch, *shape.trained_grid)
    return StepSpec(
        config=workspace.config,
        code_folder=workspace.code_folder,
        index=index,
        cell=shape.cell_in,
        forward_cell=forward_cell or shape.cell_in,
        shape=batch,
        embedding=shape.embedding,
        targets=shape.targets,
        piece=workspace.config.windows.lanes if shape.state else workspace.config.extract.batch,
        micro_batch=math.prod(batch),
        device=workspace.device.type,
        threads=torch.get_num_threads(),
        lean=workspace.budget.lean,
    )


@dataclass
class AnyBatch:
    """A batch of numbers that do not matter."""

    shape: tuple[int, ...]
    cell: tuple[int, ...]
    precision: Precision
    on_read: Callable[[Tensor], None]

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    def read(self, rows: Span, device: torch.device) -> Tensor:
        if self.precision.lossless:
            values = torch.randn(len(rows), *self.cell).to(device)
        else:
            stored = torch.zeros(len(rows), *self.cell, dtype=self.precision.stored_torch)
            values = self.precision.decode(stored.to(device), space=len(self.cell) - 1)
        self.on_read(values)
        return values
