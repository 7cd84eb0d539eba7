"""Supervised objectives, to compare with (paper, table 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gim_stagewise.objectives.contract import NO_LABEL, Objective


class CrossEntropy(Objective):
    """Cross-entropy of a linear classifier on the mean of a sample's embeddings.

    Where each step of a sequence has a label, embeddings are averaged over the steps that share
    one, and classified one by one.

    Parameters
    ----------
    channels : int
        Channels of an embedding.
    classes : int
    """

    def __init__(self, channels: int, *, classes: int) -> None:
        super().__init__()
        self.channels = channels
        self.classifier = nn.Linear(channels, classes)

    def forward(
        self,
        z: Float[Tensor, "sample *cell channel"],
        *,
        generator: torch.Generator,
        labels: Int64[Tensor, " sample *step"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch; nothing is drawn.

        Raises
        ------
        ValueError
            If there are no labels.
        """
        if labels is None:
            raise ValueError("a supervised objective needs labels")
        # What follows an embedding's own channels are targets of another objective.
        own = z[..., : self.channels].flatten(1, -2)
        if labels.ndim == 1:
            return F.cross_entropy(self.classifier(own.mean(1)), labels)
        steps = F.adaptive_avg_pool1d(own.movedim(1, 2), labels.shape[1]).movedim(1, 2)
        return F.cross_entropy(
            self.classifier(steps).flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL
        )
