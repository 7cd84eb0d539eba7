"""Pipeline files."""

from __future__ import annotations

from gim_stagewise.config.load import load_pipeline, parse_pipeline
from gim_stagewise.config.tables import (
    BITROUND,
    LARGE_KINDS,
    PRECISIONS,
    AugmentConfig,
    CacheConfig,
    ExtractConfig,
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
    "PRECISIONS",
    "AugmentConfig",
    "CacheConfig",
    "ExtractConfig",
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
]
