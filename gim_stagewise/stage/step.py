"""One training step of a module in micro-batches, with the gradients of the whole batch.

Pass 1 computes the embeddings of the whole batch without a graph. The objective and its gradient
with respect to them see the whole batch, so that negatives come from all of it. Pass 2 runs each
micro-batch again, with a graph, and back-propagates its rows of that gradient. What is in memory is
one micro-batch's graph and a batch of embeddings; the price is a second forward. (Known from
contrastive learning as gradient caching: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch
Size under Memory Limited Setup", section 3.) Where embeddings themselves are many, they are not
kept either, for two forwards more (see `gim_stagewise.objectives.streamed`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gim_stagewise.config import TrainConfig
from gim_stagewise.errors import ConfigError
from gim_stagewise.memory import release_freed
from gim_stagewise.models import CellMean, embed
from gim_stagewise.objectives import (
    InfoNCE,
    Objective,
    Parts,
    streamed_gradients,
    streamed_loss,
)
from gim_stagewise.seeds import seeded
from gim_stagewise.windows import Span, even_ranges


class Batch(Protocol):
    """The rows (patches, sequences) of a batch, wherever they are."""

    @property
    def shape(self) -> tuple[int, ...]:
        """How rows lie in the batch: (sample, grid_row, grid_col), or (sample,) of sequences."""

    @property
    def rows(self) -> int:
        """Their number."""

    def read(self, rows: Span, device: torch.device) -> Tensor:
        """Some of the rows, float32 [row, channel, ...], on a device."""


# The seed of what a module draws (dropout) while it sees micro-batch i.
ForwardSeed = Callable[[int], int]


@dataclass(frozen=True)
class Corruption:
    """What is done to a module's inputs in training, so that they are not always the same.

    Parameters
    ----------
    dropout : float
        Share of the inputs that is set to zero; the others are scaled up.
    noise : float
        Standard deviation of the normal numbers of mean 1 that inputs are multiplied with.
    """

    dropout: float = 0.0
    noise: float = 0.0

    @classmethod
    def of(cls, config: TrainConfig) -> Corruption:
        return cls(config.dropout, config.noise)

    def __bool__(self) -> bool:
        return bool(self.dropout or self.noise)

    def __call__(self, inputs: Tensor) -> Tensor:
        """Corrupted inputs, with their gradient; draws from PyTorch's global random state."""
        if self.noise:
            inputs = inputs * torch.randn_like(inputs).mul_(self.noise).add_(1)
        return F.dropout(inputs, self.dropout) if self.dropout else inputs


@dataclass(frozen=True)
class MicroBatches:
    """How the rows of a batch go through a module.

    Parameters
    ----------
    size : int
        Rows in a micro-batch; the last one may have fewer.
    seed : callable
        Seed of what is drawn, by number of the micro-batch: both passes draw the same.
    device : torch.device
    corruptions : sequence of Corruption
        What is done to the inputs of each module in training; nothing if it is empty.
    """

    size: int
    seed: ForwardSeed
    device: torch.device
    corruptions: Sequence[Corruption] = ()

    def embed(self, module: nn.Module, batch: Batch, number: int) -> Tensor:
        """What the objective sees of one micro-batch (see `gim_stagewise.models.embed`)."""
        release_freed()
        rows = self.of(batch)[number]
        with seeded(self.seed(number), self.device):
            corrupt = [own or None for own in self.corruptions] if module.training else []
            return embed(module, batch.read(rows, self.device), corrupt)

    def of(self, batch: Batch) -> list[Span]:
        """The rows of each micro-batch of a batch."""
        return even_ranges(batch.rows, self.size)


