"""Training state on disk, and frozen weights.

Both are written whole or not at all. Checkpoints hold tensors and plain values only and are read
with ``weights_only=True``; weights are safetensors: nothing executes from data.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from gim_stagewise.cache import Digest
from gim_stagewise.durable import write_atomic
from gim_stagewise.errors import CacheNotFoundError, CorruptCacheError


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write training state; the previous checkpoint stays until this one is whole."""
    content = {**state, "checksum": _state_digest(state)}

    def write(temporary: Path) -> None:
        # Into a file of Python's: PyTorch's own says nothing of a full disk that one could know by.
        with temporary.open("wb") as file:
            torch.save(content, file)

    write_atomic(path, write)


def load_checkpoint(path: Path, *, run: str) -> dict[str, Any] | None:
    """The training state at ``path`` if it belongs to this run, else None.

    Parameters
    ----------
    path : Path
    run : str
        Digest of what was trained on what; a checkpoint of anything else is not used.
    """
    try:
        state = check_checkpoint(path)
    except (FileNotFoundError, CorruptCacheError):
        return None  # training then starts afresh, and says so
    return state if state.get("run") == run else None


def check_checkpoint(path: Path) -> dict[str, Any]:
    """The training state at ``path``, whatever it belongs to.

    Raises
    ------
    FileNotFoundError
        If there is none.
    CorruptCacheError
        If it is damaged.
    """
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        intact = state.pop("checksum") == _state_digest(state)
    except FileNotFoundError:
        raise
    except Exception as error:  # a damaged file can fail in many ways
        raise CorruptCacheError(f"{path} is damaged ({type(error).__name__})") from None
    if not intact:
        raise CorruptCacheError(f"{path} does not match its checksum: it was altered or damaged")
    return state


def _state_digest(state: Any) -> str:
    """Hash of nested mappings and sequences of tensors and plain values."""
    digest = hashlib.sha256()

    def add(value: Any) -> None:
        if isinstance(value, Tensor):
            if value.nelement() * value.element_size() > value.untyped_storage().nbytes():
                raise ValueError("a tensor that declares more than the file holds")
            digest.update(f"{tuple(value.shape)}:{value.dtype};".encode())
            flat = value.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        elif isinstance(value, Mapping):
            digest.update(f"{{{len(value)}".encode())
            for key in sorted(value, key=str):
                digest.update(f"{key!r}:".encode())
                add(value[key])
        elif isinstance(value, list | tuple):
            digest.update(f"[{len(value)}".encode())
            for part in value:
                add(part)
        else:
            digest.update(f"{value!r};".encode())

    add(state)
    return digest.hexdigest()


def peek_checkpoint(path: Path, *, run: str) -> dict[str, Any] | None:
    """Where a training of this run stands: the counters of its checkpoint, or None."""
    state = load_checkpoint(path, run=run)
    return None if state is None else dict(state["counters"])


@dataclass(frozen=True)
class TrainingRecord:
    """What is known of a finished training.

    Parameters
    ----------
    epochs : int
        Epochs that were run; the best of them gave the weights.
    best_epoch : int
        Counted from 1.
    train_loss, validation_loss : float or None
        Of the frozen weights, in nats, on as many of the samples that were trained on as are held
        out, and on those that are; None of a module without an objective of its own.
    seconds : float
        Time spent in training, resumed parts included.
    numerics : dict
        What the bits of the weights depend on besides the recipe: device, torch, threads. Where
        training went on under others, a list of values.
    micro_batch : int
        Patches that were in memory at a time.
    projected_mem, measured_mem : int
        Bytes that training was expected to take, and that it took, beyond what the process had
        before; see `gim_stagewise.memory`.
    shuffle_quality : float
        How often batches repeated a chunk of the input, against a perfect shuffle, which has 1.
    epoch_losses : list of [float, float]
        After each epoch: ``train_loss`` and ``validation_loss``.
    """

    epochs: int
    best_epoch: int
    train_loss: float | None
    validation_loss: float | None
    seconds: float
    numerics: dict[str, Any]
    micro_batch: int
    projected_mem: int = 0
    measured_mem: int = 0
    shuffle_quality: float = 1.0
    epoch_losses: list[list[float]] = field(default_factory=list)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> TrainingRecord:
        """The reverse of ``asdict``.

        Raises
        ------
        TypeError, ValueError
            If that is no record.
        """
        others = {"numerics", "epoch_losses"}
        numbers = {name: value for name, value in content.items() if name not in others}
        losses = {name for name in ("train_loss", "validation_loss") if numbers[name] is None}
        known = {name: value for name, value in numbers.items() if name not in losses}
        if any(isinstance(v, bool) or not isinstance(v, int | float) for v in known.values()):
            raise TypeError("a record of something else than numbers")
        losses_of = [[float(own) for own in pair] for pair in content["epoch_losses"]]
        if any(len(pair) != 2 for pair in losses_of):
            raise ValueError("losses of an epoch that are no pair")
        return cls(**numbers, numerics=dict(content["numerics"]), epoch_losses=losses_of)


