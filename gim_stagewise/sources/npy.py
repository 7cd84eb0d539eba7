"""Arrays in files, of which parts are read by position."""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.errors import DataError, DataNotFoundError


class ArrayFile:
    """An array in a file, read by position, never mapped: mapped pages count as resident memory.

    ``file[i]`` reads one row, ``file[:]`` everything, `read` a region along all axes.

    Parameters
    ----------
    path : Path
    shape : tuple of int
    dtype : np.dtype
    offset : int
        Where in the file the array, in C order, begins.

    Raises
    ------
    DataError
        If the file is too short.
    """

    def __init__(
        self, path: Path, shape: tuple[int, ...], dtype: np.dtype[Any], *, offset: int = 0
    ) -> None:
        self.shape, self.dtype, self._path, self._offset = shape, dtype, path, offset
        self._row_bytes = math.prod(shape[1:]) * dtype.itemsize
        expected = offset + shape[0] * self._row_bytes
        if path.stat().st_size < expected:
            raise DataError(f"{path} is cut off: {path.stat().st_size} bytes of {expected}")

    def __len__(self) -> int:
        return int(self.shape[0])

    def __getitem__(self, index: int | slice) -> NDArray[Any]:
        if isinstance(index, slice) and index.step not in (None, 1):
            raise NotImplementedError("a file is read in runs of rows, without a step")
        rows = range(len(self))[index]
        start, count = (rows.start, len(rows)) if isinstance(rows, range) else (rows, 1)
        with self._path.open("rb") as file:
            data = _pread(
                file.fileno(), self._offset + start * self._row_bytes, count * self._row_bytes
            )
        array = np.frombuffer(data, dtype=self.dtype).reshape(count, *self.shape[1:])
        return array if isinstance(index, slice) else array[0]

    def read(self, region: Sequence[slice]) -> NDArray[Any]:
        """A region, a slice without a step for each axis: one read for each run of bytes."""
        spans = [range(length)[own] for own, length in zip(region, self.shape, strict=True)]
        # What is taken whole at the end is one run with the axis before it.
        axis = len(spans) - 1
        while axis > 0 and len(spans[axis]) == self.shape[axis]:
            axis -= 1
        steps = [math.prod(self.shape[n + 1 :]) * self.dtype.itemsize for n in range(len(spans))]
        run = len(spans[axis]) * steps[axis]
        data = bytearray()
        with self._path.open("rb") as file:
            for place in itertools.product(*spans[:axis]):
                offset = sum(n * step for n, step in zip(place, steps, strict=False))
                offset += self._offset + spans[axis].start * steps[axis]
                data += _pread(file.fileno(), offset, run)
        shape = [len(span) for span in spans]
        return np.frombuffer(data, dtype=self.dtype).reshape(shape)


class NpyFile(ArrayFile):
    """An npy file as `ArrayFile`.

    Raises
    ------
    DataNotFoundError
        If there is no such file.
    DataError
        If it is none that can be read by position.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise DataNotFoundError(
                f"no such file: {path.absolute()}; check source.root and source.splits"
            )
        try:
            with path.open("rb") as file:
                version = np.lib.format.read_magic(file)
                read_header = (
                    np.lib.format.read_array_header_1_0
                    if version == (1, 0)
                    else np.lib.format.read_array_header_2_0
                )
                shape, fortran, dtype = read_header(file)
                offset = file.tell()
        except ValueError as error:
            raise DataError(f"{path} is not a readable npy file ({error})") from None
        if dtype.hasobject or not shape:
            raise DataError(
                f"{path} holds {'a single value' if not shape else 'Python objects'}, expected an "
                "array of numbers"
            )
        if fortran:
            raise DataError(
                f"{path} holds an array in Fortran order, of which parts cannot be read; save "
                "numpy.ascontiguousarray(array)"
            )
        super().__init__(path, shape, dtype, offset=offset)


def _pread(descriptor: int, offset: int, count: int) -> bytearray:
    """Read exactly ``count`` bytes; a single call may return fewer (2 GiB at most on Linux)."""
    data = bytearray()
    while len(data) < count:
        piece = os.pread(descriptor, min(count - len(data), 1 << 30), offset + len(data))
        if not piece:
            raise DataError(f"the file ends {count - len(data)} bytes early; was it replaced?")
        data += piece
    return data
