"""Images to what a module sees: augmentation, then a grid of patches (paper, section 4.1)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import AugmentConfig
from gim_stagewise.errors import ConfigError, DataError
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources.base import (
    PATCH_AXES,
    Item,
    Request,
    Source,
    Split,
    UniformItems,
    label_values,
)
from gim_stagewise.sources.pixels import PixelForm, cut_patches
from gim_stagewise.windows import PatchGrid


class PatchSource:
    """A `Source` of patch grids over a `Source` of images.

    A sample is float32 [grid_row, grid_col, channel, height, width]. View 0 is the centre crop
    without a flip; view v > 0 draws crop and flip from (seed, id, v).

    Parameters
    ----------
    images : Source
        With axes (channel, height, width).
    augment : AugmentConfig
    grid : PatchGrid
    seed : int
        The pipeline's seed.

    Raises
    ------
    ConfigError
        If no patch fits, the crop is larger than the image, or ``mean`` does not match the
        channels.
    DataError
        If images differ in size and no crop makes them equal.
    """

    axes = PATCH_AXES
    chunk_items = 1

    def __init__(
        self, images: Source, augment: AugmentConfig, grid: PatchGrid, *, seed: int
    ) -> None:
        self.skipped: dict[str, str] = {}  # nothing is left out
        self._images = images
        self._augment = augment
        self._grid = grid
        self._seed = seed
        first = images.items()[0]
        self._size = height, width = self._cropped_extent(first)
        self._extent = grid.extent(height, width)
        if 0 in self._extent:
            raise ConfigError(
                f"is {grid.size}, but the image is {height}×{width} pixels after padding and crop: "
                "not one patch fits",
                key="patches.size",
            )
        self._form = PixelForm(augment, first)
        if augment.crop is None:
            self._check_equal_sizes(first)

    def _cropped_extent(self, item: Item) -> tuple[int, int]:
        height, width = (length + 2 * self._augment.pad for length in item.extent)
        crop = self._augment.crop
        if crop is None:
            return height, width
        if crop > min(height, width):
            raise ConfigError(
                f"is {crop}, larger than the image of {height}×{width} pixels "
                f"(sample {item.id}, after padding)",
                key="augment.crop",
            )
        return crop, crop

    def _check_equal_sizes(self, first: Item) -> None:
        for item in self._images.items():
            channels = first.channels if self._augment.grayscale else item.channels
            if item.extent != first.extent or channels != first.channels:
                raise DataError(
                    f"sample {item.id} is {item.extent} with {item.channels} channels, {first.id} "
                    f"is {first.extent} with {first.channels}; set augment.crop to make them equal"
                )

    def check_sizes(self) -> None:
        """Check that no image is too small for a crop, by the heads of their files alone.

        Raises
        ------
        ConfigError
        """
        if self._augment.crop is not None:
            for item in self._images.items():
                self._cropped_extent(item)

    @property
    def notices(self) -> tuple[str, ...]:
        """What is to be said of the images."""
        return tuple(getattr(self._images, "notices", ()))

    @property
    def views(self) -> int | None:
        # Augmentations are drawn when read, so there is no end of them.
        return None if self._augment.random else 0

    @property
    def extent(self) -> tuple[int, int]:
        """Rows and columns of the patch grid."""
        return self._extent

    @property
    def channels(self) -> int:
        return self._form.channels

    @property
    def item_bytes(self) -> int:
        return 4 * self._extent[0] * self._extent[1] * self.channels * self._grid.size**2

    @property
    def chunk_bytes(self) -> int:
        """The most bytes that are read, and kept, for a single image; 0 if only its own."""
        return int(getattr(self._images, "chunk_bytes", 0))

    @property
    def image_values(self) -> int:
        """Values of an image before it is cut into patches."""
        return self.channels * self._size[0] * self._size[1]

    @property
    def ids(self) -> Sequence[str]:
        return self._images.ids

    def items(self) -> Sequence[Item]:
        return UniformItems(self.ids, self._extent, self.channels, "float32")

    def split(self, name: Split) -> Sequence[str]:
        return self._images.split(name)

    @property
    def label_names(self) -> tuple[str, ...]:
        return self._images.label_names

    def labels(self, name: str) -> NDArray[np.int64]:
        return self._images.labels(name)

    def label_values(self, name: str) -> tuple[str, ...]:
        """What labels of that name mean, from 0 on; empty where that is not known."""
        return label_values(self._images, name)

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        whole = [Request(request.id) for request in requests]
        return [
            self._patches(image, request)
            for image, request in zip(self._images.read(whole), requests, strict=True)
        ]

    def read_images(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Images before they are cut into patches, view 0: [sample, channel, height, width]."""
        images = self._images.read([Request(item_id) for item_id in ids])
        return np.stack(
            [self._prepare(i, Request(item_id)) for i, item_id in zip(images, ids, strict=True)]
        )

    def _prepare(self, image: NDArray[Any], request: Request) -> NDArray[np.float32]:
        pixels = self._form.scaled(image, request.id)
        if pad := self._augment.pad:
            pixels = np.pad(pixels, ((0, 0), (pad, pad), (pad, pad)))
        return self._form.normalised(self._crop_and_flip(pixels, request))

    def _crop_and_flip(self, pixels: NDArray[np.float32], request: Request) -> NDArray[np.float32]:
        crop = self._augment.crop
        _, height, width = pixels.shape
        size = (height, width) if crop is None else (crop, crop)
        slack = (height - size[0], width - size[1])
        if min(slack) < 0:
            raise DataError(
                f"sample {request.id} is {height}×{width} pixels, "
                f"smaller than augment.crop = {crop}"
            )
        if request.view == 0:
            top, left, flip = slack[0] // 2, slack[1] // 2, False
        else:
            draw = np.random.default_rng(derive_seed(self._seed, "view", request.id, request.view))
            top, left = (int(draw.integers(room + 1)) for room in slack)
            flip = bool(draw.random() < self._augment.flip)
        pixels = pixels[:, top : top + size[0], left : left + size[1]]
        return pixels[:, :, ::-1] if flip else pixels

    def _patches(self, image: NDArray[Any], request: Request) -> NDArray[np.float32]:
        patches = cut_patches(self._prepare(image, request), self._grid)
        if request.region is not None:
            rows, columns = request.region
            patches = patches[rows.slice, columns.slice]
        return np.ascontiguousarray(patches)

    def content_digest(self) -> str:
        drawn = self._seed if self._augment.random else None
        parts = {
            "images": self._images.content_digest(),
            "augment": self._augment.model_dump(mode="json", exclude={"views", "grid_crop"}),
            "grid": [self._grid.size, self._grid.stride],
            "seed": drawn,
        }
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
