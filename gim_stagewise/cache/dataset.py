"""A cache as a PyTorch dataset, and an order of its samples that is random and cheap to read."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from gim_stagewise.errors import DataError
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources import Request, Split
from gim_stagewise.units import parse_bytes
from gim_stagewise.windows import Span

if TYPE_CHECKING:
    from gim_stagewise.cache.reader import Cache

# As of ``train.shuffle_window``.
WINDOW = "256MB"

Sample = tuple[Float[Tensor, "row column channel height width"], int]


class CacheDataset(Dataset[Sample]):
    """Samples of a cache for a ``torch.utils.data.DataLoader``.

    A sample is (activations, label): float32 [grid_row, grid_col, channel, height, width], and the
    label, -1 where there is none.

    Chunks that were read last stay in memory, in their stored form, so that an epoch in storage
    order, or in the order of `shuffled`, reads each chunk once. With ``shuffle=True`` a DataLoader
    asks for samples of nearly all chunks in every batch, which reads them over and over unless all
    of them fit.

    Parameters
    ----------
    cache : Cache
    split : str
        "unlabeled", "train" or "test".
    view : int
    window : int or str
        Bytes of chunks that stay in memory, and are mixed by `shuffled`, such as "256MB"; one chunk
        at least. Each worker of a DataLoader has its own.

    Raises
    ------
    DataError
        If the view is not stored for a sample, or the window is no size.
    """

    def __init__(
        self, cache: Cache, split: Split, view: int = 0, window: int | str = WINDOW
    ) -> None:
        ids = cache.split(split)
        self._cache = cache
        self._split = split
        self._view = view
        self._positions = np.array([cache.place(Request(i, view))[1] for i in ids], np.int64)
        self._labels = np.full(len(cache.ids), NO_LABEL)
        if cache.label_names:
            self._labels = cache.labels(cache.label_names[0])
        try:
            chunks = parse_bytes(window) // (cache.chunk_items * cache.item_bytes)
        except ValueError as error:
            raise DataError(f"window is {window!r}: {error}") from None
        self._most_held = max(1, chunks)
        self._held: OrderedDict[int, NDArray[Any]] = OrderedDict()

    def __repr__(self) -> str:
        own = f"{self._split!r}, view={self._view}, {len(self)} samples"
        return f"CacheDataset({own}, of {self._cache})"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_held": OrderedDict()}

    def __len__(self) -> int:
        return len(self._positions)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples at once; a DataLoader asks for its batches this way."""
        positions = self._positions[np.asarray(indices, np.intp)]
        chunks, places = np.divmod(positions, self._cache.chunk_items)
        decode = self._cache.precision.decode_array
        samples: dict[int, Sample] = {}
        # In the order in which they are asked for: a batch may be where one window ends and the
        # next begins, whose chunks take the place of those that are done with.
        for chunk in dict.fromkeys(chunks.tolist()):
            stored = self._chunk(chunk)
            for number in np.flatnonzero(chunks == chunk).tolist():
                values = torch.from_numpy(decode(stored[places[number]].copy()))
                samples[number] = values, int(self._labels[positions[number]])
        return [samples[number] for number in range(len(positions))]

    def _chunk(self, number: int) -> NDArray[Any]:
        """Samples of a chunk in their stored form: [sample, grid_row, ...]."""
        stored = self._held.pop(number, None)
        if stored is None:
            with suppress(KeyError):  # another thread makes room as well
                while len(self._held) >= self._most_held:
                    self._held.popitem(last=False)
            rows = Span(0, self._cache.layout.grid[0])
            parts = self._cache.read_chunk("activations", self._view, number, rows)
            # They come in memory that the next file is read into.
            copies = [values.copy() for _, values in parts]
            stored = copies[0] if len(copies) == 1 else np.concatenate(copies, axis=1)
        self._held[number] = stored
        return stored

    def shuffled(self, seed: int = 0) -> ShuffledSampler:
        """Samples in random order, as ``sampler`` of a DataLoader, that reads each chunk once."""
        return ShuffledSampler(self, seed)

    def shuffled_order(self, *, seed: int, epoch: int) -> NDArray[np.int64]:
        """Indexes of all samples in the order of a `ShuffledSampler`."""
        chunks, chunk_of = np.unique(
            self._positions // self._cache.chunk_items, return_inverse=True
        )
        # Samples that are chunks of their own need not be read together.
        windows = -(-len(chunks) // self._most_held) if self._cache.chunk_items > 1 else 1
        draw = np.random.default_rng(derive_seed(seed, "order of a dataset", epoch))
        window_of = (draw.permutation(len(chunks)) * windows // max(1, len(chunks)))[chunk_of]
        order = draw.permutation(len(self))
        return order[np.argsort(window_of[order], kind="stable")]


class ShuffledSampler(Sampler[int]):
    """Samples of a dataset in random order, for a ``torch.utils.data.DataLoader``.

    As many chunks as the dataset's window holds are drawn at random, and their samples shuffled;
    then the next ones. So each worker of a DataLoader reads a chunk once an epoch at most. The
    order is a function of cache, split, window, seed and epoch. Where few chunks fit in the
    window, batches have many samples of the same chunk.

    Parameters
    ----------
    data : CacheDataset
    seed : int

    Attributes
    ----------
    epoch : int
        As given to `set_epoch`, 0 at first.
    """

    def __init__(self, data: CacheDataset, seed: int = 0) -> None:
        self._data = data
        self._seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch is next; otherwise all are alike (as of ``DistributedSampler``)."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self._data)

    def __iter__(self) -> Iterator[int]:
        yield from self._data.shuffled_order(seed=self._seed, epoch=self.epoch).tolist()
