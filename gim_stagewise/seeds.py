"""Random numbers without random state.

Every draw (initial weights, order of samples, negatives, augmentation, dropout) comes
from a generator seeded by *what it is for*: the pipeline's seed and a path such as
``("negatives", stage, step)``. Nothing has to be saved to resume, and the same draw can
be made again by any process, in any order.
"""

from __future__ import annotations

import hashlib


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
