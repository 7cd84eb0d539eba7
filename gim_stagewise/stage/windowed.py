"""Windows of items of any size as samples: what modules are trained on where items are large."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache import PLAIN, Precision, TiledCache
from gim_stagewise.config import PipelineConfig, WindowsConfig
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources import PATCH_AXES, Item, Request, Source, Split, UniformItems
from gim_stagewise.stage.order import held_out
from gim_stagewise.stage.shape import window_of
from gim_stagewise.stage.zones import Zones

# With "auto", windows in an epoch, at most; and at least so many batches.
MOST_SAMPLES = 4096
LEAST_BATCHES = 4
# Draws of a window that is not blank.
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


class WindowSource:
    """A `Source` of windows of another's items, all of one size, placed at random.

    A sample has no place of its own: each of its views is a window somewhere else, a function of
    (seed, id, view). All places of all items are equally likely, so that items count by their area.
    Samples that `held_out` chooses lie in the zones that are held out, and all others outside.

    Parameters
    ----------
    source : Source
        Of normalised regions, or a cache that is read in regions.
    zones : Zones
        Where windows of its items may lie.
    samples : int
        Windows in an epoch, those with them that are held out.
    validation : float
        Share of the samples that is held out.
    min_variance : float
        Windows that vary less than so much of what they do on average are drawn again.
    seed : int
    """

    chunk_items = 1
    views = None
    label_names: tuple[str, ...] = ()

    def __init__(
        self,
        source: Windowable,
        zones: Zones,
        *,
        samples: int,
        validation: float,
        min_variance: float,
        seed: int,
    ) -> None:
        self.source = source
        self.axes = source.axes
        self.zones = zones
        self._min_variance = min_variance
        self._seed = seed
        self.ids: Sequence[str] = [f"window-{number:07d}" for number in range(samples)]
        self.held_out = frozenset(held_out(self.ids, seed=seed, fraction=validation)[1])

    def place(self, request: Request) -> Request:
        """Where a sample's window is in the source's items."""
        places = self._places(request, _MOST_BLANK if self._least_variance else 1)
        return next((place for place in places if not self._is_blank(place)), places[-1])

    def _is_blank(self, place: Request) -> bool:
        least = self._least_variance
        return least > 0 and _variance(self._at(place), self.axes) < least

    def _places(self, request: Request, count: int) -> list[Request]:
        draw = np.random.default_rng(derive_seed(self._seed, "window", request.id, request.view))
        found = []
        for _ in range(count):
            item_id, region = self.zones.drawn(draw, validation=request.id in self.held_out)
            found.append(Request(item_id, region=region))
        return found

    def items(self) -> Sequence[Item]:
        first = self.source.items()[0]
        grid = self.zones.window if self.axes == PATCH_AXES else ()
        return UniformItems(self.ids, grid, first.channels, "float32")

    def split(self, name: Split) -> Sequence[str]:
        return self.ids if name == "unlabeled" else []

    def labels(self, name: str) -> NDArray[np.int64]:
        raise KeyError(name)

    @property
    def item_bytes(self) -> int:
        return self.source.place_bytes * math.prod(self.zones.window)

    @property
    def precision(self) -> Precision:
        """The form that `read_stored` gives."""
        return self.source.precision if isinstance(self.source, TiledCache) else PLAIN

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        return [self._decoded(values) for values in self.read_stored(requests)]

    def _decoded(self, stored: NDArray[Any]) -> NDArray[np.float32]:
        return self.precision.decode_array(stored, space=1 if len(self.zones.window) == 1 else 2)

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

    def _at(self, place: Request) -> NDArray[np.float32]:
        return self._decoded(self._read_place(place, np.empty))

    def _read_place(self, place: Request, empty: Callable[..., NDArray[Any]]) -> NDArray[Any]:
        if isinstance(self.source, TiledCache):
            return self.source.read_stored([place], empty=empty)[0]
        return self.source.read([place])[0]

    @cached_property
    def _least_variance(self) -> float:
        """Below it a window is blank."""
        if self._min_variance == 0:
            return 0.0
        draw = np.random.default_rng(derive_seed(self._seed, "typical variance"))
        seen = []
        for _ in range(_TYPICAL):
            item_id, region = self.zones.drawn(draw, validation=False)
            values = self._at(Request(item_id, region=region))
            seen.append(_variance(values, self.axes))
        return self._min_variance * float(np.mean(seen))

    def announce(self, requests: Sequence[Request]) -> None:
        """Say what is going to be read soon, so that the disk is at work before it is."""
        if isinstance(self.source, TiledCache):
            self.source.announce([self._places(request, 1)[0] for request in requests])

    def content_digest(self) -> str:
        return self.source.content_digest()


def training_zones(
    config: PipelineConfig, index: int, extents: Mapping[str, tuple[int, ...]]
) -> Zones:
    """Where windows lie that module ``index`` is trained on.

    Parameters
    ----------
    config : PipelineConfig
    index : int
    extents : mapping
        Of its unlabeled items' inputs, by id.

    Raises
    ------
    ConfigError
        If there is no place for them.
    """
    return Zones(
        extents,
        window_of(config, index),
        zones=config.windows.zones,
        fraction=config.stage(index).train.validation,
        seed=config.seed,
        key=f"module.{index}.train.window",
    )


def extents_of(source: Source, split: Split = "unlabeled") -> dict[str, tuple[int, ...]]:
    """Extents of the items of a split, by id."""
    chosen = set(source.split(split))
    return {item.id: item.extent for item in source.items() if item.id in chosen}


def training_windows(
    config: PipelineConfig, index: int, source: Windowable, split: Split = "unlabeled"
) -> WindowSource:
    """The windows that module ``index`` is trained on, in items of a split.

    Raises
    ------
    ConfigError
        If there is no place for them.
    """
    train, extents = config.stage(index).train, extents_of(source, split)
    count = window_count(
        config.windows, list(extents.values()), window_of(config, index), train.batch
    )
    return WindowSource(
        source,
        training_zones(config, index, extents),
        samples=count,
        validation=train.validation,
        min_variance=config.windows.min_variance,
        seed=config.seed,
    )


def _variance(values: NDArray[np.float32], axes: tuple[str, ...]) -> float:
    """By how much values vary over space, the mean over channels."""
    space = tuple(number for number, name in enumerate(axes) if name != "channel")
    return float(values.var(axis=space, dtype=np.float64).mean())
