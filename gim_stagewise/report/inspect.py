"""What can be seen of a cache, also of one that is unfinished or damaged."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import zarr

from gim_stagewise.cache import BuildFolder, Manifest, Precision, read_manifest
from gim_stagewise.errors import CacheNotFoundError, CorruptCacheError
from gim_stagewise.pipeline import folder_bytes

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
        If nothing is there.
    """
    path = Path(path)
    if not path.is_dir():
        raise CacheNotFoundError(f"no cache at {path}; give the folder of a cache, such as m1.zarr")
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
            _count_chunks(found, manifest, problems)
    form = Precision("float32") if manifest is None else manifest.precision
    channels = _channel_statistics(path, form, problems)
    if channels:
        found["channels"] = channels
    found["problems"] = problems
    if problems and state == "sealed":
        found["state"] = "corrupt"
    return found


def _arrays(path: Path, problems: list[str]) -> dict[str, Any]:
    arrays = {}
    for file in sorted(path.rglob("zarr.json")):
        name = file.parent.relative_to(path).as_posix()
        if name in {".", "labels", "checksums"}:
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


def _count_chunks(found: dict[str, Any], manifest: Manifest, problems: list[str]) -> None:
    """A sealed cache with a chunk missing is damaged, even if nobody has read that chunk yet."""
    layout = manifest.layout
    for name in layout.shapes:
        stored = found["arrays"].get(name, {}).get("stored_chunks", 0)
        whole = int(
            np.prod(
                [-(-s // c) for s, c in zip(layout.shapes[name], layout.chunks[name], strict=True)]
            )
        )
        # Views beyond the evaluation view leave out chunks without unlabeled samples.
        if stored < whole and layout.views == 1:
            problems.append(f"{name}: {whole - stored} of {whole} chunks are missing")


def _channel_statistics(
    path: Path, precision: Precision, problems: list[str]
) -> list[dict[str, float]]:
    if not (path / "activations").is_dir():
        return []
    try:
        array: Any = zarr.open_array(str(path / "activations"), mode="r")
    except (ValueError, KeyError, TypeError, OSError):
        return []
    files = _chunk_files(path / "activations")
    chosen = files[:: max(1, len(files) // SAMPLED_CHUNKS)][:SAMPLED_CHUNKS]
    parts = []
    for file in chosen:
        view, sample, row = (int(n) for n in file.name.split(".")[1:4])
        size = array.chunks
        try:
            part = np.asarray(
                array[
                    view,
                    sample * size[1] : (sample + 1) * size[1],
                    row * size[2] : (row + 1) * size[2],
                ]
            )
        except (ValueError, RuntimeError, OSError) as error:
            problems.append(f"activations/{file.name} is damaged ({_first_line(error)})")
            continue
        if precision.stored_dtype == part.dtype:
            part = precision.decode_array(part)
        parts.append(np.moveaxis(part, 3, 0).reshape(part.shape[3], -1))
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
