"""Other libraries' views of a cache: a PyTorch dataset, a Dask array."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from gim_stagewise.cache.precision import Precision
from gim_stagewise.sources import MISSING_LABEL, Request, Split

if TYPE_CHECKING:
    from gim_stagewise.cache.reader import Cache

Sample = tuple[Float[Tensor, "row column channel height width"], int]


class CacheDataset(Dataset[Sample]):
    """Samples of a cache for a ``torch.utils.data.DataLoader``.

    A sample is (activations, label): float32 [grid_row, grid_col, channel, height, width], and the
    label, -1 where there is none. Batches are read chunk by chunk.

    Parameters
    ----------
    cache : Cache
    split : str
        "unlabeled", "train" or "test".
    view : int
    """

    def __init__(self, cache: Cache, split: Split, view: int = 0) -> None:
        self._cache = cache
        self._ids = list(cache.split(split))
        self._view = view
        self._labels = dict.fromkeys(self._ids, MISSING_LABEL)
        if cache.label_names:
            labels = cache.labels(cache.label_names[0]).tolist()
            known = dict(zip(cache.ids, labels, strict=True))
            self._labels = {item_id: known[item_id] for item_id in self._ids}

    def __len__(self) -> int:
        return len(self._ids)

    def __getitem__(self, index: int) -> Sample:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Sample]:
        """Several samples at once; a DataLoader asks for its batches this way."""
        ids = [self._ids[index] for index in indices]
        arrays = self._cache.read([Request(item_id, self._view) for item_id in ids])
        return [
            (torch.from_numpy(array), self._labels[item_id])
            for array, item_id in zip(arrays, ids, strict=True)
        ]


class DecodedArray:
    """Stored activations as an array of float32 that is read where it is sliced.

    Parameters
    ----------
    stored : zarr.Array
        [view, sample, grid_row, grid_col, channel, height, width].
    precision : Precision
    """

    dtype = np.dtype(np.float32)

    def __init__(self, stored: Any, precision: Precision) -> None:
        self._stored = stored
        self._precision = precision
        self.shape: tuple[int, ...] = stored.shape
        self.chunks: tuple[int, ...] = stored.chunks
        self.ndim: int = stored.ndim

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """Values at integers and slices, as NumPy would give them."""
        keys = list(key) if isinstance(key, tuple) else [key]
        if Ellipsis in keys:
            place = keys.index(Ellipsis)
            missing = self.ndim - len(keys) + 1
            keys[place : place + 1] = [slice(None)] * missing
        keys += [slice(None)] * (self.ndim - len(keys))
        # Scales go by channel, so the last axes are read whole and cut after decoding.
        lead, cell = tuple(keys[:4]), tuple(keys[4:])
        values = self._precision.decode_array(np.asarray(self._stored[lead]))
        return values[(..., *cell)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = self[...]
        return values if dtype is None else values.astype(dtype)


def dask_array(cache: Cache, name: str) -> Any:
    """An array of a cache as a lazy ``dask.array.Array``, a task per chunk."""
    import dask.array

    stored = dask.array.from_zarr(str(cache.path), component=name)  # type: ignore[no-untyped-call]
    if name != "activations" or cache.precision.stored_dtype == "float32":
        return stored
    return stored.map_blocks(cache.precision.decode_array, dtype=np.float32)
