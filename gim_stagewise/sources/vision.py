"""Any torchvision dataset by class name, ImageFolder included."""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from gim_stagewise.config import SourceConfig
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError
from gim_stagewise.sources.base import Split
from gim_stagewise.sources.parts import PartsSource, array_digest

DEFAULT_ROOT = "data"


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
    constructor = _constructor(name)
    accepted = _accepted(constructor)
    splits = config.splits or _default_splits(accepted)
    parts = {split: _open_part(constructor, config, split, own) for split, own in splits.items()}
    if not config.splits and parts.keys() == {"train", "test"}:
        # Some datasets (STL-10) have unlabeled images of their own, and say so only when asked.
        with suppress(ConfigError):
            own = {"split": "unlabeled"}
            parts["unlabeled"] = _open_part(constructor, config, "unlabeled", own)
    _number_alike(list(parts.values()))
    return PartsSource(parts, config.digest)


def _number_alike(parts: list[_DatasetPart]) -> None:
    """Give classes of one name one number, where folders of some splits lack a class."""
    known = [part.classes for part in parts if part.classes is not None]
    if any(classes != known[0] for classes in known):
        names = sorted({name for classes in known for name in classes})
        for part in parts:
            part.number_by(names)


def takes_root(name: str) -> bool:
    """Whether a dataset lies in a folder.

    Raises
    ------
    ConfigError
        If torchvision has no such dataset.
    """
    return "root" in _accepted(_constructor(name))


def _constructor(name: str) -> Any:
    from torchvision import datasets

    constructor = getattr(datasets, name, None)
    if not inspect.isclass(constructor) or constructor is datasets.VisionDataset:
        raise ConfigError(
            f"is 'torchvision:{name}', but torchvision.datasets has no class {name!r}",
            key="source.kind",
        )
    return constructor


def _default_splits(accepted: Any) -> dict[Split, dict[str, Any]]:
    if "train" in accepted:
        return {"train": {"train": True}, "test": {"train": False}}
    if "split" in accepted:
        return {"train": {"split": "train"}, "test": {"split": "test"}}
    return {"train": {}}


def _open_part(
    constructor: Any, config: SourceConfig, split: Split, own: dict[str, Any]
) -> _DatasetPart:
    accepted = _accepted(constructor)
    _check_arguments(constructor, config.options, "source.options")
    _check_arguments(constructor, own, f"source.splits.{split}")
    arguments = {**config.options, **own}
    if config.root is not None or "root" in accepted:
        _check_arguments(constructor, {"root": config.root}, "source")
        arguments.setdefault("root", config.root or DEFAULT_ROOT)
    if "download" in accepted:
        arguments.setdefault("download", config.download)
    root = Path(arguments.get("root", ".")).absolute()
    try:
        part = _DatasetPart(constructor(**arguments))
        len(part)  # some look at what they were given only now
        return part
    except (RuntimeError, FileNotFoundError, NotADirectoryError, URLError, ImportError) as error:
        advice = "set source.root to the folder that holds it"
        if "download" in accepted:
            advice += ", or source.download = true to fetch it"
        if "class folder" in str(error):
            advice = "it takes a folder for each class; put images without classes into one of them"
        raise DataNotFoundError(
            f"torchvision.datasets.{constructor.__name__}, split {split}: looked in {root} and "
            f"found no usable data ({_one_line(error)}); {advice}"
        ) from None
    except (ValueError, TypeError, NotImplementedError) as error:
        raise ConfigError(_one_line(error), key=f"source.splits.{split}") from None


def _accepted(constructor: type) -> list[str]:
    """Names of the arguments that a dataset class takes, those it hands on to its base included."""
    names: list[str] = []
    for known in constructor.__mro__[:-1]:
        parameters = inspect.signature(known).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        names += [
            p.name
            for p in parameters
            if p.kind not in _VARIADIC and p.name not in {*names, *_CALLABLES}
        ]
        if inspect.Parameter.VAR_KEYWORD not in kinds:
            break
    return names


# What no file can say.
_CALLABLES = {"transform", "target_transform", "transforms", "loader", "is_valid_file"}
_VARIADIC = {inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL}


def _check_arguments(constructor: Any, arguments: Iterable[str], key: str) -> None:
    accepted = _accepted(constructor)
    unknown = [name for name in arguments if name not in accepted]
    if unknown:
        raise ConfigError(
            f"unknown argument of torchvision.datasets.{constructor.__name__}; it takes: "
            + ", ".join(accepted),
            key=f"{key}.{unknown[0]}",
        )


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _class_names(dataset: Any) -> list[str]:
    """What a dataset calls its classes, in their order; some are called by several words."""
    names = getattr(dataset, "classes", None)
    if not isinstance(names, list | tuple):
        return []
    return [", ".join(name) if isinstance(name, tuple) else str(name) for name in names]


