"""InfoNCE on the embeddings of one module (paper, section 3, equations 3 and 4)."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn

from gim_stagewise.errors import ConfigError
from gim_stagewise.objectives.contract import Objective
from gim_stagewise.objectives.scores import Draw, Scores
from gim_stagewise.windows import Span


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
        labels: Int64[Tensor, " sample *step"] | None = None,
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
        draws = self.draws(z.shape[:-1], generator)
        flat = z.flatten(0, -2)
        scores = Scores.apply(flat, self.W, draws)  # type: ignore[no-untyped-call]
        return self.loss(scores, draws)

    def draws(self, shape: Sequence[int], generator: torch.Generator) -> list[Draw]:
        """Which rows of flattened embeddings are compared, for each group and prediction step.

        Parameters
        ----------
        shape : sequence of int
            Of the embeddings, without channels: samples, rows, and columns if there are any.
        generator : torch.Generator
        """
        samples, rows, columns = shape[0], shape[1], math.prod(shape[2:])
        each = rows * columns
        found = []
        for first in range(0, samples, self.group or samples):
            count = min(self.group or samples, samples - first)
            own = Span(first * each, (first + count) * each)
            # Numbers of rows by sample, row and column, of those in the window.
            numbers = torch.arange(own.start, own.stop).reshape(count, rows, columns)
            numbers = self._windowed(numbers, generator)
            for k in range(1, len(self.W) + 1):
                distance = k + self.skip
                context = numbers[:, :-distance].flatten()
                positive = numbers[:, distance:].flatten()
                size = (len(context), self.negatives)
                drawn = torch.randint(len(own), size, generator=generator)
                bag = torch.cat([positive[:, None], drawn + own.start], dim=1)
                found.append(Draw(k, own, context, bag))
        return found

    def loss(
        self, scores: Sequence[Float[Tensor, "pair bag"]], draws: Sequence[Draw]
    ) -> Float[Tensor, ""]:
        """The loss of a batch by the scores of all draws: equation 4, the mean over groups."""
        samples = sum(len(draw.group) for draw in draws if draw.step == 1)
        loss = scores[0].new_zeros(())
        for own, draw in zip(scores, draws, strict=True):
            share = len(draw.group) / samples
            loss = loss - own.log_softmax(dim=1)[:, 0].mean() * share
        return loss

    def _windowed(
        self, numbers: Int64[Tensor, "sample row column"], generator: torch.Generator
    ) -> Tensor:
        """Rows that contexts and targets are taken from."""
        rows = numbers.shape[1]
        if self.window is None or self.window >= rows:
            return numbers
        # Never as a number, so that the memory of a step can be counted without its values.
        start = torch.randint(rows - self.window + 1, (1,), generator=generator)
        return numbers.index_select(1, start + torch.arange(self.window))


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
