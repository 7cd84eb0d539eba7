"""Modules: builders, and what a module must keep to."""

from __future__ import annotations

from gim_stagewise.models.build import Builder, build_module, forget_user_code, resolve_builder
from gim_stagewise.models.contract import INPUT_OPERATIONS, output_shape, pool

__all__ = [
    "INPUT_OPERATIONS",
    "Builder",
    "build_module",
    "forget_user_code",
    "output_shape",
    "pool",
    "resolve_builder",
]
