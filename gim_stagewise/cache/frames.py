"""Chunk files of a cache, decoded without detours.

A chunk file is what Zarr's codecs make of a chunk: little-endian values in C order, compressed with
Blosc unless the codec is "none", and a CRC-32C of all that at the end. Zarr reads the same files;
reading them here spares a copy and most of the time per chunk, and decodes nothing that is not what
the layout says: the checksum comes first, then the frame's own header is compared with it.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numcodecs import blosc
from numpy.typing import NDArray

_CHECKSUM_BYTES = 4
# The CRC-32C of anything that is followed by its own CRC-32C.
_RESIDUE = 0x48674BC7
# Two versions, flags, type size; bytes of values, of a Blosc block, and of the whole frame.
_BLOSC_HEADER = struct.Struct("<BBBBIII")


class FrameError(ValueError):
    """A chunk file is not what was written."""


def read_frame(file: Path, out: NDArray[Any], *, compressed: bool) -> None:
    """Read and decode a chunk file.

    Parameters
    ----------
    file : Path
    out : array
        Where values go; C-contiguous, of a whole chunk's shape and type.
    compressed : bool
        Whether values went through Blosc.

    Raises
    ------
    FileNotFoundError
        If there is none.
    FrameError
        If its checksum does not match, or it does not hold a chunk of that size.
    """
    content = file.read_bytes()
    if len(content) < _CHECKSUM_BYTES or google_crc32c.value(content) != _RESIDUE:
        raise FrameError("has a checksum that does not match")
    frame = memoryview(content)[:-_CHECKSUM_BYTES]
    if not compressed:
        if len(frame) != out.nbytes:
            raise FrameError(f"has {len(frame)} bytes of values, not {out.nbytes}")
        out.reshape(-1).view(np.uint8)[:] = np.frombuffer(frame, np.uint8)
        return
    if len(frame) < _BLOSC_HEADER.size:
        raise FrameError("is too short to be a Blosc frame")
    *_, size, _, packed = _BLOSC_HEADER.unpack_from(frame)
    if size != out.nbytes or packed != len(frame):
        raise FrameError(f"declares {size} bytes in {packed}, not {out.nbytes} in {len(frame)}")
    blosc.decompress(frame, out)
