"""Images in files of any size, read one region at a time.

=====================  =====================================================================
file                   how it is read
=====================  =====================================================================
``.npy``               by position, row by row
Zarr array, OME-Zarr   the chunks that a region touches; a level of a pyramid by number
``.tif``, ``.tiff``    the tiles that a region touches (BigTIFF and OME-TIFF as well), through
                       tifffile's Zarr view; needs the ``large`` extra
=====================  =====================================================================
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError
from gim_stagewise.sources.npy import NpyFile
from gim_stagewise.units import format_bytes
from gim_stagewise.windows import Region, common, tiles_over, within

_PLANE = ("height", "width")
# What files call axes; others are none of an image's, and may be there if they are of length 1.
_CALLED = {
    "channel": ("c", "s", "channel", "channels", "band", "bands"),
    "height": ("y", "height", "row", "rows"),
    "width": ("x", "width", "column", "columns", "col", "cols"),
}
_NAMES = {called: name for name, all_called in _CALLED.items() for called in all_called}
# A larger chunk is not read for a window that may be anywhere in it.
_MOST_CHUNK_BYTES = 64_000_000


class RegionFile(Protocol):
    """An image whose regions can be read."""

    extent: tuple[int, ...]
    channels: int
    dtype: np.dtype[Any]
    # What is read at once for the smallest region.
    chunk_bytes: int

    def read(self, region: Region) -> NDArray[Any]:
        """A region, [channel, height, width]."""


def open_region_file(path: Path, *, axes: str | None = None, level: int = 0) -> RegionFile:
    """Open an image file by what its name ends in.

    Parameters
    ----------
    path : Path
    axes : str, optional
        Order of axes, such as "height width channel"; by default what the file says, else height
        and width, and with three axes the shorter one at either end as the channel.
    level : int
        Of a pyramid; 0 is the finest.

    Raises
    ------
    DataNotFoundError
        If it is not there.
    DataError
        If it cannot be read in regions.
    ConfigError
        If ``axes`` or ``level`` do not fit it.
    """
    if not path.exists():
        raise DataNotFoundError(f"no such file: {path.absolute()}; check source.root and files")
    suffix = path.suffix.lower()
    if suffix == ".npy":
        _refuse_level(path, level)
        return _NpyImage(path, axes)
    if suffix in {".tif", ".tiff", ".btf", ".tf8"}:
        return _open_tiff(path, axes, level)
    if path.is_dir():
        return _open_zarr(path, axes, level)
    raise DataError(
        f"{path} is of a kind that cannot be read in regions; store it as a Zarr array, a tiled "
        "TIFF or an npy file"
    )


def _refuse_level(path: Path, level: int) -> None:
    if level:
        raise ConfigError(
            f"is {level}, but {path} is an array without levels", key="source.options.level"
        )


def _named_axes(
    path: Path, stated: str | None, shape: Sequence[int], found: Sequence[str] | None
) -> list[str]:
    """Names of an array's axes; those of length 1 that are no axes of an image may be any."""
    if stated is not None:
        axes = stated.split()
    elif found is not None:
        axes = list(found)
    elif len(shape) == 2:
        axes = list(_PLANE)
    elif len(shape) == 3:
        axes = [*_PLANE, "channel"] if shape[2] <= shape[0] else ["channel", *_PLANE]
    else:
        axes = []
    wanted = {*_PLANE} <= set(axes) and len(set(axes)) == len(axes) == len(shape)
    others = [
        length
        for axis, length in zip(axes, shape, strict=False)
        if axis not in (*_PLANE, "channel")
    ]
    if not wanted or any(length != 1 for length in others):
        called = f", called {' '.join(axes)}" if stated or found else ""
        raise DataError(
            f"{path} has an array of shape {tuple(shape)}{called}, which is no image; give the "
            'names of its axes in order as source.options.axes, as in "height width channel"'
        )
    return axes


class _NpyImage:
    """An npy file, read by position: a run of bytes for each row of a region."""

    def __init__(self, path: Path, axes: str | None) -> None:
        self._file = NpyFile(path)
        self._axes = _named_axes(path, axes, self._file.shape, None)
        sizes = dict(zip(self._axes, self._file.shape, strict=True))
        self.extent: tuple[int, ...] = (sizes["height"], sizes["width"])
        self.channels = sizes.get("channel", 1)
        self.dtype = self._file.dtype
        self.chunk_bytes = 0

    def read(self, region: Region) -> NDArray[Any]:
        rows, columns = region
        own = {"height": rows.slice, "width": columns.slice, "channel": slice(0, self.channels)}
        values = self._file.read([own.get(axis, slice(0, 1)) for axis in self._axes])
        return _channel_first(values, self._axes)


def _channel_first(values: NDArray[Any], axes: Sequence[str]) -> NDArray[Any]:
    """[channel, height, width], whatever the order of axes was."""
    image = ("channel", *_PLANE)
    other = tuple(number for number, axis in enumerate(axes) if axis not in image)
    values = np.squeeze(values, other)
    left = [axis for axis in axes if axis in image]
    if "channel" not in left:
        values, left = values[None], ["channel", *left]
    return values.transpose([left.index(axis) for axis in image])


