"""What a training objective is."""

from __future__ import annotations

from abc import abstractmethod

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn


class Objective(nn.Module):
    """A loss with its own projections, which are discarded once the module is frozen."""

    @abstractmethod
    def forward(
        self,
        z: Float[Tensor, "sample *cell channel"],
        *,
        generator: torch.Generator,
        labels: Int64[Tensor, " sample *step"] | None = None,
    ) -> Tensor:
        """The loss of a batch, or losses of several modules.

        Parameters
        ----------
        z : Tensor
            What `gim_stagewise.models.embed` gives of all rows of all samples.
        generator : torch.Generator
            For what is drawn; on the CPU, so that draws are the same on every device.
        labels : Tensor, optional
            Classes of the samples, or [sample, step] of their steps, on ``z``'s device, for
            objectives that want them.

        Returns
        -------
        Tensor
            In nats: a scalar, or [objective] where there are several, whose sum is minimised.
        """
