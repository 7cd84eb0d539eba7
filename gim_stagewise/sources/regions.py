"""Large items as modules see them: regions of pixels, of a grid of patches, or of time."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import AugmentConfig
from gim_stagewise.errors import DataError
from gim_stagewise.sources.base import (
    PATCH_AXES,
    Item,
    PassedOn,
    Request,
    Source,
    Split,
)
from gim_stagewise.sources.pixels import PixelForm, cut_patches
from gim_stagewise.windows import PatchGrid, Span, full_region, mirrored


class RegionSource(PassedOn):
    """A `Source` of normalised regions of items that may be of any size.

    With a grid, an item's extent is its rows and columns of patches, and a region of it is read as
    float32 [grid_row, grid_col, channel, height, width]; without one, its extent is in pixels or
    steps, and a region is float32 [channel, height, width] or [channel, time].

    Parameters
    ----------
    images : Source
        With axes (channel, height, width), or (channel, time); read in regions.
    augment : AugmentConfig
        Of which what treats all pixels alike.
    grid : PatchGrid, optional
    skipped : mapping, optional
        Why samples were left out, by id; for the record.

    Raises
    ------
    ConfigError
        If ``augment`` does not fit the images' channels.
    DataError
        If an image is smaller than a patch.
    """

    chunk_items = 1
    views = 0

    def __init__(
        self,
        images: Source,
        augment: AugmentConfig,
        grid: PatchGrid | None,
        *,
        skipped: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(images)
        self.skipped = dict(skipped or {})
        self._images = images
        self._augment = augment
        self._grid = grid
        self._form = PixelForm(augment, images.items()[0])
        self._pixels = {item.id: item.extent for item in images.items()}
        self._extents = {item.id: self._extent(item) for item in images.items()}

    def _extent(self, item: Item) -> tuple[int, ...]:
        if self._grid is None:
            return item.extent
        height, width = item.extent
        found = self._grid.extent(height, width)
        if 0 in found:
            raise DataError(
                f"sample {item.id} is {height}×{width} pixels, smaller than one patch of "
                f"{self._grid.size}; remove it, or use a smaller patches.size"
            )
        return found

    @staticmethod
    def channels_of(images: Source, augment: AugmentConfig) -> int:
        """Channels that regions of such images have."""
        return PixelForm(augment, images.items()[0]).channels

    @property
    def axes(self) -> tuple[str, ...]:
        return self._images.axes if self._grid is None else PATCH_AXES

    @property
    def channels(self) -> int:
        return self._form.channels

    @property
    def place_bytes(self) -> int:
        """Bytes of what there is at one place: a pixel, a step, or a patch."""
        return 4 * self.channels * (1 if self._grid is None else self._grid.size**2)

    @property
    def chunk_bytes(self) -> int:
        """The most bytes that are read at once for the smallest region."""
        return int(getattr(self._images, "chunk_bytes", 0))

    @property
    def item_bytes(self) -> int:
        return self.place_bytes * max(math.prod(extent) for extent in self._extents.values())

    @property
    def ids(self) -> Sequence[str]:
        return self._images.ids

    def items(self) -> Sequence[Item]:
        return [Item(i, self._extents[i], self.channels, "float32") for i in self.ids]

    def split(self, name: Split) -> Sequence[str]:
        return self._images.split(name)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._images.label_names

    def labels(self, name: str) -> NDArray[np.int64]:
        return self._images.labels(name)

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        return [self._read(request) for request in requests]

    def _read(self, request: Request) -> NDArray[np.float32]:
        region = request.region or full_region(self._extents[request.id])
        if self._grid is None:
            return self._read_pixels(request.id, region)
        rows, columns = (self._grid.pixels(span) for span in region)
        return np.ascontiguousarray(
            cut_patches(self._read_pixels(request.id, (rows, columns)), self._grid)
        )

    def _read_pixels(self, item_id: str, wanted: tuple[Span, ...]) -> NDArray[np.float32]:
        """Normalised pixels of a region that may reach beyond the image's end."""
        parts = [mirrored(s, n) for s, n in zip(wanted, self._pixels[item_id], strict=True)]
        (image,) = self._images.read([Request(item_id, region=tuple(own for own, _ in parts))])
        for axis, (span, (own, places)) in enumerate(zip(wanted, parts, strict=True), start=1):
            if own != span:
                image = image.take(places, axis=axis)
        return self._form.normalised(self._form.scaled(image, item_id))

    def content_digest(self) -> str:
        parts = {
            "images": self._images.content_digest(),
            "augment": self._augment.model_dump(mode="json", exclude={"views", "grid_crop"}),
            "grid": vars(self._grid) if self._grid else None,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
