"""The order of samples: seeded, complete, and taken up anywhere."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from gim_stagewise.config import TrainConfig
from gim_stagewise.errors import ConfigError, CorruptCacheError, DataError
from gim_stagewise.sources import PATCH_AXES, Item, Request, Split
from gim_stagewise.stage.batch import SampleBatch
from gim_stagewise.stage.loader import Loader, loader_bytes, validation_batches, view_of
from gim_stagewise.stage.order import held_out
from gim_stagewise.windows import Span

quick = settings(deadline=None, max_examples=60)
ITEM_BYTES = 4 * 2


class TinySource:
    """Samples in memory, each of them its own number and the number of the view."""

    axes = PATCH_AXES
    label_names = ()
    item_bytes = ITEM_BYTES

    def __init__(self, count: int, *, chunk: int = 1, views: int | None = 0) -> None:
        self.chunk_items = chunk
        self.views = views
        self.reads: list[list[int]] = []
        self._items = [Item(f"s{n}", (1, 1), 2, "float32") for n in range(count)]

    @property
    def ids(self) -> Sequence[str]:
        return [item.id for item in self._items]

    def items(self) -> Sequence[Item]:
        return self._items

    def split(self, name: Split) -> Sequence[str]:
        return [item.id for item in self._items] if name == "unlabeled" else []

    def labels(self, name: str) -> NDArray[np.int64]:
        raise DataError(f"no labels called {name}")

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        numbers = [int(request.id[1:]) for request in requests]
        self.reads.append(numbers)
        return [
            np.array([number, request.view], np.float32).reshape(1, 1, 2, 1, 1)
            for number, request in zip(numbers, requests, strict=True)
        ]

    def content_digest(self) -> str:
        return f"{len(self._items)}"


def loader(
    source: TinySource,
    *,
    batch: int = 4,
    window: int = 10**6,
    seed: int = 0,
    stage: int = 1,
    ids: Sequence[str] | None = None,
) -> Loader:
    chosen = source.split("unlabeled") if ids is None else ids
    return Loader(source, chosen, batch=batch, window=window, seed=seed, stage=stage)


def tensors(batches: Iterable[SampleBatch]) -> list[Tensor]:
    """Batches as tensors [sample, row, column, channel, height, width]."""
    return [b.read(Span(0, b.rows)).reshape(*b.shape, 2, 1, 1) for b in batches]


def numbers(batches: Sequence[Tensor]) -> list[int]:
    return [int(number) for batch in batches for number in batch[:, 0, 0, 0, 0, 0]]


def views(batches: Sequence[Tensor]) -> dict[int, int]:
    return {
        int(sample[0, 0, 0, 0, 0]): int(sample[0, 0, 1, 0, 0])
        for batch in batches
        for sample in batch
    }


@quick
@given(
    count=st.integers(1, 80),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 100),
    shuffle=st.randoms(use_true_random=False),
)
def test_held_out_ids_are_a_choice_by_seed_whatever_their_order(
    count: int, fraction: float, seed: int, shuffle: random.Random
) -> None:
    ids = [f"train/{n}" for n in range(count)]
    kept, held = held_out(ids, seed=seed, fraction=fraction)
    assert len(held) == max(1, round(fraction * count))
    assert set(kept).isdisjoint(held)
    assert sorted([*kept, *held]) == sorted(ids)
    assert kept == [i for i in ids if i in kept]
    assert held == [i for i in ids if i in held]

    shuffled = list(ids)
    shuffle.shuffle(shuffled)
    again_kept, again_held = held_out(shuffled, seed=seed, fraction=fraction)
    assert (set(again_kept), set(again_held)) == (set(kept), set(held))


def test_another_seed_holds_out_other_ids() -> None:
    ids = [str(n) for n in range(200)]
    assert held_out(ids, seed=0, fraction=0.2) != held_out(ids, seed=1, fraction=0.2)


SOURCES = [
    pytest.param({"chunk": 1, "views": 0}, 10**6, id="unchunked"),
    pytest.param({"chunk": 1, "views": None}, 10**6, id="unchunked-endless-views"),
    pytest.param({"chunk": 5, "views": 0}, 10**6, id="one-window"),
    pytest.param({"chunk": 5, "views": 0}, 2 * 5 * ITEM_BYTES, id="windows-of-two-chunks"),
    pytest.param({"chunk": 5, "views": 3}, 5 * ITEM_BYTES, id="windows-of-one-chunk-and-views"),
]


@pytest.mark.parametrize("fresh", [True, False])
@pytest.mark.parametrize(("options", "window"), SOURCES)
def test_an_epoch_taken_up_at_a_step_goes_on_as_if_never_left(
    options: dict[str, Any], window: int, fresh: bool
) -> None:
    def made() -> Loader:
        return loader(TinySource(43, **options), window=window, batch=4)

    one = made()
    whole = tensors(one.batches(2))
    assert len(whole) == one.steps == 10
    for start in range(one.steps + 1):
        tail = tensors((made() if fresh else one).batches(2, start=start))
        assert len(tail) == one.steps - start
        assert all(torch.equal(a, b) for a, b in zip(tail, whole[start:], strict=True))


@pytest.mark.parametrize(("options", "window"), SOURCES)
def test_an_epoch_has_no_sample_twice_and_leaves_out_less_than_a_batch(
    options: dict[str, Any], window: int
) -> None:
    source = TinySource(43, **options)
    seen: set[int] = set()
    for epoch in range(6):
        batches = tensors(loader(source, window=window, batch=5).batches(epoch))
        assert all(batch.shape == (5, 1, 1, 2, 1, 1) for batch in batches)
        assert all(batch.dtype == torch.float32 for batch in batches)
        delivered = numbers(batches)
        assert len(delivered) == len(set(delivered)) == 40
        seen |= set(delivered)
    assert seen == set(range(43))


@pytest.mark.parametrize("chunk", [1, 5])
def test_only_the_ids_asked_for_are_delivered(chunk: int) -> None:
    source = TinySource(40, chunk=chunk)
    ids = [f"s{n}" for n in range(40) if n % 3]
    delivered = numbers(tensors(loader(source, ids=ids, batch=1).batches(0)))
    assert sorted(delivered) == [n for n in range(40) if n % 3]


@pytest.mark.parametrize("window_chunks", [1, 2, 3])
def test_a_chunk_is_read_once_an_epoch_and_whole(window_chunks: int) -> None:
    source = TinySource(40, chunk=5)
    list(loader(source, window=window_chunks * 5 * ITEM_BYTES + 1).batches(0))
    assert sorted(source.reads) == [list(range(first, first + 5)) for first in range(0, 40, 5)]


@pytest.mark.parametrize("start", [0, 3, 7])
def test_what_is_held_keeps_to_the_projection(start: int) -> None:
    source = TinySource(200, chunk=5)
    config = TrainConfig(batch=4, shuffle_window=20 * ITEM_BYTES)
    allowed = loader_bytes(config, samples=200, item_bytes=ITEM_BYTES, chunk_items=5, views=0)
    done = 4 * start
    for batch in loader(source, window=config.shuffle_window).batches(0, start=start):
        time.sleep(0.001)  # for those who read ahead
        held = sum(map(len, source.reads)) - (done - 4 * start)
        assert held * ITEM_BYTES <= allowed
        done += batch.shape[0]


def test_a_reader_that_fails_fails_the_one_who_waits() -> None:
    class Failing(TinySource):
        def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
            if any(request.id == "s17" for request in requests):
                raise CorruptCacheError("chunk 17 is damaged")
            return super().read(requests)

    with pytest.raises(CorruptCacheError, match="chunk 17"):
        list(loader(Failing(40)).batches(0))
    assert not [t for t in threading.enumerate() if t.name.startswith("samples")]


def test_nothing_is_read_any_more_when_nobody_listens() -> None:
    source = TinySource(400, chunk=5)
    batches: Any = loader(source, window=10 * ITEM_BYTES).batches(0)
    next(batches)
    batches.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("samples")]
    assert sum(map(len, source.reads)) < 60


def test_a_batch_that_fits_the_window_is_read_once() -> None:
    source = TinySource(12)
    batch = next(iter(loader(source, window=4 * ITEM_BYTES).batches(0)))
    for row in (0, 1, 3, 0):
        batch.read(Span(row, row + 1))
    delivered = [number for read in source.reads for number in read]
    assert len(delivered) == len(set(delivered))


def test_a_batch_larger_than_the_window_is_read_as_its_rows_are_asked_for() -> None:
    source = TinySource(12)
    batch = next(iter(loader(source, window=4 * ITEM_BYTES - 1).batches(0)))
    assert source.reads == []
    for row in (0, 1, 2, 3, 0):
        batch.read(Span(row, row + 1))
    assert [len(read) for read in source.reads] == [1, 1, 1, 1, 1]


class GridSource(TinySource):
    """Samples of 2×3 patches that tell where they lie."""

    def items(self) -> list[Item]:
        return [Item(item.id, (2, 3), 1, "float32") for item in super().items()]

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        places = np.arange(6, dtype=np.float32).reshape(2, 3, 1, 1, 1)
        return [100 * int(request.id[1:]) + places for request in requests]


@pytest.mark.parametrize("chunk", [1, 5])
@pytest.mark.parametrize("window", [40, 10**6])
@pytest.mark.parametrize("size", [1, 4, 6, 7, 23, 24])
def test_the_rows_of_a_batch_are_the_same_in_pieces_of_any_size(
    size: int, window: int, chunk: int
) -> None:
    batches = loader(GridSource(20, chunk=chunk), window=window).batches(0)
    batch = next(iter(batches))
    whole = batch.read(Span(0, 24))
    assert whole.shape == (24, 1, 1, 1)
    pieces = [batch.read(Span(a, min(a + size, 24))) for a in range(0, 24, size)]
    assert torch.equal(torch.cat(pieces), whole)
    assert (whole.reshape(4, 6) % 100 == torch.arange(6.0)).all()


def test_what_fits_the_window_is_read_once_for_all_epochs() -> None:
    source = TinySource(20, chunk=5)
    one = loader(source)
    for epoch in range(3):
        list(one.batches(epoch))
    assert sum(map(len, source.reads)) == 20


@pytest.mark.parametrize(("count", "drawn"), [(0, {0}), (1, {1}), (3, {1, 2, 3})])
def test_views_are_drawn_from_those_there_are(count: int, drawn: set[int]) -> None:
    source = TinySource(60, views=count)
    assert set(views(tensors(loader(source).batches(0))).values()) == drawn


def test_the_view_of_a_sample_follows_seed_stage_and_epoch_alone() -> None:
    def drawn(*, seed: int = 0, stage: int = 1, epoch: int = 0, chunk: int = 1) -> dict[int, int]:
        source = TinySource(20, views=None, chunk=chunk)
        return views(tensors(loader(source, seed=seed, stage=stage).batches(epoch)))

    first = drawn()
    assert min(first.values()) >= 1
    assert first == drawn(chunk=5)
    for other in (drawn(seed=1), drawn(stage=2), drawn(epoch=1)):
        assert other.keys() == first.keys()
        assert other != first
    source = TinySource(20, views=3)
    assert view_of(source, "s4", 0, 1, 7) == view_of(TinySource(5, views=3), "s4", 0, 1, 7)


def test_two_epochs_at_once_do_not_disturb_each_other() -> None:
    one = loader(TinySource(40, chunk=5, views=3), window=2 * 5 * ITEM_BYTES)
    first, second = tensors(one.batches(0)), tensors(one.batches(1))
    for batches in zip(one.batches(0), one.batches(1), strict=True):
        a, b = tensors(batches)
        assert torch.equal(a, first.pop(0))
        assert torch.equal(b, second.pop(0))


def test_a_batch_larger_than_the_data_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        loader(TinySource(7), batch=8, stage=2)
    assert caught.value.key == "module.2.train.batch"
    assert "is 8" in caught.value.problem
    assert "7 or less" in caught.value.problem
    assert loader(TinySource(7), batch=7).steps == 1


def test_no_samples_at_all_are_not_answered_with_a_smaller_batch() -> None:
    with pytest.raises(ConfigError) as caught:
        loader(TinySource(7), ids=[])
    assert "use 0" not in str(caught.value)


def test_a_window_smaller_than_a_chunk_is_refused_with_both_numbers() -> None:
    with pytest.raises(ConfigError) as caught:
        loader(TinySource(20, chunk=5), window=5 * ITEM_BYTES - 1, stage=3)
    assert caught.value.key == "module.3.train.shuffle_window"
    assert "39 bytes" in caught.value.problem
    assert "40 bytes" in caught.value.problem
    loader(TinySource(20, chunk=5), window=5 * ITEM_BYTES)


@pytest.mark.parametrize("window", [1, 10**6])
@pytest.mark.parametrize(("count", "view"), [(0, 0), (3, 1), (None, 1)])
def test_validation_is_in_storage_order_and_always_of_one_view(
    count: int | None, view: int, window: int
) -> None:
    source = TinySource(20, views=count)
    ids = ["s3", "s4", "s9", "s11", "s12"]
    batches = tensors(validation_batches(source, ids, batch=2, window=window))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    assert numbers(batches) == [3, 4, 9, 11, 12]
    assert set(views(batches).values()) == {view}


class UnevenSource(TinySource):
    """Samples that differ in size."""

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        return [np.zeros((1, int(request.id[1:]) + 1, 1, 1, 1), np.float32) for request in requests]


def test_samples_of_different_sizes_make_no_batch() -> None:
    with pytest.raises(DataError, match="differ in shape"):
        tensors(loader(UnevenSource(8)).batches(0))
