"""The order of samples, against a loop that says what is meant."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_stagewise.config import TrainConfig
from gim_stagewise.seeds import derive_seed
from gim_stagewise.stage.order import (
    Order,
    chunk_share,
    shuffle_quality,
    shuffled_order,
    storage_order,
)

quick = settings(deadline=None, max_examples=80)
SETS = st.sets(st.integers(0, 120), min_size=1, max_size=80)


def slow_order(positions: list[int], *, chunk: int, pool: int, seed: int, epoch: int) -> list[int]:
    """Indexes as they are delivered: a pool that is refilled whenever one is taken."""
    draw = np.random.default_rng(derive_seed(seed, "order", epoch))
    chunks = sorted({position // chunk for position in positions})
    ranks = draw.permutation(len(chunks))
    arrival = [
        chunk for _, chunk in sorted((list(ranks).index(n), c) for n, c in enumerate(chunks))
    ]
    stream = [i for c in arrival for i, position in enumerate(positions) if position // chunk == c]
    pool = min(pool, len(stream))
    slots, coming = stream[:pool], stream[pool:]
    delivered = []
    for slot in draw.integers(0, pool, size=len(coming)):
        delivered.append(slots[slot])
        slots[slot] = coming.pop(0)
    return delivered + [slots[place] for place in draw.permutation(len(slots))]


@quick
@given(SETS, st.integers(2, 12), st.integers(1, 40), st.integers(0, 9), st.integers(0, 3))
def test_an_order_is_that_of_the_loop(
    positions: set[int], chunk: int, pool: int, seed: int, epoch: int
) -> None:
    places = sorted(positions)
    order = shuffled_order(np.array(places), chunk=chunk, pool=pool, seed=seed, epoch=epoch)
    expected = slow_order(places, chunk=chunk, pool=pool, seed=seed, epoch=epoch)
    assert order.indexes.tolist() == expected


@quick
@given(SETS, st.integers(1, 12), st.integers(1, 40), st.integers(0, 9))
def test_an_order_delivers_every_sample_once_and_only_what_has_arrived(
    positions: set[int], chunk: int, pool: int, seed: int
) -> None:
    places = np.array(sorted(positions))
    order = shuffled_order(places, chunk=chunk, pool=pool, seed=seed, epoch=0)
    count = len(places)
    assert sorted(order.indexes) == sorted(order.arriving) == list(range(count))
    assert (np.diff(order.groups) >= 0).all()
    for group in range(int(order.groups[-1]) + 1):
        members = order.members(group)
        assert len({int(p) // chunk for p in places[order.arriving[members]]}) == 1
    for rank, place in enumerate(order.delivered):
        arrived = order.members(order.groups_before(rank) - 1).stop
        assert place < arrived <= rank + order.pool + chunk
    # All that is in memory: what has arrived and was not delivered.
    assert order.groups_before(count - 1) == int(order.groups[-1]) + 1


@quick
@given(SETS, st.integers(1, 12))
def test_storage_order_is_that(positions: set[int], chunk: int) -> None:
    places = np.array(sorted(positions))
    order = storage_order(places, chunk=chunk)
    assert order.indexes.tolist() == list(range(len(places)))
    for rank in range(len(places)):
        last = order.members(order.groups_before(rank) - 1).stop - 1
        assert places[last] // chunk == places[rank] // chunk


def test_one_sample_a_chunk_is_in_true_random_order() -> None:
    """Every sample is in every place equally often (chi-squared, 99.9 % of such tables)."""
    counts = np.zeros((6, 6))
    for seed in range(3000):
        order = shuffled_order(np.arange(6), chunk=1, pool=1, seed=seed, epoch=0)
        counts[order.indexes, range(6)] += 1
    assert ((counts - 500) ** 2 / 500).sum() < 52.6  # 25 degrees of freedom


@pytest.mark.parametrize("chunk", [1, 5])
def test_epochs_and_seeds_differ_in_order(chunk: int) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        found = shuffled_order(np.arange(60), chunk=chunk, pool=15, seed=seed, epoch=epoch)
        return tuple(found.indexes.tolist())

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(60)) not in orders


def test_the_share_of_a_chunk_is_counted_as_in_a_loop() -> None:
    positions = np.arange(60)
    order = shuffled_order(positions, chunk=4, pool=12, seed=0, epoch=0)
    shares = []
    for start in range(0, 56, 8):
        chunks = [int(index) // 4 for index in order.indexes[start : start + 8]]
        shares += [chunks.count(chunk) / 8 for chunk in chunks]
    assert chunk_share(order, positions, chunk=4, batch=8) == pytest.approx(np.mean(shares))
    alone = Order(positions, positions, positions, 1)
    assert chunk_share(alone, positions, chunk=1, batch=8) == 1 / 8


@pytest.mark.parametrize("sample_bytes", [50_000, 400_000, 1_600_000, 3_200_000])
@pytest.mark.parametrize("count", [2_000, 20_000])
def test_the_defaults_shuffle_nearly_as_well_as_a_perfect_shuffle(
    count: int, sample_bytes: int
) -> None:
    from gim_stagewise.cache import auto_chunk
    from gim_stagewise.stage.loader import pool_samples

    config = TrainConfig()
    quality = shuffle_quality(
        np.arange(count),
        chunk=auto_chunk(sample_bytes),
        pool=pool_samples(config.shuffle_window, sample_bytes),
        batch=config.batch,
        seed=0,
    )
    assert 0.9 < quality < 1.5


def test_a_small_window_shuffles_badly_and_it_shows() -> None:
    def quality(pool: int) -> float:
        return shuffle_quality(np.arange(2000), chunk=20, pool=pool, batch=32, seed=0)

    assert quality(20) > 5 > quality(100) > 1.5 > quality(2000) > 0.9
