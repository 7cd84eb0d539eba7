"""Where windows may lie: zones of items are held out for validation, all else is for training."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import accumulate, product

import numpy as np

from gim_stagewise.errors import ConfigError
from gim_stagewise.seeds import derive_seed
from gim_stagewise.stage.order import held_out_count
from gim_stagewise.windows import Region, Span, full_region, placed

# Draws for one place, of which those that touch what is held out are refused.
_MOST_DRAWS = 10_000


@dataclass(frozen=True)
class _Places:
    """Places of windows in regions of items, numbered through."""

    regions: list[tuple[str, Region]]
    ends: list[int]

    @classmethod
    def of(cls, regions: Iterable[tuple[str, Region]], window: tuple[int, ...]) -> _Places:
        kept, counts = [], []
        for item_id, region in regions:
            room = [len(s) - own + 1 for s, own in zip(region, window, strict=True)]
            if min(room) > 0:
                kept.append((item_id, region))
                counts.append(math.prod(room))
        return cls(kept, list(accumulate(counts)))

    def drawn(self, draw: np.random.Generator, window: tuple[int, ...]) -> tuple[str, Region]:
        number = int(draw.integers(self.ends[-1]))
        which = bisect_right(self.ends, number)
        item_id, region = self.regions[which]
        own = placed(tuple(map(len, region)), window, number - (self.ends[which - 1] * (which > 0)))
        shifted = (
            Span(part.start + whole.start, part.stop + whole.start)
            for part, whole in zip(own, region, strict=True)
        )
        return item_id, tuple(shifted)


class Zones:
    """Places of windows of one size in items of any size, for training and for validation.

    Each axis of an item is cut into as many zones of equal length. Which are held out is a function
    of seed and ids, so it is the same in every stage, whatever the units of its extents. A window
    for validation lies within a zone that is held out; one for training touches none of them. (What
    modules below saw of the border of a zone, within their receptive field, is not counted.)

    Parameters
    ----------
    extents : mapping
        Of the items, by id.
    window : tuple of int
    zones : int
        Along each axis of an item.
    fraction : float
        Of the zones that are held out; at least one is, and one is not.
    seed : int
    key : str
        What errors call the size of windows.

    Raises
    ------
    ConfigError
        If there is no place for windows, in what is held out or elsewhere.
    """

    def __init__(
        self,
        extents: Mapping[str, tuple[int, ...]],
        window: tuple[int, ...],
        *,
        zones: int,
        fraction: float,
        seed: int,
        key: str,
    ) -> None:
        self.window = window
        self._extents = extents
        self._count = zones
        self._key = key
        self.held_out = self._chosen(fraction, seed)
        whole = ((item_id, full_region(extent)) for item_id, extent in extents.items())
        apart = ((item_id, self._region(item_id, zone)) for item_id, zone in sorted(self.held_out))
        self._anywhere, self._apart = _Places.of(whole, window), _Places.of(apart, window)
        if not self._apart.regions:
            size = "×".join(map(str, window))
            raise ConfigError(
                f"is {window[0]}, but no zone that is held out for validation has room for windows "
                f"of {size}; use smaller windows, or lower windows.zones from {zones}",
                key=key,
            )
        self.drawn(np.random.default_rng(0), validation=False)

    def _chosen(self, fraction: float, seed: int) -> set[tuple[str, tuple[int, ...]]]:
        numbers = list(product(range(self._count), repeat=len(self.window)))
        zones = [(item_id, zone) for item_id in self._extents for zone in numbers]
        if len(zones) < 2:
            raise ConfigError(
                "is 1, but there is one item alone, so nothing could be held out; use 2 or more",
                key="windows.zones",
            )
        key = str(derive_seed(seed, "held-out zones"))
        ranked = sorted(
            zones, key=lambda zone: hashlib.sha256(f"{key}:{zone[0]}:{zone[1]}".encode()).digest()
        )
        return set(ranked[: min(held_out_count(len(zones), fraction), len(zones) - 1)])

    def _bounds(self, length: int) -> list[int]:
        return [number * length // self._count for number in range(self._count + 1)]

    def _region(self, item_id: str, zone: tuple[int, ...]) -> Region:
        bounds = (self._bounds(length) for length in self._extents[item_id])
        return tuple(Span(own[n], own[n + 1]) for own, n in zip(bounds, zone, strict=True))

    def _touches_held_out(self, item_id: str, region: Region) -> bool:
        numbers = []
        for span, length in zip(region, self._extents[item_id], strict=True):
            bounds = self._bounds(length)
            first, last = bisect_right(bounds, span.start), bisect_right(bounds, span.stop - 1)
            numbers.append(range(first - 1, last))
        return any((item_id, zone) in self.held_out for zone in product(*numbers))

    def drawn(self, draw: np.random.Generator, *, validation: bool) -> tuple[str, Region]:
        """A window's item and place, all places being equally likely.

        Raises
        ------
        ConfigError
            If windows for training hardly fit anywhere.
        """
        if validation:
            return self._apart.drawn(draw, self.window)
        for _ in range(_MOST_DRAWS):
            item_id, region = self._anywhere.drawn(draw, self.window)
            if not self._touches_held_out(item_id, region):
                return item_id, region
        raise ConfigError(
            f"is {self.window[0]}, but windows of that size hardly fit beside the zones that are "
            "held out for validation; use smaller windows, lower train.validation, or set another "
            f"windows.zones than {self._count}",
            key=self._key,
        )
