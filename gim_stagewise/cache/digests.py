"""The two identities of a stage, as flat, comparable parts.

- **Recipe**: what in the pipeline file decides the weights. It answers: does this stage still
  match the file?
- **Content**: what decides the stored bytes. It answers: do these bytes belong to these weights
  and this data?

Where a folder lies, how many workers ran, or what was logged is in neither.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Bytes of a file that are hashed at once.
_PIECE = 1 << 20


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested tables as one level with dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@dataclass(frozen=True)
class Digest:
    """A hash with the parts that it was made of, so that a difference can be named."""

    parts: Mapping[str, Any]

    @property
    def value(self) -> str:
        """SHA-256 over the parts, as hexadecimal text."""
        text = json.dumps(dict(self.parts), sort_keys=True, ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()

    def as_json(self) -> dict[str, Any]:
        return {"digest": self.value, "parts": dict(self.parts)}

    @classmethod
    def of(cls, table: Mapping[str, Any]) -> Digest:
        """The digest of nested tables; values go through JSON, as those read back did."""
        parts: dict[str, Any] = json.loads(json.dumps(flatten(table)))
        return cls(parts)

    def differences(self, other: Digest, *, ignore: Iterable[str] = ()) -> list[str]:
        """What changes on the way from this digest to ``other``, a line per part."""
        skipped = set(ignore)
        lines = []
        for key in sorted({*self.parts, *other.parts} - skipped):
            old, new = self.parts.get(key), other.parts.get(key)
            # As text: 1, 1.0 and true are equal, and yet other options to those who build.
            if json.dumps(old, sort_keys=True) != json.dumps(new, sort_keys=True):
                lines.append(f"{key} {_short(old)} → {_short(new)}")
        return lines


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    is_hash = isinstance(value, str) and len(value) == 64
    return value[:8] + "…" if is_hash else text


def files_digest(folder: Path, files: Iterable[str]) -> str:
    """SHA-256 of files, one after the other.

    Raises
    ------
    FileNotFoundError
        If one is missing, or is no file (a folder, a pipe).
    """
    digest = hashlib.sha256()
    for name in files:
        file = folder / name
        if not file.is_file():
            raise FileNotFoundError(file)
        with file.open("rb") as opened:
            while piece := opened.read(_PIECE):
                digest.update(piece)
    return digest.hexdigest()
