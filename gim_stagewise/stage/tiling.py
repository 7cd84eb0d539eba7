"""How the outputs of items of any size are cut into tiles."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gim_stagewise.cache import Precision, TiledLayout
from gim_stagewise.cache.layout import MAX_CHUNK_BYTES, MIN_CHUNK_BYTES
from gim_stagewise.errors import ConfigError
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.workspace import Workspace
from gim_stagewise.windows import Geometry, Span, halo_overhead

# Inputs that are computed for the sake of others, over those that a tile is of.
MOST_OVERHEAD = 1.15
# Of a tile that a large halo asks for; others keep to the sizes of any chunk.
MOST_TILE_BYTES = 4 * MAX_CHUNK_BYTES


def tiled_layout(
    workspace: Workspace,
    index: int,
    shape: Shape,
    ids: Sequence[str],
    extents: Sequence[tuple[int, ...]],
) -> TiledLayout:
    """How the cache of module ``index`` is laid out, whether it is there or not.

    Parameters
    ----------
    workspace : Workspace
    index : int
    shape : Shape
        Of the module.
    ids : sequence of str
    extents : sequence of tuple of int
        Of each item's input.

    Raises
    ------
    ConfigError
        If ``windows.tile`` is no multiple of the positions that share a stored embedding.
    """
    config = workspace.module_config(index)
    dense = workspace.config.dense
    precision = Precision(config.cache.precision)
    outputs = tuple(shape.extent_out(extent) for extent in extents)
    cell = shape.cell_out[:1] if dense else shape.cell_out
    pool = workspace.config.stored_pool(index) if dense else 1
    side = workspace.config.windows.tile
    if side == "auto":
        side = chosen_tile(
            shape.geometry,
            axes=len(outputs[0]),
            place_bytes=precision.itemsize * math.prod(cell),
            pool=pool,
        )
    elif side % pool:
        raise ConfigError(
            f"is {side}, which is no multiple of the {pool} positions that share an embedding of "
            f"module {index} (objective.pool, or cache.pool)",
            key="windows.tile",
        )
    longest = [max(axis) for axis in zip(*outputs, strict=True)]
    if workspace.config.windows.tile == "auto":
        tile = tuple(_even(side, length, pool) for length in longest)
    else:
        # Of no use beyond the largest item.
        tile = tuple(min(side, -(-length // pool) * pool) for length in longest)
    return TiledLayout(
        ids=tuple(ids),
        extents=outputs,
        tile=tile,
        cell=cell,
        pool=pool,
        embedding=shape.embedding,
        codec=config.cache.codec,
        materialized=True,
        dtype=precision.stored_dtype,
        state=shape.state,
    )


def chosen_tile(geometry: Sequence[Geometry], *, axes: int, place_bytes: int, pool: int) -> int:
    """The smallest side of a tile whose halo costs little, with chunks of a good size.

    Parameters
    ----------
    geometry : sequence of Geometry
        Along each axis; none of patches, which have no halo.
    axes : int
    place_bytes : int
        Bytes at one place of the outputs, as they are stored.
    pool : int
        A tile is a multiple of it.
    """

    def rounded(places: float) -> int:
        side: float = places ** (1 / axes)
        return max(pool, math.ceil(side / pool) * pool)

    least = rounded(MIN_CHUNK_BYTES / place_bytes)
    most = max(least, rounded(MOST_TILE_BYTES / place_bytes))
    side = least
    while geometry and side < most and halo_overhead(geometry, (side,) * axes) > MOST_OVERHEAD:
        side += pool
    return side


def _even(side: int, length: int, pool: int) -> int:
    """A tile of about that side, of which a whole number goes into the largest item."""
    count = max(1, length // side)
    if count == 1 and 2 * length >= 3 * side:
        count = 2  # smaller ones, but each has a halo on one side alone
    return -(-length // (count * pool)) * pool


def largest_input(
    geometry: Sequence[Geometry], tile: tuple[int, ...], extents: Sequence[tuple[int, ...]]
) -> tuple[int, ...]:
    """The most inputs along each axis that a tile of outputs is computed from.

    Parameters
    ----------
    geometry : sequence of Geometry
        Along each axis; none of patches.
    tile : tuple of int
    extents : sequence of tuple of int
        Of the items' inputs.
    """
    longest = tuple(max(axis) for axis in zip(*extents, strict=True))
    if not geometry:
        return tuple(min(side, length) for side, length in zip(tile, longest, strict=True))
    found = []
    for own, side, length in zip(geometry, tile, longest, strict=True):
        far = Span(own.before, own.before + side)
        inputs, _ = own.window(far, far.stop * own.stride + own.kernel)
        found.append(min(len(inputs), length))
    return tuple(found)
