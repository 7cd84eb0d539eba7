"""Datasets as sources of samples."""

from __future__ import annotations

from gim_stagewise.config import SourceConfig
from gim_stagewise.errors import ConfigError
from gim_stagewise.sources.base import (
    PATCH_AXES,
    SPLITS,
    Item,
    Labelled,
    Listed,
    Request,
    Source,
    Split,
    StepLabelled,
    UniformItems,
    label_values,
    labels_of,
    read_stacked,
    stamp,
    step_labelled,
)
from gim_stagewise.sources.patches import PatchSource
from gim_stagewise.sources.regions import RegionSource
from gim_stagewise.sources.subset import Subset

__all__ = [
    "PATCH_AXES",
    "SPLITS",
    "Item",
    "Labelled",
    "Listed",
    "PatchSource",
    "RegionSource",
    "Request",
    "Source",
    "Split",
    "StepLabelled",
    "Subset",
    "UniformItems",
    "default_root",
    "label_values",
    "labels_of",
    "open_source",
    "read_stacked",
    "stamp",
    "step_labelled",
]


# Where data is looked for if ``source.root`` does not say.
_ROOTS = {
    "npy": ".",
    "zarr": ".",
    "large": ".",
    "audio": ".",
    "speech": ".",
    "mosaic": "data",
    "synthetic_speech": "data",
    "stl10": "data",
}


def default_root(kind: str) -> str | None:
    """Where data of a kind is looked for without ``source.root``; None of data without a place."""
    _, _, name = kind.partition(":")
    if name:
        from gim_stagewise.sources.vision import DEFAULT_ROOT, takes_root

        return DEFAULT_ROOT if takes_root(name) else None
    return _ROOTS.get(kind)


def open_source(config: SourceConfig) -> Source:
    """Open the dataset of a pipeline file.

    Kinds: ``"digits"``, ``"photos"``, ``"stl10"``, ``"torchvision:<Class>"``, ``"npy"``,
    ``"zarr"``; read in windows: ``"large"``, ``"mosaic"``, ``"audio"``, ``"speech"``,
    ``"synthetic_speech"``.

    Raises
    ------
    ConfigError
        If the kind or one of its settings is unknown.
    DataNotFoundError
        If the data is not where the settings say.
    """
    kind, _, name = config.kind.partition(":")
    if kind == "digits" and not name:
        from gim_stagewise.sources.digits import open_digits

        given = config.model_fields_set - {"kind"}
        if given:
            raise ConfigError(
                "has no meaning for the digits, which come with scikit-learn; leave it out",
                key=f"source.{min(given)}",
            )

        return open_digits()
    if kind == "torchvision" and name:
        from gim_stagewise.sources.vision import open_torchvision

        return open_torchvision(config, name)
    if kind in {"npy", "zarr"} and not name:
        from gim_stagewise.sources.arrays import open_arrays

        return open_arrays(config)
    if kind == "large" and not name:
        from gim_stagewise.sources.large import open_large

        return open_large(config)
    if kind == "photos" and not name:
        from gim_stagewise.sources.photographs import open_photos

        return open_photos(config)
    if kind == "stl10" and not name:
        from gim_stagewise.sources.stl10 import open_stl10

        return open_stl10(config)
    if kind == "mosaic" and not name:
        from gim_stagewise.sources.photographs import open_mosaic

        return open_mosaic(config)
    if kind == "audio" and not name:
        from gim_stagewise.sources.audio import open_audio

        return open_audio(config)
    if kind == "speech" and not name:
        from gim_stagewise.sources.speech import open_speech

        return open_speech(config)
    if kind == "synthetic_speech" and not name:
        from gim_stagewise.sources.synthetic_speech import open_synthetic_speech

        return open_synthetic_speech(config)
    raise ConfigError(
        f'is {config.kind!r}, expected "digits", "photos", "stl10", "torchvision:<Class>", '
        '"npy", "zarr", "large", "mosaic", "audio", "speech" or "synthetic_speech"',
        key="source.kind",
    )
