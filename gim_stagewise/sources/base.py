"""The `Source` protocol: readable samples, from a dataset or from a cache.

A stage maps a Source to a cache, and a sealed cache is a Source. Whoever trains or extracts
knows nothing else about its input.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, overload, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.errors import DataError
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.windows import Region

Split = Literal["unlabeled", "train", "test"]
SPLITS: tuple[Split, ...] = ("unlabeled", "train", "test")

# Axes of one sample. "grid_row" and "grid_col" index patches; "height" and "width" are pixels of
# an image, or positions inside a patch where there is a grid.
IMAGE_AXES = ("channel", "height", "width")
PATCH_AXES = ("grid_row", "grid_col", "channel", "height", "width")
SEQUENCE_AXES = ("channel", "time")


@dataclass(frozen=True, slots=True)
class Item:
    """One sample of a dataset.

    Parameters
    ----------
    id : str
        Stable name; the same sample keeps it wherever the data lies.
    extent : tuple of int
        What a region selects from: (height, width) of an image, (rows, columns) of a patch
        grid, (steps,) of a sequence. May differ from item to item.
    channels : int
    dtype : str
        NumPy name of the values that `Source.read` returns.
    """

    id: str
    extent: tuple[int, ...]
    channels: int
    dtype: str


@dataclass(frozen=True, slots=True)
class Request:
    """One thing to read: a view of an item, whole or a region of its extent.

    View 0 is the evaluation view, without random augmentation; views 1, 2, ... are seeded
    augmentations for training.
    """

    id: str
    view: int = 0
    region: Region | None = None


class Listed(Protocol):
    """Samples by name, such as a `Source`."""

    @property
    def ids(self) -> Sequence[str]: ...

    def split(self, name: Split) -> Sequence[str]: ...


class Labelled(Listed, Protocol):
    """Samples by name, with labels where there are any."""

    @property
    def label_names(self) -> tuple[str, ...]: ...

    def labels(self, name: str) -> NDArray[np.int64]: ...


class Source(Protocol):
    """A set of samples that can be read in any order."""

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the axes of one sample."""

    @property
    def views(self) -> int | None:
        """Training views of a sample: 0 if only view 0 exists, None if there is no limit."""

    @property
    def chunk_items(self) -> int:
        """Consecutive items that lie in one chunk and are cheapest read together."""

    @property
    def item_bytes(self) -> int:
        """Bytes of one sample as read (the largest, where sizes differ)."""

    @property
    def ids(self) -> Sequence[str]:
        """Ids of all samples in storage order, without looking at the samples."""

    def items(self) -> Sequence[Item]:
        """All samples, each once, in storage order."""

    def split(self, name: Split) -> Sequence[str]:
        """Ids of the samples of a split; splits may share samples; empty if there is none."""

    @property
    def label_names(self) -> tuple[str, ...]:
        """Names under which `labels` has something."""

    def labels(self, name: str) -> NDArray[np.int64]:
        """Labels in the order of `items`; `NO_LABEL` where a sample has none."""

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        """The samples asked for, in that order, each with this source's axes."""

    def content_digest(self) -> str:
        """Hash of the data itself, not of paths or times."""


@runtime_checkable
class StepLabelled(Protocol):
    """A source of sequences whose steps have labels, such as the phones of speech."""

    @property
    def step_label_name(self) -> str | None:
        """What the labels are of, such as "phone"; None if there are none."""

    @property
    def step_label_hop(self) -> int:
        """Samples of a recording that share a label; 0 if there are none."""

    def step_labels(self, item_id: str) -> NDArray[np.int64]:
        """Labels of a recording, [step]: the one at ``step`` is that of the samples from
        ``step * step_label_hop`` on, or `gim_stagewise.labels.NO_LABEL`. The last samples may have
        none.
        """


class PassedOn:
    """What a source over another passes on, where the other one has it.

    Parameters
    ----------
    inner : Source

    Attributes
    ----------
    notices : tuple of str
        What is to be said of how the data is read.
    rate : int
        Samples a second of recordings; 0 of all else.
    """

    def __init__(self, inner: Source) -> None:
        self.notices: tuple[str, ...] = tuple(getattr(inner, "notices", ()))
        self.rate = int(getattr(inner, "rate", 0))
        self._inner = inner
        self._labelled = inner if isinstance(inner, StepLabelled) else None

    def stamp(self, item_id: str) -> list[int]:
        """What tells whether the file of an item was replaced; empty of those without one."""
        return stamp(self._inner, item_id)

    def label_values(self, name: str) -> tuple[str, ...]:
        """What labels of that name mean, from 0 on; empty where that is not known."""
        return label_values(self._inner, name)

    @property
    def step_label_name(self) -> str | None:
        return self._labelled.step_label_name if self._labelled else None

    @property
    def step_label_hop(self) -> int:
        return self._labelled.step_label_hop if self._labelled else 0

    def step_labels(self, item_id: str) -> NDArray[np.int64]:
        if self._labelled is None or self._labelled.step_label_name is None:
            raise DataError(f"the steps of sample {item_id} have no labels", item=item_id)
        return self._labelled.step_labels(item_id)


class UniformItems(Sequence[Item]):
    """Items that differ in their id alone, made when asked for.

    Parameters
    ----------
    ids : sequence of str
    extent, channels, dtype
        What all of them share; see `Item`.
    """

    def __init__(
        self, ids: Sequence[str], extent: tuple[int, ...], channels: int, dtype: str
    ) -> None:
        self._ids = ids
        self._shared = (extent, channels, dtype)

    def __len__(self) -> int:
        return len(self._ids)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [Item(item_id, *self._shared) for item_id in self._ids[index]]
        return Item(self._ids[index], *self._shared)


def labels_of(source: Labelled, name: Split, labels: str | None = None) -> dict[str, int]:
    """Labels of a split's samples by id, of those that have one, in the split's order.

    Of the kind called ``labels``, by default the first.
    """
    if not source.label_names:
        return {}
    every = source.labels(labels or source.label_names[0]).tolist()
    known = dict(zip(source.ids, every, strict=True))
    return {i: known[i] for i in source.split(name) if known[i] != NO_LABEL}


def read_stacked(source: Source, requests: Sequence[Request]) -> NDArray[Any]:
    """Read samples of one size into one array with a leading sample axis."""
    return np.stack(source.read(requests))


def stamp(source: Any, item_id: str) -> list[int]:
    """What tells whether the file of an item was replaced; empty of those without one."""
    known = getattr(source, "stamp", None)
    return [] if known is None else list(known(item_id))


def label_values(source: Any, name: str) -> tuple[str, ...]:
    """What labels of that name mean, from 0 on; empty where a source does not know."""
    known = getattr(source, "label_values", None)
    return () if known is None else tuple(known(name))


def step_labelled(source: Source) -> StepLabelled | None:
    """The same source, if its steps have labels."""
    if isinstance(source, StepLabelled) and source.step_label_name is not None:
        return source
    return None
