"""The empty arrays of a new cache."""

from __future__ import annotations

from collections import deque
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from zarr.storage import LocalStore, MemoryStore

from gim_stagewise.cache.codecs import zarr_codecs
from gim_stagewise.cache.layout import StoredArray
from gim_stagewise.cache.precision import Precision
from gim_stagewise.cache.tiles import Layout


def create_arrays(path: Path, layout: Layout, precision: Precision) -> None:
    """Create the group at ``path`` with the empty arrays that blocks are written to.

    All in one go: a cache of recordings has thousands of arrays, which differ in shape alone.
    """
    kinds: dict[str, Any] = {}
    nodes: dict[str, Any] = {"": zarr.create_group(MemoryStore(), zarr_format=3).metadata}
    for name, stored in layout.arrays.items():
        kind = name.partition("/")[0]
        if kind not in kinds:
            kinds[kind] = _metadata(kind, stored, layout.codec, precision)
        nodes[name] = replace(
            kinds[kind],
            shape=stored.shape,
            chunk_grid={"name": "regular", "configuration": {"chunk_shape": stored.chunks}},
        )
    # It goes only as far as it is asked to.
    deque(zarr.create_hierarchy(store=LocalStore(path), nodes=nodes), maxlen=0)


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


def padding(array: str, precision: Precision) -> float | int:
    """What an array has where there are no values.

    Of a chunk that is not stored (yet) that is read: NaN, which nobody takes for activations.
    """
    if array.partition("/")[0] != "activations":
        return float("nan")
    return {"uint8": 0, "bfloat16": 0x7FC0, "float8_e4m3": 0x7F}.get(precision.name, float("nan"))
