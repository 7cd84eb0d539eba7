"""What goes into a module and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gim_stagewise.cache import Precision, auto_chunk
from gim_stagewise.config import CacheConfig
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
    cell_in, cell_out : tuple of int
        One patch before and after: (channel, height, width).
    embedding : int
        Channels of an embedding.
    input_op : str or None
        What the module does to its input before anything else, if it says so.
    """

    grid: tuple[int, int]
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


def check_shape(workspace: Workspace, index: int, grid: tuple[int, int], cell: Cell) -> Shape:
    """Check that module ``index`` can take its input, and say what it makes of it.

    Raises
    ------
    ConfigError, ModuleRefusedError
        If the module or its objective does not fit.
    """
    train, objective = (
        workspace.module_config(index).train,
        workspace.module_config(index).objective,
    )
    if isinstance(train.micro_batch, int):
        check_micro_batch(
            train.micro_batch,
            train.batch * math.prod(grid),
            key=f"module.{index}.train.micro_batch",
        )
    check_rows(
        grid[0],
        prediction_steps=objective.prediction_steps,
        skip=objective.skip,
        key=f"module.{index}.objective.prediction_steps",
    )
    module = workspace.build(index, cell[0])
    out, embedding = output_shape(module, cell, key=f"module.{index}")
    channels, height, width = out
    input_op = getattr(module, "input_op", None)
    return Shape(grid, cell, (channels, height, width), embedding, input_op)
