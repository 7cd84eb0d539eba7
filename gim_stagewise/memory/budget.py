"""How much memory and disk may be used."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from gim_stagewise.memory.limits import available_host_bytes
from gim_stagewise.memory.peak import resident_bytes


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
