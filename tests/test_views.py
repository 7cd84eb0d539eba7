"""A cache as an array: what slicing gives, and what it refuses to give."""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import edit
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gim_stagewise import open_cache
from gim_stagewise.cache import Cache
from gim_stagewise.errors import CorruptCacheError, DataError
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.prove import prove
from gim_stagewise.sources import Request


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory, new_tiny: Callable[[Path], Path]) -> Cache:
    """Two views of unlabeled samples besides the evaluation view."""
    folder = tmp_path_factory.mktemp("views")
    file = new_tiny(folder)
    edit(file, "[patches]\n", "[augment]\nviews = 2\nflip = 0.5\n\n[patches]\n")
    Pipeline.from_file(file, folder=folder / "out", device="cpu").run(until=1)
    return open_cache(folder / "out" / "m1.zarr")


@pytest.fixture(scope="module")
def whole(cache: Cache) -> NDArray[np.float32]:
    """All of it, by way of `Cache.read`."""
    values = np.full(cache.activations.shape, np.nan, np.float32)
    for view in range(cache.views + 1):
        for place, item_id in enumerate(cache.ids):
            if cache.is_stored(view, place):
                values[view, place] = cache.read([Request(item_id, view)])[0]
    return values


def a_slice(length: int) -> st.SearchStrategy[slice]:
    ends = st.none() | st.integers(-length - 2, length + 2)
    return st.builds(slice, ends, ends, st.sampled_from([None, 1, 2, 3, -1, -2]))


def a_key(length: int) -> st.SearchStrategy[int | slice]:
    return st.integers(-length, length - 1) | a_slice(length)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_slicing_is_numpys(cache: Cache, whole: NDArray[np.float32], data: st.DataObject) -> None:
    count = data.draw(st.integers(0, whole.ndim))
    key: tuple[Any, ...] = tuple(data.draw(a_key(length)) for length in whole.shape[:count])
    if data.draw(st.booleans()):
        last = data.draw(st.integers(0, whole.ndim - count))
        ends = tuple(data.draw(a_key(n)) for n in whole.shape[whole.ndim - last :])
        key = (*key, ..., *ends)
    np.testing.assert_array_equal(cache.activations[key], whole[key])


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_samples_by_number_or_mask(
    cache: Cache, whole: NDArray[np.float32], data: st.DataObject
) -> None:
    samples = whole.shape[1]
    chosen = data.draw(st.lists(st.integers(-samples, samples - 1), max_size=9))
    array = cache.activations
    np.testing.assert_array_equal(array[:, chosen, :, 1], whole[:, :, :, 1][:, chosen])
    mask = np.zeros(samples, bool)
    mask[chosen] = True
    np.testing.assert_array_equal(array[0, mask], whole[0, mask])
    np.testing.assert_array_equal(array[0, np.array(chosen, int), 2], whole[0, chosen, 2])


def test_views_that_are_not_stored_are_nan(cache: Cache, whole: NDArray[np.float32]) -> None:
    assert np.isnan(whole).any()
    labelled_only = len(cache.ids) - 1
    assert np.isnan(cache.activations[2, labelled_only]).all()
    assert np.isfinite(cache.activations[0]).all()
    with pytest.raises(DataError, match=r"view 2 of 'test/.*' is not stored"):
        cache.read([Request(cache.ids[labelled_only], 2)])


def test_chunks_that_a_view_ends_in_need_not_be_those_below(tiny: Path, tmp_path: Path) -> None:
    """The last chunk of unlabeled samples of module 2 has labelled ones that module 1's has not."""
    edit(tiny, "splits.train", 'splits.unlabeled = { images = "train.npy" }\nsplits.train')
    edit(tiny, "[patches]\n", "[augment]\nflip = 0.5\n\n[patches]\n")
    tiny.write_text(tiny.read_text().partition("[module.3]")[0])
    edit(tiny, "[module.1]", "[module.1]\ncache.chunk = 5")
    for materialize in ("always", "never"):
        edit(tiny, "cache.chunk = 5", f'cache.chunk = 5\ncache.materialize = "{materialize}"')
        Pipeline.from_file(tiny, folder=tmp_path / materialize, device="cpu").run()
        edit(tiny, f'\ncache.materialize = "{materialize}"', "")
    stored, computed = (open_cache(tmp_path / name / "m2.zarr") for name in ("always", "never"))
    assert stored.ids[39:41] == ["unlabeled/39", "train/0"]
    assert (stored.is_stored(1, 39), stored.is_stored(1, 40)) == (True, False)
    np.testing.assert_array_equal(np.asarray(stored.activations), np.asarray(computed.activations))
    assert np.isfinite(stored.activations[1, :40]).all()
    assert np.isnan(stored.activations[1, 40:]).all()


