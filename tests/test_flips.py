"""A single bit that is not what was written is noticed, wherever it is."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import zarr
from helpers import StopError

from gim_stagewise import load_encoder
from gim_stagewise.cache import (
    BuildFolder,
    Cache,
    CacheWriter,
    PrecisionError,
    block_digests,
    find_damage,
    read_manifest,
)
from gim_stagewise.cache.manifest import write_manifest
from gim_stagewise.config import SourceConfig
from gim_stagewise.durable import read_checked_json
from gim_stagewise.errors import CorruptCacheError, DataError
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.progress import Silent
from gim_stagewise.report.record import save_record
from gim_stagewise.sources import Request, open_source
from gim_stagewise.stage.checkpoint import FrozenWeights, check_checkpoint, load_checkpoint
from gim_stagewise.stage.export import export_encoder
from gim_stagewise.stage.outputs import StageOutputs


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, new_tiny: Callable[[Path], Path]) -> Path:
    file = new_tiny(tmp_path_factory.mktemp("flips"))
    file.write_text(file.read_text().partition("[module.2]")[0])
    return file


@pytest.fixture(scope="module")
def done(file: Path) -> Path:
    """A run that is finished."""
    pipeline = Pipeline.from_file(file, folder=file.parent / "done", device="cpu")
    save_record(pipeline, pipeline.run())
    return pipeline.workspace.folder


@pytest.fixture(scope="module")
def begun(file: Path) -> Path:
    """A run that stopped in training."""

    def stop(module: int, step: int) -> None:
        if step == 5:
            raise StopError

    folder = file.parent / "begun"
    with pytest.raises(StopError):
        Pipeline.from_file(file, folder=folder, device="cpu", on_step=stop).run()
    return folder


def flips(path: Path, count: int, *, within: bytes | None = None) -> list[bytes]:
    """The file with one bit changed, in so many ways, evenly spread; at least in its ends."""
    whole = path.read_bytes()
    start = 0 if within is None else whole.index(within)
    length = len(whole) if within is None else len(within)
    draw = np.random.default_rng(0)
    bits = {0, 8 * length - 1, *draw.integers(0, 8 * length, count).tolist()}
    found = []
    for bit in sorted(bits):
        damaged = bytearray(whole)
        damaged[start + bit // 8] ^= 1 << bit % 8
        found.append(bytes(damaged))
    return found


def each_is_noticed(path: Path, count: int, use: Callable[[], object]) -> None:
    """Whoever uses a file with a flipped bit is told; one that says the same is let pass."""
    whole = path.read_bytes()
    try:
        for damaged in flips(path, count):
            path.write_bytes(damaged)
            if path.suffix == ".json" and says_the_same(whole, damaged):
                continue
            with pytest.raises(CorruptCacheError, match=rf"m1\.zarr|{path.name}"):
                use()
    finally:
        path.write_bytes(whole)
    use()


def says_the_same(one: bytes, other: bytes) -> bool:
    """White space may change in JSON."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def read_all(path: Path) -> None:
    cache = Cache(path)
    cache.read([Request(item_id) for item_id in cache.ids])
    cache.read_pooled(cache.ids)
    cache.labels("class")
    cache.split("train")


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("activations/c.0.2.0.0.0.0.0", 200),
        ("pooled/c.0.1.0.0.0", 150),
        ("ids/c.0", 60),
        ("labels/class/c.0", 60),
        ("splits/c.0", 40),
        ("checksums/pooled/c.0.0", 40),
        ("zarr.json", 150),
        ("activations/zarr.json", 60),
        ("ids/zarr.json", 40),
    ],
)
def test_in_a_cache(done: Path, name: str, count: int) -> None:
    path = done / "m1.zarr"
    each_is_noticed(path / name, count, lambda: read_all(path))


def test_in_the_recorded_pipeline(file: Path, done: Path) -> None:
    text = json.dumps(file.read_text(), ensure_ascii=False)[1:-1].encode()
    path = done / "m1.zarr" / "zarr.json"
    whole = path.read_bytes()
    try:
        for damaged in flips(path, 60, within=text):
            path.write_bytes(damaged)
            with pytest.raises(CorruptCacheError):
                Pipeline.from_cache(done / "m1.zarr")
    finally:
        path.write_bytes(whole)


def test_in_weights(done: Path) -> None:
    path = done / "m1.safetensors"
    each_is_noticed(path, 150, lambda: FrozenWeights.load(path))


def test_in_an_exported_encoder(file: Path, done: Path, tmp_path: Path) -> None:
    path = tmp_path / "enc.safetensors"
    export_encoder(Pipeline.from_file(file, folder=done).workspace, path, pipeline=file)
    each_is_noticed(path, 150, lambda: load_encoder(path))


