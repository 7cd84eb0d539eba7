"""A source becomes seeded batches (see `gim_stagewise.stage.order` for their order)."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
from torch import Tensor

from gim_stagewise.config import TrainConfig
from gim_stagewise.errors import ConfigError
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources import Request, Source
from gim_stagewise.stage.batch import SampleBatch
from gim_stagewise.stage.feed import MOST_THREADS, SampleReader, deliver
from gim_stagewise.stage.order import (
    Indexes,
    Order,
    shuffle_quality,
    shuffled_order,
    storage_order,
)
from gim_stagewise.windows import Region, Span, centre, placed


def check_loading(samples: int, *, batch: int, window: int, chunk_bytes: int, stage: int) -> None:
    """Check that a stage's samples can be delivered as asked, before anything runs.

    Parameters
    ----------
    samples : int
        Samples to train on.
    batch : int
    window : int
        Bytes of samples that may be held to be mixed.
    chunk_bytes : int
        Bytes of one chunk of the input; 0 where samples are read one by one.
    stage : int

    Raises
    ------
    ConfigError
        If there are fewer samples than a batch holds, or the window is smaller than a chunk.
    """
    if samples < batch:
        advice = (
            f"use {samples} or less"
            if samples
            else "some are held out for validation: use more of them, or lower train.validation"
        )
        raise ConfigError(
            f"is {batch}, but only {samples} samples are left to train on; {advice}",
            key=f"module.{stage}.train.batch",
        )
    if window < chunk_bytes:
        raise ConfigError(
            f"is {window} bytes, less than one chunk of the input ({chunk_bytes} bytes)",
            key=f"module.{stage}.train.shuffle_window",
        )


class Loader:
    """Batches of one split of a source.

    Parameters
    ----------
    source : Source
    ids : sequence of str
        The samples to deliver, in the source's order.
    batch : int
        Samples in a batch.
    window : int
        Bytes of samples that may be held to be mixed.
    seed, stage : int
    reader : SampleReader, optional
        Reads the samples; shared with validation, it keeps them once.
    grid : tuple of int, optional
        Rows and columns of patches to deliver of each sample, at a place drawn for each epoch; all
        by default.

    Raises
    ------
    ConfigError
        If the window is smaller than one chunk, or there are fewer samples than a batch holds.
    """

    def __init__(
        self,
        source: Source,
        ids: Sequence[str],
        *,
        batch: int,
        window: int,
        seed: int,
        stage: int,
        reader: SampleReader | None = None,
        grid: tuple[int, ...] | None = None,
    ) -> None:
        check_loading(
            len(ids),
            batch=batch,
            window=window,
            chunk_bytes=source.chunk_items * source.item_bytes if source.chunk_items > 1 else 0,
            stage=stage,
        )
        self._source = source
        self._reader = reader or SampleReader(source, samples=len(ids), window=window)
        self._ids = list(ids)
        self._batch = batch
        self._window = window
        self._seed = seed
        self._stage = stage
        self._extent = source.items()[0].extent
        self._grid = self._extent if grid is None else grid
        self.positions = positions_of(source, self._ids)

    @property
    def steps(self) -> int:
        """Batches in an epoch; samples that do not fill a last one are left for other epochs."""
        return len(self._ids) // self._batch

    @property
    def shuffle_quality(self) -> float:
        """How often batches repeat a chunk, against a perfect shuffle; 1 is as good."""
        return loading_quality(
            self.positions,
            batch=self._batch,
            window=self._window,
            item_bytes=self._source.item_bytes,
            chunk_items=self._source.chunk_items,
            seed=self._seed,
        )

    def order(self, epoch: int) -> Order:
        """The order of an epoch's samples."""
        return shuffled_order(
            self.positions,
            chunk=self._source.chunk_items,
            pool=pool_samples(self._window, self._source.item_bytes),
            seed=self._seed,
            epoch=epoch,
        )

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[SampleBatch]:
        """The batches of an epoch, from number ``start`` on."""
        request_of = partial(self._request, epoch)
        yield from _batches(
            self._reader,
            self.order(epoch),
            request_of,
            grid=self._grid,
            batch=self._batch,
            window=self._window,
            start=start,
            stop=self.steps,
        )

    def _request(self, epoch: int, index: int) -> Request:
        item_id = self._ids[index]
        view = view_of(self._source, item_id, self._seed, self._stage, epoch)
        return Request(item_id, view, self._region(epoch, item_id))

    def _region(self, epoch: int, item_id: str) -> Region | None:
        if self._grid == self._extent:
            return None
        drawn = derive_seed(self._seed, "place drawn", self._stage, epoch, item_id)
        return placed(self._extent, self._grid, drawn)


