"""What the tables of a pipeline file must have, or cannot have, together."""

from __future__ import annotations

from gim_stagewise.config.tables import LARGE_KINDS, PipelineConfig
from gim_stagewise.errors import ConfigError


def check_together(config: PipelineConfig) -> None:
    """Refuse what cannot be meant together.

    Raises
    ------
    ConfigError
        That names the key.
    """
    _check_encoding(config)
    if config.windowed:
        _check_windowed(config)
    else:
        _refuse_windows(config)


def _check_encoding(config: PipelineConfig) -> None:
    """What belongs to patches, and what to the dense encoding."""
    if not config.dense:
        if config.sequences:
            raise ConfigError(
                'is "patch", but recordings have no patches; set encoding = "dense"', key="encoding"
            )
        if config.patches is None:
            raise ConfigError(
                "missing; the pipeline file must give it, as in patches = {size = 16, stride = 8}",
                key="patches",
            )
        for number, module in config.module.items():
            for name, table in (("objective", module.objective), ("cache", module.cache)):
                if "pool" in table.model_fields_set:
                    raise ConfigError(
                        "has no meaning for patches, which have an embedding each; leave it out, "
                        'or set encoding = "dense"',
                        key=f"module.{number}.{name}.pool",
                    )
        return
    if not config.windowed:
        raise ConfigError(
            f'is "dense", which takes images or recordings that are read in windows, and '
            f"source.kind is {config.source.kind!r}; expected one of "
            f"{', '.join(map(repr, sorted(LARGE_KINDS)))}",
            key="encoding",
        )
    if config.patches is not None:
        raise ConfigError(
            'has no meaning with encoding = "dense"; leave one of the two out', key="patches"
        )


def _check_windowed(config: PipelineConfig) -> None:
    """What pipelines need whose items are read in windows, and what they cannot have."""
    unfit = ["crop", "flip", "pad", "grid_crop"] + ["grayscale"] * config.sequences
    for name in unfit:
        if name in config.augment.model_fields_set:
            raise ConfigError(
                "has no meaning for items that are read in windows; leave it out",
                key=f"augment.{name}",
            )
    if config.dense and config.extract.batch != 1:
        raise ConfigError(
            f"is {config.extract.batch}, but in dense encoding windows are computed one by one; "
            "leave it out",
            key="extract.batch",
        )
    for number, module in config.module.items():
        if module.train.window is None:
            raise ConfigError(
                "missing; where items are read in windows it says how large those are that modules "
                "are trained on",
                key=f"module.{number}.train.window",
            )
        if module.cache.materialize != "always":
            raise ConfigError(
                f"is {module.cache.materialize!r}, but outputs of items that are read in windows "
                'are always stored; leave it out, or set keep = "last-two"',
                key=f"module.{number}.cache.materialize",
            )
        if module.cache.chunk != "auto":
            raise ConfigError(
                f"is {module.cache.chunk}, but where items are read in windows, chunks are tiles; "
                "set windows.tile",
                key=f"module.{number}.cache.chunk",
            )


def _refuse_windows(config: PipelineConfig) -> None:
    """What only items that are read in windows have."""
    what = f"has no meaning for samples of kind {config.source.kind!r}, which are read whole"
    if "windows" in config.model_fields_set:
        raise ConfigError(f"{what}; leave it out", key="windows")
    for number, module in config.module.items():
        if module.train.window is not None:
            raise ConfigError(f"{what}; leave it out", key=f"module.{number}.train.window")
