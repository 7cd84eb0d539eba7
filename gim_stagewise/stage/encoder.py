"""The stack of frozen modules as one module (paper, equation 5)."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gim_stagewise.config import load_pipeline, parse_pipeline
from gim_stagewise.durable import write_atomic
from gim_stagewise.errors import CacheNotFoundError, CorruptCacheError, StaleCacheError
from gim_stagewise.models import pool
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.code import code_staleness
from gim_stagewise.stage.identity import stage_recipe
from gim_stagewise.stage.workspace import Workspace

# Where a file of all modules says what they are.
ABOUT = "gim_stage_encoder"


class Encoder(nn.Sequential):
    """Frozen modules in order; its forward gives the top module's activations."""

    def embed(
        self, patches: Float[Tensor, "patch channel height width"]
    ) -> Float[Tensor, "patch embedding"]:
        """The top module's embeddings of patches: its ``pool``, or the mean over space."""
        return pool(self[-1], self(patches))


def load_encoder(path: str | Path, *, pipeline: str | Path | None = None) -> Encoder:
    """Load the frozen modules of a run as one module.

    Parameters
    ----------
    path : str or Path
        A run's folder, with ``m1.safetensors``, ``m2.safetensors`` and so on; or a file that
        `export_encoder` wrote.
    pipeline : str or Path, optional
        The pipeline file; needed where modules are built by the user's own code, which is never
        imported on the word of a weights file.

    Returns
    -------
    Encoder
        Of all modules that lie there, also one that the pipeline file has no more, unless
        ``pipeline`` is given or ``gim-stage clean`` has removed it.
        On the CPU, in evaluation mode, without gradients. It takes float32 patches
        [patch, channel, height, width], as ``Pipeline.source`` gives them; in dense encoding images
        [image, channel, height, width] or recordings [recording, channel, time].

    Raises
    ------
    CacheNotFoundError
        If the folder has no frozen modules from the first on.
    CorruptCacheError, StaleCacheError, ConfigError
        If they cannot be read, do not belong together, or cannot be built.
    """
    path = Path(path)
    if path.is_file():
        return _load_exported(path, pipeline)
    found = frozen_chain(path)
    space = _workspace(path, found[-1].pipeline_text, pipeline)
    found = found[: len(space.config.module)]  # more may be left of an earlier file
    if pipeline is not None:
        for weights in found:
            _check_builds(space, weights)
    return _frozen(Encoder(*(_build(space, weights, found) for weights in found)))


def _check_builds(space: Workspace, weights: FrozenWeights) -> None:
    """Refuse weights of another module than file and code build now, also where they would fit."""
    number = weights.module
    own = (f"module.{number}.build", f"module.{number}.options")
    now = stage_recipe(space.config, number)
    others = [key for key in {*weights.recipe.parts, *now.parts} if not key.startswith(own)]
    changes = weights.recipe.differences(now, ignore=others)
    if reason := "; ".join(changes) or code_staleness(space, weights):
        raise StaleCacheError(f"{space.weights_path(number)} is stale: {reason}")


def frozen_chain(folder: Path) -> list[FrozenWeights]:
    """Weights of all modules of a run's folder, from the first on.

    Raises
    ------
    CacheNotFoundError
        If there are none.
    CorruptCacheError
        If they cannot be read.
    """
    found: list[FrozenWeights] = []
    while (path := folder / f"m{len(found) + 1}.safetensors").is_file():
        found.append(FrozenWeights.load(path))
    if not found:
        raise CacheNotFoundError(f"no frozen modules in {folder}; run the pipeline first")
    return found


def _workspace(folder: Path, text: str, pipeline: str | Path | None) -> Workspace:
    config, code_folder = parse_pipeline(text, file=f"the pipeline recorded in {folder}"), None
    if pipeline is not None:
        config, text = load_pipeline(pipeline)
        code_folder = Path(pipeline).resolve().parent
    return Workspace(config, text, folder, code_folder, torch.device("cpu"))


def _frozen(encoder: Encoder) -> Encoder:
    encoder.eval()
    encoder.requires_grad_(False)
    return encoder


def save_encoder(encoder: Encoder, path: Path, *, text: str, channels: list[int]) -> None:
    """Write weights of all modules into one safetensors file, atomically.

    Parameters
    ----------
    encoder : Encoder
    path : Path
    text : str
        The pipeline file.
    channels : list of int
        Of each module's input.
    """
    tensors = {name: tensor.contiguous() for name, tensor in encoder.state_dict().items()}
    about = {"pipeline_text": text, "channels": channels}
    data = save(tensors, metadata={ABOUT: json.dumps(about)})
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def _load_exported(path: Path, pipeline: str | Path | None) -> Encoder:
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {})[ABOUT])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        text, channels = str(about["pipeline_text"]), [int(count) for count in about["channels"]]
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CorruptCacheError(
            f"{path} is damaged, or no encoder that `gim-stage export` wrote "
            f"({type(error).__name__}: {error})"
        ) from None
    space = _workspace(path, text, pipeline)
    encoder = Encoder(*(space.build(n, count) for n, count in enumerate(channels, start=1)))
    try:
        encoder.load_state_dict(tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise StaleCacheError(f"{path} does not fit the modules that are built: {reason}") from None
    return _frozen(encoder)


def _build(space: Workspace, weights: FrozenWeights, chain: list[FrozenWeights]) -> nn.Module:
    path = space.weights_path(weights.module)
    position = chain.index(weights) + 1
    if weights.module != position:
        raise CorruptCacheError(f"{path} says that it is module {weights.module}, not {position}")
    if position > 1 and weights.chain != chain[position - 2].digest:
        raise StaleCacheError(
            f"{path} was trained on another module {position - 1} than the one beside it: "
            "`gim-stage run` makes them match, or, if the pipeline has no such module any more, "
            "`gim-stage clean` removes it"
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
