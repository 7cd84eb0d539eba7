"""A cache as an array that is decoded where it is sliced, and as a Dask array of such."""

from __future__ import annotations

import math
import operator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.windows import Span

if TYPE_CHECKING:
    from gim_stagewise.cache.reader import Cache

_SAMPLE = 1  # the axis


class DecodedArray:
    """An array of a cache that is read, checked and decoded where it is sliced.

    Parameters
    ----------
    cache : Cache
    name : str
        "activations", [view, sample, grid_row, grid_col, channel, height, width], or "pooled",
        [view, sample, grid_row, grid_col, channel].
    """

    dtype = np.dtype(np.float32)

    def __init__(self, cache: Cache, name: str) -> None:
        layout = cache.manifest.layout
        self._cache = cache
        self._name = name
        self.shape = layout.arrays[name].shape
        self.chunks = layout.arrays[name].chunks
        self.ndim = len(self.shape)

    def __repr__(self) -> str:
        return (
            f"DecodedArray({self._name!r}, shape={self.shape}, dtype={self.dtype}, "
            f"of {self._cache})"
        )

    @property
    def size(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, key: Any) -> NDArray[np.float32]:
        """Values at integers and slices, as NumPy would give them.

        Samples may also be given by a list or array of numbers, or by a mask; their axis stays
        where it is (Zarr's orthogonal indexing). A view that is not stored for a sample is NaN.

        Raises
        ------
        IndexError
            If there is no such place, or the key is of another kind.
        CorruptCacheError
            If a chunk is missing or damaged.
        """
        view_key, sample_key, *cell = _expanded(key, self.ndim)
        views = np.atleast_1d(np.arange(self.shape[0])[view_key])
        samples = np.atleast_1d(np.arange(self.shape[1])[sample_key])
        rows, cell[0] = _within(cell[0], self.shape[2])
        # What one sample gives, found on an array that takes no memory.
        one = np.broadcast_to(np.float32(0), (len(rows), *self.shape[3:]))[tuple(cell)]
        values = np.empty((len(views), len(samples), *one.shape), np.float32)
        if values.size:
            for number, view in enumerate(views.tolist()):
                self._fill(values[number], view, samples, rows, tuple(cell))
        dropped = tuple(0 if isinstance(k, int) else slice(None) for k in (view_key, sample_key))
        return values[dropped]

    def _fill(
        self,
        values: NDArray[np.float32],
        view: int,
        samples: NDArray[np.intp],
        rows: Span,
        cell: tuple[int | slice, ...],
    ) -> None:
        """Read samples of one view, each chunk once."""
        decode = self._cache.precision.decode_array if self._name == "activations" else np.asarray
        for chunk in np.unique(samples // self.chunks[1]).tolist():
            here = np.flatnonzero(samples // self.chunks[1] == chunk)
            stored_here = [self._cache.is_stored(view, int(place)) for place in samples[here]]
            values[here] = np.nan
            here = here[stored_here]
            if not len(here):
                continue
            places = samples[here] - chunk * self.chunks[1]
            whole = np.empty((len(here), len(rows), *self.shape[3:]), np.float32)
            for part, stored in self._cache.read_chunk(self._name, view, chunk, rows):
                start, stop = max(rows.start, part.start), min(rows.stop, part.stop)
                some = stored[places, start - part.start : stop - part.start]
                whole[:, start - rows.start : stop - rows.start] = decode(some)
            values[here] = whole[(slice(None), *cell)]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> NDArray[Any]:
        values = self[...]
        return values if dtype is None else values.astype(dtype)


def _expanded(key: Any, ndim: int) -> list[Any]:
    """An integer or slice for each axis; for the samples also an array.

    Raises
    ------
    IndexError
        If it is anything else.
    """
    keys = list(key) if isinstance(key, tuple) else [key]
    dots = [place for place, one in enumerate(keys) if one is Ellipsis]
    if len(dots) > 1 or len(keys) - len(dots) > ndim:
        raise IndexError(f"{len(keys)} indexes for an array of {ndim} axes")
    place = dots[0] if dots else len(keys)
    keys[place : place + len(dots)] = [slice(None)] * (ndim - len(keys) + len(dots))
    for axis, one in enumerate(keys):
        if isinstance(one, slice):
            continue
        number = hasattr(one, "__index__") and not isinstance(one, bool | np.bool_)
        if number and np.ndim(one) == 0:
            keys[axis] = operator.index(one)
        elif axis == _SAMPLE and isinstance(one, list | np.ndarray) and np.ndim(one) == 1:
            keys[axis] = np.asarray(one, dtype=None if len(one) else np.intp)
        else:
            raise IndexError(
                f"axis {axis} was indexed with {one!r}: take integers and slices, and for samples "
                "(axis 1) also lists of numbers or a mask"
            )
    return keys


def _within(key: int | slice, length: int) -> tuple[Span, int | slice]:
    """The shortest run of an axis that has all that a key asks for, and the key within it."""
    if isinstance(key, int):
        place = range(length)[key]
        return Span(place, place + 1), 0
    chosen = range(length)[key]
    if not chosen:
        return Span(0, 0), slice(0, 0)
    first, last = min(chosen[0], chosen[-1]), max(chosen[0], chosen[-1])
    return Span(first, last + 1), slice(None, None, chosen.step)


def dask_array(cache: Cache, name: str) -> Any:
    """An array of a cache as a lazy ``dask.array.Array``, a task per chunk."""
    import dask.array

    array = DecodedArray(cache, name)
    # The same values have the same name, so that Dask can tell what it has computed already.
    token = f"{cache.path.absolute()}-{name}-{cache.content_digest()}"
    return dask.array.from_array(  # type: ignore[no-untyped-call]
        array, chunks=array.chunks, name=token
    )
