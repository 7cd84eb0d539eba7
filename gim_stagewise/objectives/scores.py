"""Scores of contexts with their targets and negatives, and the gradients of these scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

from gim_stagewise.objectives.rows import add_weighted_rows, row_products
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


class Scores(torch.autograd.Function):
    """Scores of all draws; candidates are read where they lie, and not copied into bags.

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
        # An embedding bag would copy what has strides itself, once for each draw.
        candidates = targets(z, weights).contiguous()
        for draw, gradient in zip(ctx.draws, gradients, strict=True):
            to_prediction = bag_gradients(
                gradient,
                predictions(z, weights, draw),
                candidates,
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
    """Dot products of predictions with their bags."""
    bag = draw.bag.to(prediction.device)
    return row_products(prediction, _pairs(bag), candidates, bag.flatten()).view(bag.shape)


def bag_gradients(
    gradient: Float[Tensor, "pair bag"],
    prediction: Float[Tensor, "pair channel"],
    candidates: Float[Tensor, "row channel"],
    draw: Draw,
    to_candidates: Float[Tensor, "row channel"],
) -> Float[Tensor, "pair channel"]:
    """Gradients of predictions; those of candidates are added to ``to_candidates``."""
    bag = draw.bag.to(prediction.device)
    rows = bag.flatten() - draw.group.start
    own = to_candidates[draw.group.slice]
    add_weighted_rows(own, rows, prediction, _pairs(bag), gradient.flatten())
    return functional.embedding_bag(bag, candidates, per_sample_weights=gradient, mode="sum")


def _pairs(bag: Int64[Tensor, "pair bag"]) -> Int64[Tensor, " entry"]:
    """The pair of each entry of the flattened bags."""
    return torch.arange(len(bag), device=bag.device).repeat_interleave(bag.shape[1])
