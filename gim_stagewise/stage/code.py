"""Whether frozen weights still belong to the code that builds their module."""

from __future__ import annotations

import torch

from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.freeze import FrozenModule, behaviour_digest, training_digest
from gim_stagewise.stage.workspace import Workspace


def code_staleness(workspace: Workspace, weights: FrozenWeights) -> str:
    """Why frozen weights do not belong to the builder's code as it is now; empty if they do.

    Code that changed without changing what a fresh module does in training, nor what the frozen
    one computes, is said and kept.
    """
    builder = workspace.builder(weights.module)
    if builder.source_digest == weights.builder_source:
        return ""
    shape = weights.in_shape
    module = workspace.build(weights.module, shape[0])
    try:
        module.load_state_dict(weights.tensors)
        # On the CPU, so that it compares equal on machines with and without a GPU.
        frozen = FrozenModule(module, torch.device("cpu"))
        same = behaviour_digest(frozen, shape) == weights.behaviour
        fresh = workspace.build(weights.module, shape[0])
        same = same and training_digest(fresh, shape) == weights.training
    except RuntimeError:
        same = False
    if not same:
        old, new = weights.builder_source[:8], builder.source_digest[:8]
        return f"the code of {builder.reference!r} computes something else now ({old}… → {new}…)"
    workspace.progress.note(
        f"module {weights.module}: the code of {builder.reference!r} changed, "
        "but not its results; kept"
    )
    return ""
