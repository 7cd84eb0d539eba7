"""What a cache looks like on disk, and how it is cut into chunks and blocks.

A cache is one Zarr v3 group (format version 1):

=================  ==============================================================
array              axes
=================  ==============================================================
``activations``    view, sample, grid_row, grid_col, channel, height, width (stored form, see
                   `gim_stagewise.cache.precision`)
``pooled``         view, sample, grid_row, grid_col, channel (float32)
``ids``            sample (strings)
``splits``         sample (bit mask, CF attributes ``flag_masks``, ``flag_meanings``)
``labels/<name>``  sample (int64, -1 where missing)
``checksums/<…>``  block, byte (SHA-256 of a block's files in that array, then the CRC-32C of
                   each of them, little-endian; written by the seal)
=================  ==============================================================

View 0 is the evaluation view; it is stored for every sample of a labelled split, and is the
only view where nothing is drawn at random. Views 1 … V are stored for unlabeled samples.
A *block* is one chunk of samples in one view, in ``activations`` and ``pooled`` alike: whole
chunks, so that blocks can be written in any order by anyone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from gim_stagewise.sources import Listed
from gim_stagewise.windows import Span, even_ranges

FORMAT_VERSION = 1
ACTIVATION_AXES = ("view", "sample", "grid_row", "grid_col", "channel", "height", "width")
POOLED_AXES = ("view", "sample", "grid_row", "grid_col", "channel")

# Chunks between these sizes keep a store fast: smaller ones pay per file, larger ones make a
# shuffled epoch hold too much in memory.
MIN_CHUNK_BYTES = 4_000_000
MAX_CHUNK_BYTES = 16_000_000
# A chunk is computed as a whole, from inputs that are in memory together.
MAX_INPUT_BYTES = 64_000_000


@dataclass(frozen=True)
class Block:
    """The unit of work and of commit: one chunk of samples in one view, or one tile of a sample.

    ``tile`` has the tile's number along each axis, where samples are cut into tiles.
    """

    index: int
    view: int
    samples: Span
    tile: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredArray:
    """One of the arrays that blocks are written to."""

    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    dtype: str
    axes: tuple[str, ...]


@dataclass(frozen=True)
class BlockPart:
    """What a block is in one array.

    Parameters
    ----------
    array : str
        Name of the array.
    files : tuple of str
        The chunk files that hold the block, by their paths below the group.
    inside : tuple
        For each file, where in its chunk the block's values are; what else it has is padding.
    values : tuple
        For each file, which of the block's values it holds.
    """

    array: str
    files: tuple[str, ...]
    inside: tuple[tuple[int | slice, ...], ...]
    values: tuple[tuple[slice, ...], ...]


@dataclass(frozen=True)
class CacheLayout:
    """Shapes and codec of a cache's arrays.

    Parameters
    ----------
    samples : int
    views : int
        Length of the view axis: 1, or 1 + V where augmentation is random.
    grid : (int, int)
        Rows and columns of the patch grid.
    cell : tuple of int
        One patch's activations: (channel, height, width).
    embedding : int
        Channels of ``pooled``.
    chunk : int
        Samples in a chunk.
    codec : str
        "lz4", "zstd" or "none".
    materialized : bool
        Whether activations are stored; embeddings always are.
    dtype : str
        Type that activations are stored as.
    """

    samples: int
    views: int
    grid: tuple[int, int]
    cell: tuple[int, int, int]
    embedding: int
    chunk: int
    codec: str
    materialized: bool = True
    dtype: str = "float32"

    @property
    def space(self) -> int:
        """Axes of activations after the channel."""
        return 2

    @property
    def sample_bytes(self) -> int:
        """Bytes of one sample's activations as they are stored, uncompressed."""
        return np.dtype(self.dtype).itemsize * math.prod(self.grid) * math.prod(self.cell)

    @property
    def embedding_bytes(self) -> int:
        """Bytes of one sample's embeddings, uncompressed."""
        return 4 * math.prod(self.grid) * self.embedding

    @property
    def block_bytes(self) -> int:
        """Bytes of a block as it is stored, uncompressed."""
        return self.chunk * (self.sample_bytes + self.embedding_bytes)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What a block has parts of."""
        return ("activations", "pooled") if self.materialized else ("pooled",)

    @cached_property
    def arrays(self) -> dict[str, StoredArray]:
        """The arrays that blocks are written to, by name."""
        lead = (self.views, self.samples, *self.grid)
        pooled = StoredArray(
            (*lead, self.embedding),
            (1, self.chunk, *self.grid, self.embedding),
            "float32",
            POOLED_AXES,
        )
        if not self.materialized:
            return {"pooled": pooled}
        rows = self.grid[0]
        if self.sample_bytes > MAX_CHUNK_BYTES:
            # Even one sample is too much for a chunk: cut it between grid rows.
            rows = max(1, rows * MAX_CHUNK_BYTES // self.sample_bytes)
        chunks = (1, self.chunk, rows, self.grid[1], *self.cell)
        activations = StoredArray((*lead, *self.cell), chunks, self.dtype, ACTIVATION_AXES)
        return {"activations": activations, "pooled": pooled}

    @property
    def block_count(self) -> int:
        """Blocks in a view of all samples."""
        return math.ceil(self.samples / self.chunk)

    def blocks(self, source: Listed) -> list[Block]:
        """All blocks, in storage order; a block is there if one of its samples needs that view."""
        ids = source.ids
        found: list[Block] = []
        for view in range(self.views):
            wanted = self.wanted(source, view)
            for samples in even_ranges(self.samples, self.chunk):
                if self.views == 1 or not wanted.isdisjoint(ids[samples.slice]):
                    found.append(Block(len(found), view, samples))
        return found

    def wanted(self, source: Listed, view: int) -> frozenset[str]:
        """Ids of the samples that a view is stored for.

        A block may have others besides, which are neither computed nor read.
        """
        if self.views == 1:
            return frozenset(source.ids)
        if view == 0:
            return frozenset([*source.split("train"), *source.split("test")])
        return frozenset(source.split("unlabeled"))

    def parts(self, block: Block) -> dict[str, BlockPart]:
        """What a block is in each array."""
        return {name: self._part(name, block) for name in self.arrays}

    def _part(self, name: str, block: Block) -> BlockPart:
        array = self.arrays[name]
        tail = ".0" * (len(array.shape) - 3)
        first = block.samples.start // self.chunk
        # Where samples are large, a chunk has some of their grid rows.
        rows = even_ranges(self.grid[0], array.chunks[2])
        return BlockPart(
            array=name,
            files=tuple(
                f"{name}/c.{block.view}.{first}.{number}{tail}" for number in range(len(rows))
            ),
            inside=tuple((0, slice(len(block.samples)), slice(len(own))) for own in rows),
            values=tuple((slice(None), own.slice) for own in rows),
        )

    def chunk_files(self, block: Block) -> list[str]:
        """Paths, below the group, of all chunk files that hold a block."""
        return [file for part in self.parts(block).values() for file in part.files]


def auto_chunk(sample_bytes: int, input_bytes: int = 0) -> int:
    """Samples per chunk so that a chunk reaches `MIN_CHUNK_BYTES`.

    Of modules that make little of much there are fewer: what chunks are made from, ``input_bytes``
    a sample, stays below `MAX_INPUT_BYTES`.
    """
    count = math.ceil(MIN_CHUNK_BYTES / sample_bytes)
    if input_bytes:
        count = min(count, MAX_INPUT_BYTES // input_bytes)
    return max(1, count)
