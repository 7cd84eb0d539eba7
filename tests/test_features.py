"""Features and labels of a cache, as scikit-learn takes them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from helpers import edit, shorten
from numpy.typing import NDArray
from test_tiled import SEQUENCES, Items, make_manifest, values_of, write

from gim_stagewise import open_cache
from gim_stagewise.cache import Cache, CacheWriter, Pooling, TiledCache
from gim_stagewise.config import parse_pipeline
from gim_stagewise.errors import DataError
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.probe.probe import cached_features, probe_cache
from gim_stagewise.sources import SPLITS, Split


def of_module_1(file: Path, folder: Path) -> Cache:
    Pipeline.from_file(file, folder=folder, device="cpu").run(until=1)
    return open_cache(folder / "m1.zarr")


def by_hand(cache: Cache, split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    ids = cache.split(split)
    at = {item_id: place for place, item_id in enumerate(cache.ids)}
    return cache.read_pooled(ids), cache.labels("class")[[at[item_id] for item_id in ids]]


def test_features_are_embeddings_and_labels_are_theirs(tiny: Path, tmp_path: Path) -> None:
    cache = of_module_1(tiny, tmp_path / "out")
    for split in SPLITS[1:]:
        embeddings, labels = by_hand(cache, split)
        X, y = cache.features(split)
        np.testing.assert_allclose(X, embeddings.mean((1, 2)), rtol=1e-5, atol=1e-7)
        np.testing.assert_array_equal(y, labels)
        assert (str(X.dtype), str(y.dtype)) == ("float32", "int64")
        side_by_side, _ = cache.features(split, labels="class", pooling="all")
        np.testing.assert_array_equal(side_by_side, embeddings.reshape(len(embeddings), -1))


@pytest.mark.parametrize("pooling", ["mean", "all"])
def test_features_are_those_of_the_probe(tiny: Path, tmp_path: Path, pooling: Pooling) -> None:
    edit(tiny, "prediction_steps = 2", "prediction_steps = 1")
    edit(
        tiny,
        "[patches]",
        f'[augment]\ngrid_crop = 3\n\n[probe]\npooling = "{pooling}"\n\n[patches]',
    )
    cache = of_module_1(tiny, tmp_path / "out")
    config = parse_pipeline(tiny.read_text(), file="tiny.toml")
    X, _ = cache.features("test", pooling=pooling)
    np.testing.assert_array_equal(X, cached_features(cache.path, cache.split("test"), config))
    middle = cache.read_pooled(cache.split("test"))[:, 1:4, 1:4].reshape(12, 9, 6)
    expected = middle.mean(1) if pooling == "mean" else middle.reshape(12, -1)
    np.testing.assert_allclose(X, expected, rtol=1e-5, atol=1e-7)
    assert probe_cache(cache.path)[1] == pooling


def test_samples_without_a_label_are_left_out(tiny: Path, tmp_path: Path) -> None:
    labels = np.load(tmp_path / "train_labels.npy")
    labels[[0, 5, 39]] = -1
    np.save(tmp_path / "train_labels.npy", labels)
    cache = of_module_1(tiny, tmp_path / "out")
    X, y = cache.features("train")
    embeddings, every = by_hand(cache, "train")
    np.testing.assert_array_equal(y, every[every != -1])
    np.testing.assert_allclose(X, embeddings[every != -1].mean((1, 2)), rtol=1e-5, atol=1e-7)
    assert len(y) == 37


def test_what_there_are_no_features_of_is_refused(tiny: Path, tmp_path: Path) -> None:
    cache = of_module_1(tiny, tmp_path / "out")
    with pytest.raises(DataError, match=r"no labels called 'phone' in .*'class'"):
        cache.features("train", labels="phone")
    with pytest.raises(DataError, match='no pooling \'none\'; there are "mean" and "all"'):
        cache.features("train", pooling="none")  # type: ignore[arg-type]
    with pytest.raises(DataError, match="no split 'valid'"):
        cache.features("valid")  # type: ignore[arg-type]
    np.save(tmp_path / "test_labels.npy", np.full(12, -1))
    cache = of_module_1(tiny, tmp_path / "none")
    with pytest.raises(DataError, match=r"no sample of split 'test' in .* has a 'class'"):
        cache.features("test")
    cache = of_module_1(
        shorten(tiny, modules=1, batch=8, epochs=1, chunk=7, probe=False), tmp_path / "unlabelled"
    )
    with pytest.raises(DataError, match="has no labels; read_pooled"):
        cache.features("train")


class Speakers(Items):
    """Two recordings, of which the first has a speaker that is known."""

    label_names = ("speaker",)  # type: ignore[assignment]

    def labels(self, name: str) -> NDArray[np.int64]:
        return np.array([4, -1])


def test_features_of_items_of_any_size_are_means(tmp_path: Path) -> None:
    writer = CacheWriter(tmp_path / "m1.zarr", make_manifest(SEQUENCES), Speakers())  # type: ignore[arg-type]
    write(writer)
    writer.seal()
    cache = TiledCache(tmp_path / "m1.zarr")
    X, y = cache.features("unlabeled")
    embeddings = values_of(SEQUENCES)[SEQUENCES.array_name("pooled", 0)]
    np.testing.assert_allclose(X, embeddings.mean(0)[None], rtol=1e-5, atol=1e-7)
    assert y.tolist() == [4]
    with pytest.raises(DataError, match="items of any size, of which features are means"):
        cache.features("unlabeled", pooling="all")
