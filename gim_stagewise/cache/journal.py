"""The journal of a build: which blocks of a cache are done, and where others are staged.

While a cache is being built, a hidden folder beside it holds the journal and the staging area; both
are gone when it is sealed.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gim_stagewise.cache.digests import Digest
from gim_stagewise.cache.layout import Block
from gim_stagewise.durable import (
    append_line,
    discard,
    fsync_directory,
    storage_errors,
    write_atomic,
)


class BuildFolder:
    """The hidden folder beside an unsealed cache: journal and staging area.

    Staging lies under a token drawn by each run. Only the coordinator moves files out of its
    own token's folder, so a worker left over from a killed run can write nothing into a cache.
    """

    def __init__(self, cache: Path) -> None:
        self.path = cache.with_name(f".{cache.name}.build")
        self._journal = self.path / "journal.jsonl"
        self._errors = self.path / "errors"

    def start(self, content: Digest, blocks: int) -> Path:
        """Begin an empty journal for a cache of ``blocks``; returns this run's staging folder."""
        self.remove()
        self._errors.mkdir(parents=True)
        self._append({"content": content.value, "blocks": blocks})
        fsync_directory(self.path)
        fsync_directory(self.path.parent)
        return self._new_staging()

    def resume(self, content: Digest) -> tuple[Path, dict[int, dict[str, str]]] | None:
        """Go on with an earlier build of the same content.

        Returns
        -------
        (Path, dict) or None
            This run's staging folder, and the checksums of the blocks that are done; None if
            there is no journal of this content.
        """
        records = self._records()
        if not records or records[0]["content"] != content.value:
            return None
        for leftover in self.path.glob("staging-*"):
            discard(leftover)
        done = {record["block"]: record["sha256"] for record in records[1:]}
        # Rewritten whole, so that a line torn by a kill is not appended to.
        text = "".join(json.dumps(record) + "\n" for record in records)
        write_atomic(self._journal, lambda path: path.write_text(text, encoding="utf-8"))
        return self._new_staging(), done

    def error_path(self, block: Block) -> Path:
        """Where it is kept what storing did to a block's values, until the cache is sealed."""
        return self._errors / f"{block.index}.npy"

    def record(self, block: Block, sha256: Mapping[str, str]) -> None:
        """Note durably that a block's files are in place."""
        self._append({"block": block.index, "sha256": dict(sha256)})

    def done_blocks(self, content: Digest) -> tuple[int, int]:
        """How many blocks an unfinished build of this content has, and how many it needs."""
        records = self._records()
        if not records or records[0]["content"] != content.value:
            return 0, 0
        # One that was found damaged later was recorded once more.
        return len({record["block"] for record in records[1:]}), records[0]["blocks"]

    def remove(self) -> None:
        if self.path.exists():
            with storage_errors(f"removing {self.path}"):
                discard(self.path)

    def _new_staging(self) -> Path:
        staging = self.path / f"staging-{uuid.uuid4().hex[:12]}"
        staging.mkdir()
        return staging

    def _append(self, record: dict[str, Any]) -> None:
        with storage_errors(str(self._journal)):
            append_line(self._journal, json.dumps(record))

    def _records(self) -> list[dict[str, Any]]:
        """The journal's whole lines; what follows a torn one is not believed."""
        try:
            text = self._journal.read_text(encoding="utf-8", errors="replace")
        except (FileNotFoundError, NotADirectoryError):
            return []
        records: list[dict[str, Any]] = []
        for line in text.split("\n")[:-1]:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                break
            if not _is_entry(record, first=not records):
                break
            records.append(record)
        return records


def _is_entry(record: Any, *, first: bool) -> bool:
    """Whether a line of a journal is one that could have been written."""
    if not isinstance(record, dict):
        return False
    if first:
        return isinstance(record.get("content"), str) and type(record.get("blocks")) is int
    return type(record.get("block")) is int and isinstance(record.get("sha256"), dict)
