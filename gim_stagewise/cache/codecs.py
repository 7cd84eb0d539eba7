"""Compression of chunks: which codecs there are, and what carries them out."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import numcodecs
import numpy as np
import zarr
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

# Level of each Blosc compressor; benchmarks/results/precision.md has the alternatives.
_LEVELS: dict[str, int] = {"lz4": 5, "zstd": 1}
CODECS = (*_LEVELS, "none")
# Blosc takes no more at a time.
MOST_CHUNK_BYTES = 2**31 - 1 - 16


def zarr_codecs(codec: str, itemsize: int) -> list[Any]:
    """Zarr's codecs for values of so many bytes each; ``codec`` is "lz4", "zstd" or "none"."""
    if codec == "none":
        return [Crc32cCodec()]
    name: Any = codec
    shuffle: Any = "shuffle" if itemsize > 1 else "noshuffle"
    compress = BloscCodec(cname=name, clevel=_LEVELS[codec], shuffle=shuffle, typesize=itemsize)
    # The checksum comes last, over the compressed bytes: verified before anything is decoded.
    return [compress, Crc32cCodec()]


def encoded_bytes(values: NDArray[Any], codec: str) -> int:
    """Bytes of values once they are compressed."""
    if codec == "none":
        return values.nbytes
    shuffle = blosc.SHUFFLE if values.itemsize > 1 else blosc.NOSHUFFLE
    contiguous = np.ascontiguousarray(values)
    return len(blosc.compress(contiguous, codec.encode(), _LEVELS[codec], shuffle))


# Zarr's settings are those of the process: two threads that set and reset them at once would
# leave the setting of one behind.
_opening = threading.Lock()


def _has_zarrs() -> bool:
    return find_spec("zarrs") is not None


@contextmanager
def codec_pipeline() -> Iterator[None]:
    """Open arrays with the ``zarrs`` codec pipeline, in Rust, where it is installed.

    It writes the same bytes. It writes them in place, so that a process that is killed can leave
    half a chunk: arrays are only ever written in the staging area.
    """
    if not _has_zarrs():
        yield
        return
    with _opening, zarr.config.set({"codec_pipeline.path": "zarrs.ZarrsCodecPipeline"}):
        yield


def codec_implementation(codec: str) -> str:
    """What encodes, and in which version; part of a cache's numerics."""
    parts = [codec, f"zarr {zarr.__version__}", f"numcodecs {numcodecs.__version__}"]
    if _has_zarrs():
        parts.append(f"zarrs {version('zarrs')}")
    return ", ".join(parts)
