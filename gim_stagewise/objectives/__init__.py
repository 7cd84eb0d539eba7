"""Training objectives of a module, each with its own projections."""

from __future__ import annotations

import torch

from gim_stagewise.config import ObjectiveConfig
from gim_stagewise.objectives.infonce import InfoNCE, check_rows
from gim_stagewise.seeds import derive_seed

__all__ = ["InfoNCE", "build_objective", "check_rows"]


def build_objective(
    config: ObjectiveConfig, *, channels: int, targets: int = 0, seed: int, index: int
) -> InfoNCE:
    """The objective of module ``index`` with seeded projections.

    ``channels`` and ``targets`` are those of `InfoNCE`.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "projections", index))
        return InfoNCE(
            channels,
            targets=targets,
            prediction_steps=config.prediction_steps,
            negatives=config.negatives,
            skip=config.skip,
        )
