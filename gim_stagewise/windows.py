"""Pure integer geometry: which patches an image has, and which pixels a patch needs.

No torch and no zarr here, so that everything can be tested with integers alone.
"""

from __future__ import annotations

from dataclasses import dataclass


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
    Pixels that do not fill a last patch are left out at the right and bottom.

    Parameters
    ----------
    size : int
        Side of a patch, in pixels.
    stride : int
        Pixels between the starts of neighbouring patches.
    """

    size: int
    stride: int

    def __post_init__(self) -> None:
        if self.size < 1 or self.stride < 1:
            raise ValueError(f"size and stride must be at least 1, got {self.size}, {self.stride}")

    def count(self, length: int) -> int:
        """Patches along an axis of ``length`` pixels; 0 if not even one fits."""
        return 0 if length < self.size else (length - self.size) // self.stride + 1

    def extent(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of the grid over an image."""
        return self.count(height), self.count(width)

    def pixels(self, patches: Span) -> Span:
        """The pixels needed for a non-empty run of patches along one axis."""
        if not len(patches):
            raise ValueError("an empty run of patches needs no pixels")
        return Span(patches.start * self.stride, (patches.stop - 1) * self.stride + self.size)

    @property
    def overlapping_steps(self) -> int:
        """How many following patches share pixels with a patch.

        The prediction of these would be trivial; the paper skips them (one, at its size 16
        and stride 8).
        """
        return (self.size - 1) // self.stride


def even_ranges(count: int, size: int) -> list[Span]:
    """``[0, count)`` cut into consecutive spans of ``size``; the last may be shorter."""
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    return [Span(start, min(start + size, count)) for start in range(0, count, size)]
