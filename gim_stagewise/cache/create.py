"""The empty arrays of a new cache."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.core.buffer import default_buffer_prototype
from zarr.storage import MemoryStore

from gim_stagewise.cache.codecs import zarr_codecs
from gim_stagewise.cache.layout import StoredArray
from gim_stagewise.cache.precision import Precision
from gim_stagewise.cache.tiles import Layout


def create_arrays(path: Path, layout: Layout, precision: Precision) -> None:
    """Create the group at ``path`` with the empty arrays that blocks are written to.

    A cache of recordings has thousands of arrays, which differ in shape alone: Zarr makes the first
    of each kind, in memory.
    """
    kinds: dict[str, Any] = {}
    for name, stored in layout.arrays.items():
        kind = name.partition("/")[0]
        if kind not in kinds:
            kinds[kind] = _metadata(kind, stored, layout.codec, precision)
        grid = {"name": "regular", "configuration": {"chunk_shape": stored.chunks}}
        _write(path / name, replace(kinds[kind], shape=stored.shape, chunk_grid=grid))
    group = zarr.create_group(MemoryStore(), zarr_format=3).metadata
    for name in {"", *(name.rpartition("/")[0] for name in layout.arrays)}:
        _write(path / name, group)


def _write(folder: Path, metadata: Any) -> None:
    """Make a folder an array or a group."""
    folder.mkdir(parents=True, exist_ok=True)
    content = metadata.to_buffer_dict(default_buffer_prototype())["zarr.json"]
    (folder / "zarr.json").write_bytes(content.to_bytes())


def _metadata(kind: str, stored: StoredArray, codec: str, precision: Precision) -> Any:
    """Zarr's metadata of an array."""
    return zarr.create_array(
        MemoryStore(),
        shape=stored.shape,
        chunks=stored.chunks,
        dtype=stored.dtype,
        compressors=zarr_codecs(codec, np.dtype(stored.dtype).itemsize),
        dimension_names=stored.axes,
        fill_value=padding(kind, precision),
        # All chunk files of an array in one folder: one folder to flush after a rename.
        chunk_key_encoding={"name": "default", "separator": "."},
        attributes=precision.as_json() if kind == "activations" else {},
    ).metadata


def padding(kind: str, precision: Precision) -> float | int:
    """What arrays have where there are no values, or no chunk (yet).

    NaN, which nobody takes for activations; 0 where the precision has none.
    """
    if kind != "activations":
        return float("nan")
    return {"uint8": 0, "bfloat16": 0x7FC0, "float8_e4m3": 0x7F}.get(precision.name, float("nan"))