class _ZarrImage:
    """A Zarr array; also a TIFF seen as one.

    One chunk is read at a time: memory stays small, and where one is damaged no others are left
    being read.
    """

    def __init__(self, array: Any, path: Path, axes: Sequence[str]) -> None:
        self._array = array
        self._path = path
        self._axes = list(axes)
        sizes = dict(zip(axes, array.shape, strict=True))
        self.extent: tuple[int, ...] = (sizes["height"], sizes["width"])
        self.channels = sizes.get("channel", 1)
        self.dtype = np.dtype(array.dtype)
        self._chunks = tuple(array.shards or array.chunks)
        self.chunk_bytes = math.prod(self._chunks) * self.dtype.itemsize
        if self.chunk_bytes > _MOST_CHUNK_BYTES:
            raise DataError(
                f"{path} is stored in chunks of {'×'.join(map(str, self._chunks))} values, each of "
                f"which takes {format_bytes(self.chunk_bytes)} to read a window of it; store it in "
                "tiles, of 512×512 for instance"
            )

    def read(self, region: Region) -> NDArray[Any]:
        rows, columns = region
        out = np.empty((self.channels, len(rows), len(columns)), self.dtype)
        chunk = dict(zip(self._axes, self._chunks, strict=True))
        for _, tile in tiles_over(region, self.extent, (chunk["height"], chunk["width"])):
            part = common(tile, region)
            key = {axis: span.slice for axis, span in zip(_PLANE, part, strict=True)}
            try:
                values = self._array[tuple(key.get(axis, slice(None)) for axis in self._axes)]
            except Exception as error:  # whatever a codec raises for what it cannot decode
                raise DataError(
                    f"{self._path}: rows {tile[0].start} to {tile[0].stop}, columns "
                    f"{tile[1].start} to {tile[1].stop} cannot be read "
                    f"({_one_line(error)})"
                ) from None
            place = (slice(None), *within(part, region))
            out[place] = _channel_first(np.asarray(values), self._axes)
        return out


def _open_zarr(path: Path, axes: str | None, level: int) -> RegionFile:
    import zarr

    try:
        node: Any = zarr.open(str(path), mode="r")
        found = None
        if isinstance(node, zarr.Group):
            node, found = _ome_level(node, path, level)
        else:
            _refuse_level(path, level)
        metadata = node.metadata
        found = found or getattr(metadata, "dimension_names", None)
        if found is not None:
            found = [_NAMES.get(str(name).lower(), str(name)) for name in found]
        return _ZarrImage(node, path, _named_axes(path, axes, node.shape, found))
    except FileNotFoundError:
        raise DataError(f"{path} is a folder, but no Zarr array or OME-Zarr image") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, ConfigError | DataError):
            raise
        raise DataError(f"{path}: its Zarr metadata cannot be read ({_one_line(error)})") from None


def _ome_level(group: Any, path: Path, level: int) -> tuple[Any, list[str] | None]:
    """A level of an OME-Zarr image (versions 0.4 and 0.5), and the names of its axes."""
    attributes = dict(group.attrs)
    images = attributes.get("ome", attributes).get("multiscales")
    if not images:
        raise DataError(f"{path} is a Zarr group without an OME-Zarr image; name an array in it")
    datasets = images[0]["datasets"]
    if level >= len(datasets):
        raise ConfigError(
            f"is {level}, but {path} has levels 0 to {len(datasets) - 1}",
            key="source.options.level",
        )
    axes = images[0].get("axes")
    names = [axis["name"] if isinstance(axis, dict) else axis for axis in axes] if axes else None
    return group[datasets[level]["path"]], names


def _open_tiff(path: Path, axes: str | None, level: int) -> RegionFile:
    try:
        import tifffile
    except ImportError:
        raise ConfigError(
            f"{path} is a TIFF file, and tifffile is not installed; "
            'install it with `pip install "gim-stagewise[large]"`',
            key="source",
        ) from None
    import zarr

    opened = None
    try:
        opened = tifffile.TiffFile(path)
        levels = opened.series[0].levels
        array: Any = None
        palette = opened.series[0].keyframe.photometric == tifffile.PHOTOMETRIC.PALETTE
        if level < len(levels):
            array = zarr.open(levels[0].aszarr(level=level), mode="r")
    except Exception as error:  # tifffile raises all kinds for a file that is cut off
        if opened is not None:
            opened.close()
        raise DataError(f"{path} cannot be read as a TIFF file ({_one_line(error)})") from None
    if palette:
        opened.close()
        raise DataError(
            f"{path} has the numbers of colours in a palette for pixels, which are no brightness; "
            "save it as RGB"
        )
    if array is None:
        opened.close()
        raise ConfigError(
            f"is {level}, but {path} has levels 0 to {len(levels) - 1}", key="source.options.level"
        )
    found = [_NAMES.get(name.lower(), name) for name in levels[level].axes]
    try:
        image = _ZarrImage(array, path, _named_axes(path, axes, array.shape, found))
    except DataError:
        opened.close()
        raise
    weakref.finalize(image, opened.close)
    return image


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]
