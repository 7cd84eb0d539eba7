"""Some samples of another source."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from itertools import compress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.sources.base import Item, PassedOn, Request, Source, Split


class Subset(PassedOn):
    """A `Source` of chosen samples of another, in its order.

    Parameters
    ----------
    source : Source
    ids : collection of str
        Which samples; others are not there.
    """

    def __init__(self, source: Source, ids: Collection[str]) -> None:
        super().__init__(source)
        self._source = source
        chosen = set(ids)
        self._mask = [item_id in chosen for item_id in source.ids]
        self.axes = source.axes
        self.views = source.views
        # Neighbours in the other source's chunks are not neighbours here.
        self.chunk_items = 1
        self.item_bytes = source.item_bytes
        self.chunk_bytes: int = getattr(source, "chunk_bytes", 0)
        self.label_names = source.label_names
        self.ids: Sequence[str] = list(compress(source.ids, self._mask))

    def items(self) -> Sequence[Item]:
        return list(compress(self._source.items(), self._mask))

    def split(self, name: Split) -> Sequence[str]:
        chosen = set(self.ids)
        return [item_id for item_id in self._source.split(name) if item_id in chosen]

    def labels(self, name: str) -> NDArray[np.int64]:
        labels: NDArray[np.int64] = self._source.labels(name)[np.array(self._mask, dtype=bool)]
        return labels

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        return self._source.read(requests)

    def content_digest(self) -> str:
        text = self._source.content_digest() + "".join(f"\n{item_id}" for item_id in self.ids)
        return hashlib.sha256(text.encode()).hexdigest()
