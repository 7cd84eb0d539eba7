"""InfoNCE over embeddings that are never all in memory, exact.

In dense encoding the embeddings of a batch can be larger than anything else in a step. Here they
come in parts, which are computed as often as they are wanted: for the contexts, whose rows are few
where there is a window; for the scores, part by part of the candidates; for the gradients of the
contexts; and at last with a graph, for those of the module. What is kept is the contexts, the
scores, and the predictions of all contexts; the price is two forwards more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor
from torch._subclasses import FakeTensor

from gim_stagewise.objectives.infonce import InfoNCE
from gim_stagewise.objectives.rows import add_weighted_rows, row_products
from gim_stagewise.objectives.scores import Draw, contexts_of, targets
from gim_stagewise.windows import Span

Numbers = NDArray[np.int64]
# Embeddings of a part, flattened: [row, channel].
Embed = Callable[[int], Float[Tensor, "row channel"]]


@dataclass(frozen=True)
class Parts:
    """Embeddings of a batch in parts.

    Parameters
    ----------
    embed : callable
        Gives those of a part by its number, the same at every call.
    spans : sequence of Span
        Rows of each part among all, in order.
    only : sequence of int
        Parts to visit; all, unless memory is counted.
    """

    embed: Embed
    spans: Sequence[Span]
    only: Sequence[int]

    @torch.no_grad()
    def __iter__(self) -> Iterator[tuple[Span, Tensor]]:
        """Each part without a graph."""
        for number in self.only:
            yield self.spans[number], self.embed(number)


class _Plan:
    """A draw with its bags' rows in order, so that those of a part lie together."""

    def __init__(self, draw: Draw) -> None:
        self.step = draw.step
        self.contexts = _values(draw.contexts, draw.group)
        bag = _values(draw.bag, draw.group)
        self.shape = bag.shape
        self._entries: Numbers = np.argsort(bag, axis=None, kind="stable")
        self._rows: Numbers = bag.flatten()[self._entries]

    def of(self, part: Span, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        """Entries of the flattened bags whose rows are in a part, their pairs, and rows in it."""
        start, stop = np.searchsorted(self._rows, [part.start, part.stop])
        own = slice(int(start), int(stop))
        entries = torch.from_numpy(self._entries[own]).to(device)
        rows = torch.from_numpy(self._rows[own] - part.start).to(device)
        return entries, entries // self.shape[1], rows


def _values(rows: Tensor, group: Span) -> Numbers:
    """Row numbers; any of the group where memory is counted, and there are no values."""
    if isinstance(rows, FakeTensor):
        any_rows = np.random.default_rng(0).integers(group.start, group.stop, rows.numel())
        return np.sort(any_rows).reshape(rows.shape)
    return rows.numpy()


def streamed_loss(
    objective: InfoNCE, parts: Parts, shape: Sequence[int], generator: torch.Generator
) -> Float[Tensor, ""]:
    """The loss that `InfoNCE` gives for all embeddings, without any gradient.

    Parameters
    ----------
    objective : InfoNCE
    parts : Parts
    shape : sequence of int
        Of all embeddings, without channels.
    generator : torch.Generator
    """
    streamed = _Streamed(objective, parts, shape, generator)
    with torch.no_grad():
        return objective.loss(streamed.scores(), streamed.draws)


def streamed_gradients(
    objective: InfoNCE,
    parts: Parts,
    shape: Sequence[int],
    generator: torch.Generator,
    *,
    backward: Callable[[int, Callable[[Tensor], Tensor]], None],
) -> Float[Tensor, ""]:
    """The loss, its gradients added to those of the objective and handed on to the module.

    Parameters are those of `streamed_loss`, and ``backward``, which is called with the number of
    each part and with what makes of its embeddings [row, channel] their gradient.
    """
    streamed = _Streamed(objective, parts, shape, generator)
    loss, gradients = streamed.loss()
    to_context = streamed.context_gradients(gradients)
    for number in parts.only:
        gradient_of = partial(
            streamed.part_gradient,
            span=parts.spans[number],
            gradients=gradients,
            to_contexts=to_context,
        )
        backward(number, gradient_of)
    return loss


class _Streamed:
    def __init__(
        self,
        objective: InfoNCE,
        parts: Parts,
        shape: Sequence[int],
        generator: torch.Generator,
    ) -> None:
        self._objective, self._parts = objective, parts
        self._weights = objective.W.detach()
        self.draws = objective.draws(shape, generator)
        self._plans = [_Plan(draw) for draw in self.draws]
        # Rows that are the context of any pair, in order.
        self._rows: Numbers = np.unique(np.concatenate([plan.contexts for plan in self._plans]))
        self._contexts = self._weights.new_empty(len(self._rows), self._weights.shape[2])
        for span, z in parts:
            own, rows = self._context_rows(span)
            self._contexts[own] = contexts_of(z, self._weights).index_select(0, rows)

    def _context_rows(self, part: Span) -> tuple[slice, Tensor]:
        """Contexts of a part, and their rows in it."""
        start, stop = np.searchsorted(self._rows, [part.start, part.stop])
        own = slice(int(start), int(stop))
        return own, self._on_device(self._rows[own] - part.start)

    def _places(self, plan: _Plan) -> Tensor:
        """Of the contexts of each pair, among all contexts."""
        return self._on_device(np.searchsorted(self._rows, plan.contexts))

    def _on_device(self, numbers: Numbers) -> Tensor:
        return torch.from_numpy(numbers).to(self._weights.device)

    def _prediction(self, plan: _Plan) -> Float[Tensor, "pair channel"]:
        return self._contexts.index_select(0, self._places(plan)) @ self._weights[plan.step - 1].T

    @torch.no_grad()
    def scores(self) -> list[Tensor]:
        predictions = [self._prediction(plan) for plan in self._plans]
        scores = [self._contexts.new_empty(plan.shape) for plan in self._plans]
        for span, z in self._parts:
            candidates = targets(z, self._weights)
            for plan, prediction, own in zip(self._plans, predictions, scores, strict=True):
                entries, pairs, rows = plan.of(span, z.device)
                own.view(-1)[entries] = row_products(prediction, pairs, candidates, rows)
        return scores

    def loss(self) -> tuple[Tensor, list[Tensor]]:
        """The loss, and its gradients with respect to scores."""
        with torch.enable_grad():
            scores = [own.requires_grad_() for own in self.scores()]
            loss = self._objective.loss(scores, self.draws)
            gradients = torch.autograd.grad(loss, scores)
        return loss.detach(), list(gradients)

    @torch.no_grad()
    def context_gradients(self, gradients: Sequence[Tensor]) -> Float[Tensor, "context channel"]:
        """Gradients of all contexts; those of projections are added to the objective's."""
        to_predictions = [
            self._contexts.new_zeros(len(plan.contexts), self._weights.shape[1])
            for plan in self._plans
        ]
        for span, z in self._parts:
            candidates = targets(z, self._weights)
            for plan, gradient, own in zip(self._plans, gradients, to_predictions, strict=True):
                entries, pairs, rows = plan.of(span, z.device)
                add_weighted_rows(own, pairs, candidates, rows, gradient.view(-1)[entries])
        to_contexts = torch.zeros_like(self._contexts)
        to_weights = torch.zeros_like(self._weights)
        for plan, own in zip(self._plans, to_predictions, strict=True):
            places = self._places(plan)
            to_weights[plan.step - 1] += own.T @ self._contexts.index_select(0, places)
            to_contexts.index_add_(0, places, own @ self._weights[plan.step - 1])
        _accumulate(self._objective.W, to_weights)
        return to_contexts

    @torch.no_grad()
    def part_gradient(
        self, z: Tensor, span: Span, gradients: Sequence[Tensor], to_contexts: Tensor
    ) -> Float[Tensor, "row channel"]:
        """Gradient of a part's embeddings, as contexts and as candidates."""
        to_z = torch.zeros_like(z)
        own, rows = self._context_rows(span)
        contexts_of(to_z, self._weights).index_add_(0, rows, to_contexts[own])
        to_candidates = targets(to_z, self._weights)
        for plan, gradient in zip(self._plans, gradients, strict=True):
            entries, pairs, rows = plan.of(span, z.device)
            weights = gradient.view(-1)[entries]
            add_weighted_rows(to_candidates, rows, self._prediction(plan), pairs, weights)
        return to_z


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient
    else:
        parameter.grad += gradient
