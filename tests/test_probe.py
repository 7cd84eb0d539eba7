"""The probe chooses on validation samples and scales by training samples; the test split is read.

What it says of the same features under the same settings is remembered, and nothing else is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers import other_value
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from gim_stagewise.config import PipelineConfig, ProbeConfig
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.probe.classifier import STRENGTHS, Accuracy, classify, parts_of
from gim_stagewise.probe.probe import PARTS, RANDOM, TRAINED, Probes, ProbeScores, Rows
from gim_stagewise.probe.remembered import remembered_scores
from gim_stagewise.probe.step_classifier import step_accuracies

SEED = 2
CLASSES = 3
# Of what has no such label no classifier says that it has.
NEVER = NO_LABEL

Features = NDArray[np.floating]
Labels = NDArray[np.int64]


def samples(count: int, seed: int) -> tuple[Features, Labels]:
    """A weak signal among much noise, so that what is chosen matters."""
    draw = np.random.default_rng(seed)
    labels = draw.integers(0, CLASSES, count)
    features = draw.normal(0, 1, (count, 12))
    features[:, :CLASSES] += 0.8 * np.eye(CLASSES)[labels]
    return features, labels


# Of these classifiers do best on validation samples neither first nor last.
TRAIN, TRAIN_LABELS = samples(60, 3)
# Of other statistics than the training split's; what is said of some rests on what is chosen.
MANY = samples(60, 500)[0] * 2 + 1
TEST = MANY[20:26]


def of_steps(
    train: Features, labels: Labels, test: Features, test_labels: Labels, config: ProbeConfig
) -> Accuracy:
    """The probe of steps, where every recording has one."""
    features = [*train.astype(np.float32), *test.astype(np.float32)]
    names = [str(number) for number in range(len(features))]
    known = {name: own[None] for name, own in zip(names, [*labels, *test_labels], strict=True)}

    def walk(ids: Sequence[str]) -> Iterator[list[NDArray[np.float32]]]:
        return ([features[int(name)][None]] for name in ids)

    fitted = {name: known[name] for name in names[: len(train)]}
    unseen = {name: known[name] for name in names[len(train) :]}
    (found,) = step_accuracies(walk, fitted, unseen, config, seed=SEED)
    return found


CONFIGS = {
    "logistic": ProbeConfig(validation=0.4),
    "adam": ProbeConfig(validation=0.4, classifier="adam", lr=0.02, epochs=8, batch=8),
    "steps": ProbeConfig(validation=0.4, step_lr=0.02, step_epochs=8, step_batch=8),
}
classifiers = pytest.mark.parametrize("kind", CONFIGS)


def accuracy(
    kind: str,
    labels: Labels,
    test: Features = TEST,
    train: Features = TRAIN,
    config: ProbeConfig | None = None,
) -> Accuracy:
    """Of a classifier, where the test split has these labels."""
    config = config or CONFIGS[kind]
    if kind == "steps":
        return of_steps(train, TRAIN_LABELS, test, labels, config)
    return classify(train, TRAIN_LABELS, test, labels, config, seed=SEED)


def predictions(
    kind: str,
    test: Features = TEST,
    train: Features = TRAIN,
    config: ProbeConfig | None = None,
    *,
    rows: int = len(TEST),
) -> list[int]:
    """What a classifier says of the first rows, told from its accuracies alone."""
    found = []
    for row in range(rows):
        for label in range(CLASSES):
            labels = np.full(len(test), NEVER)
            labels[row] = label
            if accuracy(kind, labels, test, train, config).test > 0:
                found.append(label)
                break
    assert len(found) == rows
    return found


@cache
def usual_predictions(kind: str) -> tuple[int, ...]:
    return tuple(predictions(kind))


def test_the_strength_is_that_of_a_loop_over_all() -> None:
    _, fit, validation = parts_of(len(TRAIN), CONFIGS["logistic"], seed=SEED)
    judged, given = [], []
    for strength in STRENGTHS:
        logistic = LogisticRegression(C=strength, tol=1e-8, max_iter=5000)
        model = make_pipeline(StandardScaler(), logistic).fit(TRAIN[fit], TRAIN_LABELS[fit])
        judged.append(float(model.score(TRAIN[validation], TRAIN_LABELS[validation])))
        given.append(model.fit(TRAIN, TRAIN_LABELS).predict(MANY))
    best = given[judged.index(max(judged))]
    assert (best != given[0]).any()
    assert (best != given[-1]).any()
    # Also where another one would be better on the test split.
    for labels in given:
        found = accuracy("logistic", labels, MANY)
        assert found.validation == pytest.approx(max(judged))
        assert found.test == pytest.approx((best == labels).mean())


@pytest.mark.parametrize(("kind", "key"), [("adam", "epochs"), ("steps", "step_epochs")])
def test_as_many_epochs_are_trained_as_are_best_on_validation_samples(kind: str, key: str) -> None:
    most = getattr(CONFIGS[kind], key)
    shorter = [CONFIGS[kind].model_copy(update={key: n}) for n in range(1, most + 1)]
    nothing = np.full(len(TEST), NEVER)
    # Each the best of so many epochs, so that the last one of those is where the best is found.
    found = [accuracy(kind, nothing, config=own).validation for own in shorter]
    best = found.index(max(found))
    assert 0 < best < most - 1
    expected = predictions(kind, config=shorter[best])
    assert list(usual_predictions(kind)) == expected
    assert predictions(kind, config=shorter[0]) != expected


@classifiers
def test_labels_of_the_test_split_decide_nothing(kind: str) -> None:
    given = np.array(usual_predictions(kind))
    validation = accuracy(kind, given).validation
    for labels in (given, np.roll(given, 1), (given + 1) % CLASSES, np.zeros_like(given)):
        assert accuracy(kind, labels) == Accuracy(float((labels == given).mean()), validation)
    beyond = np.where(np.arange(len(given)) == 0, CLASSES + 5, given)
    assert accuracy(kind, beyond).validation == validation


@classifiers
def test_what_is_said_of_a_sample_does_not_depend_on_the_others(kind: str) -> None:
    first, others = TEST[:3], TEST[3:]
    for test in (first, [*first, *others * 100], [*first, *first[:1].repeat(9, 0)]):
        assert predictions(kind, np.array(test), rows=3) == list(usual_predictions(kind)[:3])


@classifiers
def test_the_scale_of_features_does_not_matter(kind: str) -> None:
    scale, offset = 10.0 ** np.arange(-6, 6), np.arange(12)
    test, train = ((features + offset) * scale for features in (TEST, TRAIN))
    assert predictions(kind, test, train) == list(usual_predictions(kind))


# What is remembered


SCORE = Accuracy(0.5, 0.25)


class Counted:
    """Parts of a probe that count how often they are computed."""

    def __init__(self) -> None:
        self.count = dict.fromkeys(PARTS, 0)

    def compute(self, part: str) -> list[Rows]:
        self.count[part] += 1
        return [{"1": SCORE}]

    def probes(self) -> Probes:
        return Probes(["class"], {part: partial(self.compute, part) for part in PARTS})


def computed(
    file: Path,
    folder: Path,
    change: Callable[[PipelineConfig], PipelineConfig] = lambda config: config,
    **others: Any,
) -> set[str]:
    """Parts that are not remembered."""
    space = Pipeline.from_file(file, folder=folder, device="cpu").workspace
    folder.mkdir(parents=True, exist_ok=True)
    counted = Counted()
    scores = remembered_scores(
        replace(space, config=change(space.config)),
        counted.probes(),
        **({"dataset": "d", "features": ["f"], "fresh": ["g"]} | others),
    )
    assert scores == [ProbeScores("class", [SCORE], [SCORE], {"1": SCORE})]
    assert max(counted.count.values()) <= 1
    return {part for part, count in counted.count.items() if count}


@pytest.mark.parametrize("name", ProbeConfig.model_fields)
def test_another_setting_of_the_probe_is_probed_again(
    tiny: Path, tmp_path: Path, name: str
) -> None:
    def change(config: PipelineConfig) -> PipelineConfig:
        value = other_value(config.probe, name)
        return config.model_copy(update={"probe": config.probe.model_copy(update={name: value})})

    folder = tmp_path / "runs" / "out"
    assert computed(tiny, folder) == {*PARTS}
    assert computed(tiny, folder) == set()
    assert computed(tiny, folder, change) == {*PARTS}
    assert computed(tiny, folder, change) == set()


def test_what_other_parts_come_from_is_probed_again(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "out"
    assert computed(tiny, folder) == {*PARTS}
    assert computed(tiny, folder, features=["other"]) == {TRAINED}
    assert computed(tiny, folder, features=["other"], fresh=["other"]) == {RANDOM}
    assert computed(tiny, folder, features=["other"], fresh=["other"]) == set()
    assert computed(tiny, folder, dataset="other") == {*PARTS}
    seeded = partial(PipelineConfig.model_copy, update={"seed": 8})
    assert computed(tiny, folder, seeded, dataset="other") == {*PARTS}
    # Beside it, what does not come from training is known.
    assert computed(tiny, tmp_path / "runs" / "beside", seeded, dataset="other") == {TRAINED}
