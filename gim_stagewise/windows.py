"""Pure integer geometry: patches of an image, windows of an array, halos and trims.

No torch and no zarr here, so that everything can be tested with integers alone.

A *window* is what is read of a large array at once, to compute a *tile* of the outputs: it has a
*halo*, the border that outputs of the tile depend on and that belongs to other tiles, and what is
computed of it beyond the tile is *trimmed*. At the true borders of the array there is no halo, so
that a module pads there as it would pad the whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Span:
    """A half-open range ``[start, stop)`` along one axis."""

    start: int
    stop: int

    def __post_init__(self) -> None:
        if not 0 <= self.start <= self.stop:
            raise ValueError(f"a span needs 0 <= start <= stop, got [{self.start}, {self.stop})")

    def __len__(self) -> int:
        return self.stop - self.start

    @property
    def slice(self) -> slice:
        return slice(self.start, self.stop)


# One span per axis of a sample's extent (grid rows and columns, or time).
Region = tuple[Span, ...]


def full_region(extent: tuple[int, ...]) -> Region:
    """The region that covers a whole extent."""
    return tuple(Span(0, length) for length in extent)


def centre(extent: tuple[int, ...], size: tuple[int, ...]) -> Region:
    """The region of that size in the middle; nearer to the start where it cannot be even."""
    starts = ((length - own) // 2 for length, own in zip(extent, size, strict=True))
    return tuple(Span(start, start + own) for start, own in zip(starts, size, strict=True))


def placed(extent: tuple[int, ...], size: tuple[int, ...], number: int) -> Region:
    """One of all regions of that size; ``number`` counts them through, over and over."""
    spans = []
    for length, own in zip(reversed(extent), reversed(size), strict=True):
        number, start = divmod(number, length - own + 1)
        spans.append(Span(start, start + own))
    return tuple(reversed(spans))


@dataclass(frozen=True)
class PatchGrid:
    """A grid of square patches, partly overlapping where ``stride < size``.

    The paper takes 16×16 patches with 8 pixels overlap (section 4.1): ``size=16, stride=8``.
    Pixels that do not fill a last patch, at the right and bottom, are left out, or with ``fill``
    get one more patch, which reaches beyond the image (see `mirrored`).

    Parameters
    ----------
    size : int
        Side of a patch, in pixels.
    stride : int
        Pixels between the starts of neighbouring patches.
    fill : bool
        Whether every pixel that patches without a remainder would have is in one.
    """

    size: int
    stride: int
    fill: bool = False

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1:
            raise ValueError(f"size and stride must be at least 1, got {self.size}, {self.stride}")

    def count(self, length: int) -> int:
        """Patches along an axis of ``length`` pixels; 0 if not even one fits."""
        if length < self.size:
            return 0
        whole = (length - self.size) // self.stride + 1
        covered, following = (whole - 1) * self.stride + self.size, whole * self.stride
        return whole + (self.fill and max(covered, following) < length)

    def extent(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the grid over an image."""
        return self.count(height), self.count(width)

    def pixels(self, patches: Span) -> Span:
        """The pixels needed for a non-empty run of patches along one axis."""
        if not len(patches):
            raise ValueError("an empty run of patches needs no pixels")
        return Span(patches.start * self.stride, (patches.stop - 1) * self.stride + self.size)


def mirrored(wanted: Span, length: int) -> tuple[Span, NDArray[np.int64]]:
    """What to read for a run of positions that may reach beyond the end.

    Parameters
    ----------
    wanted : Span
        Beyond the end by no more than ``length``.
    length : int

    Returns
    -------
    (Span, array)
        What to read, and for each position wanted its place in that, int64. Beyond the end
        positions are those before it in reverse, the last one first.
    """
    places = np.arange(wanted.start, wanted.stop)
    places = np.where(places < length, places, 2 * length - 1 - places)
    read = Span(int(places.min()), int(places.max()) + 1)
    return read, places - read.start


def even_ranges(count: int, size: int) -> list[Span]:
    """``[0, count)`` cut into consecutive spans of ``size``; the last may be shorter."""
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return [Span(start, min(start + size, count)) for start in range(0, count, size)]


