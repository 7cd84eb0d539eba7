"""Embeddings of a sample, pooled to features: what linear classifiers see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
from einops import rearrange, reduce
from numpy.typing import NDArray

from gim_stagewise.windows import centre

if TYPE_CHECKING:
    from gim_stagewise.cache.reader import Cache

Pooling = Literal["mean", "all"]

# Samples whose embeddings are in memory at once.
_TOGETHER = 256


def pool_grid(
    embeddings: NDArray[np.float32], *, crop: int | None, pooling: Pooling
) -> NDArray[np.float32]:
    """Embeddings of a grid of patches to features.

    Parameters
    ----------
    embeddings : array
        float32 [sample, grid_row, grid_col, channel].
    crop : int or None
        Rows and columns of patches that count, in the middle (``augment.grid_crop``); None for all.
    pooling : "mean" or "all"

    Returns
    -------
    array
        float32 [sample, channel], or [sample, grid_row · grid_col · channel].
    """
    if crop is not None:
        rows, columns = centre(embeddings.shape[1:3], (crop, crop))
        embeddings = embeddings[:, rows.slice, columns.slice]
    if pooling == "mean":
        return reduce(embeddings, "s r c ch -> s ch", "mean")
    return rearrange(embeddings, "s r c ch -> s (r c ch)")


def grid_features(
    cache: Cache, ids: Sequence[str], *, crop: int | None, pooling: Pooling
) -> NDArray[np.float32]:
    """Features of samples of one size, [sample, feature]; see `pool_grid`."""
    parts = [
        pool_grid(cache.read_pooled(ids[start : start + _TOGETHER]), crop=crop, pooling=pooling)
        for start in range(0, len(ids), _TOGETHER)
    ]
    return np.concatenate(parts)


def mean_feature(
    embeddings: NDArray[np.float32], *, deviation: bool = False
) -> NDArray[np.float32]:
    """[*cell, channel] of an item of any size to [channel], or with deviations [2 · channel]."""
    cells = embeddings.reshape(-1, embeddings.shape[-1]).astype(np.float64)
    parts = [cells.mean(0), cells.std(0)] if deviation else [cells.mean(0)]
    return np.concatenate(parts).astype(np.float32)
