"""InfoNCE on the embeddings of one module (paper, section 3, equations 3 and 4)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gim_stagewise.errors import ConfigError
from gim_stagewise.objectives.contract import Objective


class InfoNCE(Objective):
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
    targets : int
        Channels of a target, where that is not another embedding (equation 6: the outputs of a
        context network predict its input). They follow those of the embedding.
    prediction_steps : int
        K.
    negatives : int
        N.
    skip : int
        Rows between context and first target that are left out because they overlap.
    group : int, optional
        Samples that draw their negatives from one another, as those on one of several GPUs do; the
        loss is the mean over samples. By default all samples of a batch.
    window : int, optional
        Rows (steps) that contexts and targets are taken from, at a place drawn for each group of
        samples; all by default, and where there are no more. Negatives always come from all rows.
        Nothing is computed for pairs outside it (table 5, note a).
    """

    def __init__(
        self,
        channels: int,
        *,
        targets: int = 0,
        prediction_steps: int,
        negatives: int,
        skip: int = 1,
        group: int | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__()
        self.channels = channels
        self.negatives = negatives
        self.skip = skip
        self.group = group
        self.window = window
        # One W_k per step; drawn like the weights of a bias-free linear layer.
        bound = channels**-0.5
        shape = (prediction_steps, targets or channels, channels)
        weights = torch.empty(shape).uniform_(-bound, bound)
        self.W = nn.Parameter(weights)

    def forward(
        self,
        z: Float[Tensor, "sample row *column channel"],
        *,
        generator: torch.Generator,
        labels: Int64[Tensor, " sample"] | None = None,
    ) -> Float[Tensor, ""]:
        """The loss of a batch.

        Parameters
        ----------
        z : Tensor
            Embeddings of all rows of all samples of the batch: [sample, row, column, channel] of
            patch grids, [sample, step, channel] of sequences; with targets of their own, those in
            the last channels.
        generator : torch.Generator
            On the CPU, whatever device ``z`` is on, so that draws are the same everywhere.
        labels : Tensor, optional
            Not looked at.

        Returns
        -------
        Tensor
            A scalar of ``z``'s dtype.
        """
        loss = z.new_zeros(())
        for group in torch.split(z, self.group or len(z)):
            loss = loss + self._loss(group, generator) * (len(group) / len(z))
        return loss

    def _loss(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """The loss of samples that draw negatives from one another."""
        candidates = self._targets(z).flatten(0, -2)
        read = self._windowed(z, generator)
        loss = z.new_zeros(())
        for k, weight in enumerate(self.W, start=1):
            context, target = self.pairs(read, k)
            prediction = context @ weight.T  # W_k c
            drawn = torch.randint(
                len(candidates), (len(context), self.negatives), generator=generator
            )
            positive = (target * prediction).sum(1, keepdim=True)
            negative = drawn_scores(prediction, candidates, drawn.to(z.device))
            bag = torch.cat([positive, negative], dim=1)
            loss = loss - bag.log_softmax(dim=1)[:, 0].mean()
        return loss

    def pairs(
        self, z: Float[Tensor, "sample row *column channel"], k: int
    ) -> tuple[Float[Tensor, "pair channel"], Float[Tensor, "pair channel"]]:
        """Contexts and their targets for prediction step ``k``, by sample, row and column."""
        distance = k + self.skip
        context = z[:, :-distance, ..., : self.channels]
        target = self._targets(z)[:, distance:]
        return context.flatten(0, -2), target.flatten(0, -2)

    def _windowed(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """Rows that contexts and targets are taken from."""
        if self.window is None or self.window >= z.shape[1]:
            return z
        # Never as a number, so that the memory of a step can be counted without its values.
        start = torch.randint(z.shape[1] - self.window + 1, (1,), generator=generator)
        return z.index_select(1, (start + torch.arange(self.window)).to(z.device))

    def _targets(self, z: Tensor) -> Tensor:
        return z if z.shape[-1] == self.channels else z[..., self.channels :]


# With more candidates per negative than this, scores of all pairs cost more time than gathering
# those drawn (benchmarks/infonce.py; on two cores the two meet between 50 and 200).
MATRIX_CANDIDATES_PER_NEGATIVE = 100
# Negatives that are gathered at once.
GATHERED_BYTES = 16_000_000


def drawn_scores(
    prediction: Float[Tensor, "pair channel"],
    candidates: Float[Tensor, "candidate channel"],
    drawn: Int64[Tensor, "pair negative"],
) -> Float[Tensor, "pair negative"]:
    """Scores of the drawn candidates, without all of them ever gathered in memory.

    Few candidates: the matrix of all scores (its values are not kept for backward), from which
    the drawn ones are picked. Many: the drawn ones are gathered some pairs at a time, and again
    in backward.
    """
    if len(candidates) <= MATRIX_CANDIDATES_PER_NEGATIVE * drawn.shape[1]:
        return (prediction @ candidates.T).gather(1, drawn)
    scores: Tensor = _GatheredScores.apply(prediction, candidates, drawn)  # type: ignore[no-untyped-call]
    return scores


class _GatheredScores(torch.autograd.Function):
    """Dot products of each prediction with its drawn candidates; see `drawn_scores`."""

    @staticmethod
    def forward(ctx: Any, prediction: Tensor, candidates: Tensor, drawn: Tensor) -> Tensor:
        ctx.save_for_backward(prediction, candidates, drawn)
        parts = [
            torch.bmm(candidates[drawn[pairs]], prediction[pairs].unsqueeze(2)).squeeze(2)
            for pairs in _pieces(candidates, drawn)
        ]
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        prediction, candidates, drawn = ctx.saved_tensors
        to_prediction = torch.empty_like(prediction)
        to_candidates = torch.zeros_like(candidates)
        for pairs in _pieces(candidates, drawn):
            gathered = candidates[drawn[pairs]]
            to_prediction[pairs] = torch.bmm(gradient[pairs].unsqueeze(1), gathered).squeeze(1)
            torch.mul(gradient[pairs].unsqueeze(2), prediction[pairs].unsqueeze(1), out=gathered)
            to_candidates.index_add_(0, drawn[pairs].flatten(), gathered.flatten(0, 1))
        return to_prediction, to_candidates, None


def _pieces(candidates: Tensor, drawn: Tensor) -> list[slice]:
    """Pairs whose negatives are gathered together."""
    pair_bytes = drawn.shape[1] * candidates.shape[1] * candidates.element_size()
    step = max(1, GATHERED_BYTES // pair_bytes)
    return [slice(start, start + step) for start in range(0, len(drawn), step)]


def check_rows(
    rows: int, *, prediction_steps: int, skip: int, key: str, remedy: str = "smaller patches"
) -> None:
    """Refuse a grid that has too few rows for the farthest prediction.

    ``remedy`` is what would give it more.

    Raises
    ------
    ConfigError
        If no row lies ``prediction_steps + skip`` below another.
    """
    if prediction_steps + skip < rows:
        return
    most = rows - skip - 1
    advice = f"use {most} or less, or {remedy}" if most > 0 else f"use {remedy}"
    raise ConfigError(
        f"is {prediction_steps}, but the grid has {rows} rows: with skip = {skip} the farthest "
        f"target is {prediction_steps + skip} rows below its context; {advice}",
        key=key,
    )
