"""Modules: builders, and what a module must keep to."""

from __future__ import annotations

from gim_stagewise.models.build import Builder, build_module, forget_user_code, resolve_builder
from gim_stagewise.models.context import PixelCNN
from gim_stagewise.models.contract import output_shape, state_size
from gim_stagewise.models.embedding import CellMean, Stack, embed, pool, target_channels
from gim_stagewise.models.geometry import check_windows, module_geometry, probed_geometry
from gim_stagewise.models.operations import INPUT_OPERATIONS, input_operation

__all__ = [
    "INPUT_OPERATIONS",
    "Builder",
    "CellMean",
    "PixelCNN",
    "Stack",
    "build_module",
    "check_windows",
    "embed",
    "forget_user_code",
    "input_operation",
    "module_geometry",
    "output_shape",
    "pool",
    "probed_geometry",
    "resolve_builder",
    "state_size",
    "target_channels",
]
