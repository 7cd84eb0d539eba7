"""What objectives and probes see of a module, or of several that are trained in one step."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gim_stagewise.models.operations import INPUT_OPERATIONS, input_operation


class CellMean:
    """Embeddings in dense encoding: the mean over cells of so many positions along each axis.

    The last cell of an axis may have fewer. With one position a cell, as in sequences, these are
    the outputs themselves.
    """

    def __init__(self, positions: int) -> None:
        self.positions = positions

    def __call__(
        self, z: Float[Tensor, "row channel *space"]
    ) -> Float[Tensor, "row *cell channel"]:
        if self.positions > 1:
            mean = F.avg_pool2d if z.ndim == 4 else F.avg_pool1d
            z = mean(z, self.positions, ceil_mode=True, count_include_pad=False)
        return z.movedim(1, -1)


def pool(
    module: nn.Module, z: Float[Tensor, "row channel *space"]
) -> Float[Tensor, "row *cell channel"]:
    """Embeddings of a module's outputs: its own ``pool``, or the mean over space."""
    own = getattr(module, "pool", None)
    if callable(own):
        pooled: Tensor = own(z)
        return pooled
    return z.flatten(2).mean(2) if z.ndim > 2 else z


# What is done to a module's inputs in training; it gives a tensor of its own.
Corrupt = Callable[[Tensor], Tensor]


def embed(
    module: nn.Module,
    x: Float[Tensor, "row channel *space"],
    corrupt: Sequence[Corrupt | None] = (),
) -> Tensor:
    """What the objective sees of a module: embeddings, and after their channels the targets'.

    Targets are there where they are not the embeddings themselves (``predicts = "input"``), without
    a gradient. Of a `Stack` it is what all its objectives see. ``corrupt`` is what is
    done to the input of each module, but not to targets; nothing if it is empty.
    """
    if isinstance(module, Stack):
        return module.embed(x, corrupt)
    (own,) = corrupt or (None,)
    return _embeddings(module, x.detach(), module(_corrupted(module, x, own)))


def _corrupted(module: nn.Module, x: Tensor, corrupt: Corrupt | None) -> Tensor:
    """A module's input as it is trained on it.

    Corrupted after the operation that the module begins with, if it says so: what is stored may
    have gone through that already, and weights must not depend on it.
    """
    if corrupt is None:
        return x
    operation = input_operation(module)
    return corrupt(x if operation is None else INPUT_OPERATIONS[operation](x))


def _embeddings(module: nn.Module, targets: Tensor, z: Tensor) -> Tensor:
    pooled = pool(module, z)
    if target_channels(module, targets.shape[1]) == 0:
        return pooled
    return torch.cat([pooled, targets.movedim(1, -1)], dim=-1)


def target_channels(module: nn.Module, in_channels: int) -> int:
    """Channels of the targets that `embed` adds; 0 where embeddings predict their own kind."""
    return in_channels if getattr(module, "predicts", None) == "input" else 0


class Stack(nn.Module):
    """Modules one on top of another, that are trained in one step.

    Parameters
    ----------
    parts : sequence of nn.Module
        Bottom first.
    isolated : bool
        Block gradients between them (paper, section 3: GradientBlock); otherwise the network is
        trained end to end, targets included (CPC: Oord et al. 2018).
    observed : collection of int
        Numbers, from 0, of the modules that an objective looks at.
    """

    def __init__(
        self, parts: Sequence[nn.Module], *, isolated: bool, observed: Collection[int]
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.isolated = isolated
        self.observed = frozenset(observed)

    def forward(self, x: Float[Tensor, "row channel *space"]) -> Tensor:
        """The top module's activations."""
        for part in self.parts:
            x = part(x)
        return x

    def embed(
        self, x: Float[Tensor, "row channel *space"], corrupt: Sequence[Corrupt | None] = ()
    ) -> Float[Tensor, "row feature"]:
        """What the objectives of all observed modules see, each flattened, bottom first."""
        seen = []
        each = corrupt or [None] * len(self.parts)
        for number, (part, own) in enumerate(zip(self.parts, each, strict=True)):
            if self.isolated:
                x = x.detach()
            z = part(_corrupted(part, x, own))
            if number in self.observed:
                seen.append(_embeddings(part, x, z).flatten(1))
            x = z
        return torch.cat(seen, dim=1)
