"""Products with rows that are given by number, read where they lie."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int64
from torch import Tensor
from torch.nn import functional

# Bytes of terms, or of sums and values, that are held at once, and the fewest channels of them.
SUMMED_BYTES, SUMMED_CHANNELS = 16_000_000, 16


def row_products(
    left: Float[Tensor, "left channel"],
    left_rows: Int64[Tensor, " entry"],
    right: Float[Tensor, "right channel"],
    right_rows: Int64[Tensor, " entry"],
) -> Float[Tensor, " entry"]:
    """``(left[left_rows] * right[right_rows]).sum(1)``."""
    # The gradient of an embedding bag's weights is just that, and PyTorch's kernel for it reads
    # rows where they lie. Its offsets are not looked at where the bag of each entry is given.
    products: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        left, right, right_rows, left_rows[:0], left_rows, mode=0
    )
    return products


def add_weighted_rows(
    sums: Float[Tensor, "sum channel"],
    sum_rows: Int64[Tensor, " entry"],
    values: Float[Tensor, "value channel"],
    value_rows: Int64[Tensor, " entry"],
    weights: Float[Tensor, " entry"],
) -> None:
    """``sums.index_add_(0, sum_rows, weights[:, None] * values[value_rows])``."""
    # Fewer terms than sums: most rows would be added nothing, and are better not looked at.
    few = len(sum_rows) < len(sums)
    if not few:
        sum_rows, order = sum_rows.sort(stable=True)
        value_rows, weights = value_rows[order], weights[order]
        starts = torch.searchsorted(sum_rows, torch.arange(len(sums), device=sum_rows.device))
    rows = len(sum_rows) if few else max(len(sums), len(values))
    width = max(SUMMED_CHANNELS, SUMMED_BYTES // (max(rows, 1) * sums.element_size()))
    for first in range(0, sums.shape[1], width):
        channels = slice(first, first + width)
        own = values[:, channels]
        if few:
            sums[:, channels].index_add_(0, sum_rows, own[value_rows].mul_(weights[:, None]))
        else:
            sums[:, channels] += functional.embedding_bag(
                value_rows, own.contiguous(), starts, mode="sum", per_sample_weights=weights
            )
