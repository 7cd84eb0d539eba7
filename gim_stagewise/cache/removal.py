"""Removing caches, or their activations, so that nothing half-removed is taken for a whole."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from gim_stagewise.cache.journal import BuildFolder
from gim_stagewise.cache.layout import FORMAT_VERSION
from gim_stagewise.cache.manifest import KEY, Manifest, read_manifest, write_manifest
from gim_stagewise.durable import aside, discard, remove, rename, storage_errors
from gim_stagewise.errors import CorruptCacheError


def drop_activations(path: Path) -> Manifest:
    """Remove the activations of a sealed cache; embeddings and all else stay."""
    manifest = read_manifest(path)
    gone = ("activations/", "checksums/activations/")
    left = replace(
        manifest,
        layout=replace(manifest.layout, materialized=False),
        files={k: v for k, v in manifest.files.items() if not k.startswith(gone)},
    )
    trash = aside(path, "trash")
    with storage_errors(f"removing the activations of {path}"):
        trash.mkdir()
        # The manifest first: whatever is interrupted here, nobody takes half an array for a whole.
        write_manifest(path, left)
        for name in ("activations", "checksums/activations"):
            if (path / name).exists():
                rename(path / name, trash / name.replace("/", "-"))
        remove(trash)
    return left


def is_cache(path: Path) -> bool:
    """Whether a folder is what is left of a cache of ours, damaged or not, or empty."""
    if path.is_symlink() or not path.is_dir():
        return False
    file = path / "zarr.json"
    text = file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""
    if KEY in text:
        with suppress(ValueError, KeyError, TypeError, RecursionError):
            # One of a newer release is whole, for that release.
            version = json.loads(text)["attributes"][KEY]["format_version"]
            return type(version) is not int or version <= FORMAT_VERSION
        return True
    # Without its manifest it is known by the arrays that no other kind of group has together.
    ours = {"ids", "splits", "pooled"}
    return not any(path.iterdir()) or ours <= {child.name for child in path.iterdir()}


def discard_cache(path: Path) -> None:
    """Remove a cache and what is left of its building; nothing half-removed keeps its name.

    Raises
    ------
    CorruptCacheError
        If what lies at ``path`` does not look like a cache: it is not ours to delete.
    """
    BuildFolder(path).remove()
    for leftover in path.parent.glob(f".{path.name}.trash-*"):
        remove(leftover)
    if path.exists() or path.is_symlink():
        if not is_cache(path):
            raise CorruptCacheError(
                f"{path} is in the way and is not a cache of this version; move it, or choose "
                "another --dir"
            )
        discard(path)
