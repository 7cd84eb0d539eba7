"""The file that a trained encoder is exported to: weights, and what they came from.

It says of each module what the module's own file says, so that both are checked alike.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from gim_stagewise.durable import write_atomic
from gim_stagewise.errors import ConfigError, CorruptCacheError
from gim_stagewise.stage.checkpoint import UNREADABLE, FrozenWeights

# Where a file of all modules says what they are.
ABOUT = "gim_stage_encoder"


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
    about = json.dumps({"pipeline_text": text, "modules": [own.as_json() for own in chain]})
    metadata = {ABOUT: about, "sha256": hashlib.sha256(about.encode()).hexdigest()}
    data = save(tensors, metadata=metadata)
    write_atomic(path, lambda temporary: temporary.write_bytes(data))


def exported_chain(path: Path) -> list[FrozenWeights]:
    """Weights of all modules of a file that `save_encoder` wrote.

    Raises
    ------
    ConfigError
        If it is a run's file of one module.
    CorruptCacheError
        If it is damaged, or something else.
    """
    _refuse_one_module(path)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            text = metadata[ABOUT]
            about = json.loads(text)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        pipeline_text = str(about["pipeline_text"])
        found = [
            FrozenWeights.from_json(own, _part(tensors, number), pipeline_text=pipeline_text)
            for number, own in enumerate(about["modules"])
        ]
        described = hashlib.sha256(text.encode()).hexdigest() == metadata["sha256"]
        digests = [own["weights"] for own in about["modules"]]
    except UNREADABLE as error:
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


def _part(tensors: Mapping[str, Tensor], number: int) -> dict[str, Tensor]:
    """The tensors of a module, counted from 0."""
    prefix = f"{number}."
    own = {name: tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return {name.removeprefix(prefix): tensor for name, tensor in own.items()}


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
