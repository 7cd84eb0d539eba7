"""InfoNCE on the embeddings of one module (paper, section 3, equations 3 and 4)."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gim_stagewise.errors import ConfigError


class InfoNCE(nn.Module):
    r"""Module-local InfoNCE with a log-bilinear score.

    For every prediction step k = 1 … K, the embedding c of row i is the context and the
    embedding of row i + k + skip in the same column its target: with ``skip = 1`` the row that
    overlaps the context is left out (section 4.1). Each target stands in a bag with N negatives,
    drawn uniformly with replacement from all embeddings of the batch:

    .. math:: \mathcal{L} = -\sum_k \mathbb{E}\left[\log
              \frac{f_k(z_{i+k+skip}, c_i)}{\sum_{z \in X} f_k(z, c_i)}\right],\quad
              f_k(z, c) = \exp(z^\top W_k\, c)

    The bag X holds the positive and the N negatives. The loss is in nats and sums over k, as
    equation 4 does; chance level is K · log(N + 1).

    Parameters
    ----------
    channels : int
        Channels of an embedding.
    prediction_steps : int
        K.
    negatives : int
        N.
    skip : int
        Rows between context and first target that are left out because they overlap.
    """

    def __init__(
        self, channels: int, *, prediction_steps: int, negatives: int, skip: int = 1
    ) -> None:
        super().__init__()
        self.negatives = negatives
        self.skip = skip
        # One W_k per step; drawn like the weights of a bias-free linear layer.
        bound = channels**-0.5
        weights = torch.empty(prediction_steps, channels, channels).uniform_(-bound, bound)
        self.W = nn.Parameter(weights)

    def forward(
        self,
        z: Float[Tensor, "sample row column channel"],
        *,
        generator: torch.Generator,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Parameters
        ----------
        z : Tensor
            Embeddings of all patches of all samples of the batch.
        generator : torch.Generator
            On the CPU, whatever device ``z`` is on, so that draws are the same everywhere.

        Returns
        -------
        Tensor
            A scalar of ``z``'s dtype.
        """
        candidates = z.flatten(0, 2)
        loss = z.new_zeros(())
        for k, weight in enumerate(self.W, start=1):
            context, target = self.pairs(z, k)
            prediction = context @ weight.T  # W_k c
            drawn = torch.randint(
                len(candidates), (len(context), self.negatives), generator=generator
            )
            positive = (target * prediction).sum(1, keepdim=True)
            negative = (prediction @ candidates.T).gather(1, drawn.to(z.device))
            bag = torch.cat([positive, negative], dim=1)
            loss = loss - bag.log_softmax(dim=1)[:, 0].mean()
        return loss

    def pairs(
        self, z: Float[Tensor, "sample row column channel"], k: int
    ) -> tuple[Float[Tensor, "pair channel"], Float[Tensor, "pair channel"]]:
        """Contexts and their targets for prediction step ``k``, by sample, row and column."""
        distance = k + self.skip
        return z[:, :-distance].flatten(0, 2), z[:, distance:].flatten(0, 2)


def check_rows(rows: int, *, prediction_steps: int, skip: int, key: str) -> None:
    """Refuse a grid that has too few rows for the farthest prediction.

    Raises
    ------
    ConfigError
        If no row lies ``prediction_steps + skip`` below another.
    """
    if prediction_steps + skip < rows:
        return
    most = rows - skip - 1
    advice = f"use {most} or less, or smaller patches" if most > 0 else "use smaller patches"
    raise ConfigError(
        f"is {prediction_steps}, but the grid has {rows} rows: with skip = {skip} the farthest "
        f"target is {prediction_steps + skip} rows below its context; {advice}",
        key=key,
    )
