"""The recorded facts of a cache: attributes of its group, and the journal of a build.

The manifest lies under the key ``gim_stage`` in the group's attributes. While a cache is being
built, a hidden folder beside it holds the journal (which blocks are done) and the staging area;
both are gone when it is sealed, and the sealed group describes itself wherever it is moved.
"""

from __future__ import annotations

import hashlib
import json
import math
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from gim_stagewise.cache.codecs import CODECS, MOST_CHUNK_BYTES
from gim_stagewise.cache.digests import Digest
from gim_stagewise.cache.layout import FORMAT_VERSION, Block, CacheLayout
from gim_stagewise.cache.precision import Precision
from gim_stagewise.durable import (
    append_line,
    fsync_directory,
    json_checksum,
    remove,
    storage_errors,
    write_atomic,
    write_json,
)
from gim_stagewise.errors import CacheNotFoundError, CorruptCacheError

T = TypeVar("T")
KEY = "gim_stage"
MOST_VIEWS = 10_000


@dataclass(frozen=True)
class Manifest:
    """What a cache says about itself.

    Parameters
    ----------
    pipeline, module
        Name of the pipeline, and the module whose outputs are stored.
    pipeline_text : str
        The whole pipeline file, so that the next stage can be trained from the cache alone.
    recipe, content : Digest
        See `gim_stagewise.cache.digests`.
    numerics : dict
        What float results depend on; part of ``content``, repeated for readers.
    precision : Precision
        The form of stored activations, with its scales where it has any (from the first block on).
    calibration : str or None
        On what those scales were calibrated, for people.
    error : dict or None
        What storing in that form did to the values (see `PrecisionError.as_json`); known once all
        blocks are there.
    choice : dict or None
        What was measured to choose between storing and computing again, where that was asked for.
    stored_operation : str or None
        An operation of the next module that was applied before storing.
    encoding : str
        "patch": each patch was encoded on its own.
    layout : CacheLayout
    sealed : bool
        Whether all blocks are there.
    files : dict
        SHA-256 of every file but chunks, by its path in the group; known when it is sealed. Chunks
        have theirs in the arrays ``checksums/activations`` and ``checksums/pooled``.
    """

    pipeline: str
    module: int
    pipeline_text: str
    recipe: Digest
    content: Digest
    numerics: dict[str, Any]
    precision: Precision
    stored_operation: str | None
    encoding: str
    layout: CacheLayout
    sealed: bool = False
    calibration: str | None = None
    error: dict[str, Any] | None = None
    choice: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        return {
            "format_version": FORMAT_VERSION,
            "sealed": self.sealed,
            "pipeline": self.pipeline,
            "module": self.module,
            "encoding": self.encoding,
            "precision": {
                **self.precision.as_json(),
                "calibration": self.calibration,
                "error": self.error,
            },
            "stored_operation": self.stored_operation,
            "choice": self.choice,
            "numerics": self.numerics,
            "recipe": self.recipe.as_json(),
            "content": self.content.as_json(),
            "layout": asdict(self.layout),
            "files": self.files,
            "pipeline_text": self.pipeline_text,
        }


