"""Datasets made of parts: one part per split, each an indexable set of images.

`PartsSource` turns parts into a `Source`; the modules beside this one only say how their
kind of part is opened and read.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, Literal, Protocol, overload

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.errors import DataError
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.sources.base import (
    IMAGE_AXES,
    SPLITS,
    Item,
    Request,
    Split,
)
from gim_stagewise.sources.pixels import NOT_FINITE, as_float32

SAMPLED_IMAGES = 1000
_RUN_BYTES = 16_000_000


class Part(Protocol):
    """Images of one split."""

    def __len__(self) -> int: ...

    def describe(self, index: int) -> tuple[tuple[int, int], int, str]:
        """(height, width), channels and dtype of an image."""

    def read(self, index: int) -> NDArray[Any]:
        """One image, [channel, height, width]."""

    def names(self) -> Sequence[str] | None:
        """Stable names of the images within the split; None if their number is all they have."""

    def labels(self) -> NDArray[np.int64] | None:
        """One label per image, or None."""

    def digest(self, images: Sequence[int]) -> str:
        """Hash of these images, in this order, and of all labels."""


class ArrayPart:
    """Images held in an array [sample, channel, height, width]."""

    def __init__(self, images: NDArray[Any], labels: NDArray[np.int64] | None) -> None:
        self._images = images
        self._labels = labels

    def __len__(self) -> int:
        return len(self._images)

    def describe(self, index: int) -> tuple[tuple[int, int], int, str]:
        _, channels, height, width = self._images.shape
        return (height, width), channels, self._images.dtype.name

    def read(self, index: int) -> NDArray[Any]:
        image: NDArray[Any] = self._images[index]
        return image

    def names(self) -> Sequence[str] | None:
        return None

    def labels(self) -> NDArray[np.int64] | None:
        return self._labels

    def digest(self, images: Sequence[int]) -> str:
        return array_digest(self._images, images, self._labels)


class PartsSource:
    """A `Source` of images out of one part per split.

    Where no part is called *unlabeled*, the training images serve as unlabeled ones as well.

    Parameters
    ----------
    parts : mapping
        From split name to its images; at least one of *unlabeled* and *train*.
    digest : {"full", "sampled"}
        What `content_digest` covers: all images, or the names of all and the pixels of
        `SAMPLED_IMAGES` in each split, evenly spaced, the first and the last among them.

    Raises
    ------
    DataError
        If there is nothing to train on, or labels and images differ in number.
    """

    axes = IMAGE_AXES
    chunk_items = 1
    views = 0

    def __init__(
        self, parts: Mapping[Split, Part], digest: Literal["full", "sampled"] = "full"
    ) -> None:
        self._digest = digest
        # Unlabeled samples first, so that views beyond the evaluation view fill whole chunks.
        self._parts = {name: parts[name] for name in SPLITS if name in parts and len(parts[name])}
        if "unlabeled" not in self._parts and "train" not in self._parts:
            raise DataError("the source has neither unlabeled nor train samples: nothing to train")
        self._ids: dict[Split, list[str]] = {}
        self._named: dict[Split, dict[str, int]] = {}
        for name, part in self._parts.items():
            names = part.names()
            if names is not None:
                self._named[name] = {f"{name}/{own}": index for index, own in enumerate(names)}
            numbered = [f"{name}/{index}" for index in range(len(part))]
            self._ids[name] = list(self._named.get(name, numbered))
            labels = part.labels()
            if labels is not None and labels.shape != (len(part),):
                raise DataError(
                    f"split {name} has {len(part)} images but labels of shape {labels.shape}; "
                    "expected one label per image"
                )

    @property
    def chunk_bytes(self) -> int:
        """The most bytes that are read, and kept, for a single image; 0 if only its own."""
        return max(getattr(part, "chunk_bytes", 0) for part in self._parts.values())

    @property
    def item_bytes(self) -> int:
        return max(
            item.channels * math.prod(item.extent) * np.dtype(item.dtype).itemsize
            for item in self.items()
        )

    @property
    def notices(self) -> tuple[str, ...]:
        """What is to be said of labels."""
        missing = {
            name: int((labels == NO_LABEL).sum())
            for name, part in self._parts.items()
            if name != "unlabeled" and (labels := part.labels()) is not None
        }
        return tuple(
            f"{count} images of split {name} have the label {NO_LABEL}, which stands for none"
            for name, count in missing.items()
            if count
        )

    @property
    def ids(self) -> Sequence[str]:
        return [item_id for ids in self._ids.values() for item_id in ids]

    def items(self) -> Sequence[Item]:
        return _PartItems(self._parts, self._ids)

    def split(self, name: Split) -> Sequence[str]:
        owner: Split = "train" if name == "unlabeled" and name not in self._parts else name
        return list(self._ids.get(owner, ()))

    @property
    def label_names(self) -> tuple[str, ...]:
        labelled = any(part.labels() is not None for part in self._parts.values())
        return ("class",) if labelled else ()

    def label_values(self, name: str) -> tuple[str, ...]:
        """What labels of that name mean, from 0 on; empty where that is not known."""
        known = (getattr(part, "class_names", ()) for part in self._parts.values())
        return next((tuple(own) for own in known if own), ()) if name == "class" else ()

    def labels(self, name: str) -> NDArray[np.int64]:
        if name not in self.label_names:
            raise DataError(f"no labels called {name!r}; there are: {self.label_names or 'none'}")
        columns = []
        for part in self._parts.values():
            labels = part.labels()
            missing = np.full(len(part), NO_LABEL, dtype=np.int64)
            columns.append(missing if labels is None else labels)
        return np.concatenate(columns)

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        return [self._read(request) for request in requests]

    def _read(self, request: Request) -> NDArray[Any]:
        part, index = self._find(request.id)
        image = part.read(index)
        if request.region is not None:
            rows, columns = request.region
            image = image[:, rows.slice, columns.slice]
        return image

    def _find(self, item_id: str) -> tuple[Part, int]:
        split, _, own = item_id.partition("/")
        for name, part in self._parts.items():
            if name == split:
                if name in self._named:
                    index = self._named[name].get(item_id, -1)
                else:
                    index = int(own) if own.isdecimal() else -1
                if 0 <= index < len(part):
                    return part, index
        raise DataError(f"no sample {item_id!r} in this source")

    def content_digest(self) -> str:
        return self._content

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256(f"{self._digest};".encode())
        for name, part in self._parts.items():
            count = len(part)
            sampled = self._digest == "sampled" and count > SAMPLED_IMAGES
            images = evenly_spaced(count, SAMPLED_IMAGES) if sampled else range(count)
            digest.update(f"{name}:{count}:{part.digest(images)};".encode())
            for own in part.names() or ():
                digest.update(f"{own}\n".encode())
        return digest.hexdigest()


class _PartItems(Sequence[Item]):
    """Items made when asked for; an image is looked at then, and not before."""

    def __init__(self, parts: Mapping[Split, Part], ids: Mapping[Split, Sequence[str]]) -> None:
        self._parts = parts
        self._ids = ids

    def __len__(self) -> int:
        return sum(len(part) for part in self._parts.values())

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self[position] for position in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        for name, part in self._parts.items():
            if 0 <= index < len(part):
                extent, channels, dtype = part.describe(index)
                return Item(self._ids[name][index], extent, channels, dtype)
            index -= len(part)
        raise IndexError(index)

    def __iter__(self) -> Iterator[Item]:
        return (self[index] for index in range(len(self)))


def evenly_spaced(count: int, chosen: int) -> list[int]:
    """``chosen`` of ``count`` numbers, the first and the last among them."""
    return [number * (count - 1) // (chosen - 1) for number in range(chosen)]


def array_digest(array: Any, images: Sequence[int], labels: NDArray[np.int64] | None) -> str:
    """Hash of rows of an array, which may lie on disk, and of labels.

    Raises
    ------
    DataError
        If a value is NaN or infinite: what is read anyway is looked at before anything runs.
    """
    digest = hashlib.sha256(f"{array.shape}{array.dtype.str};".encode())
    if len(images) == array.shape[0]:
        # A run of rows at a time: nothing has to fit in memory, and no chunk is read twice.
        row_bytes = math.prod(array.shape[1:]) * array.dtype.itemsize
        chunk = getattr(array, "chunks", (1,))[0]
        run = chunk * max(1, _RUN_BYTES // max(1, chunk * row_bytes))
        for start in range(0, array.shape[0], run):
            rows = array[start : start + run]
            _refuse_not_finite(rows, start)
            digest.update(np.ascontiguousarray(rows).data)
    else:
        for image in images:
            row = np.asarray(array[image])
            _refuse_not_finite(row[None], image)
            digest.update(np.ascontiguousarray(row).data)
    digest.update(b"none" if labels is None else np.ascontiguousarray(labels).data)
    return digest.hexdigest()


def _refuse_not_finite(rows: NDArray[Any], first: int) -> None:
    if rows.dtype.kind != "f":
        return
    finite = np.isfinite(as_float32(rows)).reshape(len(rows), -1).all(axis=1)
    if not finite.all():
        raise DataError(f"image {first + int(finite.argmin())} has {NOT_FINITE}; mend or remove it")
