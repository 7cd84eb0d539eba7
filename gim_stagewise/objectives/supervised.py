"""Supervised objectives, to compare with (paper, table 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gim_stagewise.objectives.contract import Objective


class CrossEntropy(Objective):
    """Cross-entropy of a linear classifier on the mean of a sample's embeddings.

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
        labels: Int64[Tensor, " sample"] | None = None,
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
        mean = z[..., : self.channels].flatten(1, -2).mean(1)
        return F.cross_entropy(self.classifier(mean), labels)
