"""What the C library keeps of freed memory.

By default glibc keeps freed buffers of up to 32 MB, for speed; with tensors of that size coming and
going, a process then holds about twice what is in use. A lean process hands the largest back at
once and the rest now and then. benchmarks/memory.py has what either costs. Results do not change.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# Handed back as soon as they are free. With 1 MB a step spends as much time on fresh pages as on
# its work (page by page, the system fills them with zeros).
_LEAN_BUFFER_BYTES = 4_000_000
_M_MMAP_THRESHOLD = -3

_lean = False


def use_lean_allocator() -> None:
    """Make this process hold little more than is in use, for good."""
    global _lean
    _lean = True
    if mallopt := _c_function("mallopt"):
        mallopt(_M_MMAP_THRESHOLD, _LEAN_BUFFER_BYTES)


def release_freed() -> None:
    """Hand freed memory back to the system, in a lean process; between pieces of work."""
    if _lean:
        trim_heap()


def trim_heap() -> None:
    """Hand freed memory back to the system, where the C library can."""
    if trim := _c_function("malloc_trim"):
        trim(0)


def _c_function(name: str) -> Any:
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None
