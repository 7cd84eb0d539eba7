"""Supervised objectives, to compare with (paper, table 1)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import einsum
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gim_stagewise.labels import NO_LABEL
from gim_stagewise.objectives.contract import Objective


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
        shares = _shares(own.shape[1], labels.shape[1]).to(own)
        steps = einsum(shares, own, "label step, sample step channel -> sample label channel")
        return F.cross_entropy(
            self.classifier(steps).flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL
        )


def _shares(steps: int, labels: int) -> Float[Tensor, "label step"]:
    """Means over the steps that share a label, as a matrix.

    What ``F.adaptive_avg_pool1d`` computes, whose gradient is not repeatable on a GPU.
    """
    place, label = torch.arange(steps), torch.arange(labels)[:, None]
    first, end = label * steps // labels, ((label + 1) * steps + labels - 1) // labels
    return ((place >= first) & (place < end)) / (end - first)
