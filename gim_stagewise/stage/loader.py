"""A source becomes seeded batches.

The order of an epoch is a function of (seed, epoch, ids, chunk grid, shuffle window) alone, so
it can be taken up in the middle by any process. Chunks are shuffled, laid end to end, and mixed
within a window that is held in memory; a source whose samples are read one by one needs no
window and gets a true random order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from gim_stagewise.cache import Cache, Precision
from gim_stagewise.config import TrainConfig
from gim_stagewise.errors import ConfigError, DataError
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources import Request, Source
from gim_stagewise.windows import Span

CPU = torch.device("cpu")
PLAIN = Precision("float32")
Read = Callable[[Sequence[Request]], list[NDArray[Any]]]


def held_out(ids: Sequence[str], *, seed: int, fraction: float) -> tuple[list[str], list[str]]:
    """Split unlabeled ids into those to train on and those held out for early stopping.

    The choice is a function of (seed, ids), so it is the same in every stage of a pipeline.

    Returns
    -------
    (list of str, list of str)
        Training ids and held-out ids, each in the given order; at least one is held out.
    """
    key = str(derive_seed(seed, "held out"))
    ranked = sorted(ids, key=lambda i: hashlib.sha256(f"{key}:{i}".encode()).digest())
    chosen = set(ranked[: held_out_count(len(ids), fraction)])
    return [i for i in ids if i not in chosen], [i for i in ids if i in chosen]


def held_out_count(samples: int, fraction: float) -> int:
    """How many of so many samples are held out: the fraction, and at least one."""
    return max(1, round(fraction * samples))


def epoch_windows(
    positions: NDArray[np.int64], *, chunk: int, window_chunks: int, seed: int, epoch: int
) -> list[NDArray[np.int64]]:
    """The order of one epoch, cut into the windows that are held in memory one at a time.

    Parameters
    ----------
    positions : array of int
        Where the samples to train on lie in storage order, ascending.
    chunk : int
        Samples in a chunk.
    window_chunks : int
        Chunks that are in memory at once.
    seed, epoch : int

    Returns
    -------
    list of arrays
        Indexes into ``positions``; together each index once.
    """
    draw = np.random.default_rng(derive_seed(seed, "order", epoch))
    if chunk == 1:
        return [draw.permutation(len(positions))]
    chunk_of = positions // chunk
    chunks = draw.permutation(np.unique(chunk_of))
    windows = []
    for start in range(0, len(chunks), window_chunks):
        members = np.flatnonzero(np.isin(chunk_of, chunks[start : start + window_chunks]))
        windows.append(draw.permutation(members))
    return windows


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
        advice = f"use {samples} or less" if samples else "lower train.validation"
        raise ConfigError(
            f"is {batch}, but only {samples} samples are left to train on; {advice}",
            key=f"module.{stage}.train.batch",
        )
    if window < chunk_bytes:
        raise ConfigError(
            f"is {window} bytes, less than one chunk of the input ({chunk_bytes} bytes)",
            key=f"module.{stage}.train.shuffle_window",
        )


Fetch = Callable[[Span], list[NDArray[Any]]]


class SampleBatch:
    """Samples of a batch, handed out row by row, so that no whole batch is ever stacked.

    Parameters
    ----------
    count : int
        Samples.
    fetch : callable
        Gives a range of the batch's samples, [grid_row, grid_col, channel, height, width] each.
    grid : tuple of int
        Rows and columns of a sample's patches.
    precision : Precision
        The form that samples are fetched in.
    hold : bool
        Fetch all samples now and keep them, rather than fetch them whenever rows are read.
    """

    def __init__(
        self,
        count: int,
        fetch: Fetch,
        grid: tuple[int, ...],
        *,
        precision: Precision = PLAIN,
        hold: bool,
    ) -> None:
        self._count = count
        self._precision = precision
        self._fetch = fetch
        self._grid = grid
        self._held = fetch(Span(0, count)) if hold else None

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._count, *self._grid)

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    def read(
        self, rows: Span, device: torch.device = CPU
    ) -> Float[Tensor, "row channel height width"]:
        """Patches ``rows``, counted by sample, grid row and column.

        They are moved to the device in their stored form and decoded there.
        """
        each = math.prod(self._grid)
        samples = Span(rows.start // each, -(-rows.stop // each))
        fetched = self._fetch(samples) if self._held is None else self._held[samples.slice]
        parts = []
        for number, sample in enumerate(fetched, start=samples.start):
            if sample.shape[:2] != self._grid or sample.shape[2:] != fetched[0].shape[2:]:
                raise DataError(
                    f"samples of one batch differ in shape: {sample.shape} and {fetched[0].shape}"
                )
            patches = sample.reshape(each, *sample.shape[2:])
            start = max(rows.start - number * each, 0)
            parts.append(patches[start : min(rows.stop - number * each, each)])
        stored = torch.from_numpy(np.concatenate(parts))
        return self._precision.decode(stored.to(device))


@dataclass(frozen=True)
class _Window:
    """Samples that are held to be mixed, in storage order."""

    place: tuple[int, int]
    order: NDArray[np.int64]
    requests: list[Request]
    samples: list[NDArray[Any]]


class Loader:
    """Batches of one split of a source.

    At most ``window`` bytes of samples are held to be mixed. A batch that fits into the window is
    read once and held as well; of a larger one the samples are read whenever they are asked for,
    which a step in micro-batches does twice.

    Parameters
    ----------
    source : Source
    ids : sequence of str
        The samples to deliver, in storage order.
    batch : int
        Samples in a batch.
    window : int
        Bytes of samples that may be held to be mixed.
    seed, stage : int

    Raises
    ------
    ConfigError
        If the window is smaller than one chunk, or there are fewer samples than a batch holds.
    """

    def __init__(
        self, source: Source, ids: Sequence[str], *, batch: int, window: int, seed: int, stage: int
    ) -> None:
        check_loading(
            len(ids),
            batch=batch,
            window=window,
            chunk_bytes=source.chunk_items * source.item_bytes if source.chunk_items > 1 else 0,
            stage=stage,
        )
        self._source = source
        self._fetch, self._precision = stored_form(source)
        self._ids = list(ids)
        self._batch = batch
        self._window_chunks = window_chunks(source, window)
        self._hold = batch * source.item_bytes <= window
        self._seed = seed
        self._stage = stage
        wanted = {item_id: index for index, item_id in enumerate(self._ids)}
        self._positions = np.empty(len(ids), dtype=np.int64)
        for position, item_id in enumerate(source.ids):
            if item_id in wanted:
                self._positions[wanted[item_id]] = position
        self._kept: _Window | None = None

    @property
    def steps(self) -> int:
        """Batches in an epoch; samples that do not fill a last one are left for other epochs."""
        return len(self._ids) // self._batch

    def batches(self, epoch: int, *, start: int = 0) -> Iterator[SampleBatch]:
        """The batches of an epoch, from number ``start`` on."""
        windows = epoch_windows(
            self._positions,
            chunk=self._source.chunk_items,
            window_chunks=self._window_chunks,
            seed=self._seed,
            epoch=epoch,
        )
        grid = self._source.items()[0].extent
        for number in range(start, self.steps):
            first = number * self._batch
            fetch = partial(self._samples, windows, epoch, first)
            yield SampleBatch(self._batch, fetch, grid, precision=self._precision, hold=self._hold)

    def _samples(
        self, windows: list[NDArray[np.int64]], epoch: int, first: int, wanted: Span
    ) -> list[NDArray[Any]]:
        """Samples by their place after the ``first`` one in the order of an epoch."""
        wanted = Span(first + wanted.start, first + wanted.stop)
        samples: list[NDArray[Any]] = []
        start = 0
        for number, window in enumerate(windows):
            chosen = window[max(wanted.start - start, 0) : max(wanted.stop - start, 0)]
            if len(chosen):
                if len(samples):
                    # Not views into the chunks of the last window, which are let go of.
                    samples = [sample.copy() for sample in samples]
                samples += self._read((epoch, number), window, chosen)
            start += len(window)
        return samples

    def _read(
        self, place: tuple[int, int], window: NDArray[np.int64], chosen: NDArray[np.int64]
    ) -> list[NDArray[Any]]:
        """Samples of a window, which is read whole; ``place`` is its epoch and number."""
        epoch, _ = place
        if self._source.chunk_items == 1:
            return self._fetch([self._request(int(index), epoch) for index in chosen])
        if self._kept is None or self._kept.place != place:
            order = np.sort(window)
            requests = [self._request(int(index), epoch) for index in order]
            if self._kept is not None and self._kept.requests == requests:
                self._kept = replace(self._kept, place=place)
            else:
                self._kept = None  # let go of the last window before the next is read
                self._kept = _Window(place, order, requests, self._fetch(requests))
        kept = self._kept
        return [kept.samples[index] for index in np.searchsorted(kept.order, chosen)]

    def _request(self, index: int, epoch: int) -> Request:
        item_id = self._ids[index]
        return Request(item_id, view_of(self._source, item_id, self._seed, self._stage, epoch))


def window_chunks(source: Source, window: int) -> int:
    """Chunks of a source that a window of so many bytes can mix; at least one."""
    # A chunk is held once for every view that is drawn from it.
    chunk_bytes = source.chunk_items * source.item_bytes * max(1, source.views or 1)
    return max(1, window // chunk_bytes)


def loader_bytes(
    config: TrainConfig, *, samples: int, item_bytes: int, chunk_items: int, views: int
) -> int:
    """The most bytes of samples that a `Loader` of such a source holds at once."""
    batch = config.batch * item_bytes
    held = batch if batch <= config.shuffle_window else 0
    if chunk_items == 1:
        return held or item_bytes
    chunk_bytes = chunk_items * item_bytes * max(1, views)
    whole = -(-samples // chunk_items) * chunk_bytes
    # Only a batch that straddles two windows is copied out of the first.
    return min(max(1, config.shuffle_window // chunk_bytes) * chunk_bytes, whole) + held


def view_of(source: Source, item_id: str, seed: int, stage: int, epoch: int) -> int:
    """The training view of a sample: a function of (seed, stage, epoch, id)."""
    if source.views == 0:
        return 0
    drawn = derive_seed(seed, "view drawn", stage, epoch, item_id)
    return 1 + drawn % (source.views or 2**31)


def validation_batches(
    source: Source, ids: Sequence[str], *, batch: int, window: int
) -> Iterator[SampleBatch]:
    """Held-out samples in storage order, always the same view; the last batch may be smaller."""
    view = 0 if source.views == 0 else 1
    grid = source.items()[0].extent
    fetch, precision = stored_form(source)
    for start in range(0, len(ids), batch):
        requests = [Request(i, view) for i in ids[start : start + batch]]
        hold = len(requests) * source.item_bytes <= window
        some = partial(_some_of, fetch, requests)
        yield SampleBatch(len(requests), some, grid, precision=precision, hold=hold)


def _some_of(read: Read, requests: list[Request], wanted: Span) -> list[NDArray[Any]]:
    return read(requests[wanted.slice])


def stored_form(source: Source) -> tuple[Read, Precision]:
    """How samples are read as they are stored, and what makes floats of them."""
    if isinstance(source, Cache):
        return source.read_stored, source.precision
    return source.read, PLAIN
