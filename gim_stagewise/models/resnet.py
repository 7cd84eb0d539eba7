"""ResNet v2 without batch norm, cut into modules (He et al. 2016b; paper, section 4.1 and A.1).

The first convolution is 5×5 with stride 1 and padding 2, there is no max pooling, and the residual
stages have 3, 4 and 6 blocks of 64, 128 and 256 planes: 13 blocks, numbered from 1. The paper cuts
them into three modules, blocks 1 to 3, 4 to 7 and 8 to 13; any other cut between blocks will do.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gim_stagewise.models.residual import (
    PreActivationBlock,
    ResidualModule,
    check_numbers,
    initialise,
)

STEM_CHANNELS = 64
# (blocks, planes, stride of the first block) of each residual stage.
RESIDUAL_STAGES = ((3, 64, 1), (4, 128, 2), (6, 256, 2))


class BottleneckBlock(nn.Module):
    """relu → conv 1×1 → relu → conv 3×3 → relu → conv 1×1, plus a shortcut.

    As in `PreActivationBlock`, a shortcut that changes the shape is a 1×1 convolution of the
    *activated* input.

    Parameters
    ----------
    in_channels : int
    planes : int
        Channels inside; the output has four times as many.
    stride : int
        Of the 3×3 convolution and the shortcut.
    """

    def __init__(self, in_channels: int, planes: int, *, stride: int = 1) -> None:
        super().__init__()
        channels = 4 * planes
        self.conv1 = nn.Conv2d(in_channels, planes, 1)
        self.conv2 = nn.Conv2d(planes, planes, 3, stride=stride, padding=1)
        self.conv3 = nn.Conv2d(planes, channels, 1)
        self.shortcut: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride)

    @property
    def geometry(self) -> list[tuple[int, int, int]]:
        """(kernel, stride, padding) of the longer way through the block."""
        return [(1, 1, 0), (3, self.conv2.stride[0], 1), (1, 1, 0)]

    def forward(
        self, x: Float[Tensor, "patch in_channel height width"]
    ) -> Float[Tensor, "patch channel out_height out_width"]:
        activated = F.relu(x)
        residual = self.conv3(F.relu(self.conv2(F.relu(self.conv1(activated)))))
        bypass = x if self.shortcut is None else self.shortcut(activated)
        return bypass + residual  # type: ignore[no-any-return]


def resnet50_module(
    in_channels: int, *, blocks: list[int], init: str = "pytorch", width: int = 64
) -> ResidualModule:
    """Blocks of ResNet-50 v2, of bottlenecks; the whole has 1024 output channels.

    Parameters
    ----------
    in_channels : int
        Channels of the module's input.
    blocks : [int, int]
        First and last block, both included, from 1 to 13. Block 1 comes with the first
        convolution.
    init : str
        How weights are drawn; see `gim_stagewise.models.residual.initialise`.
    width : int
        Planes of the first residual stage, 64 in the paper; all others scale with it.

    Raises
    ------
    ValueError
        If there are no such blocks, or ``in_channels`` is not what the first of them takes, or
        there is no such ``init``.
    TypeError
        If an option has the wrong type.
    """
    return _cut(BottleneckBlock, 4, in_channels, blocks, init, width)


def resnet34_module(
    in_channels: int, *, blocks: list[int], init: str = "pytorch", width: int = 64
) -> ResidualModule:
    """Blocks of ResNet-34 v2, of two 3×3 convolutions; the whole has 256 output channels.

    Parameters and errors are those of `resnet50_module`.
    """
    return _cut(PreActivationBlock, 1, in_channels, blocks, init, width)


def _cut(
    block: Callable[..., nn.Module],
    expansion: int,
    in_channels: int,
    blocks: list[int],
    init: str,
    width: int,
) -> ResidualModule:
    check_numbers(width=width)
    # (planes, stride) of each block of the whole network.
    chain = [
        (planes * width // STEM_CHANNELS, stride if number == 0 else 1)
        for count, planes, stride in RESIDUAL_STAGES
        for number in range(count)
    ]
    first, last = _first_and_last(blocks, len(chain))
    layers: list[nn.Module] = []
    if first == 1:
        layers.append(nn.Conv2d(in_channels, width, 5, padding=2))
        in_channels = width
    expected = width if first == 1 else expansion * chain[first - 2][0]
    if in_channels != expected:
        raise ValueError(
            f"block {first} takes {expected} channels, the module's input has {in_channels}; "
            "let blocks follow on from those of the module below"
        )
    for planes, stride in chain[first - 1 : last]:
        layers.append(block(in_channels, planes, stride=stride))
        in_channels = expansion * planes
    return initialise(ResidualModule(*layers), init)


def _first_and_last(blocks: object, count: int) -> tuple[int, int]:
    if (
        isinstance(blocks, list)
        and len(blocks) == 2
        and all(isinstance(b, int) and not isinstance(b, bool) for b in blocks)
        and 1 <= blocks[0] <= blocks[1] <= count
    ):
        return blocks[0], blocks[1]
    raise ValueError(
        f"blocks must be the first and the last block, as in [1, 3], within 1 to {count}, "
        f"got {blocks!r}"
    )
