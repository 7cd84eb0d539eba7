"""How much memory and disk may be used."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass

import torch

from gim_stagewise.memory.limits import available_host_bytes
from gim_stagewise.memory.peak import resident_bytes

# Buffers from this size on go back to the system as soon as they are free, in lean mode.
_LEAN_BUFFER_BYTES = 1_000_000
_M_MMAP_THRESHOLD = -3


@dataclass(frozen=True)
class Budget:
    """Bytes that a stage may use; None where nothing was said.

    Parameters
    ----------
    device : int or None
        Of the device; by default what a GPU has free.
    host : int or None
        Of this machine, the process itself included; by default what is free, within the
        container's limit. On a CPU the device's memory counts here as well.
    disk : int or None
        Of all caches of a run; no limit by default.
    """

    device: int | None = None
    host: int | None = None
    disk: int | None = None

    @property
    def lean(self) -> bool:
        """Whether memory was said to be scarce, so that the CPU's allocator keeps nothing back."""
        return self.device is not None or self.host is not None

    def device_bytes(self, device: torch.device) -> int | None:
        if self.device is None and device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            return int(free) + torch.cuda.memory_reserved(device)
        return self.device

    def host_bytes(self) -> int:
        return available_host_bytes() + resident_bytes() if self.host is None else self.host


def use_lean_allocator() -> None:
    """Make the C library return large buffers to the system as soon as they are free.

    By default glibc keeps freed buffers of up to 32 MB, for speed; with tensors of that size coming
    and going, a process then holds about twice what is in use (benchmarks/memory.py). For good in
    this process; results do not change.
    """
    if sys.platform.startswith("linux"):
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_THRESHOLD, _LEAN_BUFFER_BYTES)
