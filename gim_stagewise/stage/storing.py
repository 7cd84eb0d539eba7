"""A block's outputs, checked and in their stored form."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from gim_stagewise.cache import Manifest, Precision, PrecisionError
from gim_stagewise.config import CacheConfig, ExtractConfig
from gim_stagewise.errors import ModuleRefusedError, NonFiniteError, PrecisionLossError
from gim_stagewise.models import INPUT_OPERATIONS
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward


def check_error(error: PrecisionError | None, cache: CacheConfig, manifest: Manifest) -> None:
    """Refuse a precision that loses more than ``cache.max_error``.

    Raises
    ------
    PrecisionLossError
        With both numbers.
    """
    if error is None or cache.max_error is None or error.relative <= cache.max_error:
        return
    channel, worst = error.worst_channel
    raise PrecisionLossError(
        f"module {manifest.module}: storing as {cache.precision} changes activations by "
        f"{error.relative:.2e} (relative L2; channel {channel} by {worst:.2e}, "
        f"{error.saturated} values saturated), cache.max_error allows {cache.max_error:g}: use a "
        "finer cache.precision, or allow more"
    )


class Storing:
    """Makes of a piece's activations what is stored of them, and keeps account of what that does.

    Parameters
    ----------
    precision : Precision or None
        None stores no activations.
    operation : str or None
        Applied first; see `gim_stagewise.models.INPUT_OPERATIONS`.

    Attributes
    ----------
    finite : list of Tensor
        For each piece, whether a row is finite: bool [row].
    error : PrecisionError or None
        What storing did to all pieces so far; None where nothing is lost.
    """

    def __init__(self, precision: Precision | None, operation: str | None = None) -> None:
        self.precision = precision
        self.operation = operation
        self.finite: list[Tensor] = []
        self.error: PrecisionError | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Storing:
        """As the cache that a manifest describes has it."""
        return cls(manifest.precision, manifest.stored_operation)

    def __call__(self, z: Float[Tensor, "row channel *space"]) -> Tensor:
        self.finite.append(_finite_rows(z).cpu())
        if self.precision is None:
            return z[:, :0]
        if self.operation is not None:
            z = INPUT_OPERATIONS[self.operation](z)
        stored, error = self.precision.encode(z)
        if error is not None:
            self.error = error if self.error is None else self.error + error
        return stored


def _finite_rows(z: Tensor) -> Tensor:
    """Whether all values of a row are finite: bool [row]."""
    # A sum costs a fraction of looking at every value, and is finite only if they all are.
    finite = z.flatten(1).sum(1).isfinite()
    return finite if finite.all() else z.flatten(1).isfinite().all(1)


def compute_block(
    frozen: FrozenModule,
    samples: NDArray[np.float32],
    ids: list[str],
    config: ExtractConfig,
    storing: Storing,
    *,
    grid: int = 2,
    trim: tuple[slice, ...] | None = None,
) -> dict[str, NDArray[Any]]:
    """Activations and embeddings of a block's samples.

    Parameters
    ----------
    frozen : FrozenModule
    samples : array
        The input, [sample, grid_row, grid_col, channel, height, width]; of windows [sample,
        channel, height, width] or [sample, channel, time].
    ids : list of str
        The block's samples, in storage order, for errors.
    config : ExtractConfig
    storing : Storing
        A new one.
    grid : int
        Axes of the grid of patches; 0 for windows.
    trim : tuple of slice, optional
        See `frozen_forward`.

    Returns
    -------
    dict
        "activations" with the axes of the input, as they are stored, and "pooled" [sample,
        grid_row, grid_col, channel] or [sample, time, channel], float32.

    Raises
    ------
    NonFiniteError
        If an output is NaN or infinite; the message names the samples.
    PrecisionLossError
        If outputs are too large for float16.
    """
    lead = samples.shape[: 1 + grid]
    rows = torch.from_numpy(samples).flatten(0, grid)
    activations, embeddings = frozen_forward(frozen, rows, config, keep=storing, trim=trim)
    arrays = checked_arrays(activations, embeddings, storing, ids, rows=math.prod(lead[1:]))
    return {name: values.reshape(*lead, *values.shape[1:]) for name, values in arrays.items()}


def checked_arrays(
    activations: Tensor, embeddings: Tensor, storing: Storing, ids: list[str], *, rows: int
) -> dict[str, NDArray[Any]]:
    """What `frozen_forward` gave, refused where it cannot be stored.

    Parameters
    ----------
    activations, embeddings : Tensor
        [row, ...]; what ``storing`` made of activations.
    storing : Storing
    ids : list of str
        Samples, for errors.
    rows : int
        Of each sample.

    Raises
    ------
    NonFiniteError, PrecisionLossError
        As of `compute_block`.
    """
    finite = torch.cat(storing.finite) & embeddings.flatten(1).isfinite().all(1)
    refuse_non_finite(finite, ids, rows)
    _refuse_overflow(storing, ids)
    return {"activations": activations.numpy(), "pooled": embeddings.numpy()}


def refuse_non_finite(finite: Tensor, ids: list[str], patches: int) -> None:
    """Name the samples whose outputs are not all finite.

    Parameters
    ----------
    finite : Tensor
        bool [row], a row for each patch of the samples.
    ids : list of str
    patches : int
        Of a sample.

    Raises
    ------
    NonFiniteError
    """
    if finite.all():
        return
    bad = sorted({int(row) // patches for row in torch.nonzero(~finite)[:, 0]})
    named = ", ".join(ids[sample] for sample in bad[:5]) + (" ..." if len(bad) > 5 else "")
    raise NonFiniteError(
        f"the frozen module gives NaN or infinity for {len(bad)} samples: {named}; nothing was "
        "sealed. Look at these samples, or train the module again with a lower train.lr"
    )


def refuse_untrained(outputs: Tensor, index: int) -> None:
    """Refuse a module whose outputs are not all finite before it is trained.

    Raises
    ------
    ModuleRefusedError
    """
    if not outputs.isfinite().all():
        raise ModuleRefusedError(
            "gives NaN or infinity for some of the data before it is trained; does it divide by "
            "what can be 0, such as the deviation of a blank patch?",
            key=f"module.{index}",
        )


def _refuse_overflow(storing: Storing, ids: list[str]) -> None:
    error = storing.error
    if error is None or storing.precision is None or storing.precision.has_scales:
        return
    if error.saturated:
        name = storing.precision.name
        wider = '"bfloat16" or "bitround-N"' if name == "float16" else '"float32"'
        raise PrecisionLossError(
            f"{error.saturated} values of samples {ids[0]} to {ids[-1]} are beyond what {name} can "
            f"store; nothing was sealed. Set cache.precision to {wider}, which reaches further"
        )
