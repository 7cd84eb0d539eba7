"""Compression of chunks: which codecs there are, and what they make of values."""

from __future__ import annotations

from typing import Any

import numcodecs
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray
from zarr.codecs import BloscCodec, Crc32cCodec

# Level of each Blosc compressor; benchmarks/results/precision.md has the alternatives.
_LEVELS: dict[str, int] = {"lz4": 5, "zstd": 1}
CODECS = (*_LEVELS, "none")
# Several threads of Blosc put blocks in the order in which they are done: other bytes in each run.
blosc.use_threads = False
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


def encode(values: NDArray[Any], codec: str) -> bytes:
    """Bytes of values in C order, little-endian, once they are compressed."""
    values = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    if codec == "none":
        return values.tobytes()
    shuffle = blosc.SHUFFLE if values.itemsize > 1 else blosc.NOSHUFFLE
    compressed: bytes = blosc.compress(values, codec.encode(), _LEVELS[codec], shuffle)
    return compressed


def codec_implementation(codec: str) -> str:
    """What encodes, and in which version; part of a cache's numerics."""
    return f"{codec}, numcodecs {numcodecs.__version__}"
