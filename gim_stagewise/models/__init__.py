"""Modules: builders, and what a module must keep to."""

from __future__ import annotations

from gim_stagewise.models.build import Builder, build_module, forget_user_code, resolve_builder
from gim_stagewise.models.contract import (
    INPUT_OPERATIONS,
    CellMean,
    embed,
    output_shape,
    pool,
    state_size,
    target_channels,
)
from gim_stagewise.models.geometry import check_windows, module_geometry, probed_geometry

__all__ = [
    "INPUT_OPERATIONS",
    "Builder",
    "CellMean",
    "build_module",
    "check_windows",
    "embed",
    "forget_user_code",
    "module_geometry",
    "output_shape",
    "pool",
    "probed_geometry",
    "resolve_builder",
    "state_size",
    "target_channels",
]
