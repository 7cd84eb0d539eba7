"""Caches and files that somebody made to do harm: nothing is run, written elsewhere, or filled."""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import shutil
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
import pytest
import torch
from helpers import edit
from warm import warm

from gim_stagewise.cache import Cache, find_damage
from gim_stagewise.durable import json_checksum
from gim_stagewise.errors import ConfigError, CorruptCacheError, GimStageError
from gim_stagewise.memory.peak import PeakMeter
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.progress import Silent
from gim_stagewise.report.inspect import inspect_cache
from gim_stagewise.sources import Request
from gim_stagewise.stage.checkpoint import check_checkpoint, load_checkpoint
from gim_stagewise.verify import mend

LARGE = 2**36


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, new_tiny: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    Pipeline.from_file(new_tiny(folder), folder=folder / "out", device="cpu").run(until=1)
    return folder


@pytest.fixture
def cache(made: Path, tmp_path: Path) -> Path:
    shutil.copytree(made / "out" / "m1.zarr", tmp_path / "m1.zarr")
    return tmp_path / "m1.zarr"


def resealed(path: Path, change: Callable[[dict[str, Any]], object] = dict) -> None:
    """Make all hashes of a cache right again, after something in it was changed."""
    content = json.loads((path / "zarr.json").read_text())
    manifest = content["attributes"]["gim_stage"]
    manifest["files"] = {
        name: hashlib.sha256((path / name).read_bytes()).hexdigest()
        for name in manifest["files"]
        if (path / name).is_file()
    }
    change(manifest)
    manifest["checksum"] = json_checksum(manifest)
    (path / "zarr.json").write_text(json.dumps(content))


def with_checksum(frame: bytes) -> bytes:
    return frame + int(google_crc32c.value(frame)).to_bytes(4, "little")


def zstd_bomb(path: Path, name: str) -> None:
    """A file of 32 kB that would be a gigabyte."""
    (path / name / "c.0").write_bytes(with_checksum(numcodecs.Zstd(9).encode(bytes(2**30))))
    resealed(path)


def blosc_bomb(path: Path) -> None:
    frame = bytearray((path / "pooled" / "c.0.0.0.0.0").read_bytes()[:-4])
    struct.pack_into("<I", frame, 4, 2**31 - 17)
    (path / "pooled" / "c.0.0.0.0.0").write_bytes(with_checksum(bytes(frame)))


def many_strings(path: Path) -> None:
    """A list that says it has four billion entries."""
    content = struct.pack("<I", 2**32 - 1) + bytes(64)
    (path / "ids" / "c.0").write_bytes(with_checksum(numcodecs.Zstd(1).encode(content)))
    resealed(path)


def metadata(name: str, **changes: Any) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        file = path / name / "zarr.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        resealed(path)

    return change


def layout(**changes: Any) -> Callable[[Path], None]:
    return lambda path: resealed(path, lambda manifest: manifest["layout"].update(changes))


def file_outside(name: str) -> Callable[[Path], None]:
    return lambda path: resealed(path, lambda manifest: manifest["files"].update({name: "0" * 64}))


HOSTILE: dict[str, Callable[[Path], None]] = {
    "a frame that declares two gigabytes": blosc_bomb,
    "labels of a gigabyte": lambda path: zstd_bomb(path, "labels/class"),
    "splits of a gigabyte": lambda path: zstd_bomb(path, "splits"),
    "ids of a gigabyte": lambda path: zstd_bomb(path, "ids"),
    "four billion ids": many_strings,
    "splits in another codec": metadata(
        "splits", codecs=[{"name": "bytes"}, {"name": "numcodecs.bz2", "configuration": {}}]
    ),
    "activations in another codec": metadata(
        "activations", codecs=[{"name": "bytes"}, {"name": "numcodecs.lzma", "configuration": {}}]
    ),
    "labels of a large shape": metadata("labels/class", shape=[LARGE]),
    "activations of a large shape": metadata("activations", shape=[1, LARGE, 5, 5, 6, 4, 4]),
    "pooled in large chunks": metadata(
        "pooled",
        chunk_grid={"name": "regular", "configuration": {"chunk_shape": [1, LARGE, 5, 5, 6]}},
    ),
    "many samples": layout(samples=LARGE),
    "many samples in a chunk": layout(chunk=LARGE),
    "many of both": layout(samples=LARGE, chunk=LARGE),
    "large cells": layout(cell=[LARGE, 4, 4]),
    "a large grid": layout(grid=[LARGE, 5]),
    "a large embedding": layout(embedding=LARGE),
    "many views": layout(views=LARGE),
    "no samples": layout(samples=0),
    "samples that are no number": layout(samples="52"),
    "a codec that there is not": layout(codec="gzip"),
    "a type that there is not": layout(dtype="float64"),
    "a file above": file_outside("../../secret"),
    "a file elsewhere": file_outside("/etc/passwd"),
}


