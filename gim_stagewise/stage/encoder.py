"""The stack of frozen modules as one module (paper, equation 5)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from gim_stagewise.cache import Digest
from gim_stagewise.config import load_pipeline, parse_pipeline
from gim_stagewise.durable import write_atomic
from gim_stagewise.errors import (
    CacheNotFoundError,
    ConfigError,
    CorruptCacheError,
    StaleCacheError,
)
from gim_stagewise.models import pool
from gim_stagewise.stage.checkpoint import FrozenWeights, TrainingRecord
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
        _refuse_one_module(path)
        found = _exported_chain(path)
    else:
        found = frozen_chain(path)
    space = _workspace(path, found[-1].pipeline_text, pipeline)
    found = found[: len(space.config.module)]  # more may be left of an earlier file
    if pipeline is not None:
        for weights in found:
            _check_builds(space, weights)
    encoder = Encoder(*(_build(space, weights, found) for weights in found))
    encoder.eval()
    encoder.requires_grad_(False)
    return encoder


def _refuse_one_module(path: Path) -> None:
    """Say so where a file is of a run, and has the weights of one module."""
    try:
        number = FrozenWeights.load(path).module
    except CorruptCacheError:
        return
    raise ConfigError(
        f"these are the weights of module {number} alone; give the run's folder {path.parent}, or "
        "a file that `gim-stage export` wrote",
        file=str(path),
    )


def _check_builds(space: Workspace, weights: FrozenWeights) -> None:
    """Refuse weights of another module than file and code build now, also where they would fit."""
    number = weights.module
    own = (f"module.{number}.build", f"module.{number}.options")
    now = stage_recipe(space.config, number)
    others = [key for key in {*weights.recipe.parts, *now.parts} if not key.startswith(own)]
    changes = weights.recipe.differences(now, ignore=others)
    if reason := "; ".join(changes) or code_staleness(space, weights):
        raise StaleCacheError(f"{_place(space, number)} is stale: {reason}")


def _place(space: Workspace, number: int) -> str:
    """What errors call a module: its file, or its part of an exported one."""
    if space.folder.is_file():
        return f"module {number} of {space.folder}"
    return str(space.weights_path(number))


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


def save_encoder(chain: Sequence[FrozenWeights], path: Path, *, text: str) -> None:
    """Write weights of all modules into one safetensors file, atomically.

    Tensors are named as in the state of an `Encoder`; what else is known of the modules goes into
    the metadata.

    Parameters
    ----------
    chain : sequence of FrozenWeights
        From the first module on.
    path : Path
    text : str
        The pipeline file.
    """
    tensors = {
        f"{number}.{name}": tensor
        for number, weights in enumerate(chain)
        for name, tensor in weights.tensors.items()
    }
    about = json.dumps({"pipeline_text": text, "modules": [_described(own) for own in chain]})
    metadata = {ABOUT: about, "sha256": hashlib.sha256(about.encode()).hexdigest()}
    data = save(tensors, metadata=metadata)
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def _described(weights: FrozenWeights) -> dict[str, Any]:
    return {
        "recipe": weights.recipe.as_json(),
        "input_content": weights.input_content,
        "builder_source": weights.builder_source,
        "behaviour": weights.behaviour,
        "training": weights.training,
        "in_shape": weights.in_shape,
        "chain": weights.chain,
        "record": asdict(weights.record),
        "weights": weights.digest,
    }


def _exported_chain(path: Path) -> list[FrozenWeights]:
    """Weights of all modules of a file that `save_encoder` wrote."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata[ABOUT]
            about = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        found = [
            _exported_module(number, own, tensors, str(about["pipeline_text"]))
            for number, own in enumerate(about["modules"], start=1)
        ]
        described = hashlib.sha256(text.encode()).hexdigest() == metadata["sha256"]
        digests = [own["weights"] for own in about["modules"]]
    except (
        SafetensorError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
        RecursionError,
    ) as error:
        raise CorruptCacheError(
            f"{path} is damaged, or no encoder that `gim-stage export` wrote "
            f"({type(error).__name__}: {error}); export it again"
        ) from None
    if not described or not found:
        raise CorruptCacheError(f"{path} is damaged: its description was altered; export it again")
    for weights, digest in zip(found, digests, strict=True):
        if weights.digest != digest:
            raise CorruptCacheError(
                f"{path} is damaged: the weights of module {weights.module} are not those that "
                "were exported; export it again"
            )
    return found


def _exported_module(
    number: int, about: dict[str, Any], tensors: dict[str, Tensor], text: str
) -> FrozenWeights:
    """One module of an exported file; the reverse of `_described`."""
    prefix = f"{number - 1}."
    return FrozenWeights(
        module=number,
        recipe=Digest(dict(about["recipe"]["parts"])),
        input_content=str(about["input_content"]),
        builder_source=str(about["builder_source"]),
        behaviour=str(about["behaviour"]),
        training=str(about["training"]),
        in_shape=tuple(int(size) for size in about["in_shape"]),
        chain=None if about["chain"] is None else str(about["chain"]),
        pipeline_text=text,
        record=TrainingRecord.from_json(about["record"]),
        tensors={
            name.removeprefix(prefix): tensor
            for name, tensor in tensors.items()
            if name.startswith(prefix)
        },
    )


def _build(space: Workspace, weights: FrozenWeights, chain: list[FrozenWeights]) -> nn.Module:
    position = chain.index(weights) + 1
    place = _place(space, position)
    if weights.module != position:
        raise CorruptCacheError(f"{place} says that it is module {weights.module}, not {position}")
    if position > 1 and weights.chain != chain[position - 2].digest:
        raise StaleCacheError(
            f"{place} was trained on another module {position - 1} than the one beside it: "
            "`gim-stage run` makes them match, or, if the pipeline has no such module any more, "
            "`gim-stage clean` removes it"
        )
    module = space.build(position, weights.in_shape[0])
    try:
        module.load_state_dict(weights.tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise StaleCacheError(
            f"{place} does not fit the module that is built now: {reason}"
        ) from None
    return module
