"""Items that turned out to be unusable while they were read, for the runs after that.

With ``source.digest = "sampled"`` nobody looks at all values before a run. What is made without an
item has the digest of a dataset without it, so every later run has to leave it out as well: until
its file changes, module 1 is made again with ``--from``, or ``left_out.json`` is removed.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from gim_stagewise.durable import json_checksum, read_checked_json, remove, write_json
from gim_stagewise.errors import CorruptCacheError
from gim_stagewise.sources import Source, stamp

_NAME = "left_out.json"


def left_out(folder: Path, source: Source) -> dict[str, str]:
    """Why items of a source were left out by runs in a folder, by id."""
    ids = set(source.ids)
    return {
        item_id: entry["why"]
        for item_id, entry in _read(folder).items()
        if item_id in ids and entry["stamp"] == stamp(source, item_id)
    }


def noted(folder: Path) -> set[str]:
    """Ids of items that runs in a folder left out, whether or not their files changed."""
    return set(_read(folder))


def leave_out(folder: Path, source: Source, item_id: str, why: str) -> None:
    """Note that an item of a source cannot be used, and why."""
    _write(folder, _read(folder) | {item_id: {"why": why, "stamp": stamp(source, item_id)}})


def take_back(folder: Path, ids: Collection[str]) -> None:
    """Forget that these items were left out."""
    items = _read(folder)
    _write(folder, {item_id: own for item_id, own in items.items() if item_id not in ids})


def _write(folder: Path, items: dict[str, dict[str, Any]]) -> None:
    if not items:
        remove(folder / _NAME)
        return
    content = {"items": items}
    write_json(folder / _NAME, content | {"checksum": json_checksum(content)})


def _read(folder: Path) -> dict[str, dict[str, Any]]:
    try:
        found: dict[str, dict[str, Any]] = read_checked_json(folder / _NAME)["items"]
    except (FileNotFoundError, NotADirectoryError, CorruptCacheError):
        return {}  # they are met again
    return found
