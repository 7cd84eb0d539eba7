"""What can be seen of a cache, also of one that is unfinished or damaged."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from gim_stagewise.cache import (
    BuildFolder,
    Manifest,
    read_chunk_file,
    read_manifest,
    require_cache,
    stored_blocks,
)
from gim_stagewise.errors import CacheNotFoundError, CorruptCacheError
from gim_stagewise.stage.disk import folder_bytes

# Statistics come from so many chunks, spread over the cache.
SAMPLED_CHUNKS = 8


def inspect_cache(path: str | Path) -> dict[str, Any]:
    """Describe a cache as plain JSON; what cannot be read is listed under "problems".

    Returns
    -------
    dict
        "path", "state" ("sealed", "partial" or "corrupt"), "bytes", "problems", "arrays" (axes,
        shape, chunks, dtype, codecs, chunks stored), and, where they can be read, "manifest"
        (without the pipeline's text) and "channels": mean, standard deviation, smallest, largest
        value and share of zeros per channel, over a sample of chunks.

    Raises
    ------
    CacheNotFoundError
        If nothing is there, or something else.
    """
    path = Path(path)
    require_cache(path)
    problems: list[str] = []
    manifest: Manifest | None = None
    state = "corrupt"
    try:
        manifest = read_manifest(path)
        state = "sealed" if manifest.sealed else "partial"
    except (CacheNotFoundError, CorruptCacheError) as error:
        problems.append(str(error))
    found: dict[str, Any] = {
        "path": str(path),
        "state": state,
        "bytes": folder_bytes(path),
        "arrays": _arrays(path, problems),
    }
    if manifest is not None:
        found["manifest"] = {k: v for k, v in manifest.as_json().items() if k != "pipeline_text"}
        if not manifest.sealed:
            done, total = BuildFolder(path).done_blocks(manifest.content)
            found["blocks"] = {"done": done, "total": total}
        else:
            _count_chunks(path, manifest, problems)
        if channels := _channel_statistics(path, manifest, problems):
            found["channels"] = channels
    found["problems"] = problems
    if problems and state == "sealed":
        found["state"] = "corrupt"
    return found


def _arrays(path: Path, problems: list[str]) -> dict[str, Any]:
    arrays = {}
    for file in sorted(path.rglob("zarr.json")):
        name = file.parent.relative_to(path).as_posix()
        if file.parent == path or _is_group(file):
            continue
        try:
            array = zarr.open_array(str(file.parent), mode="r")
        except (ValueError, KeyError, TypeError, OSError) as error:
            problems.append(f"{name}: its metadata cannot be read ({_first_line(error)})")
            continue
        metadata: Any = array.metadata
        arrays[name] = {
            "axes": list(metadata.dimension_names or map(str, range(array.ndim))),
            "shape": list(array.shape),
            "chunks": list(array.chunks),
            "dtype": str(metadata.to_dict()["data_type"]),
            "codecs": [codec.to_dict()["name"] for codec in metadata.codecs],
            "stored_chunks": len(_chunk_files(file.parent)),
            "bytes": sum(chunk.stat().st_size for chunk in _chunk_files(file.parent)),
        }
    return arrays


def _is_group(file: Path) -> bool:
    """Whether metadata is that of a group, such as of all labels."""
    try:
        return bool(json.loads(file.read_bytes())["node_type"] == "group")
    except (ValueError, KeyError, TypeError, OSError):
        return False  # which opening it as an array will say


def _count_chunks(path: Path, manifest: Manifest, problems: list[str]) -> None:
    """A sealed cache with a chunk missing is damaged, even if nobody has read that chunk yet."""
    layout = manifest.layout
    try:
        blocks = stored_blocks(path, manifest)
    except CorruptCacheError as error:
        problems.append(_first_line(error))
        return
    there = {file.relative_to(path).as_posix() for file in path.rglob("c.*")}
    files = {
        name: [f for b in blocks for f in layout.parts(b)[name].files] for name in layout.kinds
    }
    for name, expected in files.items():
        missing = sum(file not in there for file in expected)
        if missing:
            problems.append(f"{name}: {missing} of {len(expected)} chunks are missing")


def _channel_statistics(
    path: Path, manifest: Manifest, problems: list[str]
) -> list[dict[str, float]]:
    layout = manifest.layout
    try:
        blocks = stored_blocks(path, manifest) if layout.materialized else []
    except CorruptCacheError:
        blocks = []  # which was said
    there = [
        (file, inside)
        for part in (layout.parts(block)["activations"] for block in blocks)
        for file, inside in zip(part.files, part.inside, strict=True)
        if (path / file).is_file()
    ]
    parts = []
    for file, inside in there[:: max(1, len(there) // SAMPLED_CHUNKS)][:SAMPLED_CHUNKS]:
        try:
            part = read_chunk_file(path, layout, file)
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(f"{file} is damaged ({_first_line(error)})")
            continue
        part = manifest.precision.decode_array(part[inside].copy(), space=layout.space)
        channel = -1 - layout.space
        parts.append(np.moveaxis(part, channel, 0).reshape(part.shape[channel], -1))
    if not parts:
        return []
    values = np.concatenate(parts, axis=1)
    return [
        {
            "mean": float(row.mean()),
            "sd": float(row.std()),
            "min": float(row.min()),
            "max": float(row.max()),
            "zeros": float((row == 0).mean()),
        }
        for row in values
    ]


def _chunk_files(array: Path) -> list[Path]:
    return sorted(file for file in array.glob("c.*") if re.fullmatch(r"c(\.\d+)+", file.name))


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
