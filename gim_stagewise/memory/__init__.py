"""Memory: what there is, what may be used, what something will take, and what it took."""

from __future__ import annotations

from gim_stagewise.memory.allocator import release_freed, trim_heap, use_allocator
from gim_stagewise.memory.budget import Budget
from gim_stagewise.memory.count import StorageCounter, make_fake
from gim_stagewise.memory.limits import available_host_bytes
from gim_stagewise.memory.peak import PeakMeter, resident_bytes, warm_up

__all__ = [
    "Budget",
    "PeakMeter",
    "StorageCounter",
    "available_host_bytes",
    "make_fake",
    "release_freed",
    "resident_bytes",
    "trim_heap",
    "use_allocator",
    "warm_up",
]
