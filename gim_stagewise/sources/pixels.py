"""Pixels as modules see them: floats, in the channels that are asked for, normalised."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import AugmentConfig
from gim_stagewise.errors import ConfigError, DataError
from gim_stagewise.sources.base import Item
from gim_stagewise.windows import PatchGrid

NOT_FINITE = "values that are NaN, infinite or too large for float32"
# ITU-R BT.601 luma, as torchvision's and Pillow's grayscale.
_LUMA = np.array([0.299, 0.587, 0.114], dtype=np.float32)


class PixelForm:
    """The part of `AugmentConfig` that treats every pixel alike.

    Parameters
    ----------
    augment : AugmentConfig
    first : Item
        An image of the dataset; all others have to have its channels.

    Raises
    ------
    ConfigError
        If ``grayscale`` or ``mean`` do not fit the image's channels.
    """

    def __init__(self, augment: AugmentConfig, first: Item) -> None:
        if augment.grayscale and first.channels not in (1, 3):
            raise ConfigError(
                f"is true, but sample {first.id} has {first.channels} channels; it takes 1 or 3",
                key="augment.grayscale",
            )
        self.channels = 1 if augment.grayscale else first.channels
        if augment.mean is not None and len(augment.mean) != self.channels:
            raise ConfigError(
                f"has {len(augment.mean)} numbers, the image {self.channels} channels",
                key="augment.mean",
            )
        self._augment = augment

    def scaled(self, image: NDArray[Any], item_id: str) -> NDArray[np.float32]:
        """Floats of an image [channel, height, width]: integers in [0, 1], channels as asked for.

        Raises
        ------
        DataError
            If values say nothing about brightness, are not finite, or channels are others.
        """
        pixels = _to_unit(image, item_id)
        if self._augment.grayscale and len(pixels) == 3:
            pixels = np.tensordot(_LUMA, pixels, axes=1)[None]
        if len(pixels) != self.channels:
            raise DataError(
                f"sample {item_id} has {len(pixels)} channels, expected {self.channels}",
                item=item_id,
            )
        return pixels

    def normalised(self, pixels: NDArray[np.float32]) -> NDArray[np.float32]:
        """What `scaled` gave, less ``mean`` and over ``std`` where they are given."""
        augment = self._augment
        if augment.mean is not None and augment.std is not None:
            mean, std = (
                np.array(v, np.float32).reshape(-1, *(1,) * (pixels.ndim - 1))
                for v in (augment.mean, augment.std)
            )
            pixels = (pixels - mean) / std
        return np.ascontiguousarray(pixels, dtype=np.float32)


def _to_unit(image: NDArray[Any], item_id: str) -> NDArray[np.float32]:
    try:
        check_brightness(image.dtype)
    except DataError as error:
        raise DataError(f"sample {item_id} {error}", item=item_id) from None
    if np.issubdtype(image.dtype, np.integer):
        return image.astype(np.float32) / np.float32(np.iinfo(image.dtype).max)
    pixels = as_float32(image)
    if not np.isfinite(pixels).all():
        raise DataError(f"sample {item_id} has {NOT_FINITE}; mend or remove it", item=item_id)
    return pixels


def as_float32(values: NDArray[Any]) -> NDArray[np.float32]:
    """Floats as modules see them; what is too large becomes infinite, see `NOT_FINITE`."""
    with np.errstate(over="ignore"):  # what is said of it is an error
        return values.astype(np.float32)


def check_brightness(dtype: np.dtype[Any]) -> None:
    """Refuse types of pixels that say nothing about brightness.

    Raises
    ------
    DataError
    """
    if dtype.kind in "iu" and dtype.name not in ("uint8", "uint16"):
        raise DataError(
            f"has pixels of type {dtype}, whose range says nothing about brightness; store uint8 "
            "(0 to 255), uint16 (0 to 65535), or floats to be used as is"
        )
    if dtype.kind not in "iubf":
        raise DataError(f"has values of type {dtype}; expected integers or floats")


def cut_patches(pixels: NDArray[np.float32], grid: PatchGrid) -> NDArray[np.float32]:
    """All patches of [channel, height, width], as a view: [row, column, channel, height, width]."""
    windows = np.lib.stride_tricks.sliding_window_view(pixels, (grid.size, grid.size), (1, 2))
    # [channel, row, column, height, width], one window per pixel: keep those on the grid.
    return windows[:, :: grid.stride, :: grid.stride].transpose(1, 2, 0, 3, 4)
