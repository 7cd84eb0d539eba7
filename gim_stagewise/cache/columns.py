"""The small arrays of a cache, of one chunk each: ids, splits, labels, checksums.

They are read without believing what they say about themselves, and so is array metadata. A cache
may come from anyone. What its metadata declares is compared with the manifest's layout before
Zarr opens an array, and what a compressed file declares with what it can hold before anything is
allocated for it.
"""

from __future__ import annotations

import json
import math
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import VLenUTF8, Zstd
from numpy.typing import NDArray
from zarr.codecs import Crc32cCodec, ZstdCodec

from gim_stagewise.cache.frames import CHECKSUM_BYTES, RESIDUE
from gim_stagewise.cache.layout import Block, StoredArray
from gim_stagewise.cache.manifest import Manifest
from gim_stagewise.cache.tiles import Layout
from gim_stagewise.sources import SPLITS, Labelled, label_values

# What decodes values; nothing that Zarr or its extensions know besides is ever called.
_CODECS = {"bytes", "vlen-utf8", "blosc", "zstd", "crc32c"}
_ZSTD_MAGIC = 0xFD2FB528
# No two ids are equal, so no file of them is compressed by more than this.
_MOST_COMPRESSED = 100
_SMALL = 1_000_000


def label_names(manifest: Manifest) -> tuple[str, ...]:
    """Names of the labels that a cache was sealed with, whatever lies there now."""
    files = (name.split("/") for name in manifest.files)
    return tuple(sorted({p[1] for p in files if len(p) == 3 and p[0] == "labels"}))


def read_label_values(path: Path, name: str) -> tuple[str, ...]:
    """What labels of that name mean, from 0 on; empty where the cache does not say.

    Raises
    ------
    ValueError
        If that cannot be read.
    """
    content = json.loads((path / "labels" / name / "zarr.json").read_text(encoding="utf-8"))
    values = content.get("attributes", {}).get("values", [])
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        raise ValueError("values of labels that are no texts")
    return tuple(values)


def metadata_problem(path: Path, manifest: Manifest) -> str:
    """What is wrong with the array metadata of a cache; empty if nothing is."""
    layout = manifest.layout
    each = (layout.samples,)
    columns = {"ids": "string", "splits": "uint8"}
    columns |= {f"labels/{name}": "int64" for name in label_names(manifest)}
    small = {name: StoredArray(each, each, dtype, ("sample",)) for name, dtype in columns.items()}
    for name, array in (layout.arrays | small).items():
        if problem := _array_problem(path / name, array):
            return f"{name} {problem}"
        if name in small and not (path / name / "c.0").is_file():
            return f"{name} has lost its values"
    return ""


def _array_problem(path: Path, array: StoredArray) -> str:
    try:
        content = json.loads((path / "zarr.json").read_text(encoding="utf-8"))
        found = {
            "shape": tuple(content["shape"]),
            "chunks": tuple(content["chunk_grid"]["configuration"]["chunk_shape"]),
            "values of type": content["data_type"],
        }
        codecs = [str(codec["name"]) for codec in content["codecs"]]
        kinds = content["zarr_format"], content["node_type"], content["chunk_grid"]["name"]
    except FileNotFoundError:
        return "has lost its metadata"
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"has metadata that cannot be read ({type(error).__name__}: {error})"
    if kinds != (3, "array", "regular"):
        return "is not a Zarr v3 array with a regular grid of chunks"
    expected = {"shape": array.shape, "chunks": array.chunks, "values of type": array.dtype}
    for what, value in expected.items():
        if found[what] != value:
            return f"has {what} {found[what]}, not {value}"
    if unknown := [name for name in codecs if name not in _CODECS]:
        return f"would be decoded by {unknown[0]!r}, which no cache uses"
    return ""


def write_samples(path: Path, source: Labelled) -> None:
    """Write ids, splits and labels into a group."""
    group = zarr.open_group(str(path), mode="r+")
    ids = list(source.ids)
    position = {item_id: index for index, item_id in enumerate(ids)}
    mask = np.zeros(len(ids), dtype=np.uint8)
    for bit, split in enumerate(SPLITS):
        mask[[position[item_id] for item_id in source.split(split)]] |= 1 << bit
    _put(group, "ids", np.array(ids, dtype=np.dtypes.StringDType()), ("sample",))
    _put(group, "splits", mask, ("sample",)).attrs.update(
        # Climate and forecast conventions, section 3.5: readers know how to spell these out.
        {
            "flag_masks": [1 << bit for bit in range(len(SPLITS))],
            "flag_meanings": " ".join(SPLITS),
        }
    )
    if source.label_names:
        labels = group.create_group("labels")
        for name in source.label_names:
            column = _put(labels, name, source.labels(name), ("sample",))
            if values := label_values(source, name):
                column.attrs["values"] = list(values)


