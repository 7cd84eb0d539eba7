"""Pre-activation residual blocks without batch norm (He et al. 2016b; paper, appendix A.1)."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class PreActivationBlock(nn.Module):
    """relu → conv 3×3 → relu → conv 3×3, plus a shortcut.

    Where shape changes, the shortcut is a 1×1 convolution of the *activated* input, so that
    the block reads its input only after the ReLU. Without batch norm a patch's output depends
    on that patch alone, as gradient-isolated, cacheable modules must.

    Parameters
    ----------
    in_channels, channels : int
    stride : int
        Of the first convolution and the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride)

    @property
    def geometry(self) -> list[tuple[int, int, int]]:
        """(kernel, stride, padding) of the longer way through the block."""
        return [(3, self.conv1.stride[0], 1), (3, 1, 1)]

    def forward(
        self, x: Float[Tensor, "patch in_channel height width"]
    ) -> Float[Tensor, "patch channel out_height out_width"]:
        activated = F.relu(x)
        bypass = x if self.shortcut is None else self.shortcut(activated)
        residual = self.conv2(F.relu(self.conv1(activated)))
        return bypass + residual  # type: ignore[no-any-return]


class ResidualModule(nn.Sequential):
    """Layers in a row; the pre-activation blocks have a ``shortcut`` that may be None.

    ``input_op`` is "relu" where the first block reads its input only after the ReLU.
    """

    @property
    def input_op(self) -> str | None:
        return "relu" if getattr(self[0], "shortcut", None) is not None else None

    @property
    def geometry(self) -> list[tuple[int, int, int]]:
        """(kernel, stride, padding) of all layers, from the bottom up."""
        chain: list[tuple[int, int, int]] = []
        for layer in self:
            if isinstance(layer, nn.Conv2d):
                chain.append((layer.kernel_size[0], layer.stride[0], int(layer.padding[0])))
            else:
                own: Any = layer.geometry
                chain += own
        return chain


def residual_module(
    in_channels: int,
    *,
    channels: int,
    blocks: int = 1,
    stride: int = 1,
    stem: int | None = None,
    stem_kernel: int = 3,
    stem_stride: int = 1,
    init: str = "pytorch",
) -> ResidualModule:
    """A module of residual blocks, the first of which may widen and subsample.

    Parameters
    ----------
    in_channels : int
        Channels of the module's input.
    channels : int
        Channels of its output.
    blocks : int
        Residual blocks.
    stride : int
        Of the first block.
    stem : int, optional
        Channels of a first convolution, as the lowest module has.
    stem_kernel : int
        Its (odd) kernel size.
    stem_stride : int
        Its stride; with 1 it keeps height and width.
    init : str
        How weights are drawn; see `initialise`.

    Raises
    ------
    ValueError
        If a number is below 1, ``stem_kernel`` is even, or there is no such ``init``.
    TypeError
        If it is no whole number.
    """
    check_numbers(
        channels=channels,
        blocks=blocks,
        stride=stride,
        stem=1 if stem is None else stem,
        stem_kernel=stem_kernel,
        stem_stride=stem_stride,
    )
    if stem_kernel % 2 == 0:
        raise ValueError(f"stem_kernel must be odd, got {stem_kernel}")
    layers: list[nn.Module] = []
    if stem is not None:
        padding = stem_kernel // 2
        layers.append(nn.Conv2d(in_channels, stem, stem_kernel, stem_stride, padding))
        in_channels = stem
    for number in range(blocks):
        block_stride = stride if number == 0 else 1
        layers.append(PreActivationBlock(in_channels, channels, stride=block_stride))
        in_channels = channels
    return initialise(ResidualModule(*layers), init)


INITS = ("pytorch", "he", "delta_orthogonal")


def initialise(module: ResidualModule, init: str) -> ResidualModule:
    """Draw a module's convolutions anew, from PyTorch's global random state.

    Parameters
    ----------
    module : ResidualModule
    init : str
        "pytorch" leaves them as PyTorch draws them; "he" draws normal numbers for ReLUs (He et al.
        2015, equation 10) and sets biases to zero; "delta_orthogonal" as the paper's code does, see
        `delta_orthogonal_`.

    Raises
    ------
    ValueError
        If there is no such ``init``.
    """
    if init not in INITS:
        raise ValueError(f"init must be one of {', '.join(map(repr, INITS))}, got {init!r}")
    for layer in module.modules():
        if not isinstance(layer, nn.Conv2d) or init == "pytorch":
            continue
        if init == "he":
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            assert layer.bias is not None
            nn.init.zeros_(layer.bias)
        else:
            delta_orthogonal_(layer.weight, gain=nn.init.calculate_gain("relu"))
    return module


@torch.no_grad()
def delta_orthogonal_(
    weight: Float[Tensor, "out_channel in_channel height width"], *, gain: float = 1.0
) -> Tensor:
    """Fill a kernel with zeros, and its centre with a (semi-)orthogonal matrix times ``gain``.

    Xiao et al. 2018, "Dynamical Isometry and a Mean Field Theory of CNNs", algorithm 2; drawn
    from PyTorch's global random state.
    """
    weight.zero_()
    centre = weight.new_empty(weight.shape[:2])
    weight[:, :, weight.shape[2] // 2, weight.shape[3] // 2] = nn.init.orthogonal_(centre, gain)
    return weight


def check_numbers(**numbers: int) -> None:
    """Refuse options that are no whole numbers above 0."""
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise TypeError(f"{name} must be a whole number, got {number!r}")
        if number < 1:
            raise ValueError(f"{name} must be at least 1, got {number}")
