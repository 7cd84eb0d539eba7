"""What the forward of a frozen module takes, and a block on its way to the disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from gim_stagewise.cache import Precision
from gim_stagewise.memory import (
    PeakMeter,
    StorageCounter,
    make_fake,
    use_allocator,
    warm_up,
)
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward, resolve_device
from gim_stagewise.stage.project import NOISE_BYTES, SMALL_BYTES, measured_bytes
from gim_stagewise.stage.spec import StepSpec

_known_forwards: dict[tuple[Any, ...], int] = {}


def project_forward(spec: StepSpec, *, measure: bool = True, margin: bool = True) -> int:
    """Bytes that the frozen module's forward takes for one piece (see `frozen_forward`).

    Without ``measure`` an estimate of the workspace stands for its measurement, and without
    ``margin`` nothing does. A module that has to run to be counted is measured in any case.
    """
    key = (measure, margin, *spec.key)
    if key not in _known_forwards:
        _known_forwards[key] = _project_forward(spec, measure=measure, margin=margin)
    return _known_forwards[key]


def _project_forward(spec: StepSpec, *, measure: bool, margin: bool) -> int:
    try:
        counted = forward_bytes(
            spec.module(), spec.forward_cell, spec.piece, precision=spec.precision
        )
    except Exception:
        return _measured_forward(spec)
    if not measure:
        return counted + (SMALL_BYTES if margin else 0)
    return max(counted, _measured_forward(spec)) + NOISE_BYTES


def _measured_forward(spec: StepSpec) -> int:
    return measured_bytes(measure_forward, spec, lower="extract.batch")


def forward_bytes(
    module: nn.Module, cell: tuple[int, ...], piece: int, *, precision: Precision
) -> int:
    """Count the tensors of a frozen module's forward on one piece; uses the module up."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # Frozen first: a fake module cannot be moved, not even to where it is.
    frozen = make_fake(FrozenModule(module, torch.device("cpu")), mode)
    counter = StorageCounter()
    with mode, counter:
        counter.label("parameters", frozen.parameters())
        counter.restart()
        z, _ = frozen(torch.randn(piece, *cell))
        torch.empty_like(z, dtype=precision.stored_torch)
    return counter.peak


def measure_forward(spec: StepSpec) -> int:
    """Bytes that the forward of pieces really takes; for a fresh process."""
    device = resolve_device(spec.device)
    use_allocator(lean=spec.lean)
    warm_up(device)
    rows = torch.randn(spec.piece, *spec.forward_cell)
    config = spec.config.extract.model_copy(update={"batch": spec.piece})
    with PeakMeter(device) as meter:
        frozen = FrozenModule(spec.module(), device)
        for _ in range(2):
            frozen_forward(frozen, rows, config, keep=lambda z: _stored(spec, z))
    return meter.peak


def _stored(spec: StepSpec, z: Tensor) -> Tensor:
    stored, _ = spec.precision.with_any_scales(z.shape[1]).encode(z)
    return stored


def block_bytes(inputs: int, outputs: int) -> int:
    """Bytes that one block takes on its way from the input into chunk files.

    Its inputs as read and as stacked, the outputs in their stored form, and one chunk while it is
    encoded: a copy with padding, and encoded bytes before and after they are cut to their length.

    Parameters
    ----------
    inputs, outputs : int
        Bytes of the block's inputs in memory, and of its outputs in their stored form.
    """
    return 2 * inputs + 4 * outputs