def look(path: str) -> None:
    """Use a cache in every way, for a process of its own; prints whether it was refused, and bytes.

    The bytes are the most memory that was taken at once.
    """
    refused = 0
    with PeakMeter(torch.device("cpu")) as meter:
        try:
            cache = Cache(Path(path))
            cache.labels("class"), cache.split("train"), cache.activations[0, :2]
            cache.read([Request(item_id) for item_id in cache.ids])
            cache.read_pooled(cache.ids)
        except CorruptCacheError:
            refused = 1
        with suppress(CorruptCacheError):
            find_damage(Path(path), Silent())
        inspect_cache(Path(path))
    print(refused, meter.peak)


@pytest.mark.parametrize("what", HOSTILE)
def test_what_a_cache_declares_is_refused_before_it_takes_memory(cache: Path, what: str) -> None:
    HOSTILE[what](cache)
    out, err = cache.parent / "out", cache.parent / "err"
    code = warm()("test_hostile:look", str(cache), stdout=out, stderr=err, kill_after=120)
    assert code == 0, err.read_text()
    refused, grown = map(int, out.read_text().split())
    assert refused == 1
    assert grown < 100_000_000


def test_nothing_is_imported_on_the_word_of_a_cache(made: Path, cache: Path) -> None:
    """A cache names the user's builders; only a pipeline file on the command line may import."""
    (cache.parent / "evil.py").write_text(
        f"from pathlib import Path\nPath({str(cache.parent / 'harm')!r}).touch()\n"
        "def build(in_channels): ...\n"
    )

    def change(manifest: dict[str, Any]) -> None:
        text = manifest["pipeline_text"]
        assert 'build = "residual"\noptions = { channels = 8, stride = 2 }' in text
        manifest["pipeline_text"] = text.replace(
            'build = "residual"\noptions = { channels = 8, stride = 2 }', 'build = "evil:build"'
        )

    resealed(cache, change)
    with pytest.raises(ConfigError, match="never imported on the word of a cache"):
        Pipeline.from_cache(cache, device="cpu").stage(2, cache).train()
    assert not (cache.parent / "harm").exists()
    assert "evil" not in sys.modules


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


def test_nothing_that_is_read_is_unpickled(made: Path, tmp_path: Path) -> None:
    harm = tmp_path / "harm"
    folder = tmp_path / "out"
    shutil.copytree(made / "out", folder)
    checkpoint = folder / "checkpoints" / "m1.pt"
    checkpoint.parent.mkdir(exist_ok=True)
    torch.save({"run": "x", "counters": Harm(harm)}, checkpoint)
    assert load_checkpoint(checkpoint, run="x") is None
    with pytest.raises(CorruptCacheError):
        check_checkpoint(checkpoint)
    (folder / "m1.safetensors").write_bytes(pickle.dumps(Harm(harm)))
    with pytest.raises(GimStageError):
        Pipeline.from_file(made / "tiny.toml", folder=folder, device="cpu").stage(1).load_weights()
    images = np.empty(2, dtype=object)
    images[:] = [Harm(harm), Harm(harm)]
    np.save(tmp_path / "train.npy", images, allow_pickle=True)
    for name in ("train_labels.npy", "test.npy", "test_labels.npy"):
        shutil.copyfile(made / name, tmp_path / name)
    file = tmp_path / "tiny.toml"
    file.write_text((made / "tiny.toml").read_text())
    edit(file, f'root = "{made}"', f'root = "{tmp_path}"')
    with pytest.raises(GimStageError, match=r"train\.npy"):
        _ = Pipeline.from_file(file, folder=tmp_path / "x", device="cpu").source
    assert not harm.exists()