def test_both_ways_are_proved_with_views(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "[patches]\n", "[augment]\nflip = 0.5\n\n[patches]\n")
    edit(tiny, "splits.train", 'splits.unlabeled = { images = "train.npy" }\nsplits.train')
    tiny.write_text(tiny.read_text().partition("[module.3]")[0])
    proofs = prove(Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu"))
    assert [proof.equal for proof in proofs] == [True, True]


@pytest.mark.parametrize(
    "key",
    [(0,) * 8, (..., ...), (0, None), (0, 1.5), ([0], 1), (0, 0, [1]), (0, 52), (3,), (True, 0)],
)
def test_other_keys_are_refused(cache: Cache, key: Any) -> None:
    with pytest.raises((IndexError, TypeError)):
        cache.activations[key]


def test_dask_gives_the_same(cache: Cache, whole: NDArray[np.float32]) -> None:
    array = cache.dask()
    assert array.chunks[1][0] == cache.chunk_items
    np.testing.assert_array_equal(array.compute(scheduler="threads"), whole)
    np.testing.assert_array_equal(array[0, 3:9].compute(scheduler="processes"), whole[0, 3:9])
    pooled = cache.dask("pooled").compute()
    np.testing.assert_array_equal(pooled[0], cache.read_pooled(cache.ids))
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(cache)).activations[0, 1], whole[0, 1])
    with pytest.raises(DataError, match='there are "activations" and "pooled"'):
        cache.dask("ids")


def test_they_say_what_they_are_in_a_line(cache: Cache) -> None:
    said = (
        f"Cache({str(cache.path)!r}, module 1, view=3 sample=52 grid_row=5 grid_col=5 channel=6 "
        "height=4 width=4, uint8, sealed)"
    )
    assert repr(cache) == said
    shape = "(3, 52, 5, 5, 6, 4, 4)"
    array = f"DecodedArray('activations', shape={shape}, dtype=float32, of {said})"
    assert repr(cache.activations) == array
    dataset = f"CacheDataset('unlabeled', view=2, 40 samples, of {said})"
    assert repr(cache.dataset("unlabeled", view=2)) == dataset


@pytest.mark.parametrize("name", ["activations", "pooled"])
def test_no_part_of_a_damaged_chunk_is_given(cache: Cache, name: str) -> None:
    file = sorted((cache.path / name).glob("c.0.1.*"))[0]
    content = file.read_bytes()
    place = cache.chunk_items  # the first sample of the second chunk
    draw = np.random.default_rng(0)
    ways: list[Callable[[], Any]] = {
        "activations": [
            lambda: cache.activations[0, place, 0, 0, 0],
            lambda: cache.activations[0, [place]],
            lambda: np.asarray(cache.dask()[0, place, 0]),
        ],
        "pooled": [lambda: np.asarray(cache.dask("pooled")[0, place, 0])],
    }[name]
    try:
        for position in [*range(16), *draw.integers(0, len(content), 24).tolist()]:
            damaged = bytearray(content)
            damaged[position] ^= 1 << position % 8
            file.write_bytes(damaged)
            for way in ways:
                with pytest.raises(CorruptCacheError, match=r"c\.0\.1\."):
                    way()
        file.unlink()
        for way in ways:
            with pytest.raises(CorruptCacheError, match="is missing"):
                way()
    finally:
        file.write_bytes(content)


def test_samples_that_a_view_is_not_stored_for_are_not_computed(tiny: Path, tmp_path: Path) -> None:
    """Zeros in their place would give NaN, and nobody counts what is not there."""
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\n\n"
        "class Contrast(nn.Module):\n"
        "    def __init__(self, in_channels):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(in_channels, 4, 3, padding=1)\n\n"
        "    def forward(self, x):\n"
        "        x = x - x.mean((1, 2, 3), True)\n"
        "        return self.conv(x / x.square().mean((1, 2, 3), True).sqrt())\n"
    )
    edit(tiny, "splits.train", 'splits.unlabeled = { images = "train.npy" }\nsplits.train')
    edit(tiny, "[patches]\n", "[augment]\nflip = 0.5\nviews = 2\n\n[patches]\n")
    edit(
        tiny, 'build = "residual"\noptions = { stem = 4, channels = 6 }', 'build = "mine:Contrast"'
    )
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run(until=1)
    cache = open_cache(tmp_path / "out" / "m1.zarr")
    places = [(view, place) for view in range(3) for place in range(len(cache.ids))]
    stored = sum(cache.is_stored(*place) for place in places)
    assert stored == 2 * 40 + 52
    assert cache.manifest.error is not None
    assert cache.manifest.error["values"] == stored * math.prod(cache.activations.shape[2:])
    for view, place in places:
        expected = np.isfinite if cache.is_stored(view, place) else np.isnan
        assert expected(cache.activations[view, place]).all()
