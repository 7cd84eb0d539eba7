"""Which labelled samples a probe is fitted to and tested on, and whether that says anything."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import compress

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import PipelineConfig
from gim_stagewise.probe.classifier import parts_of
from gim_stagewise.sources import Source, labels_of


@dataclass(frozen=True)
class ProbeSplit:
    """Labelled samples of one split: ids and their labels."""

    ids: list[str]
    labels: NDArray[np.int64]


def probe_splits(source: Source) -> tuple[ProbeSplit, ProbeSplit] | None:
    """Train and test samples with labels, or None where there are none."""
    splits = []
    for name in ("train", "test"):
        labels = labels_of(source, name)
        splits.append(ProbeSplit(list(labels), np.array(list(labels.values()), dtype=np.int64)))
    train, test = splits
    return (train, test) if len(train.ids) > 1 and test.ids else None


def half_labelled(source: Source) -> str:
    """Which split has no labels though the other one does; empty if both or neither do."""
    counts = {name: len(labels_of(source, name)) for name in ("train", "test")}
    (most, _), (least, count) = sorted(counts.items(), key=lambda pair: -pair[1])
    if count or not counts[most]:
        return ""
    return (
        f"no accuracies: of the splits train and test, {most} alone has labels; probes need both "
        f"(source.splits.{least})"
    )


def nothing_to_probe(train: ProbeSplit, test: ProbeSplit, name: str, config: PipelineConfig) -> str:
    """Why labels of that name say nothing about features; empty if they do."""
    if len(np.unique(train.labels)) < 2:
        return f"all training samples have the same {name!r}, which is not probed"
    _, fit, _ = parts_of(len(train.ids), config.probe, seed=config.seed)
    if len(np.unique(train.labels[fit])) < 2:
        return (
            f"all training samples but some that are held out to choose by (probe.validation) have "
            f"the same {name!r}, which is not probed"
        )
    if not np.isin(test.labels, train.labels).any():
        return f"no test sample has a {name!r} that a training sample has, which is not probed"
    return ""


def of_known_labels(train: ProbeSplit, test: ProbeSplit) -> ProbeSplit:
    """Test samples with labels that training samples have: others cannot be known by anybody."""
    known = np.isin(test.labels, train.labels)
    return ProbeSplit(list(compress(test.ids, known)), test.labels[known])


def left_out_of_test(train: ProbeSplit, test: ProbeSplit, name: str) -> str:
    """How many test samples have labels of that name that no training sample has, if any do."""
    count = len(test.ids) - len(of_known_labels(train, test).ids)
    if not count:
        return ""
    return (
        f"{count} of {len(test.ids)} test samples have a {name!r} that no training sample has, and "
        "are left out"
    )
