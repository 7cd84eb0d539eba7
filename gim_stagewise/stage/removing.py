"""Removing what stages made."""

from __future__ import annotations

from gim_stagewise.cache import SealedCache, discard_cache, drop_activations
from gim_stagewise.durable import remove
from gim_stagewise.stage.disk import folder_bytes
from gim_stagewise.stage.workspace import Workspace
from gim_stagewise.units import format_bytes


def drop_outputs(space: Workspace, index: int) -> None:
    """Remove activations of a module that no stage needs any more; embeddings stay."""
    path = space.cache_path(index)
    if index < 1 or not path.exists():
        return
    if SealedCache(path).materialized or (path / "activations").exists():
        before = folder_bytes(path)
        drop_activations(path)
        freed = format_bytes(before - folder_bytes(path))
        space.progress.note(f"module {index}: activations removed, {freed} free")


def forget(space: Workspace, index: int) -> None:
    """Remove a module's cache, weights, checkpoint and logs."""
    discard_cache(space.cache_path(index))
    for path in (space.weights_path(index), space.checkpoint_path(index), space.logs_path(index)):
        remove(path)