def test_a_cache_of_somebody_else_is_only_read(cache: Path, tmp_path: Path) -> None:
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    opened = Cache(cache)
    opened.read([Request(opened.ids[0])])
    assert find_damage(cache, Silent()) == []
    after = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    assert after == before


def test_labels_that_were_put_there_later_are_not_read(cache: Path) -> None:
    shutil.copytree(cache / "labels" / "class", cache / "labels" / "aaa")
    assert Cache(cache).label_names == ("class",)


@pytest.mark.parametrize("link", [True, False])
def test_repair_stays_within_the_cache(made: Path, tmp_path: Path, link: bool) -> None:
    folder = tmp_path / "out"
    shutil.copytree(made / "out", folder)
    path = folder / "m1.zarr"
    victim = tmp_path / "victim" / "documents"
    victim.mkdir(parents=True)
    (victim / "thesis.txt").write_text("all of it")
    name = "activations"
    if link:
        (path / "extra").symlink_to(tmp_path / "victim")
        name = "extra/documents"
    resealed(path, lambda m: m["files"].update({name: hashlib.sha256(b"").hexdigest()}))
    before = {file: file.read_bytes() for file in tmp_path.rglob("c.*")}
    pipeline = Pipeline.from_file(made / "tiny.toml", folder=folder, device="cpu")
    with pytest.raises(CorruptCacheError):
        mend(pipeline, path, find_damage(path, Silent()))
    assert (victim / "thesis.txt").read_text() == "all of it"
    assert {file: file.read_bytes() for file in tmp_path.rglob("c.*")} == before


def test_a_folder_of_the_cache_that_is_a_link_is_not_followed(made: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(made / "out", folder)
    path = folder / "m1.zarr"
    (path / "pooled").rename(tmp_path / "elsewhere")
    (path / "pooled").symlink_to(tmp_path / "elsewhere")
    chunk = tmp_path / "elsewhere" / "c.0.1.0.0.0"
    chunk.write_bytes(b"torn")
    pipeline = Pipeline.from_file(made / "tiny.toml", folder=folder, device="cpu")
    with pytest.raises(CorruptCacheError, match="a link"):
        mend(pipeline, path, find_damage(path, Silent()))
    assert chunk.read_bytes() == b"torn"


@pytest.mark.parametrize("name", ["ids/c.0", "pooled/c.0.1.0.0.0", "activations/c.0.1.0.0.0.0.0"])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_what_is_no_file_is_damage(cache: Path, name: str, kind: str) -> None:
    (cache / name).unlink()
    os.mkfifo(cache / name) if kind == "pipe" else (cache / name).mkdir()
    damage = find_damage(cache, Silent())
    assert [one.file for one in damage] == [name]


def test_a_checkpoint_that_declares_more_than_it_holds_is_refused(tmp_path: Path) -> None:
    state = {"run": "x", "best": torch.zeros(1).expand(2**33)}
    torch.save({**state, "checksum": "0" * 64}, tmp_path / "m1.pt")
    assert (tmp_path / "m1.pt").stat().st_size < 10_000
    with pytest.raises(CorruptCacheError):
        check_checkpoint(tmp_path / "m1.pt")


@pytest.mark.parametrize("shape", [[1, 36], [3, 32], [3, 2**28], [2**28, 36]])
def test_checksums_of_another_shape_are_refused(cache: Path, shape: list[int]) -> None:
    place = cache / "checksums" / "pooled"
    content = json.loads((place / "zarr.json").read_text())
    content["shape"] = shape
    (place / "zarr.json").write_text(json.dumps(content))
    size = min(math.prod(shape), 2**20)
    (place / "c.0.0").write_bytes(with_checksum(numcodecs.Zstd(1).encode(bytes(size))))
    resealed(cache)
    opened = Cache(cache)
    with pytest.raises(CorruptCacheError, match="pooled"):
        opened.read_pooled(opened.ids)
