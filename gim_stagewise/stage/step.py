"""One training step of a module in micro-batches, with the gradients of the whole batch.

Pass 1 computes the embeddings of the whole batch without a graph. The objective and its gradient
with respect to them see the whole batch, so that negatives come from all of it. Pass 2 runs each
micro-batch again, with a graph, and back-propagates its rows of that gradient. What is in memory is
one micro-batch's graph and a batch of embeddings; the price is a second forward. (Known from
contrastive learning as gradient caching: Gao et al. 2021, "Scaling Deep Contrastive Learning Batch
Size under Memory Limited Setup", section 3.)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gim_stagewise.config import TrainConfig
from gim_stagewise.errors import ConfigError
from gim_stagewise.memory import release_freed
from gim_stagewise.models import embed
from gim_stagewise.objectives import InfoNCE
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
class MicroBatches:
    """How the rows of a batch go through a module.

    Parameters
    ----------
    size : int
        Rows in a micro-batch; the last one may have fewer.
    seed : callable
        Seed of what the module draws, by number of the micro-batch: both passes draw the same.
    device : torch.device
    """

    size: int
    seed: ForwardSeed
    device: torch.device

    def embed(self, module: nn.Module, batch: Batch, number: int) -> Tensor:
        """What the objective sees of one micro-batch (see `gim_stagewise.models.embed`)."""
        release_freed()
        rows = self.of(batch)[number]
        # On the CPU nothing but its generator draws; on a GPU, that of the GPU.
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.seed(number))
            return embed(module, batch.read(rows, self.device))

    def of(self, batch: Batch) -> list[Span]:
        """The rows of each micro-batch of a batch."""
        return even_ranges(batch.rows, self.size)


def accumulate_gradients(
    module: nn.Module,
    objective: InfoNCE,
    batch: Batch,
    micro_batches: MicroBatches,
    *,
    generator: torch.Generator,
    only: Sequence[int] | None = None,
) -> Tensor:
    """Add the gradients of a batch's loss to the parameters of module and objective.

    Exact: equal to one pass over the whole batch, but for the order in which floats are added.

    Parameters
    ----------
    module : nn.Module
        Treats rows independently of one another (contract: Module).
    objective : InfoNCE
    batch : Batch
    micro_batches : MicroBatches
    generator : torch.Generator
        For negatives; on the CPU.
    only : sequence of int, optional
        Visit these micro-batches alone, for counting memory; the result is then meaningless.

    Returns
    -------
    Tensor
        The loss, a scalar without a graph.
    """
    count = len(micro_batches.of(batch))
    if count == 1:
        pooled = micro_batches.embed(module, batch, 0)
        loss = objective(in_place(pooled, batch), generator=generator)
        loss.backward()
        return loss.detach()  # type: ignore[no-any-return]
    numbers = range(count) if only is None else only
    embeddings = embed_batch(module, batch, micro_batches, numbers=numbers).requires_grad_()
    loss = objective(in_place(embeddings, batch), generator=generator)
    loss.backward()
    gradient = embeddings.grad
    assert gradient is not None
    for number in numbers:
        rows = micro_batches.of(batch)[number]
        micro_batches.embed(module, batch, number).backward(gradient[rows.slice])  # type: ignore[no-untyped-call]
    return loss.detach()  # type: ignore[no-any-return]


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


def make_optimizer(
    module: nn.Module, objective: InfoNCE, config: TrainConfig
) -> torch.optim.Optimizer:
    """The optimizer of a module with its objective's projections."""
    parameters = [*module.parameters(), *objective.parameters()]
    # Fused: the default makes copies of all parameters within a step.
    return torch.optim.Adam(parameters, lr=config.lr, fused=True)


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