class _DatasetPart:
    """A map-style torchvision dataset of (image, label) pairs or of images."""

    def __init__(self, dataset: Any) -> None:
        self._dataset = dataset
        self._numbers: NDArray[np.int64] | None = None
        self.class_names: Sequence[str] = _class_names(dataset)

    @property
    def classes(self) -> list[str] | None:
        """Names of the folders that labels are numbers of."""
        return getattr(self._dataset, "classes", None) if self._files() is not None else None

    def number_by(self, names: list[str]) -> None:
        """Labels are places in these names from now on."""
        if self.classes is not None:
            self._numbers = np.array([names.index(name) for name in self.classes], dtype=np.int64)
            self.class_names = names

    def __len__(self) -> int:
        return len(self._dataset)

    def describe(self, index: int) -> tuple[tuple[int, int], int, str]:
        data = getattr(self._dataset, "data", None)
        if isinstance(data, np.ndarray) and data.ndim == 4:
            # All images of one size: no need to make one only to measure it. Height and width lie
            # in the middle (CIFAR-10) or at the end (STL-10, SVHN).
            channels_last = data.shape[3] in (1, 3)
            height, width = data.shape[1:3] if channels_last else data.shape[2:]
            return (height, width), data.shape[3 if channels_last else 1], data.dtype.name
        if (files := self._files()) is not None:
            # Their loader makes all of them RGB; the size stands in a file's first bytes.
            with self._naming_the_image(index), Image.open(files[index][0]) as header:
                (width, height), mode = header.size, header.mode
            if mode == "F" or mode.startswith("I"):
                raise DataError(
                    f"image {files[index][0]} has pixels of more than 8 bits (Pillow's mode "
                    f"{mode}), which torchvision's loader would cut off at 255; save it with 8 "
                    'bits, or all of them as an array for source.kind = "npy"'
                )
            return (height, width), 3, "uint8"
        image = self.read(index)
        channels, height, width = image.shape
        return (height, width), channels, image.dtype.name

    def read(self, index: int) -> NDArray[Any]:
        with self._naming_the_image(index):
            sample = self._dataset[index]
        image = sample[0] if isinstance(sample, tuple) else sample
        if getattr(image, "mode", None) in {"P", "1", "CMYK", "RGBA", "LA"}:
            image = image.convert("RGB")
        pixels = np.asarray(image)
        return pixels[None] if pixels.ndim == 2 else np.moveaxis(pixels, -1, 0)

    def _files(self) -> list[tuple[str, int]] | None:
        """Paths and labels of ImageFolder and its like."""
        files = getattr(self._dataset, "samples", None)
        return files if isinstance(files, list) else None

    @contextmanager
    def _naming_the_image(self, index: int) -> Iterator[None]:
        try:
            yield
        except (OSError, SyntaxError) as error:  # Pillow's words for an image that is torn
            files = self._files()
            where = files[index][0] if files else f"number {index}"
            raise DataError(f"image {where} cannot be read ({error}); mend or remove it") from None

    def names(self) -> Sequence[str] | None:
        files = self._files()
        if files is None:
            return None
        # A file that is added must not rename the others.
        root = Path(self._dataset.root)
        return [Path(path).relative_to(root).as_posix() for path, _ in files]

    def labels(self) -> NDArray[np.int64] | None:
        for name in ("targets", "labels", "_labels"):
            values = getattr(self._dataset, name, None)
            if values is not None:
                labels = np.asarray(values)
                # STL-10 marks its unlabeled images with -1, which is our own mark too.
                if labels.ndim == 1 and np.issubdtype(labels.dtype, np.integer):
                    numbers = labels.astype(np.int64)
                    return numbers if self._numbers is None else self._numbers[numbers]
        return None

    def digest(self, images: Sequence[int]) -> str:
        data = getattr(self._dataset, "data", None)
        if data is not None and hasattr(data, "__array__"):
            return array_digest(np.asarray(data), images, self.labels())
        digest = hashlib.sha256()
        if (files := self._files()) is not None:
            labels = self.labels()
            assert labels is not None
            for (path, _), label in zip(files, labels, strict=True):
                digest.update(f"{label}:{Path(path).stat().st_size};".encode())
            for image in images:
                with self._naming_the_image(image):
                    digest.update(hashlib.sha256(Path(files[image][0]).read_bytes()).digest())
        else:
            for image in images:
                pixels = self.read(image)
                digest.update(f"{pixels.shape}{pixels.dtype.str};".encode())
                digest.update(np.ascontiguousarray(pixels).data)
            labels = self.labels()
            digest.update(b"none" if labels is None else labels.data)
        return digest.hexdigest()
