"""The stack of frozen modules as one module (paper, equation 5)."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gim_stagewise.config import load_pipeline, parse_pipeline
from gim_stagewise.errors import CacheNotFoundError, CorruptCacheError, StaleCacheError
from gim_stagewise.models import pool
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.workspace import Workspace


class Encoder(nn.Sequential):
    """Frozen modules in order; its forward gives the top module's activations."""

    def embed(
        self, patches: Float[Tensor, "patch channel height width"]
    ) -> Float[Tensor, "patch embedding"]:
        """The top module's embeddings of patches: its ``pool``, or the mean over space."""
        return pool(self[-1], self(patches))


def load_encoder(folder: str | Path, *, pipeline: str | Path | None = None) -> Encoder:
    """Load the frozen modules of a run as one module.

    Parameters
    ----------
    folder : str or Path
        With ``m1.safetensors``, ``m2.safetensors`` and so on.
    pipeline : str or Path, optional
        The pipeline file; needed where modules are built by the user's own code, which is never
        imported on the word of a weights file.

    Returns
    -------
    Encoder
        On the CPU, in evaluation mode, without gradients. It takes float32 patches
        [patch, channel, height, width], as ``Pipeline.source`` gives them.

    Raises
    ------
    CacheNotFoundError
        If the folder has no frozen modules from the first on.
    CorruptCacheError, StaleCacheError, ConfigError
        If they cannot be read, do not belong together, or cannot be built.
    """
    folder = Path(folder)
    found: list[FrozenWeights] = []
    while (path := folder / f"m{len(found) + 1}.safetensors").is_file():
        found.append(FrozenWeights.load(path))
    if not found:
        raise CacheNotFoundError(f"no frozen modules in {folder}; run the pipeline first")
    text = found[-1].pipeline_text
    code_folder = None
    config = parse_pipeline(text, file=f"the pipeline recorded in {folder}")
    if pipeline is not None:
        config, text = load_pipeline(pipeline)
        code_folder = Path(pipeline).resolve().parent
    space = Workspace(config, text, folder, code_folder, torch.device("cpu"))
    modules = [_build(space, weights, found) for weights in found]
    encoder = Encoder(*modules)
    encoder.eval()
    encoder.requires_grad_(False)
    return encoder


def _build(space: Workspace, weights: FrozenWeights, chain: list[FrozenWeights]) -> nn.Module:
    path = space.weights_path(weights.module)
    position = chain.index(weights) + 1
    if weights.module != position:
        raise CorruptCacheError(f"{path} says that it is module {weights.module}, not {position}")
    if position > 1 and weights.chain != chain[position - 2].digest:
        raise StaleCacheError(
            f"{path} was trained on another module {position - 1} than the one beside it; "
            "give `gim-stage run` to make them match"
        )
    module = space.build(position, weights.in_shape[0])
    try:
        module.load_state_dict(weights.tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise StaleCacheError(
            f"{path} does not fit the module that is built now: {reason}"
        ) from None
    return module
