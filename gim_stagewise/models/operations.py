"""What a module may do to its input before anything else."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch.nn.functional as F
from torch import Tensor, nn

# All of them leave unchanged what went through them before, so that a module that applies its
# operation gives the same on either form of its input.
INPUT_OPERATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {"relu": F.relu}


def input_operation(module: nn.Module) -> str | None:
    """The name of the operation that a module says it begins with, if it says so."""
    name: str | None = getattr(module, "input_op", None)
    return name
