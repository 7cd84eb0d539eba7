"""Random numbers without random state.

Every draw (initial weights, order of samples, negatives, augmentation, dropout) comes
from a generator seeded by *what it is for*: the pipeline's seed and a path such as
``("negatives", stage, step)``. Nothing has to be saved to resume, and the same draw can
be made again by any process, in any order.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *path: str | int) -> int:
    """A seed for one purpose, independent of those for all other purposes.

    Parameters
    ----------
    seed : int
        The pipeline's seed.
    *path : str or int
        What the numbers are for, for example ``"negatives", stage, step``.

    Returns
    -------
    int
        In ``[0, 2**63)``, as accepted by ``torch.Generator.manual_seed`` and NumPy.
    """
    text = "\x1f".join([str(seed), *(f"{type(part).__name__}:{part}" for part in path)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Seed PyTorch's global generators inside, and leave them as they were.

    For code that takes no generator: initial weights, dropout.

    Parameters
    ----------
    seed : int
        As of `derive_seed`.
    device : torch.device, optional
        A GPU whose generator is meant too.
    """
    import torch

    on_gpu = device is not None and device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if on_gpu else []):
        # Not torch.manual_seed: it seeds GPUs, and formats a traceback where none is in use.
        torch.default_generator.manual_seed(seed)
        if on_gpu:
            torch.cuda.manual_seed(seed)
        yield
