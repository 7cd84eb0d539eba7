"""Frozen weights, and whether they still belong to file, data and code."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from gim_stagewise.cache import Digest
from gim_stagewise.stage.checkpoint import FrozenWeights, TrainingRecord, module_tensors
from gim_stagewise.stage.freeze import FrozenModule, behaviour_digest, training_digest
from gim_stagewise.stage.identity import recipe_differences
from gim_stagewise.stage.workspace import Workspace


def frozen_weights(
    workspace: Workspace,
    index: int,
    *,
    in_shape: tuple[int, ...],
    tensors: Mapping[str, Tensor],
    recipe: Digest,
    input_content: str,
    chain: str | None,
    record: TrainingRecord,
) -> FrozenWeights:
    """Weights of a module with digests of the code that builds it; see `FrozenWeights`."""
    module = workspace.build(index, in_shape[0])
    module.load_state_dict(tensors)
    return FrozenWeights(
        module=index,
        recipe=recipe,
        input_content=input_content,
        builder_source=workspace.builder(index).source_digest,
        behaviour=behaviour_digest(FrozenModule(module, torch.device("cpu")), in_shape),
        training=training_digest(workspace.build(index, in_shape[0]), in_shape),
        in_shape=in_shape,
        chain=chain,
        pipeline_text=workspace.text,
        record=record,
        tensors=module_tensors(module),
    )


def weights_staleness(
    workspace: Workspace, weights: FrozenWeights, recipe: Digest, input_content: str
) -> str:
    """Why frozen weights do not belong to this recipe, data and code; empty if they do."""
    if changes := recipe_differences(weights.recipe, recipe):
        return "; ".join(changes)
    if weights.input_content != input_content:
        old, new = weights.input_content[:8], input_content[:8]
        return f"the data of its input changed ({old}… → {new}…)"
    return code_staleness(workspace, weights)


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
