"""Whether an input cache belongs to what lies beside it."""

from __future__ import annotations

from collections.abc import Callable

from gim_stagewise.cache import SealedCache
from gim_stagewise.sources import Source
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.code import code_staleness
from gim_stagewise.stage.workspace import Workspace


def foreign_content(workspace: Workspace, data: Callable[[], Source], cache: SealedCache) -> str:
    """Why an input cache does not belong to what lies beside it; empty if nothing says so.

    The weights, the cache below and, with a pipeline file, data and code are compared where they
    are at hand; a cache that was moved away alone is believed.

    Parameters
    ----------
    workspace : Workspace
    data : callable
        Opens the dataset; called only if the cache is module 1's.
    cache : SealedCache
    """
    index = cache.manifest.module
    parts = cache.manifest.content.parts
    beside = cache.path.absolute().parent
    weights_path = beside / f"m{index}.safetensors"
    below_path = beside / f"m{index - 1}.zarr"
    if index == 1 and workspace.code_folder is not None:
        if (reason := _changed(parts["input"], data().content_digest())) != "":
            return f"the data of its source changed ({reason})"
    elif index > 1 and below_path.exists():
        below = SealedCache(below_path)
        if (reason := _changed(parts["input"], below.content_digest())) != "":
            return f"it was made from another {below_path.name} than the one beside it ({reason})"
        if reason := foreign_content(workspace, data, below):
            return f"{below_path.name} below it: {reason}"
    if not weights_path.exists():
        return ""
    weights = FrozenWeights.load(weights_path)
    if (reason := _changed(parts["weights"], weights.digest)) != "":
        return f"it was made with other weights than {weights_path.name} beside it ({reason})"
    if workspace.code_folder is None:
        return ""
    return code_staleness(workspace, weights)


def _changed(old: str, new: str) -> str:
    """From what to what; empty if it is the same."""
    return "" if old == new else f"{old[:8]}… → {new[:8]}…"
