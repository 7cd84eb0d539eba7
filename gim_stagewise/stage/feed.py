"""Samples in a given order, read ahead in the background."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gim_stagewise.cache import PLAIN, Cache, TiledCache
from gim_stagewise.processes import usable_cores
from gim_stagewise.sources import Request, Source
from gim_stagewise.stage.extract import VirtualCache
from gim_stagewise.stage.order import Order
from gim_stagewise.stage.windowed import WindowSource

# Reading a chunk is over too soon to need many threads.
MOST_THREADS = 4


class SampleReader:
    """Reads the samples of a source in their stored form; keeps them, if all of them fit.

    Parameters
    ----------
    source : Source
    samples : int
        How many are going to be read, over and over.
    window : int
        Bytes that may be kept.
    pin : bool
        Put samples into page-locked memory, from which a GPU copies by itself.

    Attributes
    ----------
    precision : Precision
        What makes floats of the samples.
    threads : int
        That may read at once; 0 if reading has to be done by the thread that asks.
    """

    def __init__(self, source: Source, *, samples: int, window: int, pin: bool = False) -> None:
        self.source = source
        self.precision = source.precision if isinstance(source, Cache | WindowSource) else PLAIN
        self.threads = _reading_threads(source)
        self.keeps_all = keeps_all(source, samples=samples, window=window)
        self._pin = pin
        self._memory = _Recycled()
        self._kept: dict[str, Tensor] = {}  # view 0 is all there is

    def read(self, requests: Sequence[Request]) -> list[Tensor]:
        """Samples as they lie in the source; what is kept has its own memory."""
        if not self.keeps_all:
            return self._read(requests)
        missing = [id_ for r in requests if (id_ := r.id) not in self._kept]
        if missing:
            whole = self._read([Request(item_id) for item_id in missing])
            self._kept.update(zip(missing, whole, strict=True))
        return [_part(self._kept[request.id], request) for request in requests]

    def _read(self, requests: Sequence[Request]) -> list[Tensor]:
        source = self.source
        if isinstance(source, Cache | WindowSource):
            arrays = source.read_stored(requests, empty=self._memory.empty)
        else:
            arrays = source.read(requests)
        samples = [torch.from_numpy(array) for array in arrays]
        if not self._pin:
            return samples
        # PyTorch uses page-locked memory again by itself, once it was copied from.
        pinned = [torch.empty_like(s, pin_memory=True).copy_(s) for s in samples]
        self.give_back(samples)
        return pinned

    def announce(self, requests: Sequence[Request]) -> None:
        """Say what is going to be read soon."""
        if isinstance(self.source, WindowSource):
            self.source.announce(requests)
        elif isinstance(self.source, Cache) and not isinstance(self.source, VirtualCache):
            self.source.announce(r for r in requests if r.id not in self._kept)

    def give_back(self, samples: Sequence[Tensor]) -> None:
        """Let the memory of samples that nobody uses any more be used again."""
        source = self.source.source if isinstance(self.source, WindowSource) else self.source
        if isinstance(source, Cache | TiledCache) and not self.keeps_all:
            self._memory.give_back(s.numpy() for s in samples if not s.is_pinned())


class _Recycled:
    """Arrays that are handed out again, since fresh memory pages cost more than reading does."""

    def __init__(self) -> None:
        self._free: list[NDArray[Any]] = []

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        try:
            array = self._free.pop()
        except IndexError:
            return np.empty(shape, dtype)
        return array if (array.shape, array.dtype) == (shape, dtype) else np.empty(shape, dtype)

    def give_back(self, arrays: Iterable[NDArray[Any]]) -> None:
        self._free.extend(arrays)


def _part(sample: Tensor, request: Request) -> Tensor:
    if request.region is None:
        return sample
    rows, columns = request.region
    return sample[rows.slice, columns.slice]


def keeps_all(source: Source, *, samples: int, window: int) -> bool:
    """Whether all samples are kept in memory once they were read."""
    return source.views == 0 and samples * source.item_bytes <= window


def _reading_threads(source: Source) -> int:
    if isinstance(source, VirtualCache):
        return 0  # the thread count of the frozen forward belongs to the whole process
    if isinstance(source, WindowSource):
        return _reading_threads(source.source)
    if isinstance(source, Cache | TiledCache):
        return min(MOST_THREADS, usable_cores())
    return 1


def deliver(
    reader: SampleReader,
    order: Order,
    request_of: Callable[[int], Request],
    *,
    batch: int,
    start: int = 0,
    stop: int | None = None,
) -> Iterator[list[Tensor]]:
    """Batches of samples, the next one read while one is used.

    What is held is the order's pool, a chunk, the batch that is used and the one that follows.

    Parameters
    ----------
    reader : SampleReader
    order : Order
    request_of : callable
        The request for the sample of an index.
    batch : int
        Samples in a batch; the last one may be smaller.
    start, stop : int
        Numbers of the first batch, and of the one after the last; all by default.
    """
    delivered = order.delivered
    batches = -(-len(delivered) // batch)
    stop = batches if stop is None else stop
    first = start * batch
    rank_of = delivered.argsort()
    waiting: dict[int, Tensor] = {}
    reading: deque[tuple[list[int], Future[list[Tensor]] | None]] = deque()
    held = asked = 0
    largest = 1

    def places_of(group: int) -> list[int]:
        """Places in the group that were not delivered before the start."""
        members = order.members(group)
        return [p for p in range(members.start, members.stop) if rank_of[p] >= first]

    def ask(executor: ThreadPoolExecutor | None) -> None:
        nonlocal held, asked, largest
        places = places_of(asked)
        requests = [request_of(int(order.arriving[place])) for place in places]
        reader.announce(requests)
        future = executor.submit(reader.read, requests) if executor and requests else None
        if future is None and requests:
            waiting.update(zip(places, reader.read(requests), strict=True))
        reading.append((places, future))
        held, asked, largest = held + len(places), asked + 1, max(largest, len(places))

    executor = ThreadPoolExecutor(reader.threads, "samples") if reader.threads else None
    total = int(order.groups[-1]) + 1 if len(order.groups) else 0
    try:
        arrived = 0
        for number in range(start, stop):
            ranks = delivered[number * batch : (number + 1) * batch]
            needed = order.groups_before(number * batch + len(ranks) - 1)
            while asked < needed:
                ask(executor)
            while arrived < needed:
                places, future = reading.popleft()
                if future is not None:
                    waiting.update(zip(places, future.result(), strict=True))
                arrived += 1
            samples = [waiting.pop(int(place)) for place in ranks]
            # What was handed out before is the reader's again.
            room = order.pool + 2 * batch + largest
            while executor and asked < total and held + largest <= room:
                ask(executor)
            yield samples
            held -= len(samples)
            reader.give_back(samples)
            del samples
    finally:
        if executor is not None:
            executor.shutdown(cancel_futures=True)