def test_in_the_record_of_a_run(done: Path) -> None:
    path = done / "run.json"
    each_is_noticed(path, 100, lambda: read_checked_json(path))


def test_in_a_checkpoint(begun: Path) -> None:
    path = begun / "checkpoints" / "m1.pt"
    run = Pipeline.from_file(begun.parent / "tiny.toml", folder=begun).stage(1).run_digest
    assert load_checkpoint(path, run=run) is not None
    whole = path.read_bytes()
    expected = repr(check_checkpoint(path))
    noticed = 0
    for damaged in flips(path, 100):
        path.write_bytes(damaged)
        try:
            # What the zip file around it is filled up with may change.
            assert repr(check_checkpoint(path)) == expected
        except CorruptCacheError:
            noticed += 1
            assert load_checkpoint(path, run=run) is None  # training begins anew
    path.write_bytes(whole)
    assert noticed > 50


def test_in_a_journal(file: Path, done: Path, tmp_path: Path) -> None:
    """Whatever the journal says: a block that is kept is whole, and the others are made again."""
    stage = Pipeline.from_file(file, folder=done, device="cpu").stage(1)
    manifest = stage.outputs.manifest(stage.load_weights())
    unsealed = build_unsealed(stage.outputs, done)
    journal = unsealed / ".m1.zarr.build" / "journal.jsonl"
    assert BuildFolder(unsealed / "m1.zarr").done_blocks(manifest.content)[0] == 8
    for number, damaged in enumerate(flips(journal, 100)):
        copy = tmp_path / str(number)
        shutil.copytree(unsealed, copy)
        (copy / ".m1.zarr.build" / "journal.jsonl").write_bytes(damaged)
        # A block is damaged as well: no flip may make it count as done.
        chunk = copy / "m1.zarr" / "pooled" / "c.0.3.0.0.0"
        chunk.write_bytes(chunk.read_bytes()[:-1] + b"?")
        writer = CacheWriter(copy / "m1.zarr", manifest, stage.source)
        pending = {block.index for block in writer.pending}
        assert 3 in pending
        whole = Cache(done / "m1.zarr")
        for block in writer.blocks:
            if block.index not in pending:
                for name in manifest.layout.chunk_files(block):
                    assert (copy / "m1.zarr" / name).read_bytes() == (
                        whole.path / name
                    ).read_bytes()
        shutil.rmtree(copy)


def build_unsealed(outputs: StageOutputs, done: Path) -> Path:
    """The sealed cache as it was before the seal: its blocks, recorded in a journal."""
    folder = done.parent / "unsealed"
    shutil.copytree(done / "m1.zarr", folder / "m1.zarr")
    shutil.rmtree(folder / "m1.zarr" / "checksums")
    sealed = read_manifest(done / "m1.zarr")
    write_manifest(folder / "m1.zarr", replace(sealed, sealed=False, files={}, error=None))
    build = BuildFolder(folder / "m1.zarr")
    blocks = sealed.layout.blocks(outputs.source)
    build.start(sealed.content, len(blocks))
    nothing = np.zeros(sealed.layout.cell[0])
    for block in blocks:
        PrecisionError(nothing, nothing, nothing, nothing).save(build.error_path(block))
        build.record(block, block_digests(folder / "m1.zarr", sealed.layout, block))
    return folder


def test_in_the_shards_of_a_source(tmp_path: Path) -> None:
    """Data that is not ours has checksums only where its shards have; its digest has the rest."""
    images = np.random.default_rng(0).integers(0, 255, (24, 8, 8), dtype=np.uint8)
    group = zarr.open_group(str(tmp_path / "data.zarr"), mode="w")
    group.create_array("x", data=images, chunks=(2, 8, 8), shards=(24, 8, 8))
    config = SourceConfig(
        kind="zarr", root=str(tmp_path / "data.zarr"), splits={"train": {"images": "x"}}
    )
    digest = open_source(config).content_digest()
    shard = next(file for file in (tmp_path / "data.zarr" / "x").rglob("0") if file.is_file())
    whole = shard.read_bytes()
    index = 12 * 16 + 4
    for damaged in [*flips(shard, 60), *flips(shard, 60, within=whole[-index:])]:
        shard.write_bytes(damaged)
        with suppress(DataError):
            assert open_source(config).content_digest() != digest


def test_verify_lists_what_reading_finds(done: Path) -> None:
    path = done / "m1.zarr"
    chunk = path / "activations" / "c.0.0.0.0.0.0.0"
    whole = chunk.read_bytes()
    for damaged in flips(chunk, 60):
        chunk.write_bytes(damaged)
        assert [one.file for one in find_damage(path, Silent())] == ["activations/c.0.0.0.0.0.0.0"]
    chunk.write_bytes(whole)
    assert find_damage(path, Silent()) == []
