"""Pipeline files."""

from __future__ import annotations

from gim_stagewise.config.load import load_pipeline, parse_pipeline, with_values
from gim_stagewise.config.tables import (
    BITROUND,
    LARGE_KINDS,
    MODES,
    PRECISIONS,
    AugmentConfig,
    CacheConfig,
    ContextConfig,
    ExtractConfig,
    Mode,
    ModuleConfig,
    ObjectiveConfig,
    PatchesConfig,
    PipelineConfig,
    ProbeConfig,
    SourceConfig,
    TrainConfig,
    WindowsConfig,
)

__all__ = [
    "BITROUND",
    "LARGE_KINDS",
    "MODES",
    "PRECISIONS",
    "AugmentConfig",
    "CacheConfig",
    "ContextConfig",
    "ExtractConfig",
    "Mode",
    "ModuleConfig",
    "ObjectiveConfig",
    "PatchesConfig",
    "PipelineConfig",
    "ProbeConfig",
    "SourceConfig",
    "TrainConfig",
    "WindowsConfig",
    "load_pipeline",
    "parse_pipeline",
    "with_values",
]