def accumulate_gradients(
    module: nn.Module,
    objective: Objective,
    batch: Batch,
    micro_batches: MicroBatches,
    *,
    generator: torch.Generator,
    labels: Tensor | None = None,
    only: Sequence[int] | None = None,
) -> Tensor:
    """Add the gradients of a batch's loss to the parameters of module and objective.

    Exact: equal to one pass over the whole batch, but for the order in which floats are added.

    Parameters
    ----------
    module : nn.Module
        Treats rows independently of one another (contract: Module).
    objective : Objective
    batch : Batch
    micro_batches : MicroBatches
    generator : torch.Generator
        For negatives; on the CPU.
    labels : Tensor, optional
        Classes of the batch's samples, for objectives that want them.
    only : sequence of int, optional
        Visit these micro-batches alone, for counting memory; the result is then meaningless.

    Returns
    -------
    Tensor
        The loss, a scalar without a graph; or [objective], where there are several, the sum of
        which is minimised.
    """
    count = len(micro_batches.of(batch))
    if count == 1:
        pooled = micro_batches.embed(module, batch, 0)
        loss = objective(in_place(pooled, batch), generator=generator, labels=labels)
        loss.sum().backward()
        return loss.detach()  # type: ignore[no-any-return]
    numbers = range(count) if only is None else only
    if is_streamed(module, objective):
        assert isinstance(objective, InfoNCE)
        parts, shape = _parts(module, batch, micro_batches, numbers)

        def backward(number: int, gradient_of: Callable[[Tensor], Tensor]) -> None:
            own = micro_batches.embed(module, batch, number)
            own.backward(gradient_of(own.flatten(0, -2)).reshape(own.shape))  # type: ignore[no-untyped-call]

        return streamed_gradients(objective, parts, shape, generator, backward=backward)
    embeddings = embed_batch(module, batch, micro_batches, numbers=numbers).requires_grad_()
    loss = objective(in_place(embeddings, batch), generator=generator, labels=labels)
    loss.sum().backward()
    gradient = embeddings.grad
    assert gradient is not None
    for number in numbers:
        rows = micro_batches.of(batch)[number]
        micro_batches.embed(module, batch, number).backward(gradient[rows.slice])  # type: ignore[no-untyped-call]
    return loss.detach()  # type: ignore[no-any-return]


@torch.no_grad()
def evaluate_batch(
    module: nn.Module,
    objective: Objective,
    batch: Batch,
    micro_batches: MicroBatches,
    *,
    generator: torch.Generator,
    labels: Tensor | None = None,
) -> Tensor:
    """The loss of a batch, or losses; parameters are those of `accumulate_gradients`."""
    count = len(micro_batches.of(batch))
    if count > 1 and is_streamed(module, objective):
        assert isinstance(objective, InfoNCE)
        parts, shape = _parts(module, batch, micro_batches, range(count))
        return streamed_loss(objective, parts, shape, generator)
    embeddings = embed_batch(module, batch, micro_batches)
    loss: Tensor = objective(in_place(embeddings, batch), generator=generator, labels=labels)
    return loss


def is_streamed(module: nn.Module, objective: Objective) -> bool:
    """Whether micro-batches come one by one to the objective too.

    So it is where every output is an embedding: all of them could be larger than anything else.
    Patches have one each, and means of many positions are few; recurrent modules keep several times
    their outputs anyway.
    """
    own = getattr(module, "pool", None)
    every = isinstance(own, CellMean) and own.positions == 1
    return every and isinstance(objective, InfoNCE) and not getattr(module, "stateful", False)


def _parts(
    module: nn.Module, batch: Batch, micro_batches: MicroBatches, numbers: Sequence[int]
) -> tuple[Parts, tuple[int, ...]]:
    """Embeddings of a batch by micro-batch, and the shape of all of them without channels."""
    with torch.no_grad():
        cells = micro_batches.embed(module, batch, numbers[0]).shape[1:-1]
    each = math.prod(cells)
    spans = [Span(own.start * each, own.stop * each) for own in micro_batches.of(batch)]

    def embed(number: int) -> Tensor:
        return micro_batches.embed(module, batch, number).flatten(0, -2)

    return Parts(embed, spans, numbers), (*batch.shape, *cells)


def in_place(rows: Tensor, batch: Batch) -> Float[Tensor, "sample row *column channel"]:
    """Rows as they lie in the batch."""
    return rows.reshape(*batch.shape, *rows.shape[1:])


@torch.no_grad()
def embed_batch(
    module: nn.Module,
    batch: Batch,
    micro_batches: MicroBatches,
    *,
    numbers: Sequence[int] | None = None,
) -> Tensor:
    """Embeddings [row, channel] of a whole batch, without a graph."""
    embeddings: Tensor | None = None
    spans = micro_batches.of(batch)
    for number in range(len(spans)) if numbers is None else numbers:
        pooled = micro_batches.embed(module, batch, number)
        if embeddings is None:
            embeddings = pooled.new_empty(batch.rows, *pooled.shape[1:])
        embeddings[spans[number].slice] = pooled
    assert embeddings is not None
    return embeddings


def check_micro_batch(size: int, rows: int, *, key: str) -> None:
    """Refuse micro-batches larger than a batch.

    Raises
    ------
    ConfigError
        If ``size`` is more than ``rows``.
    """
    if size > rows:
        raise ConfigError(
            f"is {size}, but a batch has {rows} rows; use 1 to {rows}, "
            "or leave it out to take a batch in one pass",
            key=key,
        )