@dataclass(frozen=True)
class Geometry:
    """Which inputs an output depends on, along one axis, for one layer or a chain of them.

    Output ``o`` depends on the inputs from ``o * stride - before`` on, ``kernel`` of them. A chain
    of convolutions and poolings does the same as one layer with a larger kernel (Araujo, Norris
    and Sim: Computing Receptive Fields of Convolutional Neural Networks, Distill 2019, equations
    2 and 3), also in the number of its outputs, since floors of quotients compose.

    Parameters
    ----------
    kernel : int
        Inputs that an output depends on; of a dilated convolution with the gaps.
    stride : int
        Inputs between those of neighbouring outputs.
    before, after : int
        Inputs that are made up on either side (padding).
    """

    kernel: int = 1
    stride: int = 1
    before: int = 0
    after: int = 0

    def __post_init__(self) -> None:
        if self.kernel < 1 or self.stride < 1:
            raise ValueError(
                f"kernel and stride must be at least 1, got {self.kernel}, {self.stride}"
            )
        if not (0 <= self.before < self.kernel and 0 <= self.after < self.kernel):
            raise ValueError(
                f"padding must be at least 0 and less than the kernel of {self.kernel}, got "
                f"{self.before}, {self.after}"
            )

    @classmethod
    def of_chain(cls, layers: Sequence[tuple[int, int, int]]) -> Geometry:
        """Of layers from the bottom up, each (kernel, stride, padding on both sides)."""
        found = cls()
        for kernel, stride, padding in layers:
            found = found.then(cls(kernel, stride, padding, padding))
        return found

    def then(self, above: Geometry) -> Geometry:
        """Of this and another on top of it."""
        return Geometry(
            self.kernel + (above.kernel - 1) * self.stride,
            self.stride * above.stride,
            self.before + above.before * self.stride,
            self.after + above.after * self.stride,
        )

    @property
    def least(self) -> int:
        """The fewest inputs that give an output."""
        return max(1, self.kernel - self.before - self.after)

    def count(self, length: int) -> int:
        """Outputs of so many inputs; 0 if there are too few."""
        if length < self.least:
            return 0
        return (length + self.before + self.after - self.kernel) // self.stride + 1

    def inputs(self, outputs: int) -> int:
        """The fewest inputs that give so many outputs, at least one."""
        return max(self.least, (outputs - 1) * self.stride + self.least)

    def receptive(self, outputs: Span, length: int) -> Span:
        """The inputs, of so many, that a non-empty run of outputs depends on."""
        if not len(outputs) or outputs.stop > self.count(length):
            raise ValueError(f"{length} inputs have no outputs {outputs}")
        start = outputs.start * self.stride - self.before
        stop = (outputs.stop - 1) * self.stride - self.before + self.kernel
        return Span(max(0, start), min(length, stop))

    def window(self, outputs: Span, length: int) -> tuple[Span, int]:
        """What to read, of so many inputs, to compute a run of outputs.

        Returns
        -------
        (Span, int)
            The inputs, and how many of the outputs computed from them come before the run. The
            inputs start at a multiple of the stride, so that strides fall on the same ones as
            over the whole.
        """
        needed = self.receptive(outputs, length)
        first = needed.start // self.stride
        return Span(first * self.stride, needed.stop), outputs.start - first


@dataclass(frozen=True)
class Window:
    """A piece of work on a large array.

    Parameters
    ----------
    inputs : Region
        What is read: the tile's own inputs and the halo.
    outputs : Region
        The tile: what is kept.
    kept : Region
        The same, counted from the first output that is computed from ``inputs``.
    """

    inputs: Region
    outputs: Region
    kept: Region

    @classmethod
    def over(cls, outputs: Region, geometry: Sequence[Geometry], extent: tuple[int, ...]) -> Window:
        """The window that gives these outputs of an array with ``extent`` inputs."""
        inputs, kept = [], []
        for span, own, length in zip(outputs, geometry, extent, strict=True):
            read, trim = own.window(span, length)
            inputs.append(read)
            kept.append(Span(trim, trim + len(span)))
        return cls(tuple(inputs), outputs, tuple(kept))


def halo_overhead(geometry: Sequence[Geometry], tile: tuple[int, ...]) -> float:
    """Inputs computed over inputs kept, for a tile with all of its halo; at least 1."""
    overhead = 1.0
    for own, size in zip(geometry, tile, strict=True):
        first = own.before  # far enough from the border
        outputs = Span(first, first + size)
        inputs, _ = own.window(outputs, outputs.stop * own.stride + own.kernel)
        overhead *= len(inputs) / (size * own.stride)
    return max(1.0, overhead)


def computed_overhead(
    geometry: Sequence[Geometry], tile: tuple[int, ...], extents: Sequence[tuple[int, ...]]
) -> float:
    """Inputs computed over inputs there are, when items with these extents are cut into tiles."""
    computed = kept = 0
    for extent in extents:
        own = all_read = 1
        for axis, side, length in zip(geometry, tile, extent, strict=True):
            spans = even_ranges(axis.count(length), side)
            all_read *= sum(len(axis.window(span, length)[0]) for span in spans)
            own *= length
        computed, kept = computed + all_read, kept + own
    return max(1.0, computed / kept)


def tiles(extent: tuple[int, ...], tile: tuple[int, ...]) -> list[Region]:
    """An extent cut into tiles, the last axis fastest; the last ones of an axis may be smaller."""
    spans = (even_ranges(length, size) for length, size in zip(extent, tile, strict=True))
    return list(product(*spans))


def tiles_over(
    region: Region, extent: tuple[int, ...], tile: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], Region]]:
    """The tiles of an extent that a region has a share of, each by its coordinates and region."""
    numbers = (
        range(span.start // size, -(-span.stop // size)) if len(span) else range(0)
        for span, size in zip(region, tile, strict=True)
    )
    for place in product(*numbers):
        yield (
            place,
            tuple(
                Span(number * size, min((number + 1) * size, length))
                for number, size, length in zip(place, tile, extent, strict=True)
            ),
        )


def common(one: Region, other: Region) -> Region:
    """What two overlapping regions have in common."""
    return tuple(
        Span(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(one, other, strict=True)
    )


def within(region: Region, outer: Region) -> tuple[slice, ...]:
    """Slices of a region in an array that holds the outer one."""
    return tuple(
        slice(span.start - own.start, span.stop - own.start)
        for span, own in zip(region, outer, strict=True)
    )
