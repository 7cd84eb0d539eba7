"""Sizes in bytes, read and written."""

from __future__ import annotations

import re

_UNITS = {"": 1, "b": 1}
for _power, _letter in enumerate("kmgt", start=1):
    _UNITS |= {f"{_letter}b": 1000**_power, f"{_letter}ib": 1024**_power}


def parse_bytes(value: object) -> int:
    """A number of bytes from ``2_000_000``, ``"2.5GB"`` (10^9) or ``"2GiB"`` (2^30).

    Raises
    ------
    ValueError
        If it is not a positive size.
    """
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return value
    if isinstance(value, str):
        found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([A-Za-z]*)\s*", value)
        if found and found[2].lower() in _UNITS:
            size = float(found[1]) * _UNITS[found[2].lower()]
            if 1 <= size < 2**63:
                return int(size)
    raise ValueError('expected a size above 0, such as 500_000_000, "2.5GB" or "2GiB"')


def format_bytes(count: float) -> str:
    """A size in decimal units, as disks are sold: "1.3 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
