"""The recorded facts of a cache, as attributes of its group.

The manifest lies under the key ``gim_stage``; the group describes itself wherever it is moved.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import numpy as np

from gim_stagewise.cache.codecs import CODECS, MOST_CHUNK_BYTES
from gim_stagewise.cache.digests import Digest, files_digest
from gim_stagewise.cache.layout import FORMAT_VERSION, CacheLayout
from gim_stagewise.cache.precision import Precision
from gim_stagewise.cache.tiles import Layout, TiledLayout
from gim_stagewise.durable import json_checksum, write_json
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
        "patch": each patch was encoded on its own; "dense": modules saw the whole input.
    layout : CacheLayout or TiledLayout
    sealed : bool
        Whether all blocks are there.
    files : dict
        SHA-256 of every file but chunks, by its path in the group; known when it is sealed. Chunks
        have theirs in the arrays ``checksums/activations``, ``checksums/pooled`` and so on.
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
    layout: Layout
    sealed: bool = False
    calibration: str | None = None
    error: dict[str, Any] | None = None
    choice: dict[str, Any] | None = None
    files: dict[str, str] = field(default_factory=dict)

    @property
    def sample_layout(self) -> CacheLayout:
        """The layout of samples of one size; of another kind is the caller's mistake."""
        assert isinstance(self.layout, CacheLayout)
        return self.layout

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


_GIVE = "give the folder of a module's cache, such as cache/digits/m1.zarr"


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
        raise CacheNotFoundError(f"no cache at {path}; {_GIVE}") from None
    except UnicodeDecodeError:
        raise CorruptCacheError(f"{file} is damaged: not text. Build the cache again") from None
    try:
        group = json.loads(text)
        content = group["attributes"][KEY]
        version = content["format_version"]
        kind = group["zarr_format"], group["node_type"]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise CorruptCacheError(
            f"{path} is not a gim-stage cache, or its zarr.json is damaged"
        ) from None
    if kind != (3, "group"):
        raise CorruptCacheError(f"{file} is damaged: it says it is {kind}. Build the cache again")
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


def require_cache(path: Path) -> None:
    """Refuse what is no cache, rather than one that is damaged.

    Raises
    ------
    CacheNotFoundError
        If a folder is not there, has nothing of a cache, or is another Zarr store.
    """
    if not path.is_dir():
        raise CacheNotFoundError(f"no cache at {path}; {_GIVE}")
    file = path / "zarr.json"
    if not file.exists():
        if path.suffix == ".zarr" or (path / "activations").is_dir():
            return  # it lost its metadata
        raise CacheNotFoundError(f"{path} holds no cache; {_GIVE}")
    try:
        found = json.loads(file.read_bytes())
        kind, attributes = str(found["node_type"]), dict(found.get("attributes", {}))
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return  # damaged
    if KEY not in attributes:
        raise CacheNotFoundError(f"{path} is a Zarr {kind} that is no cache of gim-stage; {_GIVE}")


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
        recipe=_parse_digest(content["recipe"]),
        content=_parse_digest(content["content"], needs=("weights", "input")),
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


def _parse_digest(content: dict[str, Any], needs: Sequence[str] = ()) -> Digest:
    parts = content["parts"]
    if not isinstance(parts, dict) or not all(isinstance(parts.get(name), str) for name in needs):
        raise TypeError(f"parts of a digest without {', '.join(needs) or 'names'}")
    return Digest(parts)


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


def _parse_layout(content: dict[str, Any]) -> Layout:
    """A layout that a cache can have.

    Raises
    ------
    ValueError, TypeError
        If it says anything else.
    """
    layout = _tiled_layout(content) if "tile" in content else _sample_layout(content)
    if layout.codec not in CODECS or type(layout.materialized) is not bool:
        raise ValueError(f"a codec {layout.codec!r}")
    for name, array in layout.arrays.items():
        if math.prod(array.chunks) * np.dtype(array.dtype).itemsize > MOST_CHUNK_BYTES:
            raise ValueError(f"chunks of {name} with {array.chunks} values: too large")
    return layout


def _sample_layout(content: dict[str, Any]) -> CacheLayout:
    layout = CacheLayout(
        **{**content, "grid": tuple(content["grid"]), "cell": tuple(content["cell"])}
    )
    _check_sizes(layout.samples, layout.views, layout.chunk, layout.embedding)
    _check_sizes(*layout.grid, *layout.cell)
    if layout.views > MOST_VIEWS:
        raise ValueError(f"{layout.views} views")
    if len(layout.grid) != 2 or len(layout.cell) != 3:
        raise ValueError(f"a grid of {layout.grid} and cells of {layout.cell}")
    return layout


def _tiled_layout(content: dict[str, Any]) -> TiledLayout:
    own = {name: tuple(content[name]) for name in ("ids", "extents", "tile", "cell")}
    extents = tuple(tuple(extent) for extent in own["extents"])
    layout = TiledLayout(**{**content, **own, "extents": extents})
    _check_sizes(*layout.tile, *layout.cell, layout.pool, layout.embedding)
    _check_sizes(*(length for extent in extents for length in extent))
    if any(type(item_id) is not str for item_id in layout.ids):
        raise TypeError("ids that are no strings")
    if {"", ".", ".."} & set(layout.ids):
        raise ValueError("ids that are no names")
    if not len(layout.ids) == len(set(layout.ids)) == len(extents) > 0:
        raise ValueError(f"{len(layout.ids)} ids and {len(extents)} extents")
    axes = len(layout.tile)
    if axes not in (1, 2) or any(len(extent) != axes for extent in extents):
        raise ValueError(f"tiles of {layout.tile} and extents of another kind")
    if len(layout.cell) not in (1, 3) or (len(layout.cell) == 3 and axes == 1):
        raise ValueError(f"cells of {layout.cell} along {axes} axes")
    if type(layout.state) is not int or layout.state < 0 or (layout.state and axes != 1):
        raise ValueError(f"a state of {layout.state!r} numbers")
    if any(size % layout.pool for size in layout.tile):
        raise ValueError(f"tiles of {layout.tile}, pooled by {layout.pool}")
    return layout


def _check_sizes(*sizes: object) -> None:
    for size in sizes:
        if type(size) is not int or size < 1:
            raise ValueError(f"a size of {size!r}")


def _inside(name: str) -> str:
    """A path that stays within the group.

    Raises
    ------
    ValueError
        If it does not.
    """
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or "\0" in name:
        raise ValueError(f"{name!r} is not a file of a cache")
    return name


def file_digests(path: Path, layout: Layout) -> dict[str, str]:
    """SHA-256 of the files of a cache that are neither chunks nor the manifest.

    What else somebody put there (a file browser's ``.DS_Store``) is no part of it.
    """
    found = {}
    arrays = {path / name for name in layout.arrays}
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path).as_posix()
        chunk = file.name.startswith("c.")
        own = file.name == "zarr.json" or (chunk and file.parent not in arrays)
        if own and name != "zarr.json" and file.is_file():
            found[name] = files_digest(path, [name])
    return found
