"""How much memory there is."""

from __future__ import annotations

from gim_stagewise.memory.limits import available_host_bytes

__all__ = ["available_host_bytes"]
