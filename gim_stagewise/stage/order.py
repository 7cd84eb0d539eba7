"""The order in which samples are delivered: index arithmetic alone.

An order is a function of (seed, epoch, ids, chunk grid, shuffle window), so it can be taken up in
the middle by any process, whatever reads the samples and with however many threads. Chunks arrive
in random order; their samples wait in a *pool* of so many as the window holds, from which the next
one is drawn at random. Where samples are read one by one, the order is a true permutation.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.seeds import derive_seed

Indexes = NDArray[np.int64]


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


@dataclass(frozen=True)
class Order:
    """How samples arrive, and how they are delivered.

    Parameters
    ----------
    arriving : array of int
        Indexes of all samples, as they arrive.
    groups : array of int
        With which group, from 0, each of them arrives: the samples of one chunk.
    delivered : array of int
        Places in ``arriving``, as samples are delivered.
    pool : int
        Samples that have arrived ahead of the one that is delivered, at most.
    """

    arriving: Indexes
    groups: Indexes
    delivered: Indexes
    pool: int

    @property
    def indexes(self) -> Indexes:
        """Indexes of samples as they are delivered."""
        return self.arriving[self.delivered]

    def members(self, group: int) -> slice:
        """Places in ``arriving`` of a group."""
        start, stop = np.searchsorted(self.groups, [group, group + 1])
        return slice(int(start), int(stop))

    def groups_before(self, rank: int) -> int:
        """Groups that have to be there before the sample of that rank is delivered."""
        last = min(rank + self.pool, len(self.groups)) - 1
        return int(self.groups[last]) + 1


def shuffled_order(positions: Indexes, *, chunk: int, pool: int, seed: int, epoch: int) -> Order:
    """The order of a training epoch.

    Parameters
    ----------
    positions : array of int
        Where samples lie in storage order, ascending; an index is a place in this array.
    chunk : int
        Samples in a chunk.
    pool : int
        Samples that the shuffle window holds.
    seed, epoch : int
    """
    draw = np.random.default_rng(derive_seed(seed, "order", epoch))
    count = len(positions)
    if chunk == 1:
        places = np.arange(count)
        return Order(draw.permutation(count), places, places, 1)
    chunk_of = positions // chunk
    present = np.unique(chunk_of)
    rank_of_chunk = np.empty(len(present), dtype=np.int64)
    rank_of_chunk[draw.permutation(len(present))] = np.arange(len(present))
    groups = rank_of_chunk[np.searchsorted(present, chunk_of)]
    arriving = np.argsort(groups, kind="stable")
    pool = min(pool, count)
    return Order(arriving, groups[arriving], _drawn_from_pool(count, pool, draw), pool)


def storage_order(positions: Indexes, *, chunk: int) -> Order:
    """Samples as they are stored; for validation."""
    places = np.arange(len(positions))
    _, groups = np.unique(positions // chunk, return_inverse=True)
    return Order(places, groups.astype(np.int64), places, 1)


def _drawn_from_pool(count: int, pool: int, draw: np.random.Generator) -> Indexes:
    """Places in the order in which they leave a pool that is refilled in order.

    As a loop: fill ``pool`` slots with the first places; as long as there are more, take what is in
    a random slot and put the next one there; then take what is left in random order.
    """
    slots = draw.integers(0, pool, size=count - pool)
    # What is taken out of a slot was put there when the slot was drawn the last time before.
    by_slot = np.argsort(slots, kind="stable")
    same = np.diff(slots[by_slot], prepend=-1) == 0
    taken = slots.copy()
    taken[by_slot[1:][same[1:]]] = pool + by_slot[:-1][same[1:]]
    left = np.arange(pool)
    left[slots] = pool + np.arange(len(slots))  # of several, the last one counts
    return np.concatenate([taken, draw.permutation(left)])


def chunk_share(order: Order, positions: Indexes, *, chunk: int, batch: int) -> float:
    """The share of a batch that comes from the same chunk as one of its samples, on average.

    1 / batch if no two samples of a batch ever come from one chunk. Negatives are drawn from the
    batch, so what it is made of matters.
    """
    whole = len(positions) // batch * batch
    chunks = np.sort((positions // chunk)[order.indexes[:whole]].reshape(-1, batch), axis=1)
    new = np.diff(chunks, axis=1, prepend=-1) != 0
    sizes = np.diff(np.flatnonzero(np.append(new.ravel(), True)))
    return float((sizes.astype(float) ** 2).sum() / (len(chunks) * batch**2))


def shuffle_quality(positions: Indexes, *, chunk: int, pool: int, batch: int, seed: int) -> float:
    """How often batches repeat a chunk, against a perfect shuffle; 1 is as good.

    `chunk_share` of the first epoch's order, over what is expected of random order.
    """
    order = shuffled_order(positions, chunk=chunk, pool=pool, seed=seed, epoch=0)
    own = chunk_share(order, positions, chunk=chunk, batch=batch)
    # Of a perfect shuffle, in expectation: a sample itself, and others by their share of all.
    sizes = np.unique(positions // chunk, return_counts=True)[1].astype(float)
    count = len(positions)
    other = float((sizes * (sizes - 1)).sum()) / (count * max(1, count - 1))
    return own / ((1 + (batch - 1) * other) / batch)
