"""Any torchvision dataset by class name, ImageFolder included."""

from __future__ import annotations

import hashlib
import inspect
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import SourceConfig
from gim_stagewise.errors import ConfigError, DataNotFoundError
from gim_stagewise.sources.base import Split
from gim_stagewise.sources.parts import PartsSource, array_digest


def open_torchvision(config: SourceConfig, name: str) -> PartsSource:
    """Open ``torchvision.datasets.<name>`` once per split.

    ``source.root`` and ``source.download`` go to every split; each table
    ``[source.splits.<split>]`` adds arguments of its own (``train = true``,
    ``split = "unlabeled"``, or another ``root``). Without such tables, a class with an argument
    ``train`` gives *train* and *test*; one with ``split`` is opened by those names, and with
    *unlabeled* where it has that; any other class gives *train*.

    Raises
    ------
    ConfigError
        If torchvision has no such dataset, or it does not take an argument.
    DataNotFoundError
        If the data is not under ``source.root``.
    """
    from torchvision import datasets

    constructor = getattr(datasets, name, None)
    if not inspect.isclass(constructor):
        raise ConfigError(
            f"is 'torchvision:{name}', but torchvision.datasets has no class {name!r}",
            key="source.kind",
        )
    accepted = inspect.signature(constructor).parameters
    splits = config.splits or _default_splits(accepted)
    return PartsSource(
        {split: _open_part(constructor, config, split, own) for split, own in splits.items()}
    )


def _default_splits(accepted: Any) -> dict[Split, dict[str, Any]]:
    if "train" in accepted:
        return {"train": {"train": True}, "test": {"train": False}}
    if "split" in accepted:
        return {"train": {"split": "train"}, "test": {"split": "test"}}
    return {"train": {}}


def _open_part(
    constructor: Any, config: SourceConfig, split: Split, own: dict[str, Any]
) -> _DatasetPart:
    accepted = inspect.signature(constructor).parameters
    arguments = {"root": config.root or "data", **config.options, **own}
    if "download" in accepted:
        arguments.setdefault("download", config.download)
    unknown = [key for key in arguments if key not in accepted]
    if unknown:
        raise ConfigError(
            f"unknown argument of torchvision.datasets.{constructor.__name__}; it takes: "
            + ", ".join(accepted),
            key=f"source.splits.{split}.{unknown[0]}",
        )
    root = Path(arguments["root"]).absolute()
    try:
        return _DatasetPart(constructor(**arguments))
    except (RuntimeError, FileNotFoundError, NotADirectoryError) as error:
        advice = "set source.root to the folder that holds it"
        if "download" in accepted:
            advice += ", or source.download = true to fetch it"
        raise DataNotFoundError(
            f"torchvision.datasets.{constructor.__name__}, split {split}: looked in {root} and "
            f"found no usable data ({_one_line(error)}); {advice}"
        ) from None
    except (ValueError, TypeError) as error:
        raise ConfigError(_one_line(error), key=f"source.splits.{split}") from None


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


class _DatasetPart:
    """A map-style torchvision dataset of (image, label) pairs or of images."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    def describe(self, index: int) -> tuple[tuple[int, int], int, str]:
        image = self.read(index)
        channels, height, width = image.shape
        return (height, width), channels, image.dtype.name

    def read(self, index: int) -> NDArray[Any]:
        sample = self._dataset[index]
        image = sample[0] if isinstance(sample, tuple) else sample
        if getattr(image, "mode", None) in {"P", "1", "CMYK", "RGBA", "LA"}:
            image = image.convert("RGB")
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)

    def labels(self) -> NDArray[np.int64] | None:
        for name in ("targets", "labels", "_labels"):
            values = getattr(self._dataset, name, None)
            if values is not None:
                labels = np.asarray(values)
                # STL-10 marks its unlabeled images with -1, which is our own mark too.
                if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
                    return labels.astype(np.int64)
        return None

    def digest(self) -> str:
        data = getattr(self._dataset, "data", None)
        if data is not None and hasattr(data, "__array__"):
            return array_digest(np.asarray(data), self.labels())
        digest = hashlib.sha256()
        files = getattr(self._dataset, "samples", None)
        if files is not None:
            for path, label in files:
                digest.update(
                    f"{label}:{hashlib.sha256(Path(path).read_bytes()).hexdigest()};".encode()
                )
        else:
            for index in range(len(self)):
                digest.update(array_digest(self.read(index)).encode())
            digest.update(array_digest(self.labels()).encode())
        return digest.hexdigest()
