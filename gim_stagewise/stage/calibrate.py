"""The range of a frozen module's outputs, from which a precision gets its scales."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from gim_stagewise.config import ExtractConfig
from gim_stagewise.models import INPUT_OPERATIONS
from gim_stagewise.sources import Request, Source, read_stacked
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward
from gim_stagewise.stage.storing import refuse_non_finite
from gim_stagewise.windows import even_ranges

# More of them hardly change the range, which has a margin anyway.
MOST_SAMPLES = 64


def calibration_samples(
    source: Source, patches: int, config: ExtractConfig
) -> tuple[list[list[str]], int]:
    """Samples that stand for all of a source, and the view of them that is looked at.

    Parameters
    ----------
    source : Source
    patches : int
        Of one sample.
    config : ExtractConfig

    Returns
    -------
    (list of lists of str, int)
        Evenly spaced unlabeled samples, so many together as fill a piece of the forward; and a
        training view, where there is one.
    """
    ids = source.split("unlabeled") or source.ids
    count = min(MOST_SAMPLES, len(ids))
    chosen = [ids[int(place)] for place in np.linspace(0, len(ids) - 1, count)]
    unique = list(dict.fromkeys(chosen))
    groups = even_ranges(len(unique), max(1, config.batch // patches))
    return [unique[some.slice] for some in groups], 0 if source.views == 0 else 1


def grid_axes(source: Source) -> int:
    """Axes of a sample's grid of patches, of which each is a row of the forward; 0 for windows."""
    return sum(axis.startswith("grid") for axis in source.axes)


def value_range(
    frozen: FrozenModule,
    source: Source,
    ids: list[list[str]],
    view: int,
    config: ExtractConfig,
    operation: str | None,
) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of each channel of a module's outputs.

    Parameters
    ----------
    frozen : FrozenModule
    source : Source
        The module's input.
    ids : list of lists of str
        Samples that are in memory together.
    view : int
    config : ExtractConfig
    operation : str or None
        Applied to the outputs first.

    Returns
    -------
    (Tensor, Tensor)
        float32 [channel], on the CPU.

    Raises
    ------
    NonFiniteError
        If a value is NaN or infinite; the message names the samples.
    """

    def extremes(z: Tensor) -> Tensor:
        if operation is not None:
            z = INPUT_OPERATIONS[operation](z)
        return torch.stack(z.flatten(2).aminmax(dim=2), dim=1)

    found = []
    for some in ids:
        samples = read_stacked(source, [Request(item_id, view) for item_id in some])
        rows = torch.from_numpy(samples).flatten(0, grid_axes(source))
        pairs, _ = frozen_forward(frozen, rows, config, keep=extremes)
        refuse_non_finite(pairs.flatten(1).isfinite().all(1), some, len(rows) // len(some))
        found.append(torch.stack([pairs[:, 0].amin(0), pairs[:, 1].amax(0)]))
    lowest, highest = torch.stack(found).unbind(1)
    return lowest.amin(0), highest.amax(0)