def _put(group: zarr.Group, name: str, values: NDArray[Any], axes: tuple[str, ...]) -> Any:
    return group.create_array(
        name,
        data=values,
        chunks=values.shape,
        compressors=[ZstdCodec(), Crc32cCodec()],
        dimension_names=axes,
        chunk_key_encoding={"name": "default", "separator": "."},
        config={"write_empty_chunks": True},
    )


def write_checksums(
    path: Path, cache: Path, layout: Layout, blocks: Sequence[Block], digests: list[dict[str, str]]
) -> None:
    """Write the blocks' hashes, and the checksums that their files end in, into a group.

    A row is the SHA-256 of a block's files, one after the other, then the CRC-32C of each of them
    (little-endian). The short one is compared whenever a chunk is read: a file that is whole, but
    of another block or cache, is not believed.
    """
    group = zarr.open_group(str(path), mode="r+").create_group("checksums")
    for kind in layout.kinds:
        rows = []
        for block, sha256 in zip(blocks, digests, strict=True):
            sums = [_last_bytes(cache / file) for file in layout.parts(block)[kind].files]
            rows.append(bytes.fromhex(sha256[kind]) + b"".join(sums))
        values = np.frombuffer(b"".join(rows), np.uint8).reshape(len(rows), -1)
        _put(group, kind, values, ("block", "byte"))


def _last_bytes(file: Path) -> bytes:
    with file.open("rb") as opened:
        opened.seek(-CHECKSUM_BYTES, os.SEEK_END)
        return opened.read()


def read_checksums(path: Path, kind: str) -> tuple[NDArray[np.uint8], NDArray[np.uint32]]:
    """What `write_checksums` wrote: SHA-256 [block, byte], and CRC-32C [block, file].

    Raises
    ------
    FileNotFoundError, ValueError
        As of `read_numbers`, and if its shape is none that they can have.
    """
    place = path / "checksums" / kind
    try:
        shape = tuple(json.loads((place / "zarr.json").read_text(encoding="utf-8"))["shape"])
    except (KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"has metadata that cannot be read ({error!r})") from None
    known = len(shape) == 2 and all(type(length) is int and length > 0 for length in shape)
    if not known or shape[1] < 36 or shape[1] % 4:
        raise ValueError(f"has shape {shape}")
    # Only rows of equal blocks compress at all.
    if math.prod(shape) > _MOST_COMPRESSED * (place / "c.0.0").stat().st_size + _SMALL:
        raise ValueError(f"declares shape {shape}, more than it can hold")
    rows = read_numbers(place, shape, "uint8")
    return rows[:, :32], np.ascontiguousarray(rows[:, 32:]).view("<u4")


def read_numbers(path: Path, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """Numbers of an array with one chunk.

    Raises
    ------
    FileNotFoundError
        If the chunk is not there.
    ValueError
        If it is damaged, or holds anything else.
    """
    expected = math.prod(shape) * np.dtype(dtype).itemsize
    content = _decoded(path / ".".join(["c", *["0"] * len(shape)]), expected)
    if len(content) != expected:
        raise ValueError(f"holds {len(content)} bytes, not {expected}")
    return np.frombuffer(content, dtype).reshape(shape)


def read_strings(path: Path, count: int) -> list[str]:
    """Strings of an array with one chunk; errors as of `read_numbers`."""
    file = path / "c.0"
    size = file.stat().st_size if file.is_file() else 0
    content = _decoded(file, _MOST_COMPRESSED * size + _SMALL)
    if len(content) < 4 + 4 * count or struct.unpack_from("<I", content)[0] != count:
        raise ValueError(f"does not hold {count} strings")
    strings: list[str] = VLenUTF8().decode(content).tolist()
    return strings


def _decoded(file: Path, most: int) -> bytes:
    if not file.is_file():
        raise FileNotFoundError(file)
    if file.stat().st_size > most + _SMALL:
        raise ValueError(f"has {file.stat().st_size} bytes, more than it can take")
    content = file.read_bytes()
    if google_crc32c.value(content) != RESIDUE:
        raise ValueError("has a checksum that does not match")
    frame = content[:-CHECKSUM_BYTES]
    size = _declared_size(frame)
    if size > most:
        raise ValueError(f"declares {size} bytes, more than it can hold")
    try:
        decoded = Zstd().decode(frame)
    except RuntimeError as error:
        raise ValueError(f"cannot be decompressed ({error})") from None
    return bytes(decoded)


def _declared_size(frame: bytes) -> int:
    """Bytes that a Zstandard frame says it holds (RFC 8878, section 3.1.1.1)."""
    if len(frame) < 5 or int.from_bytes(frame[:4], "little") != _ZSTD_MAGIC:
        raise ValueError("is not compressed with Zstandard")
    descriptor = frame[4]
    single = descriptor >> 5 & 1
    start = 5 + (1 - single) + (0, 1, 2, 4)[descriptor & 3]
    width = (single, 2, 4, 8)[descriptor >> 6]
    if not width:
        raise ValueError("does not say how much it holds")
    return int.from_bytes(frame[start : start + width], "little") + 256 * (width == 2)
