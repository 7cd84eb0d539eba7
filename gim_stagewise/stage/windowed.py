"""Windows of items of any size as samples: what modules are trained on where items are large."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, product
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache import PLAIN, Precision, TiledCache
from gim_stagewise.config import PipelineConfig, WindowsConfig
from gim_stagewise.errors import ConfigError
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources import PATCH_AXES, Item, Request, Source, Split, UniformItems
from gim_stagewise.stage.order import held_out, held_out_count
from gim_stagewise.stage.shape import window_of
from gim_stagewise.windows import Region, Span, placed

# With "auto", windows in an epoch, at most; and at least so many batches.
MOST_SAMPLES = 4096
LEAST_BATCHES = 4
# Draws for one place, of which those that touch what is held out are refused, and draws of windows
# that are not blank.
_MOST_DRAWS = 10_000
_MOST_BLANK = 16
# Windows from which it is known how much they vary on average.
_TYPICAL = 64


class Windowable(Source, Protocol):
    """A `Source` that is read in regions, of as many bytes as they have places."""

    @property
    def place_bytes(self) -> int:
        """Bytes of what there is at one place, in the form it is read in."""


def window_count(
    config: WindowsConfig, extents: Sequence[tuple[int, ...]], window: tuple[int, ...], batch: int
) -> int:
    """Windows in an epoch, those with them that are held out."""
    if config.samples != "auto":
        return config.samples
    once = math.ceil(sum(map(math.prod, extents)) / math.prod(window))
    return max(LEAST_BATCHES * batch, min(once, MOST_SAMPLES))


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


class WindowSource:
    """A `Source` of windows of another's items, all of one size, placed at random.

    A sample has no place of its own: each of its views is a window somewhere else, a function of
    (seed, id, view). All places of all items are equally likely, so that items count by their area.
    Items are cut into zones, the same in every stage, some of which are held out: samples that
    `held_out` chooses lie within those, and all others touch none of them. (What modules below saw
    of the border of a zone, within their receptive field, is not counted.)

    Parameters
    ----------
    source : Source
        Of normalised regions, or a cache that is read in regions.
    window : tuple of int
        Extent of a window, in the units of the items' extents.
    config : WindowsConfig
    samples : int
        Windows in an epoch, those with them that are held out.
    validation : float
        Share of the zones, and of the samples, that is held out.
    seed : int
    key : str
        What errors call the size of windows.

    Raises
    ------
    ConfigError
        If there is no place for windows, in what is held out or elsewhere.
    """

    chunk_items = 1
    views = None
    label_names: tuple[str, ...] = ()

    def __init__(
        self,
        source: Windowable,
        window: tuple[int, ...],
        *,
        config: WindowsConfig,
        samples: int,
        validation: float,
        seed: int,
        key: str,
    ) -> None:
        self.source = source
        self.axes = source.axes
        self._window = window
        self._config = config
        self._seed = seed
        self._key = key
        self.ids: Sequence[str] = [f"window-{number:07d}" for number in range(samples)]
        self._held_out = set(held_out(self.ids, seed=seed, fraction=validation)[1])
        chosen = set(source.split("unlabeled"))
        self._extents = {item.id: item.extent for item in source.items() if item.id in chosen}
        self._zones = self._held_zones(validation)
        whole = [(i, tuple(Span(0, n) for n in extent)) for i, extent in self._extents.items()]
        self._anywhere = _Places.of(whole, window)
        self._apart = _Places.of(
            ((item_id, self._zone(item_id, zone)) for item_id, zone in sorted(self._zones)), window
        )
        self._check_places()

    # Zones

    def _bounds(self, length: int) -> list[int]:
        count = self._config.zones
        return [number * length // count for number in range(count + 1)]

    def _zone(self, item_id: str, zone: tuple[int, ...]) -> Region:
        bounds = (self._bounds(length) for length in self._extents[item_id])
        return tuple(Span(own[n], own[n + 1]) for own, n in zip(bounds, zone, strict=True))

    def _held_zones(self, validation: float) -> set[tuple[str, tuple[int, ...]]]:
        """Zones that are held out: a function of (seed, ids), not of a stage's sizes."""
        numbers = list(product(range(self._config.zones), repeat=len(self._window)))
        zones = [(item_id, zone) for item_id in self._extents for zone in numbers]
        if len(zones) < 2:
            raise ConfigError(
                "is 1, but there is one item alone, so nothing could be held out; use 2 or more",
                key="windows.zones",
            )
        key = str(derive_seed(self._seed, "held-out zones"))
        ranked = sorted(
            zones, key=lambda zone: hashlib.sha256(f"{key}:{zone[0]}:{zone[1]}".encode()).digest()
        )
        return set(ranked[: min(held_out_count(len(zones), validation), len(zones) - 1)])

    def _check_places(self) -> None:
        size = "×".join(map(str, self._window))
        if not self._apart.regions:
            raise ConfigError(
                f"is {self._window[0]}, but no zone that is held out for validation has room for a "
                f"window of {size}; use smaller windows, or lower windows.zones from "
                f"{self._config.zones}",
                key=self._key,
            )
        draw = np.random.default_rng(derive_seed(self._seed, "any place"))
        self._training_place(draw)

    def _touches_held_out(self, item_id: str, region: Region) -> bool:
        numbers = []
        for span, length in zip(region, self._extents[item_id], strict=True):
            bounds = self._bounds(length)
            first, last = bisect_right(bounds, span.start), bisect_right(bounds, span.stop - 1)
            numbers.append(range(first - 1, last))
        return any((item_id, zone) in self._zones for zone in product(*numbers))

    def _training_place(self, draw: np.random.Generator) -> tuple[str, Region]:
        for _ in range(_MOST_DRAWS):
            item_id, region = self._anywhere.drawn(draw, self._window)
            if not self._touches_held_out(item_id, region):
                return item_id, region
        raise ConfigError(
            f"is {self._window[0]}, but windows of that size hardly fit beside the zones that are "
            "held out for validation; use smaller windows, lower train.validation, or set another "
            f"windows.zones than {self._config.zones}",
            key=self._key,
        )

    # Samples

    def place(self, request: Request) -> Request:
        """Where a sample's window is in the source's items; blank ones count as well."""
        return self._places(request, 1)[0]

    def _places(self, request: Request, count: int) -> list[Request]:
        draw = np.random.default_rng(derive_seed(self._seed, "window", request.id, request.view))
        found = []
        for _ in range(count):
            if request.id in self._held_out:
                item_id, region = self._apart.drawn(draw, self._window)
            else:
                item_id, region = self._training_place(draw)
            found.append(Request(item_id, region=region))
        return found

    def items(self) -> Sequence[Item]:
        first = self.source.items()[0]
        grid = self._window if self.axes == PATCH_AXES else ()
        return UniformItems(self.ids, grid, first.channels, "float32")

    def split(self, name: Split) -> Sequence[str]:
        return self.ids if name == "unlabeled" else []

    def labels(self, name: str) -> NDArray[np.int64]:
        raise KeyError(name)

    @property
    def item_bytes(self) -> int:
        return self.source.place_bytes * math.prod(self._window)

    @property
    def precision(self) -> Precision:
        """The form that `read_stored` gives."""
        return self.source.precision if isinstance(self.source, TiledCache) else PLAIN

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        return [self._decoded(values) for values in self.read_stored(requests)]

    def _decoded(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        return self.precision.decode_array(stored, space=1 if len(self._window) == 1 else 2)

    def read_stored(
        self, requests: Sequence[Request], *, empty: Callable[..., NDArray[Any]] = np.empty
    ) -> list[NDArray[Any]]:
        """The samples asked for, in the form that the source has them in."""
        return [self._read(request, empty) for request in requests]

    def _read(self, request: Request, empty: Callable[..., NDArray[Any]]) -> NDArray[Any]:
        least = self._least_variance
        for place in self._places(request, _MOST_BLANK if least else 1):
            values = self._read_place(place, empty)
            if least == 0 or _variance(self._decoded(values), self.axes) >= least:
                break
        return values

    def _read_place(self, place: Request, empty: Callable[..., NDArray[Any]]) -> NDArray[Any]:
        if isinstance(self.source, TiledCache):
            return self.source.read_stored([place], empty=empty)[0]
        return self.source.read([place])[0]

    @cached_property
    def _least_variance(self) -> float:
        """Below it a window is blank."""
        if self._config.min_variance == 0:
            return 0.0
        draw = np.random.default_rng(derive_seed(self._seed, "typical variance"))
        seen = []
        for _ in range(_TYPICAL):
            item_id, region = self._training_place(draw)
            values = self._read_place(Request(item_id, region=region), np.empty)
            seen.append(_variance(self._decoded(values), self.axes))
        return self._config.min_variance * float(np.mean(seen))

    def announce(self, requests: Sequence[Request]) -> None:
        """Say what is going to be read soon, so that the disk is at work before it is."""
        if isinstance(self.source, TiledCache):
            self.source.announce([self.place(request) for request in requests])

    def content_digest(self) -> str:
        return self.source.content_digest()


def training_windows(config: PipelineConfig, index: int, source: Windowable) -> WindowSource:
    """The windows that module ``index`` is trained on.

    Raises
    ------
    ConfigError
        If there is no place for them.
    """
    train, window = config.stage(index).train, window_of(config, index)
    chosen = set(source.split("unlabeled"))
    extents = [item.extent for item in source.items() if item.id in chosen]
    return WindowSource(
        source,
        window,
        config=config.windows,
        samples=window_count(config.windows, extents, window, train.batch),
        validation=train.validation,
        seed=config.seed,
        key=f"module.{index}.train.window",
    )


def _variance(values: NDArray[np.float32], axes: tuple[str, ...]) -> float:
    """By how much values vary over space, the mean over channels."""
    space = tuple(number for number, name in enumerate(axes) if name != "channel")
    return float(values.var(axis=space, dtype=np.float64).mean())
