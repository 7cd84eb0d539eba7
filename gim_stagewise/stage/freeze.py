"""Frozen modules, and the one forward that all of them go through.

Float results depend on the size of the batch an operation sees and on the number of threads
inside it. So every forward of a frozen module, whoever asks for it, works in pieces of exactly
``extract.batch`` rows, the last one padded, with ``extract.threads`` threads. Both are part of
the *numerics* record; "bit-identical" always means: under equal numerics.
"""

from __future__ import annotations

import hashlib
import os
import platform
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from gim_stagewise.cache import codec_implementation
from gim_stagewise.config import CacheConfig, ExtractConfig
from gim_stagewise.errors import ConfigError, StaleCacheError
from gim_stagewise.models import pool
from gim_stagewise.seeds import seeded

_one_forward_at_a_time = threading.Lock()
# Of a stateful module, which takes several times its input; part of what decides its bits.
STEPS_AT_ONCE = 1024


class FrozenModule(nn.Module):
    """A module in evaluation mode without gradients, for good.

    Parameters
    ----------
    module : nn.Module
        Taken over: it is moved to ``device`` and its parameters stop requiring gradients.
    device : torch.device
    """

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        super().__init__()
        module.eval()
        module.requires_grad_(False)
        self.module = module.to(device)
        self.device = device
        super().train(False)

    def train(self, mode: bool = True) -> FrozenModule:
        """Refused.

        Raises
        ------
        RuntimeError
            If ``mode`` is true: a frozen module has no train mode.
        """
        if mode:
            raise RuntimeError("a frozen module has no train mode; train a copy of its weights")
        return self

    def requires_grad_(self, requires_grad: bool = True) -> FrozenModule:
        """Refused, like `train`."""
        if requires_grad:
            raise RuntimeError("a frozen module has no gradients; train a copy of its weights")
        return self

    @torch.no_grad()
    def forward(
        self,
        rows: Float[Tensor, "piece channel *space"],
        trim: tuple[slice, ...] | None = None,
    ) -> tuple[Tensor, Float[Tensor, "piece *cell embedding"]]:
        """Activations and their embeddings for one piece of rows, on the module's device.

        Of what is computed, ``trim`` says for each axis of space what is kept.
        """
        z = self.module(rows.to(self.device))
        if trim is not None:
            z = z[(slice(None), slice(None), *trim)].contiguous()
        return z, self.embeddings(z)

    @torch.no_grad()
    def embeddings(
        self, z: Float[Tensor, "piece channel *space"]
    ) -> Float[Tensor, "piece *cell embedding"]:
        """Embeddings of activations."""
        return pool(self.module, z).float()

    @torch.no_grad()
    def step(
        self, rows: Float[Tensor, "lane channel time"], states: Float[Tensor, "lane state"]
    ) -> tuple[Tensor, Tensor]:
        """Activations of a stateful module from where its states are, and the states after."""
        z, after = self.module(rows.to(self.device), states.to(self.device))
        return z, after

    @torch.no_grad()
    def initial_state(self) -> Float[Tensor, " state"]:
        """The state of a stateful module before a sequence begins, on the CPU."""
        module: Any = self.module
        state: Tensor = module.initial_state(1)[0].cpu()
        return state


def frozen_forward(
    frozen: FrozenModule,
    rows: Float[Tensor, "row channel *space"],
    config: ExtractConfig,
    *,
    keep: Callable[[Tensor], Tensor] | None = None,
    trim: tuple[slice, ...] | None = None,
) -> tuple[Float[Tensor, "row out_channel *out_space"], Float[Tensor, "row *cell embedding"]]:
    """The one forward of frozen modules.

    Parameters
    ----------
    frozen : FrozenModule
    rows : Tensor
        float32, any number of rows, at least one. Which rows come together in a piece is decided
        by their order here, so callers hand over whole blocks.
    config : ExtractConfig
        Piece size and threads.
    keep : callable, optional
        Makes of a piece's activations, on the module's device, what is kept of them; all of them
        by default. What it gets is its own to change.
    trim : tuple of slice, optional
        Along each axis of space, the outputs that are not of a halo; all by default.

    Returns
    -------
    (Tensor, Tensor)
        Activations (what ``keep`` makes of them) and embeddings on the CPU, a row for each input
        row; float32.
    """
    outputs: list[Tensor] = []
    # The thread count belongs to the process: two threads of one must not set it at once.
    with _one_forward_at_a_time, intra_op_threads(config.threads):
        for start in range(0, len(rows), config.batch):
            piece = rows[start : start + config.batch]
            missing = config.batch - len(piece)
            if missing:
                piece = torch.cat([piece, piece.new_zeros(missing, *piece.shape[1:])])
            own = slice(start, start + config.batch - missing)
            z, pooled = (part[: config.batch - missing] for part in frozen(piece, trim))
            kept = (z if keep is None else keep(z), pooled)
            if not outputs:
                outputs = [k.new_empty(len(rows), *k.shape[1:], device="cpu") for k in kept]
            for output, part in zip(outputs, kept, strict=True):
                output[own] = part
    activations, embeddings = outputs
    return activations, embeddings


