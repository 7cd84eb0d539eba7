"""What the tables of a pipeline file must have, or cannot have, together."""

from __future__ import annotations

from gim_stagewise.config.tables import LARGE_KINDS, PipelineConfig, TrainConfig
from gim_stagewise.errors import ConfigError


def check_together(config: PipelineConfig) -> None:
    """Refuse what cannot be meant together.

    Raises
    ------
    ConfigError
        That names the key.
    """
    _check_mode(config)
    _check_groups(config)
    _check_encoding(config)
    if config.windowed:
        _check_windowed(config)
    else:
        _refuse_windows(config)


# What may differ between modules that are trained in one step.
_OWN = {"lr", "update_every", "window", "dropout", "noise"}


def _check_mode(config: PipelineConfig) -> None:
    """What cannot be where all modules are trained in one step."""
    if config.iterative or config.mode == "random":
        return
    first = config.module[1].train
    for number, module in config.module.items():
        for name in TrainConfig.model_fields:
            if name in _OWN:
                continue
            own, shared = getattr(module.train, name), getattr(first, name)
            if own != shared:
                raise ConfigError(
                    f"is {own!r}, and {shared!r} for module 1, but mode = {config.mode!r} trains "
                    "all modules in one step; give it once, as train." + name,
                    key=f"module.{number}.train.{name}",
                )
    if config.mode == "cpc" and config.dense and not config.sequences:
        raise ConfigError(
            'is "cpc", whose context network takes a grid of patches, and encoding is "dense"',
            key="mode",
        )


def _check_groups(config: PipelineConfig) -> None:
    """Groups that negatives come from are whole parts of a batch."""
    for number, module in config.module.items():
        group, batch = module.objective.negatives_group, module.train.batch
        if group is not None and batch % group:
            raise ConfigError(
                f"is {group}, of which a batch of {batch} samples is no multiple; use a divisor of "
                f"train.batch",
                key=f"module.{number}.objective.negatives_group",
            )


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
    if config.probe.pooling != "mean":
        raise ConfigError(
            f"is {config.probe.pooling!r}, but features of items of any size are means; leave it "
            "out",
            key="probe.pooling",
        )
    for number, module in config.module.items():
        if module.train.window is None and (config.iterative or number == 1):
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
    if config.source.on_error != "stop":
        raise ConfigError(f"{what}; leave it out", key="source.on_error")
