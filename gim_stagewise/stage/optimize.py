"""How weights change: the optimizer, and averages of them."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gim_stagewise.config import TrainConfig
from gim_stagewise.models import Stack
from gim_stagewise.objectives import Joint, Objective


def make_optimizer(
    module: nn.Module, objective: Objective, trains: Sequence[TrainConfig]
) -> torch.optim.Optimizer:
    """The optimizer of a module with its objective's projections, or of several.

    It has a group of parameters for each module, whose tables are given.
    """
    groups = [
        {"params": parameters, "lr": train.lr}
        for parameters, train in zip(_parameters(module, objective), trains, strict=True)
    ]
    # Fused: the default makes copies of all parameters within a step.
    return torch.optim.Adam(groups, fused=True)


def _parameters(module: nn.Module, objective: Objective) -> list[list[nn.Parameter]]:
    """Parameters by module, with those of its objective."""
    if not isinstance(module, Stack) or not isinstance(objective, Joint):
        return [[*module.parameters(), *objective.parameters()]]
    groups = [list(part.parameters()) for part in module.parts]
    for number, part in zip(sorted(module.observed), objective.parts, strict=True):
        groups[number] += part.parameters()
    return groups


class WeightAverage:
    """Exponential moving averages of all weights, which forget faster at first.

    After n steps the decay is min(decay, (1 + n) / (10 + n)), as in TensorFlow's
    ExponentialMovingAverage, so that averages do not dwell on the initial weights.

    Parameters
    ----------
    module : nn.Module
    objective : Objective
        Both are copied.
    decay : float

    Attributes
    ----------
    module, objective
        With averaged weights, without gradients.
    """

    def __init__(self, module: nn.Module, objective: Objective, decay: float) -> None:
        self._decay = decay
        self.module, self.objective = copy.deepcopy((module, objective))
        for part in (self.module, self.objective):
            part.requires_grad_(False)

    @torch.no_grad()
    def update(self, module: nn.Module, objective: Objective, *, steps: int) -> None:
        """Take in the weights after so many steps."""
        averages: list[Tensor] = [*self.module.parameters(), *self.objective.parameters()]
        weights: list[Tensor] = [*module.parameters(), *objective.parameters()]
        decay = min(self._decay, (1 + steps) / (10 + steps))
        torch._foreach_lerp_(averages, weights, 1 - decay)
