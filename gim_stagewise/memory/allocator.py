"""What the C library keeps of freed memory.

Large tensors come and go. What glibc hands back to the system comes back as fresh pages, which the
system fills with zeros one by one: that can take as long as the work itself. A fast process keeps
freed buffers of up to 32 MB and shares them between its threads; it holds about twice what is in
use. A lean process hands the largest back at once and the rest now and then. benchmarks/memory.py
has what either costs. Results do not change.
"""

from __future__ import annotations

import ctypes
import sys
from typing import Any

# Handed back as soon as they are free. With 1 MB a step spends as much time on fresh pages as on
# its work (page by page, the system fills them with zeros).
_LEAN_BUFFER_BYTES = 4_000_000
_LEAN_HEAP_BYTES = 128 * 2**10  # as by default
# The most that glibc lets be kept, and more than it ever sees free at the end of its heap.
_FAST_BUFFER_BYTES = 32 * 2**20
_FAST_HEAP_BYTES = 2**31 - 1
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_M_ARENA_MAX = -8

_lean = False


def use_allocator(*, lean: bool) -> None:
    """Make this process hold little more than is in use, or keep freed memory to use it again."""
    global _lean
    if lean and not _lean:
        trim_heap()  # what was kept until now
    _lean = lean
    if not (mallopt := _c_function("mallopt")):
        return
    if _lean:
        mallopt(_M_MMAP_THRESHOLD, _LEAN_BUFFER_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _LEAN_HEAP_BYTES)
    else:
        mallopt(_M_MMAP_THRESHOLD, _FAST_BUFFER_BYTES)
        mallopt(_M_TRIM_THRESHOLD, _FAST_HEAP_BYTES)
        # One heap for all threads: those of its own that a thread gets hold 64 MB at most.
        mallopt(_M_ARENA_MAX, 1)


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
