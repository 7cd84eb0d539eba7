"""A cache is whole and right, or says what is wrong with it."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
import torch
import zarr
from numcodecs import blosc
from torch import Tensor, nn

from gim_stagewise.cache import (
    Block,
    BuildFolder,
    Cache,
    CacheLayout,
    CacheWriter,
    Digest,
    Manifest,
    Precision,
    StagedBlock,
    discard_cache,
    find_damage,
    open_cache,
    read_manifest,
    stage_block,
)
from gim_stagewise.cache.codecs import zarr_codecs
from gim_stagewise.cache.frames import write_frame
from gim_stagewise.cache.manifest import write_manifest
from gim_stagewise.config import AugmentConfig, ExtractConfig
from gim_stagewise.errors import (
    CacheNotFoundError,
    CorruptCacheError,
    NonFiniteError,
    PartialCacheError,
)
from gim_stagewise.progress import Silent
from gim_stagewise.sources import PatchSource, Request, read_stacked
from gim_stagewise.sources.parts import ArrayPart, PartsSource
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward, frozen_step
from gim_stagewise.stage.storing import Storing, compute_block
from gim_stagewise.windows import PatchGrid

SAMPLES = 10
CONFIG = ExtractConfig(batch=6)


def make_source(images: np.ndarray | None = None) -> PatchSource:
    draw = np.random.default_rng(1)
    if images is None:
        images = draw.random((SAMPLES, 1, 6, 6), dtype=np.float32)
    labels = np.arange(SAMPLES) % 3
    parts = {"train": ArrayPart(images[:7], labels[:7]), "test": ArrayPart(images[7:], labels[7:])}
    return PatchSource(PartsSource(parts), AugmentConfig(), PatchGrid(4, 2), seed=0)  # type: ignore[arg-type]


def make_frozen() -> FrozenModule:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FrozenModule(nn.Conv2d(1, 3, 3), torch.device("cpu"))


def make_manifest(*, codec: str = "lz4", content: str = "a") -> Manifest:
    return Manifest(
        pipeline="test",
        module=1,
        pipeline_text="",
        recipe=Digest({"lr": 1}),
        content=Digest({"weights": content, "input": "b"}),
        numerics={},
        precision=Precision("float32"),
        stored_operation=None,
        encoding="patch",
        layout=CacheLayout(SAMPLES, 1, (2, 2), (3, 2, 2), 3, 4, codec),
    )


def stage(
    writer: CacheWriter, block: Block, frozen: FrozenModule, source: PatchSource
) -> StagedBlock:
    ids = [item.id for item in source.items()[block.samples.slice]]
    storing = Storing.of(writer.manifest)
    samples = read_stacked(source, [Request(item_id, block.view) for item_id in ids])
    arrays = compute_block(frozen, samples, ids, CONFIG, storing)
    return stage_block(
        writer.path, writer.staging, writer.manifest, block, arrays, error=storing.error
    )


def extract(frozen: FrozenModule, source: PatchSource, path: Path, manifest: Manifest) -> None:
    writer = CacheWriter(path, manifest, source)
    for block in writer.pending:
        writer.commit(stage(writer, block, frozen, source))
    writer.seal()


def build(path: Path, *, codec: str = "lz4") -> Cache:
    extract(make_frozen(), make_source(), path, make_manifest(codec=codec))
    return Cache(path)


@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
def test_what_is_read_is_what_was_computed(tmp_path: Path, codec: str) -> None:
    cache = build(tmp_path / "m1.zarr", codec=codec)
    source, frozen = make_source(), make_frozen()
    ids = [item.id for item in source.items()]
    shuffled = [ids[i] for i in (9, 0, 5, 5, 2)]
    for item_id, sample in zip(shuffled, cache.read([Request(i) for i in shuffled]), strict=True):
        patches = torch.from_numpy(source.read([Request(item_id)])[0]).flatten(0, 1)
        expected, _ = frozen_forward(frozen, patches, CONFIG)
        torch.testing.assert_close(torch.from_numpy(sample).flatten(0, 1), expected)
    assert [item.id for item in cache.items()] == ids
    assert list(cache.split("test")) == ids[7:]
    assert list(cache.split("unlabeled")) == ids[:7]
    np.testing.assert_array_equal(cache.labels("class"), np.arange(SAMPLES) % 3)


def test_all_zero_chunks_are_stored(tmp_path: Path) -> None:
    frozen = FrozenModule(nn.Conv2d(1, 3, 3), torch.device("cpu"))
    for parameter in frozen.parameters():
        parameter.zero_()
    extract(frozen, make_source(), tmp_path / "m1.zarr", make_manifest())
    assert len(list((tmp_path / "m1.zarr" / "activations").glob("c.*"))) == 3
    assert not Cache(tmp_path / "m1.zarr").read([Request("train/0")])[0].any()


def test_a_lost_chunk_is_an_error_and_not_zeros(tmp_path: Path) -> None:
    cache = build(tmp_path / "m1.zarr")
    (cache.path / "activations" / "c.0.1.0.0.0.0.0").unlink()
    with pytest.raises(CorruptCacheError, match=r"c\.0\.1\.0\.0\.0\.0\.0 is missing"):
        cache.read([Request("train/5")])
    assert cache.read([Request("train/0")])


@pytest.mark.parametrize("name", ["activations", "pooled", "ids", "splits", "labels/class"])
def test_every_flipped_bit_is_noticed_on_reading(tmp_path: Path, name: str) -> None:
    build(tmp_path / "m1.zarr")
    file = next(iter(sorted((tmp_path / "m1.zarr" / name).glob("c.*"))))
    whole = file.read_bytes()
    for position in range(0, len(whole), max(1, len(whole) // 40)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << position % 8
        file.write_bytes(bytes(damaged))
        with pytest.raises(CorruptCacheError, match=r"verify .* --repair"):
            read_everything(Cache(tmp_path / "m1.zarr"))
    file.unlink()
    with pytest.raises(CorruptCacheError, match="is missing"):
        read_everything(Cache(tmp_path / "m1.zarr"))


def test_trusted_storage_is_not_checked(tmp_path: Path) -> None:
    whole = build(tmp_path / "m1.zarr", codec="none").read([Request("train/0")])[0]
    file = tmp_path / "m1.zarr" / "activations" / "c.0.0.0.0.0.0.0"
    content = bytearray(file.read_bytes())
    content[1] ^= 1
    file.write_bytes(content)
    with pytest.raises(CorruptCacheError, match="checksum"):
        open_cache(tmp_path / "m1.zarr").read([Request("train/0")])
    trusted = open_cache(tmp_path / "m1.zarr", verify=False)
    assert (trusted.read([Request("train/0")])[0] != whole).sum() == 1
    file.write_bytes(content[:-1])
    with pytest.raises(CorruptCacheError, match="bytes"):
        trusted.read([Request("train/0")])


def read_everything(cache: Cache) -> None:
    ids = cache.ids
    cache.read([Request(item_id) for item_id in ids])
    cache.read_pooled(ids)
    for split in ("unlabeled", "train", "test"):
        cache.split(split)
    cache.labels("class")


def test_a_cache_that_is_not_sealed_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "m1.zarr"
    CacheWriter(path, make_manifest(), make_source())
    with pytest.raises(PartialCacheError, match="never finished"):
        Cache(path)
    with pytest.raises(CacheNotFoundError, match="no cache at"):
        Cache(tmp_path / "other.zarr")


def stage_and_commit(writer: CacheWriter, count: int) -> None:
    source, frozen = make_source(), make_frozen()
    for block in writer.pending[:count]:
        writer.commit(stage(writer, block, frozen, source))


def test_a_build_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "m1.zarr"
    first = CacheWriter(path, make_manifest(), make_source())
    stage_and_commit(first, 2)
    second = CacheWriter(path, make_manifest(), make_source())
    assert [block.index for block in second.pending] == [2]
    stage_and_commit(second, 1)
    second.seal()
    expected = build(tmp_path / "whole.zarr")
    ids = [Request(str(i)) for i in expected.ids]
    np.testing.assert_array_equal(Cache(path).read(ids), expected.read(ids))
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


@pytest.mark.parametrize("damage", ["gone", "torn"])
def test_a_recorded_block_whose_files_are_not_as_recorded_is_written_again(
    tmp_path: Path, damage: str
) -> None:
    path = tmp_path / "m1.zarr"
    stage_and_commit(CacheWriter(path, make_manifest(), make_source()), 2)
    chunk = path / "activations" / "c.0.1.0.0.0.0.0"
    if damage == "gone":
        chunk.unlink()
    else:
        chunk.write_bytes(chunk.read_bytes()[:-1])
    writer = CacheWriter(path, make_manifest(), make_source())
    assert [block.index for block in writer.pending] == [1, 2]


@pytest.mark.parametrize("damage", ["gone", "altered"])
@pytest.mark.parametrize(
    "file",
    [
        "ids/c.0",
        "ids/zarr.json",
        "splits/c.0",
        "labels/class/c.0",
        "activations/zarr.json",
        "pooled/zarr.json",
    ],
)
def test_an_unfinished_build_is_begun_again_if_what_it_began_with_is_not_there(
    tmp_path: Path, file: str, damage: str
) -> None:
    path = tmp_path / "m1.zarr"
    stage_and_commit(CacheWriter(path, make_manifest(), make_source()), 2)
    if damage == "gone":
        (path / file).unlink()
    else:
        content = bytearray((path / file).read_bytes())
        content[len(content) // 2] ^= 1
        (path / file).write_bytes(content)
    writer = CacheWriter(path, make_manifest(), make_source())
    assert writer.pending == writer.blocks
    stage_and_commit(writer, len(writer.blocks))
    writer.seal()
    assert find_damage(path, Silent()) == []
    assert list(Cache(path).ids) == list(make_source().ids)


def test_a_run_whose_build_was_taken_over_commits_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m1.zarr"
    first = CacheWriter(path, make_manifest(), make_source())
    staged = stage(first, first.blocks[0], make_frozen(), make_source())
    CacheWriter(path, make_manifest(content="b"), make_source())
    with pytest.raises(CorruptCacheError, match="another run has begun"):
        first.commit(staged)
    assert list((path / "activations").glob("c.*")) == []


def test_a_torn_line_of_the_journal_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "m1.zarr"
    writer = CacheWriter(path, make_manifest(), make_source())
    stage_and_commit(writer, 2)
    journal = BuildFolder(path).path / "journal.jsonl"
    journal.write_bytes(journal.read_bytes()[:-9])
    assert [b.index for b in CacheWriter(path, make_manifest(), make_source()).pending] == [1, 2]


def test_a_build_of_other_content_is_begun_again(tmp_path: Path) -> None:
    path = tmp_path / "m1.zarr"
    stage_and_commit(CacheWriter(path, make_manifest(), make_source()), 2)
    other = CacheWriter(path, make_manifest(content="b"), make_source())
    assert len(other.pending) == 3
    assert read_manifest(path).content.parts["weights"] == "b"


@pytest.mark.parametrize("what", ["numerics", "layout"])
def test_a_build_whose_manifest_says_something_else_is_begun_again(
    tmp_path: Path, what: str
) -> None:
    path, manifest = tmp_path / "m1.zarr", make_manifest()
    stage_and_commit(CacheWriter(path, manifest, make_source()), 2)
    assert len(CacheWriter(path, manifest, make_source()).pending) == 1
    content = Digest({**manifest.content.parts, "numerics.torch": "1.0"})
    layout = replace(manifest.sample_layout, codec="zstd")
    others = {"numerics": {"content": content}, "layout": {"layout": layout}}
    write_manifest(path, replace(manifest, **others[what]))  # type: ignore[arg-type]
    assert len(CacheWriter(path, manifest, make_source()).pending) == 3
    assert read_manifest(path) == manifest


def test_a_worker_left_over_from_an_earlier_run_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "m1.zarr"
    old = CacheWriter(path, make_manifest(), make_source())
    CacheWriter(path, make_manifest(), make_source())
    source, frozen = make_source(np.ones((SAMPLES, 1, 6, 6), np.float32)), make_frozen()
    with pytest.raises(FileNotFoundError):
        stage(old, old.blocks[0], frozen, source)
    assert list((path / "activations").glob("c.*")) == []


def test_the_checksums_of_a_sealed_cache_are_those_of_its_files(tmp_path: Path) -> None:
    import hashlib

    cache = build(tmp_path / "m1.zarr")
    for name in ("activations", "pooled"):
        recorded = zarr.open_array(str(cache.path / "checksums" / name), mode="r")
        for block in cache.manifest.layout.blocks(make_source()):
            digest = hashlib.sha256()
            for file in cache.manifest.layout.parts(block)[name].files:
                digest.update((cache.path / file).read_bytes())
            assert bytes(np.asarray(recorded[block.index]))[:32] == digest.digest()


def test_non_finite_activations_stop_the_extraction_and_name_the_sample(tmp_path: Path) -> None:
    images = np.zeros((SAMPLES, 1, 6, 6), np.float32)
    images[5] = 3e38
    frozen = make_frozen()
    for parameter in frozen.parameters():
        parameter.fill_(1e3)
    with pytest.raises(NonFiniteError, match=r"1 samples: train/5"):
        extract(frozen, make_source(images), tmp_path / "m1.zarr", make_manifest())
    assert not read_manifest(tmp_path / "m1.zarr").sealed


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["recipe"]["parts"].update(lr=2), "altered"),
        (lambda m: m["content"].update(digest="0" * 64), "altered"),
        (lambda m: m.update(format_version=99), "format 99"),
        (lambda m: m.update(sealed="yes"), "damaged"),
        (lambda m: m.pop("layout"), "damaged"),
    ],
)
def test_an_altered_manifest_is_refused(tmp_path: Path, change: object, message: str) -> None:
    build(tmp_path / "m1.zarr")
    file = tmp_path / "m1.zarr" / "zarr.json"
    content = json.loads(file.read_text())
    change(content["attributes"]["gim_stage"])  # type: ignore[operator]
    file.write_text(json.dumps(content))
    with pytest.raises(CorruptCacheError, match=message):
        Cache(tmp_path / "m1.zarr")


def test_only_caches_are_replaced(tmp_path: Path) -> None:
    precious = tmp_path / "m1.zarr"
    precious.mkdir()
    (precious / "thesis.txt").write_text("all of it")
    with pytest.raises(CorruptCacheError, match="is not a cache"):
        CacheWriter(precious, make_manifest(), make_source())
    assert (precious / "thesis.txt").read_text() == "all of it"
    group = zarr.open_group(str(tmp_path / "m3.zarr"), mode="w")
    group.create_array("mine", data=np.arange(3))
    with pytest.raises(CorruptCacheError, match="is not a cache of this version"):
        CacheWriter(tmp_path / "m3.zarr", make_manifest(), make_source())
    build(tmp_path / "m4.zarr")
    file = tmp_path / "m4.zarr" / "zarr.json"
    file.write_text(file.read_text().replace('"format_version": 1', '"format_version": 2'))
    with pytest.raises(CorruptCacheError, match="is not a cache of this version"):
        CacheWriter(tmp_path / "m4.zarr", make_manifest(), make_source())
    build(tmp_path / "m2.zarr")
    shutil.rmtree(tmp_path / "m2.zarr" / "activations")
    discard_cache(tmp_path / "m2.zarr")
    assert not (tmp_path / "m2.zarr").exists()


def test_large_samples_are_cut_into_chunks_between_grid_rows(tmp_path: Path) -> None:
    layout = CacheLayout(3, 1, (10, 10), (200, 16, 16), 200, 1, "none")
    rows = layout.arrays["activations"].chunks[2]
    assert 4 * rows * 10 * 200 * 16 * 16 <= 16_000_000 < 4 * (rows + 1) * 10 * 200 * 16 * 16
    source = make_source()
    for block in replace(layout, samples=SAMPLES).blocks(source)[:2]:
        files = layout.chunk_files(block)
        assert len(files) == len(set(files)) == -(-10 // rows) + 1


def test_a_frozen_module_stays_frozen() -> None:
    frozen = make_frozen()
    frozen.eval()
    with pytest.raises(RuntimeError, match="no train mode"):
        frozen.train()
    with pytest.raises(RuntimeError, match="no gradients"):
        frozen.requires_grad_()
    rows = torch.ones(2, 1, 4, 4, requires_grad=True)
    z, pooled = frozen(rows)
    assert not z.requires_grad
    assert not pooled.requires_grad


def test_the_one_forward_gives_a_row_the_same_bits_in_any_company() -> None:
    frozen = make_frozen()
    rows = torch.randn(13, 1, 4, 4, generator=torch.Generator().manual_seed(2))
    whole, _ = frozen_forward(frozen, rows, CONFIG)
    for count in (1, 5, 6, 7, 12):
        part, _ = frozen_forward(frozen, rows[:count], CONFIG)
        assert torch.equal(part, whole[:count])


class Threads(nn.Module):
    """Gives the number of threads that its operations have; with a state, or without."""

    def forward(self, x: Tensor, state: Tensor | None = None) -> Any:
        noted = torch.full_like(x, torch.get_num_threads())
        return noted if state is None else (noted, state)


class FailsError(Exception):
    pass


class Fails(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise FailsError


def test_the_one_forward_has_its_own_number_of_threads_and_leaves_that_of_others() -> None:
    own, cpu = ExtractConfig(batch=2, threads=2), torch.device("cpu")
    assert torch.get_num_threads() == 1
    z, _ = frozen_forward(FrozenModule(Threads(), cpu), torch.zeros(3, 1, 2, 2), own)
    assert {*z.flatten().tolist()} == {2}
    assert torch.get_num_threads() == 1
    z, _ = frozen_step(FrozenModule(Threads(), cpu), torch.zeros(2, 1, 3), torch.zeros(2, 1), own)
    assert {*z.flatten().tolist()} == {2}
    assert torch.get_num_threads() == 1
    with pytest.raises(FailsError):
        frozen_forward(FrozenModule(Fails(), cpu), torch.zeros(3, 1, 2, 2), own)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "uint16", "uint8"])
def test_zarr_writes_the_same_chunks(tmp_path: Path, codec: str, dtype: str) -> None:
    values = np.random.default_rng(0).integers(0, 9, (300, 200)).astype(dtype)
    write_frame(tmp_path / "c.0.0", values, codec)
    zarr.create_array(
        tmp_path / "array",
        data=values,
        chunks=values.shape,
        compressors=zarr_codecs(codec, values.itemsize),
    )
    written = (tmp_path / "array" / "c" / "0" / "0").read_bytes()
    assert (tmp_path / "c.0.0").read_bytes() == written


@pytest.mark.parametrize("codec", ["lz4", "zstd", "none"])
def test_zarr_writes_the_same_cache(tmp_path: Path, codec: str) -> None:
    cache = build(tmp_path / "m1.zarr", codec=codec)
    shutil.copytree(cache.path, tmp_path / "copy.zarr")
    group: Any = zarr.open_group(str(tmp_path / "copy.zarr"), mode="r+")
    for name in ("activations", "pooled"):
        array = group[name].with_config({"write_empty_chunks": True})
        values = array[...]
        for file in (tmp_path / "copy.zarr" / name).glob("c.*"):
            file.unlink()
        array[...] = values
    files = sorted(cache.path.glob("*/c.*"))
    assert len(files) > 4
    for file in files:
        other = tmp_path / "copy.zarr" / file.relative_to(cache.path)
        assert file.read_bytes() == other.read_bytes(), file


@pytest.mark.parametrize("size", [0, 3, 4, 20])
def test_a_chunk_file_that_was_cut_off_is_an_error(tmp_path: Path, size: int) -> None:
    cache = build(tmp_path / "m1.zarr")
    file = cache.path / "activations" / "c.0.1.0.0.0.0.0"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(CorruptCacheError, match="cut off"):
        cache.read([Request("train/5")])


@pytest.mark.parametrize("kind", ["activations", "pooled"])
def test_a_whole_chunk_in_anothers_place_is_not_believed(tmp_path: Path, kind: str) -> None:
    cache = build(tmp_path / "m1.zarr")
    one, other = sorted((cache.path / kind).glob("c.*"))[:2]
    content = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(content)
    with pytest.raises(CorruptCacheError, match="is whole, but not what was sealed"):
        cache.read([Request("train/0")]) if kind == "activations" else cache.read_pooled(
            ["train/0"]
        )


def test_a_cache_made_again_under_an_open_one_is_not_mixed_with_it(tmp_path: Path) -> None:
    cache = build(tmp_path / "m1.zarr")
    cache.read([Request("train/0")])
    draw = np.random.default_rng(2)
    other = make_source(draw.random((SAMPLES, 1, 6, 6), dtype=np.float32))
    extract(make_frozen(), other, tmp_path / "m1.zarr", make_manifest(content="b"))
    with pytest.raises(CorruptCacheError, match="is whole, but not what was sealed"):
        cache.read([Request("train/5")])


def test_a_frame_of_another_size_is_not_decoded(tmp_path: Path) -> None:
    """Its checksum is right, so it was put there by somebody."""
    cache = build(tmp_path / "m1.zarr")
    file = cache.path / "activations" / "c.0.1.0.0.0.0.0"
    frame = blosc.compress(np.zeros(10**6, np.float32), b"zstd", 5, blosc.SHUFFLE)
    assert len(frame) < 788  # what a chunk can take
    file.write_bytes(frame + google_crc32c.value(frame).to_bytes(4, "little"))
    with pytest.raises(CorruptCacheError, match="not what was sealed"):
        cache.read([Request("train/5")])
    with pytest.raises(CorruptCacheError, match="declares 4000000 bytes"):
        Cache(cache.path, verify=False).read([Request("train/5")])


@pytest.mark.parametrize(("old", "new"), [(1, True), (1, 1.0), ([0], [False])])
def test_what_python_calls_equal_may_be_another_option(old: object, new: object) -> None:
    before, after = Digest.of({"options": {"k": old}}), Digest.of({"options": {"k": new}})
    assert before.value != after.value
    assert len(before.differences(after)) == 1
    assert not after.differences(Digest.of({"options": {"k": new}}))
