"""The empty arrays of a new cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import zarr

from gim_stagewise.cache.codecs import zarr_codecs
from gim_stagewise.cache.precision import PLAIN, Precision
from gim_stagewise.cache.tiles import Layout


def create_arrays(path: Path, layout: Layout, precision: Precision) -> None:
    """Create the group at ``path`` with the empty arrays that blocks are written to."""
    group = zarr.open_group(str(path), mode="w-", zarr_format=3)
    for name, stored in layout.arrays.items():
        kind = name.partition("/")[0]
        own = precision if kind == "activations" else PLAIN
        array = group.create_array(
            name,
            shape=stored.shape,
            chunks=stored.chunks,
            dtype=stored.dtype,
            compressors=zarr_codecs(layout.codec, np.dtype(stored.dtype).itemsize),
            dimension_names=stored.axes,
            fill_value=_nothing(own.name),
            # All chunk files of an array in one folder: one folder to flush after a rename.
            chunk_key_encoding={"name": "default", "separator": "."},
            # All-zero chunks are data too: a chunk file that is absent is a chunk that is lost.
            config={"write_empty_chunks": True},
        )
        if kind == "activations":
            array.attrs.update(precision.as_json())


def _nothing(precision: str) -> float | int:
    """What a chunk that is not stored (yet) reads as: NaN, which nobody takes for activations."""
    return {"uint8": 0, "bfloat16": 0x7FC0, "float8_e4m3": 0x7F}.get(precision, float("nan"))
