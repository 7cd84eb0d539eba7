"""Scores of contexts with their targets and negatives, and the gradients of these scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor

from gim_stagewise.windows import Span


@dataclass(frozen=True)
class Draw:
    """Rows of flattened embeddings that are compared for one prediction step.

    Parameters
    ----------
    step : int
        The prediction step, from 1.
    group : Span
        Rows that negatives come from.
    contexts : Tensor
        int64 [pair], on the CPU.
    bag : Tensor
        int64 [pair, 1 + negative]: of each pair's target, then of its negatives.
    """

    step: int
    group: Span
    contexts: Int64[Tensor, " pair"]
    bag: Int64[Tensor, "pair bag"]


# With more candidates per negative than this, scores of all pairs cost more time than gathering
# those drawn (benchmarks/infonce.py; on two cores the two meet between 50 and 200).
MATRIX_CANDIDATES_PER_NEGATIVE = 100
# Candidates that are gathered at once.
GATHERED_BYTES = 16_000_000


class Scores(torch.autograd.Function):
    """Scores of all draws, without all candidates ever gathered in memory.

    Gradients with respect to embeddings have one buffer, whether they are contexts or candidates;
    predictions are computed again in backward rather than kept.
    """

    @staticmethod
    def forward(ctx: Any, z: Tensor, weights: Tensor, draws: list[Draw]) -> tuple[Tensor, ...]:
        ctx.save_for_backward(z, weights)
        ctx.draws = draws
        return tuple(
            bag_scores(predictions(z, weights, draw), targets(z, weights), draw) for draw in draws
        )

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        z, weights = ctx.saved_tensors
        to_z, to_weights = torch.zeros_like(z), torch.zeros_like(weights)
        for draw, gradient in zip(ctx.draws, gradients, strict=True):
            to_prediction = bag_gradients(
                gradient,
                predictions(z, weights, draw),
                targets(z, weights),
                draw,
                targets(to_z, weights),
            )
            to_context = context_gradients(to_prediction, z, weights, draw, to_weights)
            contexts_of(to_z, weights).index_add_(0, draw.contexts.to(z.device), to_context)
        return to_z, to_weights, None


def contexts_of(z: Tensor, weights: Tensor) -> Float[Tensor, "row channel"]:
    """Channels of rows that are a context's; a view."""
    return z[:, : weights.shape[2]]


def targets(z: Tensor, weights: Tensor) -> Float[Tensor, "row channel"]:
    """Channels of rows that are a target's: the same, or those that follow; a view."""
    return z if z.shape[1] == weights.shape[2] else z[:, weights.shape[2] :]


def predictions(z: Tensor, weights: Tensor, draw: Draw) -> Float[Tensor, "pair channel"]:
    """W_k c of a draw's contexts."""
    context = contexts_of(z, weights).index_select(0, draw.contexts.to(z.device))
    return context @ weights[draw.step - 1].T


def context_gradients(
    to_prediction: Tensor, z: Tensor, weights: Tensor, draw: Draw, to_weights: Tensor
) -> Float[Tensor, "pair channel"]:
    """Gradients of a draw's contexts; those of its projection are added to ``to_weights``."""
    context = contexts_of(z, weights).index_select(0, draw.contexts.to(z.device))
    to_weights[draw.step - 1] += to_prediction.T @ context
    return to_prediction @ weights[draw.step - 1]


def bag_scores(
    prediction: Float[Tensor, "pair channel"], candidates: Float[Tensor, "row channel"], draw: Draw
) -> Float[Tensor, "pair bag"]:
    """Dot products of predictions with their bags.

    Few candidates: the matrix of all scores, from which the drawn ones are picked. Many: the drawn
    ones are gathered, some pairs at a time.
    """
    bag = draw.bag.to(prediction.device)
    if _takes_matrix(draw):
        return (prediction @ candidates[draw.group.slice].T).gather(1, bag - draw.group.start)
    parts = [
        torch.bmm(_gathered(candidates, bag[pairs]), prediction[pairs].unsqueeze(2)).squeeze(2)
        for pairs in _pieces(candidates, bag)
    ]
    return torch.cat(parts)


def bag_gradients(
    gradient: Float[Tensor, "pair bag"],
    prediction: Float[Tensor, "pair channel"],
    candidates: Float[Tensor, "row channel"],
    draw: Draw,
    to_candidates: Float[Tensor, "row channel"],
) -> Float[Tensor, "pair channel"]:
    """Gradients of predictions; those of candidates are added to ``to_candidates``."""
    bag = draw.bag.to(prediction.device)
    if _takes_matrix(draw):
        group = draw.group.slice
        matrix = prediction.new_zeros(len(prediction), len(draw.group))
        matrix.scatter_add_(1, bag - draw.group.start, gradient)
        to_candidates[group] += matrix.T @ prediction
        return matrix @ candidates[group]
    to_prediction = torch.empty_like(prediction)
    for pairs in _pieces(candidates, bag):
        gathered = _gathered(candidates, bag[pairs])
        to_prediction[pairs] = torch.bmm(gradient[pairs].unsqueeze(1), gathered).squeeze(1)
        torch.mul(gradient[pairs].unsqueeze(2), prediction[pairs].unsqueeze(1), out=gathered)
        to_candidates.index_add_(0, bag[pairs].flatten(), gathered.flatten(0, 1))
    return to_prediction


def _gathered(candidates: Tensor, bag: Tensor) -> Float[Tensor, "pair bag channel"]:
    """Candidates of bags; whole rows are copied faster so than by an index of two axes."""
    return candidates.index_select(0, bag.flatten()).reshape(*bag.shape, -1)


def _takes_matrix(draw: Draw) -> bool:
    return len(draw.group) <= MATRIX_CANDIDATES_PER_NEGATIVE * (draw.bag.shape[1] - 1)


def _pieces(candidates: Tensor, bag: Tensor) -> list[slice]:
    """Pairs whose candidates are gathered together."""
    pair_bytes = bag.shape[1] * candidates.shape[1] * candidates.element_size()
    step = max(1, GATHERED_BYTES // pair_bytes)
    return [slice(start, start + step) for start in range(0, len(bag), step)]
