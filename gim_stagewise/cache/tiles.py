"""The cache of inputs of any size: an array for each item, cut into tiles.

=====================  ============================================================
array                  axes
=====================  ============================================================
``activations/<id>``   channel, height, width; or channel, time (dense encoding); or
                       grid_row, grid_col, channel, height, width (patches)
``pooled/<id>``        grid_row, grid_col, channel; or time, channel (float32)
``states/<id>``        tile, state: of a stateful module, after each tile (float32); after an
                       item's last tile, that is beyond its end, of no meaning
=====================  ============================================================

In names ``<id>`` is the item's id with what no file's name should have as ``%`` and its code
(RFC 3986). Ids, splits and checksums are as in any other cache. A *block* is one tile of one item.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from urllib.parse import quote

import numpy as np

from gim_stagewise.cache.layout import Block, BlockPart, CacheLayout, StoredArray
from gim_stagewise.sources import Listed
from gim_stagewise.sources.base import IMAGE_AXES, PATCH_AXES, SEQUENCE_AXES
from gim_stagewise.windows import Region, Span


@dataclass(frozen=True)
class TiledLayout:
    """Shapes and codec of the arrays of items of any size.

    Parameters
    ----------
    ids : tuple of str
    extents : tuple of tuple of int
        Of each item's outputs: rows and columns of patches, or positions along each axis.
    tile : tuple of int
        Extent of a tile, of which each is a chunk.
    cell : tuple of int
        What there is at a place: (channel, height, width) of a patch, or (channel,).
    pool : int
        Positions along an axis that share an embedding; 1 for patches. Divides ``tile``.
    embedding : int
        Channels of ``pooled``.
    codec : str
        "lz4", "zstd" or "none".
    materialized : bool
        Whether activations are stored; embeddings always are.
    dtype : str
        Type that activations are stored as.
    state : int
        Numbers in the module's state; 0 of one that has none.
    """

    ids: tuple[str, ...]
    extents: tuple[tuple[int, ...], ...]
    tile: tuple[int, ...]
    cell: tuple[int, ...]
    pool: int
    embedding: int
    codec: str
    materialized: bool = True
    dtype: str = "float32"
    state: int = 0

    @property
    def samples(self) -> int:
        return len(self.ids)

    @property
    def views(self) -> int:
        """Length of the view axis, which there is none of."""
        return 1

    @property
    def dense(self) -> bool:
        """Whether places are positions of a convolution's output, and not patches."""
        return len(self.cell) == 1

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of an item's activations."""
        if not self.dense:
            return PATCH_AXES
        return IMAGE_AXES if len(self.tile) == 2 else SEQUENCE_AXES

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a block has parts of."""
        kinds = ("activations", "pooled") if self.materialized else ("pooled",)
        return (*kinds, "states") if self.state else kinds

    @property
    def space(self) -> int:
        """Axes of activations after the channel."""
        return len(self.tile) if self.dense else 2

    @property
    def place_bytes(self) -> int:
        """Bytes of the activations at one place as they are stored, uncompressed."""
        return np.dtype(self.dtype).itemsize * math.prod(self.cell)

    @property
    def positions(self) -> int:
        """Places of all items."""
        return sum(map(math.prod, self.extents))

    @property
    def block_bytes(self) -> int:
        """Bytes of a block as it is stored, uncompressed."""
        embeddings = math.prod(self._pooled(self.tile)) * self.embedding * 4
        return math.prod(self.tile) * self.place_bytes + embeddings + 4 * self.state

    @property
    def pooled_bytes(self) -> int:
        """Bytes of all embeddings, uncompressed."""
        return 4 * self.embedding * sum(math.prod(self._pooled(own)) for own in self.extents)

    @cached_property
    def _number(self) -> dict[str, int]:
        return {item_id: number for number, item_id in enumerate(self.ids)}

    def extent(self, item_id: str) -> tuple[int, ...]:
        """Extent of an item's outputs."""
        return self.extents[self._number[item_id]]

    def array_name(self, kind: str, number: int) -> str:
        """Name of an item's array."""
        return f"{kind}/{quote(self.ids[number], safe='')}"

    @cached_property
    def arrays(self) -> dict[str, StoredArray]:
        """The arrays that blocks are written to, by name."""
        found = {}
        for kind in self.kinds:
            for number, extent in enumerate(self.extents):
                found[self.array_name(kind, number)] = self._array(kind, extent)
        return found

    def _array(self, kind: str, extent: tuple[int, ...]) -> StoredArray:
        if kind == "pooled":
            axes = PATCH_AXES[:2] if len(self.tile) == 2 else ("time",)
            shape = (*self._pooled(extent), self.embedding)
            chunks = (*self._pooled(self.tile), self.embedding)
            return StoredArray(shape, chunks, "float32", (*axes, "channel"))
        if kind == "states":
            (count,) = self._tiles(extent)
            return StoredArray((count, self.state), (1, self.state), "float32", ("tile", "state"))
        lead, tail = (self.cell, ()) if self.dense else ((), self.cell)
        return StoredArray(
            (*lead, *extent, *tail), (*lead, *self.tile, *tail), self.dtype, self.axes
        )

    def _pooled(self, extent: tuple[int, ...]) -> tuple[int, ...]:
        return tuple(-(-length // self.pool) for length in extent)

    def _tiles(self, extent: tuple[int, ...]) -> tuple[int, ...]:
        """Tiles along each axis."""
        return tuple(-(-length // size) for length, size in zip(extent, self.tile, strict=True))

    @property
    def block_count(self) -> int:
        """Tiles of all items."""
        return sum(math.prod(self._tiles(extent)) for extent in self.extents)

    def blocks(self, source: Listed) -> list[Block]:
        """All blocks, item by item, the last axis fastest."""
        found: list[Block] = []
        for number, extent in enumerate(self.extents):
            for tile in product(*map(range, self._tiles(extent))):
                found.append(Block(len(found), 0, Span(number, number + 1), tile))
        return found

    @cached_property
    def _first(self) -> list[int]:
        """Index of the first block of each item."""
        counts = (math.prod(self._tiles(extent)) for extent in self.extents)
        return [0, *accumulate(counts)]

    def index(self, number: int, tile: tuple[int, ...]) -> int:
        """Index of the block of an item's tile."""
        place = 0
        for own, count in zip(tile, self._tiles(self.extents[number]), strict=True):
            place = place * count + own
        return self._first[number] + place

    def region(self, block: Block) -> Region:
        """The places of a block."""
        extent = self.extents[block.samples.start]
        starts = (n * size for n, size in zip(block.tile, self.tile, strict=True))
        return tuple(
            Span(start, min(start + size, length))
            for start, size, length in zip(starts, self.tile, extent, strict=True)
        )

    def parts(self, block: Block) -> dict[str, BlockPart]:
        """What a block is in each kind of array."""
        region = self.region(block)
        return {kind: self._part(kind, block, region) for kind in self.kinds}

    def _part(self, kind: str, block: Block, region: Region) -> BlockPart:
        name = self.array_name(kind, block.samples.start)
        if kind == "states":
            (tile,) = block.tile
            whole = (slice(1), slice(None))
            return BlockPart(name, (f"{name}/c.{tile}.0",), (whole,), ((),))
        numbers = [*block.tile]
        if kind == "pooled":
            spans = [Span(s.start // self.pool, -(-s.stop // self.pool)) for s in region]
            numbers.append(0)
            lead: tuple[slice, ...] = ()
        else:
            spans = list(region)
            numbers = [0, *numbers] if self.dense else [*numbers, 0, 0, 0]
            lead = (slice(None),) if self.dense else ()
        return BlockPart(
            array=name,
            files=(f"{name}/c.{'.'.join(map(str, numbers))}",),
            inside=((*lead, *(slice(len(span)) for span in spans)),),
            values=((),),
        )

    def chunk_files(self, block: Block) -> list[str]:
        """Paths, below the group, of all chunk files that hold a block."""
        return [file for part in self.parts(block).values() for file in part.files]


Layout = CacheLayout | TiledLayout
