"""Other libraries' views of a cache: a PyTorch dataset, a Dask array."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset

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
            (torch.from_numpy(array.copy()), self._labels[item_id])
            for array, item_id in zip(arrays, ids, strict=True)
        ]


def dask_array(cache: Cache, name: str) -> Any:
    """An array of a cache as a lazy ``dask.array.Array``, a task per chunk."""
    import dask.array

    return dask.array.from_zarr(str(cache.path), component=name)  # type: ignore[no-untyped-call]
