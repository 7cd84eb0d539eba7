"""Recordings with another sample rate, or fewer channels, than they are stored with."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.errors import DataError
from gim_stagewise.sources.files import RegionFile
from gim_stagewise.units import format_bytes
from gim_stagewise.windows import Region, Span

# Those of torchaudio.functional.resample: zero crossings of the sinc on either side, and where its
# cutoff lies below half of the lower rate.
_CROSSINGS = 6
_ROLLOFF = 0.99
# Output of a block, about.
_BLOCK = 4096
_MOST_KERNEL_BYTES = 64_000_000


class Resampled:
    """A recording at another sample rate, by windowed sinc interpolation.

    As torchaudio.functional.resample does it with its defaults (a Hann window over six zero
    crossings; Smith, Digital Audio Resampling, 2002), and as long: ceil(steps · new / old).

    Steps are always computed in the same blocks, by a sum in a fixed order that no number of
    threads changes: a region is, bit for bit, the slice of the whole.

    Parameters
    ----------
    file : RegionFile
        With one axis, of time.
    old, new : int
        Its own rate, and the one wanted, in Hz.

    Raises
    ------
    DataError
        If the two rates have so small a common divisor that the interpolation's filters would take
        more than 64 MB.
    """

    def __init__(self, file: RegionFile, *, old: int, new: int) -> None:
        self._file = file
        common = math.gcd(old, new)
        # A period of so many steps becomes one of so many.
        self._old, self._new = old // common, new // common
        kernel_bytes = 4 * self._new * (self._old + 2 * _half_width(self._old, self._new))
        if kernel_bytes > _MOST_KERNEL_BYTES:
            raise DataError(
                f"{old} Hz cannot be resampled to {new} Hz here: these have no common divisor "
                f"above {common}, and the filters would take {format_bytes(kernel_bytes)}; "
                "resample it beforehand"
            )
        self._periods = max(1, _BLOCK // self._new)
        self.rate = new
        self.stored_rate = old
        (steps,) = file.extent
        self.extent: tuple[int, ...] = (-(-steps * self._new // self._old),)
        self.channels = file.channels
        self.dtype: np.dtype[Any] = np.dtype("float32")
        block = 4 * self.channels * self._periods * self._old
        self.chunk_bytes = max(file.chunk_bytes, block)

    def read(self, region: Region) -> NDArray[np.float32]:
        """Some steps, float32 [channel, time]."""
        (span,) = region
        size = self._periods * self._new
        first, last = span.start // size, -(-span.stop // size)
        out = np.empty((self.channels, (last - first) * size), np.float32)
        kernel, half = _kernel(self._old, self._new)
        advance = self._periods * self._old
        inputs = self._padded(first * advance - half, last * advance + half)
        for number in range(last - first):
            start = number * advance
            block = np.ascontiguousarray(inputs[:, start : start + advance + 2 * half])
            place = slice(number * size, (number + 1) * size)
            out[:, place] = _interpolated(block, kernel, self._old, self._periods)
        offset = first * size
        return np.ascontiguousarray(out[:, span.start - offset : span.stop - offset])

    def _padded(self, start: int, stop: int) -> NDArray[np.float32]:
        """Steps of the recording, and zeros before its start and beyond its end."""
        (steps,) = self._file.extent
        own = Span(min(max(start, 0), steps), min(max(stop, 0), steps))
        values = self._file.read((own,)).astype(np.float32, copy=False)
        before = min(max(-start, 0), stop - start)
        return np.pad(values, ((0, 0), (before, stop - start - before - len(own))))


def _half_width(old: int, new: int) -> int:
    """Steps on either side of a period that its filters reach."""
    return math.ceil(_CROSSINGS * old / (min(old, new) * _ROLLOFF))


@lru_cache(maxsize=4)
def _kernel(old: int, new: int) -> tuple[NDArray[np.float32], int]:
    """A filter for each step of a period: float32 [new, old + 2 · half], and half."""
    half, cutoff = _half_width(old, new), min(old, new) * _ROLLOFF
    times = np.arange(-half, half + old) / old - np.arange(new)[:, None] / new
    times = np.clip(times * cutoff, -_CROSSINGS, _CROSSINGS)
    window = np.cos(times * np.pi / _CROSSINGS / 2) ** 2
    return (np.sinc(times) * window * (cutoff / old)).astype(np.float32), half


def _interpolated(
    block: NDArray[np.float32], kernel: NDArray[np.float32], old: int, periods: int
) -> NDArray[np.float32]:
    """[channel, step] to [channel, new step], a period after another."""
    frames = np.lib.stride_tricks.sliding_window_view(block, kernel.shape[1], axis=1)
    # Not a matrix product, whose order of summation is the library's and its threads'.
    found: NDArray[np.float32] = np.einsum("cpk,jk->cpj", frames[:, ::old][:, :periods], kernel)
    return found.reshape(len(block), -1)


class Mono:
    """The mean over the channels of a recording."""

    def __init__(self, file: RegionFile) -> None:
        self._file = file
        self.rate = int(getattr(file, "rate", 0))
        self.extent = file.extent
        self.channels = 1
        self.dtype: np.dtype[Any] = np.dtype("float32")
        self.chunk_bytes = file.chunk_bytes

    def read(self, region: Region) -> NDArray[np.float32]:
        """Some steps, float32 [1, time]."""
        mean: NDArray[np.float32] = self._file.read(region).mean(0, np.float32, keepdims=True)
        return mean


def resample(values: NDArray[np.float32], *, old: int, new: int) -> NDArray[np.float32]:
    """Resample a recording that is in memory; see `Resampled`.

    Parameters
    ----------
    values : array
        float32 [channel, time].
    old, new : int
        Rates in Hz.
    """
    resampled = Resampled(_InMemory(values), old=old, new=new)
    return resampled.read((Span(0, resampled.extent[0]),))


class _InMemory:
    """An array as a `RegionFile`."""

    def __init__(self, values: NDArray[np.float32]) -> None:
        self._values = values
        self.channels = len(values)
        self.extent: tuple[int, ...] = (values.shape[1],)
        self.dtype = values.dtype
        self.chunk_bytes = 0

    def read(self, region: Region) -> NDArray[np.float32]:
        return self._values[:, region[0].slice]
