"""Images in npy files and Zarr arrays."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import SourceConfig
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError
from gim_stagewise.sources.base import Split
from gim_stagewise.sources.npy import NpyFile
from gim_stagewise.sources.parts import PartsSource, array_digest
from gim_stagewise.units import format_bytes

_AXES = {"sample", "channel", "height", "width"}
# Samples of one chunk are read together, whichever of them is asked for.
_MOST_TOGETHER_BYTES = 64_000_000


def open_arrays(config: SourceConfig) -> PartsSource:
    """Images in arrays: ``kind = "npy"`` or ``kind = "zarr"``.

    Each table ``[source.splits.<split>]`` has ``images`` and, if there are any, ``labels``: npy
    files below ``source.root``, or paths inside the Zarr group ``source.root``. The order of
    axes is ``source.options.axes``; if absent, "sample height width" or
    "sample channel height width" by the number of axes.

    Raises
    ------
    ConfigError
        If the tables are wrong.
    DataNotFoundError
        If a file or array is not there.
    DataError
        If an array has other axes than stated.
    """
    if config.download:
        raise ConfigError("is true, but arrays are never fetched", key="source.download")
    if not config.splits:
        raise ConfigError(
            "missing; say where each split lies, as in "
            'train = {images = "x.npy", labels = "y.npy"}',
            key="source.splits",
        )
    unknown = set(config.options) - {"axes"}
    if unknown:
        raise ConfigError("unknown key; known: axes", key=f"source.options.{sorted(unknown)[0]}")
    last = _LastChunk()
    return PartsSource(
        {split: _open_part(config, split, table, last) for split, table in config.splits.items()},
        config.digest,
    )


def _open_part(
    config: SourceConfig, split: Split, table: dict[str, Any], last: _LastChunk
) -> _StoredPart:
    key = f"source.splits.{split}"
    unknown = set(table) - {"images", "labels"}
    if unknown:
        raise ConfigError("unknown key; known: images, labels", key=f"{key}.{sorted(unknown)[0]}")
    for name in table:
        if not isinstance(table[name], str):
            raise ConfigError(f"is {table[name]!r}, expected a path", key=f"{key}.{name}")
    if "images" not in table:
        raise ConfigError("missing; the pipeline file must give it", key=f"{key}.images")
    opener = NpyFile if config.kind == "npy" else _open_zarr
    root = Path(config.root or ".")
    images = opener(root / table["images"])
    labels = opener(root / table["labels"])[:] if "labels" in table else None
    if labels is not None and not np.issubdtype(labels.dtype, np.integer):
        raise DataError(f"{root / table['labels']} holds {labels.dtype}, expected integer labels")
    axes = _axes(config, images, root / table["images"])
    if config.kind == "zarr":
        images = _ZarrRows(images, root / table["images"], last)
    return _StoredPart(
        images, root / table["images"], axes, None if labels is None else labels.astype(np.int64)
    )


def _axes(config: SourceConfig, images: Any, where: Path) -> tuple[str, ...]:
    stated = config.options.get("axes")
    if stated is None:
        guess = {3: "sample height width", 4: "sample channel height width"}
        if len(images.shape) not in guess:
            raise DataError(f"{where} has shape {images.shape}, expected 3 or 4 axes")
        if len(images.shape) == 4 and images.shape[3] <= 4 < images.shape[1]:
            raise ConfigError(
                f"missing, and {where} has shape {images.shape}, which looks as if channels come "
                'last; set it to "sample height width channel"',
                key="source.options.axes",
            )
        stated = guess[len(images.shape)]
    axes = tuple(str(stated).split())
    if (
        not {"sample", "height", "width"} <= set(axes) <= _AXES
        or len(set(axes)) < len(axes)
        or axes[0] != "sample"
    ):
        raise ConfigError(
            f'is {stated!r}, expected an order such as "sample height width channel"',
            key="source.options.axes",
        )
    if len(axes) != len(images.shape):
        raise DataError(f"{where} has shape {images.shape}, expected the axes {' '.join(axes)}")
    return axes


def _open_zarr(path: Path) -> Any:
    import zarr

    try:
        array = zarr.open(str(path), mode="r")
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path}: its Zarr metadata cannot be read ({error})") from None
    except FileNotFoundError:
        raise DataNotFoundError(
            f"no Zarr array at {path.absolute()}; check source.root and source.splits"
        ) from None
    if not isinstance(array, zarr.Array):
        raise DataError(f"{path} is a Zarr group, expected an array; name one inside it")
    return array


class _LastChunk:
    """Rows of the chunk that was decoded last, of whichever array."""

    def __init__(self) -> None:
        self._held: tuple[_ZarrRows, int, NDArray[Any]] | None = None

    def of(self, array: _ZarrRows, number: int) -> NDArray[Any]:
        held = self._held
        if held is None or held[0] is not array or held[1] != number:
            self._held = None  # before there is another: no two are in memory
            self._held = held = (array, number, array.chunk(number))
        return held[2]


class _ZarrRows:
    """A Zarr array by rows; those that a chunk has together are read together.

    Raises
    ------
    DataError
        If these are more than `_MOST_TOGETHER_BYTES`.
    """

    def __init__(self, array: Any, path: Path, last: _LastChunk) -> None:
        self.shape: tuple[int, ...] = array.shape
        self.dtype = np.dtype(array.dtype)
        self.chunks: tuple[int, ...] = array.chunks
        self._array = array
        together = min(self.chunks[0], self.shape[0]) if self.shape else 1
        each = math.prod(self.shape[1:]) * self.dtype.itemsize
        self.chunk_bytes = together * each if together > 1 else 0
        if self.chunk_bytes > _MOST_TOGETHER_BYTES:
            raise DataError(
                f"{path} is stored in chunks of {together} samples, which take "
                f"{format_bytes(self.chunk_bytes)} to read one of them; store it with fewer in a "
                f"chunk, {max(1, _MOST_TOGETHER_BYTES // each)} at most"
            )
        self._last = last

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: int | slice) -> NDArray[Any]:
        if isinstance(index, slice) or not self.chunk_bytes:
            return np.asarray(self._array[index])
        number, place = divmod(range(len(self))[index], self.chunks[0])
        # A copy: whoever keeps a row shall not keep its chunk.
        row: NDArray[Any] = self._last.of(self, number)[place].copy()
        return row

    def chunk(self, number: int) -> NDArray[Any]:
        """All rows that a chunk has."""
        start = number * self.chunks[0]
        return np.asarray(self._array[start : start + self.chunks[0]])


class _StoredPart:
    """Images in an array on disk, read one at a time."""

    def __init__(
        self, images: Any, where: Path, axes: tuple[str, ...], labels: NDArray[np.int64] | None
    ) -> None:
        self._where = where
        self._images = images
        self.chunk_bytes: int = getattr(images, "chunk_bytes", 0)
        self._axes = axes
        self._labels = labels

    def __len__(self) -> int:
        return int(self._images.shape[0])

    def describe(self, index: int) -> tuple[tuple[int, int], int, str]:
        sizes = dict(zip(self._axes, self._images.shape, strict=True))
        dtype = np.dtype(self._images.dtype).name
        return (sizes["height"], sizes["width"]), sizes.get("channel", 1), dtype

    def read(self, index: int) -> NDArray[Any]:
        try:
            image = np.asarray(self._images[index])
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise DataError(f"{self._where}: image {index} cannot be read ({error})") from None
        if "channel" not in self._axes:
            return image[None] if self._axes.index("height") == 1 else image.T[None]
        order = [self._axes.index(axis) - 1 for axis in ("channel", "height", "width")]
        return image.transpose(order)

    def names(self) -> Sequence[str] | None:
        return None

    def labels(self) -> NDArray[np.int64] | None:
        return self._labels

    def digest(self, images: Sequence[int]) -> str:
        try:
            values = array_digest(self._images, images, self._labels)
        except DataError as error:
            raise DataError(f"{self._where}: {error}") from None
        except (ValueError, RuntimeError, KeyError, OSError) as error:
            raise DataError(f"{self._where} cannot be read ({error})") from None
        # In another order of axes the same values are other images.
        return hashlib.sha256(f"{self._axes};{values}".encode()).hexdigest()
