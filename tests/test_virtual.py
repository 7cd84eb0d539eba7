"""Inputs that are computed when they are read, and activations that may go."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import edit, one_error, weights_of
from warm import gim_stage

from gim_stagewise.cache import Cache, Digest, read_manifest
from gim_stagewise.cache.manifest import write_manifest
from gim_stagewise.errors import DataError, StaleCacheError
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.sources import Request
from gim_stagewise.stage.extract import VirtualCache
from gim_stagewise.stage.extraction_plan import Workers


def never(file: Path) -> Path:
    """The same pipeline, with inputs computed when they are read."""
    other = file.with_name("never.toml")
    other.write_text(file.read_text())
    edit(other, "[cache]\n", '[cache]\nmaterialize = "never"\n')
    return other


def run(file: Path, folder: Path, **options: object) -> None:
    Pipeline.from_file(file, folder=folder, device="cpu").run(**options)  # type: ignore[arg-type]


def assert_same_weights(one: Path, other: Path) -> None:
    expected, found = weights_of(one), weights_of(other)
    assert expected.keys() == found.keys()
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
    for path in sorted(one.glob("m*.zarr")):
        left, right = Cache(path), Cache(other / path.name)
        np.testing.assert_array_equal(left.read_pooled(left.ids), right.read_pooled(right.ids))
        assert left.content_digest() == right.content_digest()


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_stored_and_computed_inputs_give_the_same_bits(
    tiny: Path, tmp_path: Path, workers: int
) -> None:
    # A cluster is started for each module.
    last = 2 if workers else 3
    run(tiny, tmp_path / "stored", until=last)
    run(never(tiny), tmp_path / "computed", workers=Workers(workers), until=last)
    assert_same_weights(tmp_path / "stored", tmp_path / "computed")
    for index in range(1, last + 1):
        folder = tmp_path / "computed" / f"m{index}.zarr"
        assert not (folder / "activations").exists()


def test_random_views_are_computed_like_those_stored(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "[patches]", "[augment]\ncrop = 10\nflip = 0.5\nviews = 2\n\n[patches]")
    run(tiny, tmp_path / "stored", until=2)
    run(never(tiny), tmp_path / "computed", until=2)
    assert_same_weights(tmp_path / "stored", tmp_path / "computed")


def test_a_virtual_cache_reads_what_would_be_stored(tiny: Path, tmp_path: Path) -> None:
    run(tiny, tmp_path / "stored", until=2)
    run(never(tiny), tmp_path / "computed", until=2)
    stored = Cache(tmp_path / "stored" / "m2.zarr")
    source = Pipeline.from_file(never(tiny), folder=tmp_path / "computed", device="cpu").stage(3)
    virtual = source.source
    assert isinstance(virtual, VirtualCache)
    requests = [Request(item_id) for item_id in stored.ids[::-3]]
    for one, other in zip(stored.read(requests), virtual.read(requests), strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_choice_can_be_changed_without_training_again(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    run(never(tiny), folder)
    again = Pipeline.from_file(tiny, folder=folder, device="cpu").run()
    assert [(stage.trained, stage.extracted) for stage in again.stages] == [(False, True)] * 3
    back = Pipeline.from_file(never(tiny), folder=folder, device="cpu").run()
    assert not any(stage.trained or stage.extracted for stage in back.stages)


def test_an_interrupted_training_on_computed_inputs_goes_on_exactly(
    tiny: Path, tmp_path: Path
) -> None:
    file = never(tiny)
    run(file, tmp_path / "whole")

    def stop(module: int, step: int) -> None:
        if (module, step) == (2, 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Pipeline.from_file(file, folder=tmp_path / "cut", device="cpu", on_step=stop).run()
    run(file, tmp_path / "cut")
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_activations_that_are_not_stored_are_not_read_as_nothing(
    tiny: Path, tmp_path: Path
) -> None:
    run(never(tiny), tmp_path, until=1)
    cache = Cache(tmp_path / "m1.zarr")
    for read in (
        lambda: cache.read([Request(cache.ids[0])]),
        lambda: cache.activations,
        lambda: cache.dataset("train"),
        lambda: cache.dask(),
    ):
        with pytest.raises(DataError, match="stores embeddings alone"):
            read()
    assert cache.dask("pooled").shape[1] == len(cache.ids)
    assert gim_stage("inspect", tmp_path / "m1.zarr").returncode == 0
    done = gim_stage("probe", "--input", tmp_path / "m1.zarr")
    assert done.returncode == 0, done.stderr


def test_an_input_is_not_computed_from_other_weights(tiny: Path, tmp_path: Path) -> None:
    file = never(tiny)
    run(file, tmp_path / "out", until=1)
    edit(file, "seed = 3", "seed = 4")
    run(file, tmp_path / "other", until=1)
    (tmp_path / "other" / "m1.safetensors").replace(tmp_path / "out" / "m1.safetensors")
    edit(file, "seed = 4", "seed = 3")
    with pytest.raises(StaleCacheError):
        Pipeline.from_file(file, folder=tmp_path / "out", device="cpu").stage(2)


@pytest.mark.parametrize(
    ("keep", "left"), [("last-two", [2, 3]), pytest.param("last", [3], marks=pytest.mark.slow)]
)
def test_earlier_activations_go_and_embeddings_stay(
    tiny: Path, tmp_path: Path, keep: str, left: list[int]
) -> None:
    run(tiny, tmp_path / "all")
    edit(tiny, "seed = 3\n", f'seed = 3\nkeep = "{keep}"\n')
    folder = tmp_path / "out"
    run(tiny, folder)
    stored = [n for n in (1, 2, 3) if Cache(folder / f"m{n}.zarr").materialized]
    assert stored == left
    assert [n for n in (1, 2, 3) if (folder / f"m{n}.zarr" / "activations").exists()] == left
    assert_same_weights(tmp_path / "all", folder)
    again = Pipeline.from_file(tiny, folder=folder, device="cpu").run()
    assert not any(stage.trained or stage.extracted for stage in again.stages)
    states = json.loads(gim_stage("status", tiny, "--dir", folder, "--json").stdout)
    assert {stage["state"] for stage in states["modules"]} == {"sealed"}
    # What is gone is computed where a stage above is made again.
    run(tiny, folder, start=2)
    assert_same_weights(tmp_path / "all", folder)


def test_what_keep_leaves_is_stored_once_that_is_asked_for(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "seed = 3\n", 'seed = 3\nkeep = "last-two"\n')
    run(never(tiny), tmp_path / "out")
    run(tiny, tmp_path / "out")
    caches = [Cache(tmp_path / "out" / f"m{n}.zarr") for n in (1, 2, 3)]
    assert [own.materialized for own in caches] == [False, True, True]


def test_prove_shows_equal_weights(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gim_stage("prove", tiny, "--dir", out, "--device", "cpu", "--json", "-q")
    assert done.returncode == 0, done.stderr
    proof = json.loads(done.stdout)
    assert proof["equal"] is True
    assert [module["module"] for module in proof["modules"]] == [1, 2, 3]
    assert all(module["stored"] == module["computed"] for module in proof["modules"])
    assert list(out.iterdir()) == []


def test_prove_tells_when_the_two_ways_differ(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gim_stagewise.prove import prove

    original = VirtualCache.read_chunk

    def off_by_a_bit(self: VirtualCache, name: str, *chunk: Any) -> Iterator[Any]:
        for rows, values in original(self, name, *chunk):
            other = values ^ 1 if values.dtype == np.uint8 else values
            yield rows, other

    monkeypatch.setattr(VirtualCache, "read_chunk", off_by_a_bit)
    proofs = prove(Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu"))
    assert [proof.equal for proof in proofs] == [True, False, False]


def test_an_unknown_choice_is_refused(tiny: Path) -> None:
    edit(tiny, "[cache]\n", '[cache]\nmaterialize = "sometimes"\n')
    assert "cache.materialize" in one_error(gim_stage("plan", tiny), 2)


def test_other_numerics_than_those_sealed_are_refused_when_read(tiny: Path, tmp_path: Path) -> None:
    file, folder = never(tiny), tmp_path / "out"
    run(file, folder, until=1)
    path = folder / "m1.zarr"
    manifest = read_manifest(path)
    parts = {**manifest.content.parts, "numerics.torch": "1.0"}
    numerics = {**manifest.numerics, "torch": "1.0"}
    write_manifest(path, replace(manifest, numerics=numerics, content=Digest(parts)))
    stage = Pipeline.from_file(file, folder=folder, device="cpu").stage(2)
    with pytest.raises(StaleCacheError, match=r"torch 1\.0"):
        stage.source.read([Request(stage.source.ids[0])])
