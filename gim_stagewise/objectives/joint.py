"""Objectives of several modules that are trained in one step."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gim_stagewise.objectives.contract import Objective


class Joint(Objective):
    """One objective for each observed module of a `gim_stagewise.models.Stack`.

    Parameters
    ----------
    parts : sequence of Objective
        In the order in which the stack gives what they see.
    shapes : sequence of tuple of int
        What each sees of one row, the channel last.
    """

    def __init__(self, parts: Sequence[Objective], shapes: Sequence[tuple[int, ...]]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.shapes = tuple(shapes)

    def forward(
        self,
        z: Float[Tensor, "sample *grid feature"],
        *,
        generator: torch.Generator,
        labels: Int64[Tensor, " sample *step"] | None = None,
    ) -> Float[Tensor, " objective"]:
        """The losses of a batch, one for each objective."""
        seen = torch.split(z, [math.prod(shape) for shape in self.shapes], dim=-1)
        losses = [
            part(own.reshape(*own.shape[:-1], *shape), generator=generator, labels=labels)
            for part, own, shape in zip(self.parts, seen, self.shapes, strict=True)
        ]
        return torch.stack(losses)