def write_manifest(path: Path, manifest: Manifest) -> None:
    """Write the group's ``zarr.json`` atomically; writing one that is sealed is the seal."""
    content = manifest.as_json()
    attributes = {KEY: {**content, "checksum": json_checksum(content)}}
    write_json(
        path / "zarr.json", {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    )


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the cache at ``path``, sealed or not.

    Raises
    ------
    CacheNotFoundError
        If there is no cache.
    CorruptCacheError
        If its metadata is damaged, or of another format version.
    """
    file = path / "zarr.json"
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        raise CacheNotFoundError(
            f"no cache at {path}; give the path of a module's cache, such as cache/digits/m1.zarr"
        ) from None
    except UnicodeDecodeError:
        raise CorruptCacheError(f"{file} is damaged: not text. Build the cache again") from None
    try:
        content = json.loads(text)["attributes"][KEY]
        version = content["format_version"]
    except (json.JSONDecodeError, KeyError, TypeError):
        raise CorruptCacheError(
            f"{path} is not a gim-stage cache, or its zarr.json is damaged"
        ) from None
    if version != FORMAT_VERSION:
        raise CorruptCacheError(
            f"{path} has cache format {version}, this version reads {FORMAT_VERSION}; "
            "build it again, or use the release that wrote it"
        )
    try:
        intact = content["checksum"] == json_checksum(content)
        manifest = _parse(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CorruptCacheError(
            f"the manifest in {file} is damaged ({type(error).__name__}: {error}); "
            "build the cache again"
        ) from None
    if not intact:
        raise CorruptCacheError(
            f"the manifest in {file} does not match its checksum: it was altered or damaged; "
            "build the cache again"
        )
    return manifest


def _parse(content: dict[str, Any]) -> Manifest:
    layout = _parse_layout(content["layout"])
    if not isinstance(content["sealed"], bool):
        raise TypeError("sealed is neither true nor false")
    precision = Precision.from_json(content["precision"])
    if precision.has_scales and content["sealed"] and len(precision.scale) != layout.cell[0]:
        raise ValueError(f"{len(precision.scale)} scales for {layout.cell[0]} channels")
    if precision.stored_dtype != layout.dtype:
        raise ValueError(f"{precision.name} is not stored as {layout.dtype!r}")
    return Manifest(
        pipeline=str(content["pipeline"]),
        module=int(content["module"]),
        pipeline_text=str(content["pipeline_text"]),
        recipe=Digest(content["recipe"]["parts"]),
        content=Digest(content["content"]["parts"]),
        numerics=dict(content["numerics"]),
        precision=precision,
        stored_operation=_optional(content["stored_operation"], str),
        encoding=str(content["encoding"]),
        layout=layout,
        sealed=content["sealed"],
        calibration=_optional(content["precision"]["calibration"], str),
        error=_parse_error(content["precision"]["error"]),
        choice=_optional(content["choice"], dict),
        files={_inside(name): str(digest) for name, digest in content["files"].items()},
    )


def _optional(value: Any, kind: type[T]) -> T | None:
    """A value of that kind, or None.

    Raises
    ------
    TypeError
        If it is anything else.
    """
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{value!r} where {kind.__name__} was expected")
    return value


def _parse_error(content: Any) -> dict[str, Any] | None:
    """What storing did to the values, as numbers (see `PrecisionError.as_json`)."""
    error = _optional(content, dict)
    if error is not None:
        for name in ("relative_l2", "worst_channel_relative_l2"):
            error[name] = float(error[name])
        for name in ("worst_channel", "saturated", "values"):
            error[name] = int(error[name])
    return error


def _parse_layout(content: dict[str, Any]) -> CacheLayout:
    """A layout that a cache can have.

    Raises
    ------
    ValueError, TypeError
        If it says anything else.
    """
    layout = CacheLayout(
        **{**content, "grid": tuple(content["grid"]), "cell": tuple(content["cell"])}
    )
    sizes = (layout.samples, layout.views, layout.chunk, layout.embedding)
    for size in (*sizes, *layout.grid, *layout.cell):
        if type(size) is not int or size < 1:
            raise ValueError(f"a size of {size!r}")
    if layout.views > MOST_VIEWS:
        raise ValueError(f"{layout.views} views")
    if len(layout.grid) != 2 or len(layout.cell) != 3:
        raise ValueError(f"a grid of {layout.grid} and cells of {layout.cell}")
    if layout.codec not in CODECS or type(layout.materialized) is not bool:
        raise ValueError(f"a codec {layout.codec!r}")
    for name, chunk in layout.chunks.items():
        itemsize = np.dtype(layout.dtype if name == "activations" else "float32").itemsize
        if math.prod(chunk) * itemsize > MOST_CHUNK_BYTES:
            raise ValueError(f"chunks of {name} with {chunk} values: too large")
    return layout


def _inside(name: str) -> str:
    """A path that stays within the group.

    Raises
    ------
    ValueError
        If it does not.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts:
        raise ValueError(f"{name!r} is not a file of a cache")
    return name


def file_digests(path: Path, layout: CacheLayout) -> dict[str, str]:
    """SHA-256 of the files of a cache that are neither chunks nor the manifest."""
    found = {}
    arrays = {path / name for name in layout.shapes}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        chunk = file.parent in arrays and file.name.startswith("c.")
        if file.is_file() and not chunk and name != "zarr.json":
            found[name] = hashlib.sha256(file.read_bytes()).hexdigest()
    return found


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
        remove(self.path)
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
            remove(leftover)
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
        return len(records) - 1, records[0]["blocks"]

    def remove(self) -> None:
        if self.path.exists():
            remove(self.path)

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
