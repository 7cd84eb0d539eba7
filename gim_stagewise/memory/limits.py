"""The memory that this process may use: what the machine has free, or less in a container."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil


@dataclass(frozen=True)
class _Version:
    """Where one version of the kernel's control groups keeps what of a group's memory."""

    folder: str
    limit: str
    used: str
    reclaimable: str


_VERSIONS = {
    "": _Version(".", "memory.max", "memory.current", "inactive_file"),
    "memory": _Version(
        "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
    ),
}


def available_host_bytes(
    cgroup: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> int:
    """Bytes of host memory that can still be taken.

    Parameters
    ----------
    cgroup : Path
        Where the kernel shows control groups.
    membership : Path
        Where it says in which of them this process is.

    Returns
    -------
    int
        The machine's available memory, or what is left below the limit of this process's control
        group, or of one above it, if that is less. Page cache that the kernel would give up first
        counts as free.
    """
    available = int(psutil.virtual_memory().available)
    for version, folder in _groups(cgroup, membership):
        try:
            limit = int((folder / version.limit).read_text())
            used = int((folder / version.used).read_text())
        except (OSError, ValueError):  # no such group, or its limit is the word "max"
            continue
        used -= _reclaimable(folder / "memory.stat", version.reclaimable)
        available = min(available, max(0, limit - used))
    return available


def _groups(cgroup: Path, membership: Path) -> Iterator[tuple[_Version, Path]]:
    """Folders of the groups this process is in, and of those above them."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        lines = []
    own = {"": "", "memory": ""}
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        for name in controllers.split(","):
            if name in own:
                own[name] = path.strip("/")
    for name, version in _VERSIONS.items():
        folder = cgroup / version.folder
        yield version, folder
        # Within a container the path may be the host's, and not be there.
        for part in filter(None, own[name].split("/")):
            folder = folder / part
            yield version, folder


def _reclaimable(statistics: Path, name: str) -> int:
    try:
        lines = statistics.read_text().splitlines()
    except OSError:
        return 0
    found = (int(line.split()[1]) for line in lines if line.split()[:1] == [name])
    return next(found, 0)
