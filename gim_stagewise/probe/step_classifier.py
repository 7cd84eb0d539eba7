"""Linear classifiers of single steps of sequences, such as the phones of speech (section 4.2).

There are too many steps for a fit that wants all of them at once, so classifiers are trained by
Adam (appendix A.2), on some recordings at a time; those of all modules together, so that recordings
are gone over once an epoch. What is chosen, the number of epochs, is chosen on recordings that are
held out; classifiers are then trained again on all, and the test split is read once, at the end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int64
from numpy.typing import NDArray
from torch import Tensor, nn

from gim_stagewise.config import ProbeConfig
from gim_stagewise.errors import DataError
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.probe.classifier import Accuracy
from gim_stagewise.seeds import derive_seed, seeded
from gim_stagewise.stage.order import held_out_count

# Features of recordings one after another; of each module [step, channel].
Walk = Callable[[Sequence[str]], Iterable[Sequence[NDArray[np.float32]]]]
StepLabels = Mapping[str, NDArray[np.integer]]


def of_known_step_labels(train: StepLabels, test: StepLabels) -> StepLabels:
    """Labels of test steps without those that no training step has: nobody could know them."""
    learned = np.unique(np.concatenate([np.unique(own) for own in train.values()]))
    return {i: np.where(np.isin(own, learned), own, NO_LABEL) for i, own in test.items()}


def step_accuracies(
    walk: Walk, train: StepLabels, test: StepLabels, config: ProbeConfig, *, seed: int
) -> list[Accuracy]:
    """Accuracies of classifiers of steps, one for each module; 0 if there is no step to test.

    Parameters
    ----------
    walk : callable
        Gives features of recordings.
    train, test : mapping
        Labels [step] of recordings by id; steps with `NO_LABEL` are left out. Of what features and
        labels differ in length, the shorter one counts.
    config : ProbeConfig
    seed : int

    Raises
    ------
    DataError
        If there are too few recordings to hold some out.
    """
    ids = list(train)
    if len(ids) < 2:
        raise DataError(f"{len(ids)} labelled recordings are too few for a probe of their steps")
    order = ids[::-1]  # the last ones come first, and are held out
    if config.validation_part == "random":
        draw = np.random.default_rng(derive_seed(seed, "step probe"))
        order = [ids[number] for number in draw.permutation(len(ids))]
    held = min(held_out_count(len(ids), config.validation), len(ids) - 1)
    # Of training alone: test labels may not size a classifier.
    classes = 1 + max(int(own.max(initial=0)) for own in train.values())
    labels = {**train, **test}
    fit = _Fit(walk, labels, order[held:], classes, config, seed)
    found = list(fit.epochs(order[:held], config.step_epochs))
    best = [int(np.argmax(own)) for own in zip(*found, strict=True)]
    final = _Fit(walk, labels, order, classes, config, seed)
    accuracies = final.after([1 + epoch for epoch in best], list(test))
    return [
        Accuracy(own, found[epoch][module])
        for module, (epoch, own) in enumerate(zip(best, accuracies, strict=True))
    ]


class _Fit:
    """Classifiers of all modules on some recordings, with the statistics of their features."""

    def __init__(
        self,
        walk: Walk,
        labels: StepLabels,
        ids: Sequence[str],
        classes: int,
        config: ProbeConfig,
        seed: int,
    ) -> None:
        self._walk, self._labels, self._ids, self._config = walk, labels, ids, config
        self._draw = np.random.default_rng(derive_seed(seed, "order of recordings"))
        self._scalings = [scaling.found() for scaling in _scalings(walk(ids))]
        with seeded(derive_seed(seed, "step classifiers")):
            self._layers = [nn.Linear(len(mean), classes) for mean, _ in self._scalings]
        self._optimizers = [
            torch.optim.Adam(layer.parameters(), lr=config.step_lr, fused=True)
            for layer in self._layers
        ]

    def epochs(self, judged: Sequence[str], count: int) -> Iterator[list[float]]:
        """Accuracies on other recordings after each epoch."""
        for _ in range(count):
            self._train_epoch()
            yield self.accuracies(judged)

    def after(self, epochs: Sequence[int], judged: Sequence[str]) -> list[float]:
        """Each classifier's accuracy after so many epochs."""
        states: list[dict[str, Tensor]] = [{} for _ in epochs]
        for epoch in range(1, max(epochs) + 1):
            self._train_epoch()
            for number, wanted in enumerate(epochs):
                if wanted == epoch:
                    state = self._layers[number].state_dict()
                    states[number] = {name: value.clone() for name, value in state.items()}
        for layer, state in zip(self._layers, states, strict=True):
            layer.load_state_dict(state)
        return self.accuracies(judged)

    def _train_epoch(self) -> None:
        order = [self._ids[number] for number in self._draw.permutation(len(self._ids))]
        for features, labels in self._batches(order):
            for own, layer, optimizer in zip(features, self._layers, self._optimizers, strict=True):
                optimizer.zero_grad(set_to_none=True)
                F.cross_entropy(layer(own), labels).backward()  # type: ignore[no-untyped-call]
                optimizer.step()

    @torch.no_grad()
    def accuracies(self, ids: Sequence[str]) -> list[float]:
        """Shares of steps that are classified as they should be."""
        right, count = [0] * len(self._layers), 0
        for features, labels in self._batches(ids):
            count += len(labels)
            for number, (own, layer) in enumerate(zip(features, self._layers, strict=True)):
                right[number] += int((layer(own).argmax(1) == labels).sum())
        return [own / max(1, count) for own in right]

    def _batches(
        self, ids: Sequence[str]
    ) -> Iterator[tuple[list[Float[Tensor, "step channel"]], Int64[Tensor, " step"]]]:
        """Standardised features of each module, and labels, of some recordings at a time.

        Features are gone when the next ones are asked for: there is memory for one batch.
        """
        size = self._config.step_batch
        for start in range(0, len(ids), size):
            parts, labels = self._read(ids[start : start + size])
            features = [
                torch.from_numpy(_standardised(np.concatenate(parts.pop(0)), *scaling))
                for scaling in self._scalings
            ]
            yield features, torch.from_numpy(labels.astype(np.int64))
            features.clear()

    def _read(
        self, ids: Sequence[str]
    ) -> tuple[list[list[NDArray[np.float32]]], NDArray[np.integer]]:
        """Features of each module by recording, and labels, of steps that have one."""
        parts: list[list[NDArray[np.float32]]] = [[] for _ in self._layers]
        labels = []
        for item_id, features in zip(ids, self._walk(ids), strict=True):
            steps = min(len(self._labels[item_id]), *(len(part) for part in features))
            known = self._labels[item_id][:steps] != NO_LABEL
            labels.append(self._labels[item_id][:steps][known])
            for kept, part in zip(parts, features, strict=True):
                kept.append(part[:steps] if known.all() else part[:steps][known])
        return parts, np.concatenate(labels)


def _standardised(
    features: NDArray[np.float32], mean: NDArray[np.float32], std: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Features of zero mean and unit deviation, in the same memory."""
    features -= mean
    features /= std
    return features


@dataclass
class _Scaling:
    """Mean and deviation of features, gathered recording by recording."""

    count: int
    total: NDArray[np.float64]
    squares: NDArray[np.float64]

    def found(self) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        mean = self.total / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        std[std == 0] = 1
        return mean.astype(np.float32), std.astype(np.float32)


def _scalings(recordings: Iterable[Sequence[NDArray[np.float32]]]) -> list[_Scaling]:
    found: list[_Scaling] = []
    for features in recordings:
        if not found:
            found = [_Scaling(0, np.zeros(f.shape[1]), np.zeros(f.shape[1])) for f in features]
        for scaling, own in zip(found, features, strict=True):
            values = own.astype(np.float64)
            scaling.count += len(own)
            scaling.total += values.sum(0)
            scaling.squares += (values**2).sum(0)
    return found
