"""Contrastive predictive coding: InfoNCE with a context network (Oord et al. 2018; equation 1)."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gim_stagewise.objectives.contract import Objective
from gim_stagewise.objectives.infonce import InfoNCE


class CPC(Objective):
    """InfoNCE whose contexts come from a network over embeddings, as do its gradients.

    Parameters
    ----------
    context : nn.Module
        Embeddings [sample, row, column, channel] to contexts of the same shape, none of which may
        know of rows below its own.
    infonce : InfoNCE
        With targets of their own: the embeddings.
    """

    def __init__(self, context: nn.Module, infonce: InfoNCE) -> None:
        super().__init__()
        self.context = context
        self.infonce = infonce

    def forward(
        self,
        z: Float[Tensor, "sample row *column channel"],
        *,
        generator: torch.Generator,
        labels: Int64[Tensor, " sample *step"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch."""
        loss: Tensor = self.infonce(torch.cat([self.context(z), z], -1), generator=generator)
        return loss