def _batches(
    reader: SampleReader,
    order: Order,
    request_of: Callable[[int], Request],
    *,
    grid: tuple[int, ...],
    batch: int,
    window: int,
    start: int,
    stop: int,
) -> Iterator[SampleBatch]:
    source = reader.source

    def requests_of(number: int) -> list[Request]:
        own = order.indexes[number * batch : (number + 1) * batch]
        return [request_of(int(index)) for index in own]

    if batch * source.item_bytes > window and not reader.keeps_all:
        # Not even a batch may be held: its samples are read as its rows are asked for.
        for number in range(start, stop):
            requests = requests_of(number)
            fetch = partial(_read_some, reader, requests)
            yield SampleBatch(len(requests), fetch, grid, reader.precision, requests)
        return
    delivered = deliver(reader, order, request_of, batch=batch, start=start, stop=stop)
    for number, samples in enumerate(delivered, start=start):
        held = partial(_some, samples)
        yield SampleBatch(len(samples), held, grid, reader.precision, requests_of(number))


def _some(samples: list[Tensor], wanted: Span) -> list[Tensor]:
    return samples[wanted.slice]


def _read_some(reader: SampleReader, requests: list[Request], wanted: Span) -> list[Tensor]:
    return reader.read(requests[wanted.slice])


def positions_of(source: Source, ids: Sequence[str]) -> Indexes:
    """Where samples lie in storage order."""
    wanted = {item_id: index for index, item_id in enumerate(ids)}
    positions = np.empty(len(ids), dtype=np.int64)
    for position, item_id in enumerate(source.ids):
        if item_id in wanted:
            positions[wanted[item_id]] = position
    return positions


def pool_samples(window: int, item_bytes: int) -> int:
    """Samples that a window of so many bytes holds to be mixed; at least one."""
    return max(1, window // item_bytes)


def loading_quality(
    positions: Indexes, *, batch: int, window: int, item_bytes: int, chunk_items: int, seed: int
) -> float:
    """How well a `Loader` of such a source shuffles (see `shuffle_quality`)."""
    if chunk_items == 1 or len(positions) < batch:
        return 1.0
    pool = pool_samples(window, item_bytes)
    return shuffle_quality(positions, chunk=chunk_items, pool=pool, batch=batch, seed=seed)


def loader_bytes(
    config: TrainConfig, *, samples: int, item_bytes: int, chunk_items: int, views: int | None
) -> int:
    """The most bytes of samples that a `Loader` of such a source holds at once.

    ``samples`` counts all unlabeled ones, held-out ones with them.
    """
    window, batch = config.shuffle_window, config.batch * item_bytes
    # Chunks on their way from the disk into single samples.
    reading = 2 * chunk_items * item_bytes * (MOST_THREADS if chunk_items > 1 else 1)
    if views == 0 and samples * item_bytes <= window:
        return samples * item_bytes + reading
    if batch > window:
        return reading
    pool = 1 if chunk_items == 1 else min(pool_samples(window, item_bytes), samples)
    held = (pool + chunk_items) * item_bytes + 2 * batch
    return min(held, samples * item_bytes + batch) + reading


def view_of(source: Source, item_id: str, seed: int, stage: int, epoch: int) -> int:
    """The training view of a sample: a function of (seed, stage, epoch, id)."""
    if source.views == 0:
        return 0
    drawn = derive_seed(seed, "view drawn", stage, epoch, item_id)
    return 1 + drawn % (source.views or 2**31)


def validation_batches(
    source: Source,
    ids: Sequence[str],
    *,
    batch: int,
    window: int,
    reader: SampleReader | None = None,
    grid: tuple[int, ...] | None = None,
) -> Iterator[SampleBatch]:
    """Held-out samples in storage order, always the same view; the last batch may be smaller.

    Of ``grid``, where it is given, the patches in the middle.
    """
    view = 0 if source.views == 0 else 1
    extent = source.items()[0].extent
    grid = extent if grid is None else grid
    region = None if grid == extent else centre(extent, grid)
    yield from _batches(
        reader or SampleReader(source, samples=len(ids), window=window),
        storage_order(positions_of(source, ids), chunk=source.chunk_items),
        lambda index: Request(ids[index], view, region),
        grid=grid,
        batch=batch,
        window=window,
        start=0,
        stop=-(-len(ids) // batch),
    )
