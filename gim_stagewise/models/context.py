"""Context networks of CPC: what is known of a patch and of those above it."""

from __future__ import annotations

import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from torch import Tensor, nn

from gim_stagewise.models.residual import check_numbers


class PixelCNN(nn.Module):
    """A PixelCNN-style network over the grid of patches, as CPC uses on images.

    Residual layers of 1×1, 1×3 and 2×1 convolutions; the last looks at its own row and the one
    above, so that a context knows rows above its own and its own, but none below. (Hénaff et al.
    2019, "Data-Efficient Image Recognition with Contrastive Predictive Coding", appendix; the
    masking by rows after van den Oord et al. 2016, "Conditional Image Generation with PixelCNN
    Decoders".)

    Parameters
    ----------
    channels : int
        Of embeddings, and of the contexts that come out.
    hidden : int
        Channels inside a layer.
    layers : int
    """

    def __init__(self, channels: int, *, hidden: int = 256, layers: int = 5) -> None:
        super().__init__()
        check_numbers(channels=channels, hidden=hidden, layers=layers)
        self.layers = nn.ModuleList(_Layer(channels, hidden) for _ in range(layers))

    def forward(
        self, z: Float[Tensor, "sample row column channel"]
    ) -> Float[Tensor, "sample row column channel"]:
        """Contexts of all patches."""
        c = rearrange(z, "s r c ch -> s ch r c")
        for layer in self.layers:
            c = c + layer(c)
        return rearrange(F.relu(c), "s ch r c -> s r c ch")


class _Layer(nn.Module):
    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.narrow = nn.Conv2d(channels, hidden, 1)
        self.across = nn.Conv2d(hidden, hidden, (1, 3), padding=(0, 1))
        self.down = nn.Conv2d(hidden, hidden, (2, 1))
        self.widen = nn.Conv2d(hidden, channels, 1)

    def forward(self, c: Tensor) -> Tensor:
        c = self.across(F.relu(self.narrow(c)))
        c = self.down(F.pad(c, (0, 0, 1, 0)))  # a row of zeros above, and none below
        widened: Tensor = self.widen(F.relu(c))
        return widened
