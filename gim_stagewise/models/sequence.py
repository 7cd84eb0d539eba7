"""Modules of sequences: convolutions over time, and a recurrent context network (paper, A.2)."""

from __future__ import annotations

from typing import overload

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gim_stagewise.models.residual import check_numbers


class ConvModule(nn.Module):
    """conv → relu over time.

    Parameters are those of `conv1d_module`.
    """

    def __init__(
        self, in_channels: int, channels: int, kernel: int, stride: int, padding: int
    ) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, channels, kernel, stride=stride, padding=padding)

    @property
    def geometry(self) -> list[tuple[int, int, int]]:
        """(kernel, stride, padding) of the convolution."""
        return [(self.conv.kernel_size[0], self.conv.stride[0], int(self.conv.padding[0]))]

    def forward(
        self, x: Float[Tensor, "row in_channel time"]
    ) -> Float[Tensor, "row channel out_time"]:
        return F.relu(self.conv(x))


def conv1d_module(
    in_channels: int, *, channels: int, kernel: int, stride: int = 1, padding: int = 0
) -> ConvModule:
    """A module of one convolution over time, as in the paper's audio encoder (Table 5).

    There it has kernels of 10, 8, 4, 4, 4, strides of 5, 4, 2, 2, 2 and paddings of 2, 2, 2, 2, 1.
    (The table prints a kernel of 1 for the fifth, which would give 130 steps of 20480 samples; with
    4 there are the 128 that it says.)

    Parameters
    ----------
    in_channels : int
        Channels of the module's input.
    channels : int
        Channels of its output.
    kernel, stride : int
        In steps.
    padding : int
        Zeros on both sides.

    Raises
    ------
    ValueError
        If a number is below 1, or ``padding`` below 0 or not less than ``kernel``.
    TypeError
        If it is no whole number.
    """
    check_numbers(channels=channels, kernel=kernel, stride=stride, padding=padding + 1)
    if padding >= kernel:
        raise ValueError(f"padding must be less than the kernel of {kernel}, got {padding}")
    return ConvModule(in_channels, channels, kernel, stride, padding)


class GRUModule(nn.Module):
    """A recurrent context network (paper, equation 6): c_t from all inputs up to t.

    It is *stateful*: over a long sequence it goes on where its state was. What its outputs predict
    is the module's input, z, and not other outputs of its own.

    Parameters
    ----------
    in_channels, channels : int
    bptt : bool
        Whether gradients go through the state from step to step (backpropagation through time), or
        are blocked there: c_t = g_ar(z_t, GradientBlock(h_{t-1})) (section 4.2, ablation study).
    """

    stateful = True
    predicts = "input"

    def __init__(self, in_channels: int, channels: int, *, bptt: bool = True) -> None:
        super().__init__()
        self.gru = nn.GRU(in_channels, channels, batch_first=True)
        self.bptt = bptt

    def initial_state(self, rows: int) -> Float[Tensor, "row state"]:
        """The state before a sequence begins."""
        weight: Tensor = self.gru.all_weights[0][0]
        return weight.new_zeros(rows, self.gru.hidden_size)

    @overload
    def forward(self, x: Tensor) -> Tensor: ...
    @overload
    def forward(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]: ...
    def forward(
        self,
        x: Float[Tensor, "row in_channel time"],
        state: Float[Tensor, "row state"] | None = None,
    ) -> Float[Tensor, "row channel time"] | tuple[Tensor, Tensor]:
        """Outputs of whole sequences; or with a state, of what follows it, and the state then."""
        before = self.initial_state(len(x)) if state is None else state
        if self.bptt or not torch.is_grad_enabled():
            z, after = self.gru(x.transpose(1, 2), before[None].contiguous())
            after = after[0]
        else:
            z = self._with_blocked_state(x.transpose(1, 2), before)
            after = z[:, -1].detach()
        z = z.transpose(1, 2)
        return z if state is None else (z, after)

    def _with_blocked_state(
        self, x: Float[Tensor, "row time in_channel"], before: Float[Tensor, "row state"]
    ) -> Float[Tensor, "row time channel"]:
        """Outputs through which no gradient goes back in time.

        All states are computed first, without a graph; from them all steps can be taken at once,
        each with a graph of its own.
        """
        with torch.no_grad():
            states, _ = self.gru(x, before[None].contiguous())
            previous = torch.cat([before[:, None], states[:, :-1]], dim=1)
        rows, steps = x.shape[:2]
        after = torch.gru_cell(x.flatten(0, 1), previous.flatten(0, 1), *self.gru.all_weights[0])
        return after.reshape(rows, steps, -1)


def gru_module(in_channels: int, *, channels: int = 256, bptt: bool = True) -> GRUModule:
    """The paper's context network: a GRU, 256 channels wide by default.

    Parameters
    ----------
    in_channels : int
        Channels of the module's input.
    channels : int
        Channels of its output, and of its state.
    bptt : bool
        Backpropagation through time; without, gradients are blocked between steps (table 4).

    Raises
    ------
    ValueError, TypeError
        If ``channels`` is no whole number above 0, or ``bptt`` is neither true nor false.
    """
    check_numbers(channels=channels)
    if not isinstance(bptt, bool):
        raise TypeError(f"bptt must be true or false, got {bptt!r}")
    return GRUModule(in_channels, channels, bptt=bptt)
