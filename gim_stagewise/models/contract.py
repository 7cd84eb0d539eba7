"""What a module must be so that it can be trained alone and its outputs cached.

A module maps a batch of rows to a batch of rows: patches, or in dense encoding windows of images or
of sequences. It may define

- ``pool(z)``: the embeddings of patches that objective and probe see; the spatial mean where it
  does not; in dense encoding that is `CellMean`;
- ``geometry``: a list of (kernel, stride, padding) of its layers, from the bottom up, which dense
  encoding has to know; it is found by trying where it is not there;
- ``stateful``: true of a module of sequences that goes on where it stopped: ``forward(x, state)``
  gives outputs and the state after them, ``initial_state(rows)`` the state before a sequence, which
  is float32 [row, state];
- ``predicts``: "input" if what its embeddings predict is the module's input, and not other
  embeddings of its own (paper, equation 6);
- ``input_op``: the name of an operation (see `INPUT_OPERATIONS`) that it applies to its input
  before anything else, so that the input may be stored after it.

Refused, with the reason: modules whose output for one row depends on other rows (batch norm
in train mode), and modules whose forward changes their buffers: a cached output would then
depend on what happened to be in the same batch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter

from gim_stagewise.errors import ModuleRefusedError
from gim_stagewise.models.embedding import pool
from gim_stagewise.models.operations import INPUT_OPERATIONS, input_operation
from gim_stagewise.seeds import seeded


def state_size(module: nn.Module, in_shape: tuple[int, ...], *, key: str) -> int:
    """Numbers in the state of a module of sequences; 0 of one that has none.

    Raises
    ------
    ModuleRefusedError
        If a sequence in two parts, the state handed on, has other outputs than in one.
    """
    if not getattr(module, "stateful", False):
        return 0
    if len(in_shape) != 2:
        raise ModuleRefusedError("is stateful, which only modules of sequences can be", key=key)
    training = module.training
    module.eval()
    try:
        whole, parts, before, after = _in_two_parts(module, in_shape)
    except Exception as error:
        raise ModuleRefusedError(
            f"is stateful, but {_first_line(error)}; forward(x, state) must give outputs and the "
            "state after them, and go on from initial_state(rows)",
            key=key,
        ) from error
    finally:
        module.train(training)
    if before.ndim != 2 or after.shape != before.shape or after.dtype != torch.float32:
        raise ModuleRefusedError(
            f"has the state {after.dtype} {tuple(after.shape)}, expected float32 [row, state]",
            key=key,
        )
    if parts.shape != whole.shape or not torch.allclose(parts, whole, rtol=1e-4, atol=1e-5):
        raise ModuleRefusedError(
            "is stateful, but gives other outputs for a sequence in two parts than in one", key=key
        )
    return int(before.shape[1])


@torch.no_grad()
def _in_two_parts(module: Any, in_shape: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Outputs of random sequences, the same from two parts, and the states before and after."""
    with seeded(0):
        x = torch.randn(2, in_shape[0], max(2, min(in_shape[1], 16)))
        cut, before = x.shape[2] // 2, module.initial_state(2)
        first, between = module(x[:, :, :cut], before)
        second, after = module(x[:, :, cut:], between)
        return module(x), torch.cat([first, second], dim=2), before, after


