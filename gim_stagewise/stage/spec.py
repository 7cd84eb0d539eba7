"""Everything that decides the memory of a training step and of a frozen forward."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gim_stagewise.cache import PLAIN, Precision
from gim_stagewise.config import PipelineConfig, TrainConfig
from gim_stagewise.objectives import Objective
from gim_stagewise.stage.assemble import assemble
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.workspace import Workspace
from gim_stagewise.windows import Span


@dataclass(frozen=True)
class StepSpec:
    """Everything that decides the memory of a training step, for any process.

    Parameters
    ----------
    config : PipelineConfig
    code_folder : Path or None
    indexes : tuple of int
        Numbers of the modules that the step trains: one, or all.
    shapes : tuple of Shape
        Of those modules.
    classes, label_steps : int
        Of the labels, and how many a sample has if not one, for supervised modes.
    forward_cell : tuple of int
        One row of the frozen forward's input: in dense encoding the largest window of a tile.
    shape : tuple of int
        Samples of a batch, and rows and columns of a sample's patches, if it has any.
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
    indexes: tuple[int, ...]
    shapes: tuple[Shape, ...]
    classes: int
    label_steps: int
    forward_cell: tuple[int, ...]
    shape: tuple[int, ...]
    piece: int
    micro_batch: int
    device: str
    threads: int
    lean: bool

    @property
    def index(self) -> int:
        """The (top) module's number."""
        return self.indexes[-1]

    @property
    def label(self) -> str:
        """What messages call the modules."""
        if len(self.indexes) == 1:
            return f"module {self.index}"
        return f"modules {self.indexes[0]} to {self.index}"

    @property
    def train_key(self) -> str:
        """The key of the table that says how they are trained."""
        return f"module.{self.index}.train" if len(self.indexes) == 1 else "train"

    @property
    def train(self) -> TrainConfig:
        """How they are trained: what all of them have in common."""
        return self.config.stage(self.indexes[0]).train

    @property
    def trains(self) -> list[TrainConfig]:
        """How each of them is."""
        return [self.config.stage(index).train for index in self.indexes]

    @property
    def cell(self) -> tuple[int, ...]:
        """One row of the input: (channel, height, width), or (channel, time)."""
        return self.shapes[0].cell_in

    @property
    def rows(self) -> int:
        """Patches in a batch."""
        return math.prod(self.shape)

    @property
    def key(self) -> tuple[Any, ...]:
        """What decides memory, hashable: equal for steps that take the same."""
        users_code = any(":" in module.build for module in self.config.module.values())
        own = vars(self) | {
            "config": self.config.model_dump_json(exclude={"name", "seed", "source"}),
            "code_folder": self.code_folder if users_code else None,
        }
        return tuple(own.values())

    @property
    def input_precision(self) -> Precision:
        """The form in which the input is read."""
        if self.indexes[0] == 1:
            return PLAIN
        name = self.config.stage(self.indexes[0] - 1).cache.precision
        return Precision(name).with_any_scales(self.cell[0])

    @property
    def precision(self) -> Precision:
        """The form in which the (top) module's outputs are stored."""
        return Precision(self.config.stage(self.index).cache.precision)

    def batch(self, on_read: Callable[[Tensor], None] = lambda _: None) -> AnyBatch:
        """A batch of numbers that do not matter."""
        return AnyBatch(self.shape, self.cell, self.input_precision, on_read)

    def labels(self, device: torch.device) -> Tensor | None:
        """Labels of such a batch, where the objective wants any."""
        if not self.config.supervised:
            return None
        shape = (self.shape[0], self.label_steps) if self.label_steps else self.shape[:1]
        return torch.zeros(shape, dtype=torch.int64, device=device)

    def module(self) -> nn.Module:
        """The (top) module alone, as it is frozen, whatever it is trained with."""
        return self._space.build(self.index, self.shapes[-1].cell_in[0])

    def parts(self) -> tuple[nn.Module, Objective]:
        """Module and objective, as `assemble` gives them."""
        return assemble(self._space, self.indexes, self.shapes, classes=self.classes)

    @property
    def _space(self) -> Workspace:
        return Workspace(self.config, "", Path(), self.code_folder, torch.device(self.device))


def step_spec(
    workspace: Workspace, index: int, shape: Shape, forward_cell: tuple[int, ...] | None = None
) -> StepSpec:
    """The training step of module ``index``, with a whole batch in one pass."""
    piece = workspace.config.windows.lanes if shape.state else workspace.config.extract.batch
    return _spec(workspace, (index,), (shape,), forward_cell or shape.cell_in, piece)


def joint_spec(
    workspace: Workspace, shapes: Sequence[Shape], *, classes: int = 0, label_steps: int = 0
) -> StepSpec:
    """The training step of all modules, with a whole batch in one pass."""
    indexes, piece = tuple(workspace.config.module), workspace.config.extract.batch
    spec = _spec(workspace, indexes, tuple(shapes), shapes[0].cell_in, piece)
    return replace(spec, classes=classes, label_steps=label_steps)


def _spec(
    workspace: Workspace,
    indexes: tuple[int, ...],
    shapes: tuple[Shape, ...],
    forward_cell: tuple[int, ...],
    piece: int,
) -> StepSpec:
    batch = (workspace.module_config(indexes[0]).train.batch, *shapes[0].trained_grid)
    return StepSpec(
        config=workspace.config,
        code_folder=workspace.code_folder,
        indexes=indexes,
        shapes=shapes,
        classes=0,
        label_steps=0,
        forward_cell=forward_cell,
        shape=batch,
        piece=piece,
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