def frozen_step(
    frozen: FrozenModule,
    rows: Float[Tensor, "lane channel time"],
    states: Float[Tensor, "lane state"],
    config: ExtractConfig,
) -> tuple[Float[Tensor, "lane out_channel time"], Float[Tensor, "lane state"]]:
    """The one forward of stateful frozen modules: always of all lanes, `STEPS_AT_ONCE` at a time.

    Returns
    -------
    (Tensor, Tensor)
        Activations and the states after them, float32 on the CPU.
    """
    parts = []
    with _one_forward_at_a_time, intra_op_threads(config.threads):
        for start in range(0, rows.shape[2], STEPS_AT_ONCE):
            z, states = frozen.step(rows[:, :, start : start + STEPS_AT_ONCE], states)
            parts.append(z.cpu())
    return torch.cat(parts, dim=2), states.cpu()


@contextmanager
def intra_op_threads(count: int) -> Iterator[None]:
    """Run operations with ``count`` threads inside each."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve_device(name: str) -> torch.device:
    """``auto`` (CUDA where there is a GPU), ``cpu`` or ``cuda``; makes GPU results repeatable.

    Raises
    ------
    ConfigError
        If CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("is 'cuda', but PyTorch finds no GPU; use auto or cpu", key="--device")
    device = torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False
    if device.type == "cuda":
        # Gradients of embeddings that are used several times are summed with index_add_, which on
        # a GPU is repeatable only so. cuBLAS reads its variable when it starts.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    return device


def numerics(device: torch.device, config: ExtractConfig, cache: CacheConfig) -> dict[str, Any]:
    """What the bits of a frozen module's outputs, and their encoded form, depend on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "threads": config.threads,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "arithmetic": _arithmetic(device, config.threads),
        "piece": config.batch,
        "deterministic": torch.backends.cudnn.deterministic,
        "tf32": torch.backends.cuda.matmul.allow_tf32 or torch.backends.cudnn.allow_tf32,
        "codec": codec_implementation(cache.codec),
    }


@lru_cache
def _arithmetic(device: torch.device, threads: int) -> str:
    """Hash of a fixed convolution and matrix product, as this machine computes them.

    Libraries below PyTorch choose their code by what they find of the processor, and do not say so.
    It is that of the first call in a process.
    """
    draw = torch.Generator().manual_seed(0)
    rows, kernel, matrix = (
        torch.randn(*shape, generator=draw, dtype=torch.float32, device="cpu").to(device)
        for shape in ((4, 128, 8, 8), (64, 128, 3, 3), (64, 256))
    )
    plain = torch.autocast(device.type, enabled=False)
    with torch.no_grad(), plain, _one_forward_at_a_time, intra_op_threads(threads):
        outputs = functional.conv2d(rows, kernel, padding=1)
        products = outputs.mean((2, 3)) @ matrix
    digest = hashlib.sha256()
    for values in (outputs, products):
        digest.update(values.cpu().contiguous().numpy().data)
    return digest.hexdigest()[:16]


def training_numerics(device: torch.device) -> dict[str, Any]:
    """What the bits of trained weights depend on, besides their recipe."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "arithmetic": _arithmetic(device, torch.get_num_threads()),
    }


def check_numerics(
    recorded: dict[str, Any], device: torch.device, config: ExtractConfig, cache: CacheConfig
) -> None:
    """Refuse to compute under other numerics than those recorded.

    Raises
    ------
    StaleCacheError
        If this process would compute, or encode, other bits.
    """
    own = numerics(device, config, cache)
    differing = [
        f"{key} {recorded.get(key)} → {own[key]}" for key in own if own[key] != recorded.get(key)
    ]
    if differing:
        raise StaleCacheError(
            f"a worker on {platform.node()} would compute other bits than the cache records: "
            + "; ".join(differing)
        )


def training_digest(module: nn.Module, in_shape: tuple[int, ...]) -> str:
    """Hash of a fresh module's initial state, and of a seeded forward and backward in train mode.

    It tells whether code that changed would train differently, where frozen results are the same
    (another initialisation, another dropout). The module is on the CPU, and used up.
    """
    digest = hashlib.sha256()
    module.train()
    with intra_op_threads(1), seeded(0):
        pooled = pool(module, module(torch.randn(2, *in_shape)))
        scalar: Tensor = (pooled * torch.randn_like(pooled)).sum()
        scalar.backward()  # type: ignore[no-untyped-call]
    for name, value in module.state_dict(keep_vars=True).items():
        gradient = None if value.grad is None else value.grad
        for tensor in (value.detach(), gradient):
            digest.update(f"{name}:{None if tensor is None else tuple(tensor.shape)};".encode())
            if tensor is not None:
                digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    digest.update(pooled.detach().contiguous().numpy().data)
    return digest.hexdigest()


def behaviour_digest(frozen: FrozenModule, in_shape: tuple[int, ...]) -> str:
    """Hash of a module's outputs on a fixed input of two rows.

    It tells a change of code that leaves the results alone from one that does not.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, *in_shape, generator=generator)
    z, pooled = frozen_forward(frozen, rows, ExtractConfig(batch=2, threads=1))
    digest = hashlib.sha256()
    for values in (z, pooled):
        digest.update(str(tuple(values.shape)).encode())
        digest.update(values.contiguous().numpy().data)
    return digest.hexdigest()
