"""Labels of training samples, for supervised modes."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Int64
from numpy.typing import NDArray
from torch import Tensor

from gim_stagewise.config import PipelineConfig
from gim_stagewise.errors import ConfigError
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.sources import (
    Request,
    Source,
    labels_of,
    step_labelled,
)
from gim_stagewise.stage.windowed import WindowSource

# Recordings whose labels of steps are held in memory.
_MOST_REMEMBERED = 16


class Labels(Protocol):
    """Classes of samples, counted from 0.

    Attributes
    ----------
    ids : collection of str
        Samples that have a label.
    classes : int
    steps : int
        Labels of a sample; 0 where it has one as a whole.
    """

    ids: Collection[str]
    classes: int
    steps: int

    @abstractmethod
    def of(self, requests: Sequence[Request]) -> Int64[Tensor, " sample *step"]:
        """Of samples in a batch; `NO_LABEL` where a step has none."""


class SampleLabels:
    """One label for each sample (see `Labels`), whatever numbers the dataset has for them."""

    steps = 0

    def __init__(self, labels: dict[str, int]) -> None:
        self._numbers = _numbered(labels)
        self.ids: Collection[str] = self._numbers
        self.classes = 1 + max(self._numbers.values())

    def of(self, requests: Sequence[Request]) -> Int64[Tensor, " sample"]:
        return torch.tensor([self._numbers[request.id] for request in requests])


class WindowLabels:
    """The label of the item that a window lies in (see `Labels`)."""

    steps = 0

    def __init__(self, windows: WindowSource, labels: dict[str, int]) -> None:
        self._windows = windows
        self._numbers = _numbered(labels)
        self.ids: Collection[str] = frozenset(windows.ids)
        self.classes = 1 + max(self._numbers.values())

    def of(self, requests: Sequence[Request]) -> Int64[Tensor, " sample"]:
        places = [self._windows.place(request) for request in requests]
        return torch.tensor([self._numbers[place.id] for place in places])


class WindowStepLabels:
    """Labels of the steps of a window (see `Labels`): each that of the step at its middle.

    Parameters
    ----------
    windows : WindowSource
        Of recordings whose steps have labels.
    items : sequence of str
        Recordings that windows lie in.
    """

    def __init__(self, windows: WindowSource, items: Sequence[str]) -> None:
        source = step_labelled(windows.source)
        assert source is not None
        self._source, self._windows = source, windows
        # Those of hours of sound are not parsed anew for every window.
        self._labels = lru_cache(_MOST_REMEMBERED)(source.step_labels)
        self.ids: Collection[str] = frozenset(windows.ids)
        (window,) = windows.zones.window
        self.steps = window // source.step_label_hop
        if self.steps == 0:
            raise ConfigError(
                f"is {window}, less than the {source.step_label_hop} samples that share a label; "
                "use larger windows",
                key="module.1.train.window",
            )
        most = (int(source.step_labels(item_id).max(initial=0)) for item_id in items)
        self.classes = 1 + max(most)

    def of(self, requests: Sequence[Request]) -> Int64[Tensor, "sample step"]:
        return torch.from_numpy(np.stack([self._of(request) for request in requests]))

    def _of(self, request: Request) -> NDArray[np.int64]:
        place = self._windows.place(request)
        assert place.region is not None
        hop = self._source.step_label_hop
        steps = (place.region[0].start + hop // 2) // hop + np.arange(self.steps)
        labels = self._labels(place.id)
        found = np.full(self.steps, NO_LABEL, np.int64)
        inside = steps < len(labels)
        found[inside] = labels[steps[inside]]
        return found


def chosen_labels(config: PipelineConfig, source: Source) -> str | None:
    """Name of the labels that supervised modes are trained on, or None where there are none.

    Raises
    ------
    ConfigError
        If the file names others than there are.
    """
    stepped = step_labelled(source)
    known = [*source.label_names, *([stepped.step_label_name] if stepped else [])]
    chosen = config.labels or (known[0] if known else None)
    if chosen is not None and chosen not in known:
        there = ", ".join(map(repr, known)) or "none"
        raise ConfigError(f"is {chosen!r}, but the dataset's labels are: {there}", key="labels")
    return chosen


def item_labels(config: PipelineConfig, source: Source) -> dict[str, int] | None:
    """Labels that supervised modes are trained on: ``labels`` in the file, or the first kind.

    Returns
    -------
    dict or None
        By id of a training item; None where steps have them.

    Raises
    ------
    ConfigError
        If there are none.
    """
    stepped, chosen = step_labelled(source), chosen_labels(config, source)
    if stepped and chosen == stepped.step_label_name:
        return None
    labels = labels_of(source, "train")
    if not labels:
        raise ConfigError(
            f"is {config.mode!r}, which needs labels, and no training sample has one; "
            "label the training items, if datasets of its kind have labels, or choose another mode",
            key="mode",
        )
    if len(set(labels.values())) < 2:
        raise ConfigError(
            f"is {config.mode!r}, but all training samples have the same {chosen!r}; choose other "
            "labels, or another mode",
            key="mode",
        )
    return labels


def training_labels(config: PipelineConfig, samples: Source) -> Labels:
    """Labels of samples, or of windows (see `item_labels`).

    Raises
    ------
    ConfigError
        If there are none.
    """
    source = samples.source if isinstance(samples, WindowSource) else samples
    labels = item_labels(config, source)
    if isinstance(samples, WindowSource):
        if labels is None:
            return WindowStepLabels(samples, source.split("train"))
        return WindowLabels(samples, labels)
    assert labels is not None  # only recordings have labels of steps, and are read in windows
    return SampleLabels(labels)


def _numbered(labels: dict[str, int]) -> dict[str, int]:
    """Labels as numbers from 0."""
    numbers = {label: number for number, label in enumerate(sorted(set(labels.values())))}
    return {item_id: numbers[label] for item_id, label in labels.items()}