# What a damaged or foreign safetensors file can end in.
UNREADABLE = (SafetensorError, KeyError, TypeError, ValueError, AttributeError, RecursionError)


@dataclass(frozen=True)
class FrozenWeights:
    """Weights of a frozen module with what they came from.

    Parameters
    ----------
    module : int
    recipe : Digest
    input_content : str
        Content digest of what the module was trained on.
    builder_source, behaviour : str
        Digests of the builder's code and of the module's outputs.
    training : str
        Digest of how the fresh module behaves in training.
    in_shape : tuple of int
        One row of the module's input, (channel, height, width).
    chain : str or None
        Digest of the weights of the module below; None for the first.
    pipeline_text : str
        The pipeline file.
    record : TrainingRecord
    tensors : dict
        The module's state.
    """

    module: int
    recipe: Digest
    input_content: str
    builder_source: str
    behaviour: str
    training: str
    in_shape: tuple[int, ...]
    chain: str | None
    pipeline_text: str
    record: TrainingRecord
    tensors: dict[str, Tensor]

    @property
    def digest(self) -> str:
        """Hash of names, shapes, dtypes and values of all tensors."""
        digest = hashlib.sha256()
        for name in sorted(self.tensors):
            tensor = self.tensors[name]
            digest.update(f"{name}:{tuple(tensor.shape)}:{tensor.dtype};".encode())
            digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def as_json(self) -> dict[str, Any]:
        """All but tensors, for which their digest stands, and the pipeline file."""
        return {
            "module": self.module,
            "recipe": self.recipe.as_json(),
            "input_content": self.input_content,
            "builder_source": self.builder_source,
            "behaviour": self.behaviour,
            "training": self.training,
            "in_shape": self.in_shape,
            "chain": self.chain,
            "record": asdict(self.record),
            "weights": self.digest,
        }

    @classmethod
    def from_json(
        cls, content: dict[str, Any], tensors: dict[str, Tensor], *, pipeline_text: str
    ) -> FrozenWeights:
        """The reverse of `as_json`, with what that leaves out; the digest is not compared.

        Raises
        ------
        KeyError, TypeError, ValueError, AttributeError
            If that is no module's.
        """
        return cls(
            module=int(content["module"]),
            recipe=Digest(dict(content["recipe"]["parts"])),
            input_content=str(content["input_content"]),
            builder_source=str(content["builder_source"]),
            behaviour=str(content["behaviour"]),
            training=str(content["training"]),
            in_shape=tuple(int(size) for size in content["in_shape"]),
            chain=None if content["chain"] is None else str(content["chain"]),
            pipeline_text=pipeline_text,
            record=TrainingRecord.from_json(content["record"]),
            tensors=tensors,
        )

    def save(self, path: Path) -> None:
        """Write a safetensors file; what is not a tensor goes into its metadata."""
        text = json.dumps({**self.as_json(), "pipeline_text": self.pipeline_text})
        metadata = {"gim_stage": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
        data = save(self.tensors, metadata=metadata)
        write_atomic(path, lambda temporary: temporary.write_bytes(data))

    @classmethod
    def load(cls, path: Path) -> FrozenWeights:
        """Read what `save` wrote.

        Raises
        ------
        CacheNotFoundError
            If there is no such file.
        CorruptCacheError
            If it is damaged or not ours.
        """
        if path.exists() and not path.is_file():
            raise CorruptCacheError(f"{path} is no file; remove it, and train the module again")
        if not path.is_file():
            raise CacheNotFoundError(f"no frozen weights at {path}; train that module first")
        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata()
                text = metadata["gim_stage"]
                about = json.loads(text)
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            weights = cls.from_json(about, tensors, pipeline_text=str(about["pipeline_text"]))
            described = hashlib.sha256(text.encode()).hexdigest() == metadata["sha256"]
            intact = described and weights.digest == about["weights"]
        except UNREADABLE as error:
            raise CorruptCacheError(
                f"{path} is damaged or not a frozen module of gim-stage "
                f"({type(error).__name__}: {error}); train the module again"
            ) from None
        if not intact:
            what = (
                "its weights are not those recorded" if described else "its description was altered"
            )
            raise CorruptCacheError(f"{path} is damaged: {what}; train the module again")
        return weights


def module_tensors(module: torch.nn.Module) -> dict[str, Tensor]:
    """A module's state as separate CPU tensors, safe to store while it trains on."""
    return {
        name: value.detach().cpu().contiguous().clone()
        for name, value in module.state_dict().items()
    }
