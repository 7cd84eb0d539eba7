"""Crops on the patch grid: drawn when read, from caches that hold the whole grid."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import edit, one_error
from test_virtual import assert_same_weights, never, run
from warm import gim_stage

from gim_stagewise.cache import Cache
from gim_stagewise.config import parse_pipeline
from gim_stagewise.probe.probe import pool_features
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources import Request, Source
from gim_stagewise.stage.loader import Loader, validation_batches
from gim_stagewise.stage.workspace import open_data
from gim_stagewise.windows import Span


@pytest.fixture
def cropped(tiny: Path) -> Path:
    """Trained on 3×3 of 5×5 patches."""
    edit(tiny, "[patches]", "[augment]\ngrid_crop = 3\n\n[patches]")
    edit(tiny, "prediction_steps = 2", "prediction_steps = 1")
    return tiny


def batches(source: Source, *, window: int, epoch: int = 0) -> list[torch.Tensor]:
    loader = Loader(source, source.ids, batch=8, window=window, seed=3, stage=2, grid=(3, 3))
    return [batch.read(Span(0, batch.rows)) for batch in loader.batches(epoch)]


def test_a_batch_is_cut_out_of_whole_samples(cropped: Path, tmp_path: Path) -> None:
    run(cropped, tmp_path / "out", until=1)
    cache = Cache(tmp_path / "out" / "m1.zarr")
    assert cache.manifest.sample_layout.grid == (5, 5)
    patches = open_data(parse_pipeline(cropped.read_text(), file="x"))
    for source in (cache, patches):
        whole = dict(zip(source.ids, source.read([Request(i) for i in source.ids]), strict=True))
        places = set()
        for epoch in (0, 1):
            loader = Loader(source, source.ids, batch=8, window=10**9, seed=3, stage=2, grid=(3, 3))
            order = [source.ids[i] for i in loader.order(epoch).indexes]
            rows = torch.cat(batches(source, window=10**9, epoch=epoch))
            found = rows.reshape(-1, 3, 3, *rows.shape[1:])
            for item_id, sample in zip(order, found, strict=False):
                # Slowly: number the nine places row by row.
                drawn = derive_seed(3, "place drawn", 2, epoch, item_id) % 9
                top, left = drawn // 3, drawn % 3
                expected = whole[item_id][top : top + 3, left : left + 3]
                np.testing.assert_array_equal(sample.numpy(), expected)
                places.add((top, left))
        assert len(places) == 9
        middle = validation_batches(source, source.ids[:5], batch=5, window=10**9, grid=(3, 3))
        rows = next(iter(middle)).read(Span(0, 45))
        read = rows.reshape(5, 3, 3, *rows.shape[1:]).numpy()
        for item_id, sample in zip(source.ids, read, strict=False):
            np.testing.assert_array_equal(sample, whole[item_id][1:4, 1:4])


def test_a_window_that_holds_all_or_little_delivers_the_same(cropped: Path, tmp_path: Path) -> None:
    run(cropped, tmp_path / "out", until=1)
    cache = Cache(tmp_path / "out" / "m1.zarr")
    for epoch in (0, 1):
        # As many samples in the pool, kept from the first epoch on or read again.
        pool = len(cache.ids) * cache.item_bytes
        kept = batches(cache, window=pool, epoch=epoch)
        loader = Loader(cache, cache.ids, batch=8, window=pool, seed=3, stage=2, grid=(3, 3))
        loader._reader.keeps_all = False
        again = [batch.read(Span(0, batch.rows)) for batch in loader.batches(epoch)]
        assert all(torch.equal(a, b) for a, b in zip(kept, again, strict=True))


def test_stored_and_computed_inputs_give_the_same_bits(cropped: Path, tmp_path: Path) -> None:
    run(cropped, tmp_path / "stored", until=2)
    run(never(cropped), tmp_path / "computed", until=2)
    assert_same_weights(tmp_path / "stored", tmp_path / "computed")


def test_modules_are_judged_on_the_patches_in_the_middle(cropped: Path) -> None:
    config = parse_pipeline(cropped.read_text(), file="x")
    embeddings = np.random.default_rng(0).random((4, 5, 5, 2), dtype=np.float32)
    expected = embeddings[:, 1:4, 1:4].reshape(4, 9, 2).mean(1)
    np.testing.assert_allclose(pool_features(embeddings, config), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("augment", "expected"),
    [
        ("grid_crop = 6", "augment.grid_crop: is 6, but a sample has 5×5 patches; use 5 or less"),
        ("grid_crop = 0", "greater than 0"),
        ("views = 0", "greater than 0"),
    ],
)
def test_crops_and_views_that_cannot_be_are_refused(
    tiny: Path, augment: str, expected: str
) -> None:
    edit(tiny, "[patches]", f"[augment]\n{augment}\n\n[patches]")
    assert expected in one_error(gim_stage("run", tiny, "--device", "cpu"), 2)
