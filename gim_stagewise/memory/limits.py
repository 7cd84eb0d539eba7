"""The memory that this process may use: what the machine has free, or less in a container."""

from __future__ import annotations

from pathlib import Path

import psutil

# (limit, use) of the memory control group, version 2 and version 1.
_CGROUP_FILES = (
    ("memory.max", "memory.current"),
    ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
)


def available_host_bytes(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Bytes of host memory that can still be taken.

    Parameters
    ----------
    cgroup : Path
        Where the kernel shows the control group of this container.

    Returns
    -------
    int
        The machine's available memory, or what is left below the container's limit if that is
        less. Page cache counts as used there, so this errs on the low side.
    """
    available = int(psutil.virtual_memory().available)
    for limit_file, use_file in _CGROUP_FILES:
        try:
            limit = int((cgroup / limit_file).read_text())
            used = int((cgroup / use_file).read_text())
        except (OSError, ValueError):  # no such group, or its limit is the word "max"
            continue
        available = min(available, max(0, limit - used))
    return available
