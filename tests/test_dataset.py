"""A cache behind a DataLoader: what is delivered, in which order, and how often chunks are read."""

from __future__ import annotations

import pickle
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import edit
from torch.utils.data import BatchSampler, DataLoader

from gim_stagewise import open_cache
from gim_stagewise.cache import Cache, read_chunk_file
from gim_stagewise.cache.dataset import CacheDataset
from gim_stagewise.errors import DataError
from gim_stagewise.pipeline import Pipeline


@pytest.fixture(scope="module", params=["float32", "uint8"])
def cache(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    new_tiny: Callable[[Path], Path],
) -> Cache:
    """Chunks of 7: six that training samples are in, the last one with test samples."""
    folder = tmp_path_factory.mktemp("dataset")
    file = new_tiny(folder)
    edit(file, "[cache]\n", f'[cache]\nprecision = "{request.param}"\n')
    Pipeline.from_file(file, folder=folder / "out", device="cpu").run(until=1)
    return open_cache(folder / "out" / "m1.zarr")


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each chunk file was read."""
    counted: Counter[str] = Counter()

    def counting(path: Path, layout: Any, file: str, **rest: Any) -> Any:
        counted[file] += 1
        return read_chunk_file(path, layout, file, **rest)

    monkeypatch.setattr("gim_stagewise.cache.sealed.read_chunk_file", counting)
    return counted


def dataset(cache: Cache, chunks: int, split: Any = "train") -> CacheDataset:
    """With a window that holds so many chunks."""
    return cache.dataset(split, window=chunks * 7 * cache.item_bytes)


def windows_of(data: CacheDataset, *, seed: int) -> tuple[frozenset[int], ...]:
    """Numbers of the chunks that are read together: until no sample of them is left."""
    order = [index // 7 for index in data.shuffled_order(seed=seed, epoch=0).tolist()]
    left, window, windows = Counter(order), set(), []
    for chunk in order:
        window.add(chunk)
        left[chunk] -= 1
        if not any(left[one] for one in window):
            windows.append(frozenset(window))
            window = set()
    return tuple(windows)


@pytest.mark.parametrize("chunks", [1, 2, 3, 6, 100])
def test_every_sample_comes_once_an_epoch_with_its_label(cache: Cache, chunks: int) -> None:
    data = dataset(cache, chunks)
    sampler = data.shuffled(seed=1)
    values, labels = cache.activations[0, :40], cache.labels("class")[:40]
    for epoch in range(3):
        sampler.set_epoch(epoch)
        order = list(sampler)
        assert sorted(order) == list(range(40))
        batches = list(DataLoader(data, batch_size=9, sampler=sampler))
        np.testing.assert_array_equal(torch.cat([x for x, _ in batches]), values[order])
        np.testing.assert_array_equal(torch.cat([y for _, y in batches]), labels[order])


def test_the_order_is_a_function_of_seed_and_epoch(cache: Cache) -> None:
    def order(seed: int, epoch: int) -> tuple[int, ...]:
        sampler = dataset(cache, 2).shuffled(seed=seed)
        sampler.set_epoch(epoch)
        assert list(sampler) == list(sampler)
        return tuple(sampler)

    orders = {order(seed, epoch) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    assert tuple(range(40)) not in orders
    assert order(1, 2) == order(1, 2)
    assert tuple(dataset(cache, 2).shuffled(seed=1)) == order(1, 0)


@pytest.mark.parametrize(("fit", "sizes"), [(1, [1] * 6), (2, [2] * 3), (4, [3] * 2), (9, [6])])
def test_chunks_are_drawn_into_windows_of_even_sizes(
    cache: Cache, fit: int, sizes: list[int]
) -> None:
    seen = [windows_of(dataset(cache, fit), seed=seed) for seed in range(20)]
    assert all([len(window) for window in windows] == sizes for windows in seen)
    assert len(set(seen)) > 10 or len(sizes) == 1


def test_all_samples_in_a_window_are_in_true_random_order(cache: Cache) -> None:
    """Every sample of a chunk is in every place equally often (chi-squared, 99.9 %)."""
    data = dataset(cache, 100, "test")
    counts = np.zeros((12, 12))
    for epoch in range(1200):
        counts[data.shuffled_order(seed=0, epoch=epoch), range(12)] += 1
    assert ((counts - 100) ** 2 / 100).sum() < 173.6  # 121 degrees of freedom


@pytest.mark.parametrize("chunks", [1, 2, 3, 100])
@pytest.mark.parametrize("batch", [1, 4, 16])
def test_chunks_are_read_once_an_epoch(
    cache: Cache, reads: Counter[str], chunks: int, batch: int
) -> None:
    data = dataset(cache, chunks)
    for _ in DataLoader(data, batch_size=batch, sampler=data.shuffled()):
        pass
    assert sorted(reads.values()) == [1] * 6
    reads.clear()
    for _ in DataLoader(dataset(cache, chunks), batch_size=batch):
        pass
    assert sorted(reads.values()) == [1] * 6


@pytest.mark.parametrize("workers", [2, 3])
def test_each_worker_reads_a_chunk_once_at_most(
    cache: Cache, reads: Counter[str], workers: int
) -> None:
    data = dataset(cache, 2)
    batches = list(BatchSampler(data.shuffled(), 5, drop_last=False))
    for worker in range(workers):  # a DataLoader deals batches out in turn
        own = pickle.loads(pickle.dumps(data))
        for batch in batches[worker::workers]:
            own.__getitems__(batch)
        assert set(reads.values()) == {1}
        reads.clear()


def test_a_dataset_that_fits_is_read_once_for_all(cache: Cache, reads: Counter[str]) -> None:
    data = cache.dataset("train")
    for _ in range(2):
        for _ in DataLoader(data, batch_size=8, shuffle=True):
            pass
    assert sorted(reads.values()) == [1] * 6
    data[3]
    assert sum(reads.values()) == 6
    pickle.loads(pickle.dumps(data))[3]  # what is held does not travel
    assert sum(reads.values()) == 7


def test_no_more_is_held_than_the_window(cache: Cache) -> None:
    data = dataset(cache, 2)
    for batch in BatchSampler(data.shuffled(), 4, drop_last=False):
        samples = data.__getitems__(batch)
        assert len(data._held) <= 2
        # Samples are the caller's own.
        for values, _ in samples:
            values.fill_(7)
    np.testing.assert_array_equal(data[0][0], cache.activations[0, 0])


def test_a_dataset_is_a_sequence(cache: Cache) -> None:
    data = dataset(cache, 2, "test")
    assert len(data) == len(data.shuffled()) == 12
    np.testing.assert_array_equal(data[-1][0], cache.activations[0, -1])
    assert [data[index][1] for index in range(12)] == cache.labels("class")[40:].tolist()
    with pytest.raises(IndexError):
        data[12]


def test_views_and_windows_that_cannot_be_are_refused(cache: Cache) -> None:
    with pytest.raises(DataError, match="window is 'much': expected a size"):
        cache.dataset("train", window="much")
    with pytest.raises(DataError, match="no view 1 in"):
        cache.dataset("train", view=1)
    assert len(cache.dataset("train", window=1)) == 40  # holds one chunk


def test_large_samples_that_are_cut_between_grid_rows_are_whole(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: Counter[str]
) -> None:
    monkeypatch.setattr("gim_stagewise.cache.layout.MAX_CHUNK_BYTES", 1000)
    edit(tiny, "chunk = 7", "chunk = 1")
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run(until=1)
    cache = open_cache(tmp_path / "out" / "m1.zarr")
    reads.clear()
    data = dataset(cache, 1)
    order = data.shuffled_order(seed=0, epoch=0).tolist()
    values = torch.stack([values for values, _ in data.__getitems__(order)])
    assert len(reads) > 40
    assert set(reads.values()) == {1}
    np.testing.assert_array_equal(values, cache.activations[0][order])
    # No chunk has two of them, so nothing keeps the order from being that of a perfect shuffle.
    apart = [abs(a - b) for a, b in pairwise(order)]
    assert max(apart) > 20