def output_shape(
    module: nn.Module, in_shape: tuple[int, ...], *, key: str, dense: bool = False
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Check a module against the contract on two random rows.

    Parameters
    ----------
    module : nn.Module
        On the CPU; its mode and buffers are left as they were.
    in_shape : tuple of int
        One row of its input, (channel, height, width) or (channel, time).
    key : str
        What errors call the module, such as ``"module.2"``.
    dense : bool
        Whether a row is a window, with embeddings of its cells, and not a patch, which has one.

    Returns
    -------
    (tuple of int, tuple of int)
        The shape of one output row, and of its embeddings, the channel last.

    Raises
    ------
    ModuleRefusedError
        If the input does not fit, the output is no batch of finite rows, rows depend on one
        another, a forward changes a buffer or draws in evaluation mode, or there is nothing to
        train.
    """
    _check_parameters(module, key)
    training = module.training
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    with seeded(0):
        rows = torch.randn(2, *in_shape, requires_grad=True)
        try:
            module.train()
            z, pooled = _forward(module, rows, key)
            _check_shapes(z, pooled, rows.ndim, key, dense=dense)
            if not (z.isfinite().all() and pooled.isfinite().all()):
                raise ModuleRefusedError(
                    "gives NaN or infinity for normally distributed values; does it divide by 0, "
                    "or take a logarithm or root of what may be negative?",
                    key=key,
                )
            _check_buffers(module, before, key)
            _check_rows_alone(module, rows, key)
            _check_input_op(module, rows.detach(), key)
            _check_draws(module, rows.detach(), key)
        finally:
            module.train(training)
            _restore_buffers(module, before)
    return tuple(z.shape[1:]), tuple(pooled.shape[1:])


def _forward(module: nn.Module, rows: Tensor, key: str, *, draws: int = 1) -> tuple[Tensor, Tensor]:
    """Outputs and embeddings, of equal ``draws`` with the same random numbers (dropout)."""
    try:
        with seeded(draws):
            z = module(rows)
    except Exception as error:
        size = "×".join(map(str, rows.shape[1:]))
        axes = "channels×height×width" if rows.ndim == 4 else "channels×time"
        raise ModuleRefusedError(
            f"cannot take its input of {size} ({axes}): {_first_line(error)}; change the module or "
            "the one below it",
            key=key,
        ) from error
    if not isinstance(z, Tensor):
        raise ModuleRefusedError(
            f"returned {type(z).__name__}, expected one tensor of outputs", key=key
        )
    try:
        with seeded(draws):
            pooled = pool(module, z)
    except Exception as error:
        raise ModuleRefusedError(f"its pool failed: {_first_line(error)}", key=key) from error
    if not isinstance(pooled, Tensor):
        raise ModuleRefusedError(
            f"its pool returned {type(pooled).__name__}, expected a tensor [patch, channel]",
            key=key,
        )
    return z, pooled


def _first_line(error: Exception) -> str:
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def _check_parameters(module: nn.Module, key: str) -> None:
    if any(isinstance(own, UninitializedParameter) for own in module.parameters()):
        raise ModuleRefusedError(
            "has lazy layers, whose sizes follow from the first input; give their sizes", key=key
        )
    if not any(own.requires_grad for own in module.parameters()):
        raise ModuleRefusedError("has no parameters that can be trained", key=key)


def _check_shapes(z: Tensor, pooled: Tensor, in_axes: int, key: str, *, dense: bool) -> None:
    if z.ndim != in_axes or len(z) != 2 or 0 in z.shape:
        axes = "channel, height, width" if in_axes == 4 else "channel, time"
        raise ModuleRefusedError(
            f"returned shape {tuple(z.shape)} for 2 rows, expected [2, {axes}]", key=key
        )
    if z.dtype != torch.float32:
        raise ModuleRefusedError(f"returned {z.dtype}, expected torch.float32", key=key)
    if pooled.ndim != (in_axes if dense else 2) or len(pooled) != 2:
        raise ModuleRefusedError(
            f"pool returned shape {tuple(pooled.shape)} for 2 patches, expected [2, channel]",
            key=key,
        )


def _check_buffers(module: nn.Module, before: dict[str, Tensor], key: str) -> None:
    for name, buffer in module.named_buffers():
        if name not in before or not torch.equal(before[name], buffer):
            raise ModuleRefusedError(
                f"its forward changes the buffer {name!r}, so outputs would depend on what ran "
                "before; use layers without running statistics (group norm, layer norm, none)",
                key=key,
            )


def _restore_buffers(module: nn.Module, before: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            if name in before:
                buffer.copy_(before[name])


def _check_input_op(module: nn.Module, rows: Tensor, key: str) -> None:
    """What a module declares to begin with must change nothing when it was done before."""
    name = input_operation(module)
    if name is None:
        return
    if name not in INPUT_OPERATIONS:
        raise ModuleRefusedError(
            f"declares input_op = {name!r}; known: {', '.join(INPUT_OPERATIONS)}", key=key
        )
    with torch.no_grad():
        plain, _ = _forward(module, rows, key)
        after, _ = _forward(module, INPUT_OPERATIONS[name](rows), key)
    if not torch.equal(plain, after):
        raise ModuleRefusedError(
            f"declares input_op = {name!r}, but gives other outputs when that was applied to its "
            "input before (an identity shortcut?); remove the declaration",
            key=key,
        )


@torch.no_grad()
def _check_draws(module: nn.Module, rows: Tensor, key: str) -> None:
    """Outputs of a frozen module must not be drawn: nobody could compute them again."""
    module.eval()
    (z, pooled), (again, again_pooled) = (_forward(module, rows, key, draws=n) for n in (1, 2))
    if not torch.equal(z, again) or not torch.equal(pooled, again_pooled):
        raise ModuleRefusedError(
            "its output is random in evaluation mode (F.dropout without training=self.training?); "
            "draw in train mode alone",
            key=key,
        )


def _check_rows_alone(module: nn.Module, rows: Tensor, key: str) -> None:
    """Each row's outputs must not change with the other row, nor have a gradient to it."""
    z, pooled = _forward(module, rows, key)
    if not z.requires_grad:
        raise ModuleRefusedError("its output does not depend on its input", key=key)
    for row, other in ((0, 1), (1, 0)):
        # Random weights, not a sum: normalisations make the plain sum of their outputs constant.
        scalar = (z[row] * torch.randn_like(z[row])).sum()
        scalar = scalar + (pooled[row] * torch.randn_like(pooled[row])).sum()
        (gradient,) = torch.autograd.grad(scalar, rows, retain_graph=True, allow_unused=True)
        if gradient is None:
            raise ModuleRefusedError("its output does not depend on its input", key=key)
        changed = rows.detach().clone()
        changed[other] = 3 * torch.randn_like(changed[other])
        with torch.no_grad():
            again, again_pooled = _forward(module, changed, key)
        # What is detached has no gradient, so values are compared as well.
        same = torch.allclose(again[row], z[row], rtol=1e-4, atol=1e-5)
        same = same and torch.allclose(again_pooled[row], pooled[row], rtol=1e-4, atol=1e-5)
        if gradient[other].count_nonzero() or not same:
            raise ModuleRefusedError(
                "its output for one row depends on the other rows of the batch (batch norm in "
                "train mode?); use layers that treat each row alone (group norm, layer norm, none)",
                key=key,
            )
