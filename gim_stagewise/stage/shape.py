"""What goes into a module and what comes out."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gim_stagewise.cache import Precision, auto_chunk
from gim_stagewise.config import AugmentConfig, CacheConfig, PipelineConfig
from gim_stagewise.errors import ConfigError, ModuleRefusedError
from gim_stagewise.models import (
    check_windows,
    input_operation,
    module_geometry,
    output_shape,
    state_size,
    target_channels,
)
from gim_stagewise.objectives import check_rows
from gim_stagewise.stage.step import check_micro_batch
from gim_stagewise.stage.workspace import Workspace
from gim_stagewise.windows import Geometry

# One row: (channel, height, width) of a patch or a window, or (channel, time).
Cell = tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """What goes into a module and what comes out, for one sample.

    Parameters
    ----------
    grid : tuple of int
        Rows and columns of patches; of a window, where items are read in windows; none in dense
        encoding.
    trained_grid : tuple of int
        Those that modules are trained on.
    cell_in, cell_out : tuple of int
        One row, before and after.
    embedding : int
        Channels of an embedding.
    targets : int
        Channels of targets that are no embeddings (see `gim_stagewise.models.embed`).
    state : int
        Numbers in the module's state; 0 of one that has none.
    cells : tuple of int
        Extent of a window's embeddings in dense encoding.
    input_op : str or None
        What the module does to its input before anything else, if it says so.
    geometry : tuple of Geometry
        Of the module along each axis, in dense encoding.
    """

    grid: tuple[int, ...]
    trained_grid: tuple[int, ...]
    cell_in: Cell
    cell_out: Cell
    embedding: int
    targets: int = 0
    state: int = 0
    cells: tuple[int, ...] = ()
    input_op: str | None = None
    geometry: tuple[Geometry, ...] = ()

    @property
    def input_bytes(self) -> int:
        """Bytes of a sample of the input in memory."""
        return 4 * math.prod(self.grid) * math.prod(self.cell_in)

    def chunk(self, cache: CacheConfig, samples: int) -> int:
        """Samples in a chunk of the module's cache."""
        wanted = cache.chunk
        if wanted == "auto":
            wanted = auto_chunk(self._stored_bytes(cache), self.input_bytes)
        return min(wanted, samples)

    def chunk_bytes(self, cache: CacheConfig, samples: int) -> int:
        """Bytes of one chunk of the module's cache, before it is compressed."""
        return self._stored_bytes(cache) * self.chunk(cache, samples)

    def _stored_bytes(self, cache: CacheConfig) -> int:
        """Bytes of a sample of the module's cache, before it is compressed."""
        itemsize = Precision(cache.precision).itemsize
        return itemsize * math.prod(self.grid) * math.prod(self.cell_out)

    def extent_out(self, extent: tuple[int, ...]) -> tuple[int, ...]:
        """Extent of the outputs for an item whose input has this one."""
        if not self.geometry:
            return extent
        pairs = zip(self.geometry, extent, strict=True)
        return tuple(geometry.count(length) for geometry, length in pairs)


def trained_part(augment: AugmentConfig, grid: tuple[int, ...]) -> tuple[int, ...]:
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


def window_of(config: PipelineConfig, index: int) -> tuple[int, ...]:
    """Extent of the windows that module ``index`` is trained on, where items are read in such."""
    side = config.stage(index).train.window
    assert side is not None
    return (side,) if config.sequences else (side, side)


def windowed_input(config: PipelineConfig, index: int, cell: Cell) -> tuple[tuple[int, ...], Cell]:
    """Grid and row of a window that module ``index`` is trained on.

    Parameters
    ----------
    config : PipelineConfig
    index : int
    cell : tuple of int
        What there is at a place of its input: a patch, or (channel,).
    """
    window = window_of(config, index)
    return ((), (cell[0], *window)) if config.dense else (window, cell)


def check_shape(workspace: Workspace, index: int, grid: tuple[int, ...], cell: Cell) -> Shape:
    """Check that module ``index`` can take its input, and say what it makes of it.

    Raises
    ------
    ConfigError, ModuleRefusedError
        If the module or its objective does not fit.
    """
    trained_grid = trained_part(workspace.config.augment, grid)
    config = workspace.module_config(index)
    if isinstance(config.train.micro_batch, int):
        check_micro_batch(
            config.train.micro_batch,
            config.train.batch * math.prod(trained_grid),
            key=f"module.{index}.train.micro_batch",
        )
    dense = workspace.config.dense
    if not dense:
        _check_rows(workspace, index, trained_grid[0], "patches")
    module = workspace.build(index, cell[0])
    out, embedded = output_shape(module, cell, key=f"module.{index}", dense=dense)
    input_op = input_operation(module)
    state = state_size(module, cell, key=f"module.{index}")
    targets = target_channels(module, cell[0])
    if not dense:
        if targets:
            raise ModuleRefusedError(
                'predicts its input, which takes encoding = "dense"', key=f"module.{index}"
            )
        return Shape(grid, trained_grid, cell, out, embedded[0], input_op=input_op)
    geometry = module_geometry(module, cell[0], len(cell) - 1, key=f"module.{index}")
    _check_geometry(index, geometry, cell, out)
    if not state:
        check_windows(module, cell[0], geometry, key=f"module.{index}")
    *cells, embedding = embedded
    if targets and tuple(cells) != cell[1:]:
        raise ModuleRefusedError(
            f"predicts its input, which has {cell[1:]} positions, with embeddings of "
            f"{tuple(cells)}; it needs one for each, and objective.pool = 1",
            key=f"module.{index}",
        )
    _check_rows(workspace, index, cells[0], "windows")
    return Shape(
        grid=grid,
        trained_grid=trained_grid,
        cell_in=cell,
        cell_out=out,
        embedding=embedding,
        targets=targets,
        state=state,
        cells=tuple(cells),
        input_op=input_op,
        geometry=geometry,
    )


def _check_rows(workspace: Workspace, index: int, rows: int, what: str) -> None:
    objective = workspace.module_config(index).objective
    smaller = "a larger train.window"
    if what == "patches":
        cropped = workspace.config.augment.grid_crop is not None
        smaller = "a larger augment.grid_crop" if cropped else "smaller patches"
    if objective.window is not None and objective.window < rows:
        rows, smaller = objective.window, "a larger objective.window"
    check_rows(
        rows,
        prediction_steps=objective.prediction_steps,
        skip=objective.skip,
        key=f"module.{index}.objective.prediction_steps",
        remedy=smaller,
    )


def _check_geometry(index: int, geometry: tuple[Geometry, ...], cell: Cell, out: Cell) -> None:
    """Refuse a module whose outputs are not those that its geometry says."""
    counts = tuple(own.count(length) for own, length in zip(geometry, cell[1:], strict=True))
    if counts != out[1:]:
        raise ModuleRefusedError(
            f"its geometry says that {cell[1:]} inputs give {counts} outputs, and they give "
            f"{out[1:]}; correct the geometry that it declares, or remove it",
            key=f"module.{index}",
        )
