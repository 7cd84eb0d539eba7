"""What goes into a module and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gim_stagewise.cache import Precision, auto_chunk
from gim_stagewise.config import AugmentConfig, CacheConfig
from gim_stagewise.errors import ConfigError
from gim_stagewise.models import output_shape
from gim_stagewise.objectives import check_rows
from gim_stagewise.stage.step import check_micro_batch
from gim_stagewise.stage.workspace import Workspace

Cell = tuple[int, int, int]


@dataclass(frozen=True)
class Shape:
    """What goes into a module and what comes out, for one sample.

    Parameters
    ----------
    grid : (int, int)
        Rows and columns of patches.
    trained_grid : (int, int)
        Those of the part that modules are trained and judged on (``augment.grid_crop``).
    cell_in, cell_out : tuple of int
        One patch before and after: (channel, height, width).
    embedding : int
        Channels of an embedding.
    input_op : str or None
        What the module does to its input before anything else, if it says so.
    """

    grid: tuple[int, int]
    trained_grid: tuple[int, int]
    cell_in: Cell
    cell_out: Cell
    embedding: int
    input_op: str | None = None

    def chunk_bytes(self, cache: CacheConfig, samples: int) -> int:
        """Bytes of one chunk of the module's cache, before it is compressed."""
        itemsize = Precision(cache.precision).itemsize
        per_sample = itemsize * math.prod(self.grid) * math.prod(self.cell_out)
        wanted = auto_chunk(per_sample) if cache.chunk == "auto" else cache.chunk
        return per_sample * min(wanted, samples)


def trained_part(augment: AugmentConfig, grid: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of patches that modules are trained and judged on.

    Raises
    ------
    ConfigError
        If ``augment.grid_crop`` is more than there are.
    """
    crop = augment.grid_crop
    if crop is None:
        return grid
    if crop > min(grid):
        raise ConfigError(
            f"is {crop}, but a sample has {grid[0]}×{grid[1]} patches; use {min(grid)} or less",
            key="augment.grid_crop",
        )
    return crop, crop


def check_shape(workspace: Workspace, index: int, grid: tuple[int, int], cell: Cell) -> Shape:
    """Check that module ``index`` can take its input, and say what it makes of it.

    Raises
    ------
    ConfigError, ModuleRefusedError
        If the module or its objective does not fit.
    """
    trained_grid = trained_part(workspace.config.augment, grid)
    train, objective = (
        workspace.module_config(index).train,
        workspace.module_config(index).objective,
    )
    if isinstance(train.micro_batch, int):
        check_micro_batch(
            train.micro_batch,
            train.batch * math.prod(trained_grid),
            key=f"module.{index}.train.micro_batch",
        )
    check_rows(
        trained_grid[0],
        prediction_steps=objective.prediction_steps,
        skip=objective.skip,
        key=f"module.{index}.objective.prediction_steps",
    )
    module = workspace.build(index, cell[0])
    out, embedding = output_shape(module, cell, key=f"module.{index}")
    channels, height, width = out
    input_op = getattr(module, "input_op", None)
    return Shape(grid, trained_grid, cell, (channels, height, width), embedding, input_op)
