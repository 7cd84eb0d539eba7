"""Training objectives of a module, each with its own projections."""

from __future__ import annotations

from gim_stagewise.config import ObjectiveConfig
from gim_stagewise.objectives.contract import Objective
from gim_stagewise.objectives.cpc import CPC
from gim_stagewise.objectives.infonce import InfoNCE, check_rows
from gim_stagewise.objectives.joint import Joint
from gim_stagewise.objectives.streamed import Parts, streamed_gradients, streamed_loss
from gim_stagewise.objectives.supervised import CrossEntropy
from gim_stagewise.seeds import derive_seed, seeded

__all__ = [
    "CPC",
    "CrossEntropy",
    "InfoNCE",
    "Joint",
    "Objective",
    "Parts",
    "build_objective",
    "check_rows",
    "streamed_gradients",
    "streamed_loss",
]


def build_objective(
    config: ObjectiveConfig, *, channels: int, targets: int = 0, seed: int, index: int
) -> InfoNCE:
    """The InfoNCE of module ``index`` with seeded projections.

    ``channels`` and ``targets`` are those of `InfoNCE`.
    """
    with seeded(derive_seed(seed, "projections", index)):
        return InfoNCE(
            channels,
            targets=targets,
            prediction_steps=config.prediction_steps,
            negatives=config.negatives,
            skip=config.skip,
            group=config.negatives_group,
            window=config.window,
        )
