"""A sealed cache of items of any size as a `Source`, read in regions."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache.features import Pooling, mean_feature
from gim_stagewise.cache.frames import announce
from gim_stagewise.cache.layout import Block
from gim_stagewise.cache.manifest import read_manifest
from gim_stagewise.cache.reader import Cache
from gim_stagewise.cache.sealed import SealedCache
from gim_stagewise.cache.tiles import TiledLayout
from gim_stagewise.errors import DataError, StaleCacheError
from gim_stagewise.sources import Item, Request
from gim_stagewise.windows import Region, Span, common, full_region, tiles_over, within


class TiledCache(SealedCache):
    """Stored activations of items of any size, read in regions as the input of the next module.

    Values come decoded, float32 with the axes of `TiledLayout.axes`, unless the stored form is
    asked for. An item's extent is that of its outputs. Parameters and errors are those of
    `SealedCache`.
    """

    chunk_items = 1
    views = 0

    @property
    def layout(self) -> TiledLayout:
        layout = self.manifest.layout
        assert isinstance(layout, TiledLayout)
        return layout

    @property
    def axes(self) -> tuple[str, ...]:
        return self.layout.axes

    @property
    def _shape(self) -> str:
        channels = f"channel={self.layout.cell[0]}"
        axes = (channels if axis == "channel" else axis for axis in self.axes)
        return f"{self.layout.samples} items of {' '.join(axes)}"

    def require_activations(self) -> None:
        """Refuse a cache whose activations were removed: nothing else can give them.

        Raises
        ------
        StaleCacheError
        """
        if not self.materialized:
            raise StaleCacheError(
                f"{self.path} has no activations any more (the pipeline's keep), and they are "
                'needed: make them again with `gim-stage run ... --from 1`, and set keep = "all" '
                "to have them another time"
            )

    @property
    def place_bytes(self) -> int:
        """Bytes of what there is at one place, as it is stored."""
        return self.layout.place_bytes

    @property
    def item_bytes(self) -> int:
        return self.place_bytes * max(math.prod(extent) for extent in self.layout.extents)

    def items(self) -> Sequence[Item]:
        layout = self.layout
        return [
            Item(item_id, extent, layout.cell[0], "float32")
            for item_id, extent in zip(self.ids, layout.extents, strict=True)
        ]

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        return [self._decoded(values) for values in self.read_stored(requests)]

    def _decoded(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        return self.precision.decode_array(stored, space=self.layout.space)

    def read_stored(
        self, requests: Sequence[Request], *, empty: Callable[..., NDArray[Any]] = np.empty
    ) -> list[NDArray[Any]]:
        """The regions asked for in their stored form; ``precision.decode`` makes floats of it.

        ``empty``, called with shape and type, gives the memory for each of them.
        """
        self.require_activations()
        return [self._region("activations", request, empty) for request in requests]

    def read_pooled(self, item_id: str) -> NDArray[np.float32]:
        """All embeddings of an item: [grid_row, grid_col, channel], or [time, channel]."""
        layout = self.layout
        extent = layout.arrays[layout.array_name("pooled", self._place(item_id))].shape[:-1]
        return self._region("pooled", Request(item_id, region=full_region(extent)), np.empty)

    def _features(self, ids: Sequence[str], pooling: Pooling) -> NDArray[np.float32]:
        if pooling != "mean":
            raise DataError(f"{self.path} holds items of any size, of which features are means")
        return np.stack([mean_feature(self.read_pooled(item_id)) for item_id in ids])

    def announce(self, requests: Iterable[Request]) -> None:
        """Say what is going to be read soon, so that the disk is at work before it is."""
        for request in requests:
            number = self._place(request.id)
            extent = self.layout.extents[number]
            region = request.region or full_region(extent)
            for tile, _ in tiles_over(region, extent, self.layout.tile):
                block = Block(-1, 0, Span(number, number + 1), tile)
                announce(self.path / self.layout.parts(block)["activations"].files[0])

    def _place(self, item_id: str) -> int:
        try:
            return self._numbers[item_id]
        except KeyError:
            raise DataError(f"no sample {item_id!r} in {self.path}") from None

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {item_id: number for number, item_id in enumerate(self.ids)}

    def _region(
        self, kind: str, request: Request, empty: Callable[..., NDArray[Any]]
    ) -> NDArray[Any]:
        """A region put together from the tiles that it touches, each read once."""
        layout, number = self.layout, self._place(request.id)
        if request.view != 0:
            raise DataError(f"no view {request.view} in {self.path}; it has view 0 alone")
        array = layout.arrays[layout.array_name(kind, number)]
        lead = 1 if kind == "activations" and layout.dense else 0
        axes = slice(lead, lead + len(layout.tile))
        extent, tile = array.shape[axes], array.chunks[axes]
        region = request.region or full_region(extent)
        _check_within(region, extent, request.id)
        shape = (*array.shape[:lead], *map(len, region), *array.shape[axes.stop :])
        out = empty(shape, np.dtype(array.dtype))
        for place, own in tiles_over(region, extent, tile):
            block = Block(-1, 0, Span(number, number + 1), place)
            (file,) = layout.parts(block)[kind].files
            part = common(own, region)
            values = self._read_file(kind, layout.index(number, place), 0, file)
            out[(slice(None),) * lead + within(part, region)] = values[
                (slice(None),) * lead + within(part, own)
            ]
        return out


def _check_within(region: Region, extent: tuple[int, ...], item_id: str) -> None:
    """Refuse regions that reach beyond an item.

    Raises
    ------
    DataError
    """
    if len(region) != len(extent) or any(
        span.stop > length for span, length in zip(region, extent, strict=True)
    ):
        raise DataError(f"sample {item_id!r} has extent {extent}, no region {region}")


def open_cache(path: str | Path, *, verify: bool = True) -> Cache:
    """Open the sealed cache of samples of one size (see `Cache`).

    Parameters
    ----------
    path : str or Path
    verify : bool
        Whether every chunk is compared with its checksum before it is used.

    Raises
    ------
    CacheNotFoundError, PartialCacheError, CorruptCacheError
        If it cannot be used.
    DataError
        If it is one of items that are read in windows.
    """
    cache = open_sealed(path, verify=verify)
    if not isinstance(cache, Cache):
        raise DataError(f"{path} holds items that are read in windows; use open_tiled_cache")
    return cache


def open_tiled_cache(path: str | Path, *, verify: bool = True) -> TiledCache:
    """Open the sealed cache of items that are read in windows (see `TiledCache`).

    Parameters and errors are those of `open_cache`.
    """
    cache = open_sealed(path, verify=verify)
    if not isinstance(cache, TiledCache):
        raise DataError(f"{path} holds samples of one size; use open_cache")
    return cache


def open_sealed(path: str | Path, *, verify: bool = True) -> Cache | TiledCache:
    """Open a sealed cache of either kind."""
    tiled = isinstance(read_manifest(Path(path)).layout, TiledLayout)
    return (TiledCache if tiled else Cache)(path, verify=verify)
