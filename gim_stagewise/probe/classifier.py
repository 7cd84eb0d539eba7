"""The linear classifier on frozen features: fitted to convergence, or trained as the paper's is."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from gim_stagewise.config import ProbeConfig
from gim_stagewise.errors import DataError
from gim_stagewise.seeds import derive_seed, seeded

# Up to so many weights Newton's method, whose steps are few, is several times as fast as L-BFGS.
MOST_NEWTON = 1000
# Inverse regularisation strengths that are tried, on standardised features.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)

Features = NDArray[np.floating]
Labels = NDArray[np.int64]


@dataclass(frozen=True)
class Accuracy:
    """Accuracies in [0, 1]: on the test split, and the one by which choices were made."""

    test: float
    validation: float


def classify(
    fitted: Features,
    labels: Labels,
    unseen: Features,
    unseen_labels: Labels,
    config: ProbeConfig,
    *,
    seed: int,
) -> Accuracy:
    """Accuracy of a linear classifier.

    Features are standardised with the training split's statistics. What is to be chosen (the L2
    strength of a classifier that is fitted to convergence, the number of epochs of one that Adam
    trains) is chosen on a validation part of the training split; the classifier is then fitted
    again on all of it, and the test split is read once, at the end.

    Parameters
    ----------
    fitted, unseen : array
        [sample, feature] of the training and the test split.
    labels, unseen_labels : array
        [sample].
    config : ProbeConfig
    seed : int

    Raises
    ------
    DataError
        If the training split has only one class, or too few samples.
    """
    # In double precision the optimum, and so the table, is the same on every processor.
    fitted, unseen = fitted.astype(np.float64), unseen.astype(np.float64)
    order, fit, validation = parts_of(len(labels), config, seed=seed)
    if len(np.unique(labels[fit])) < 2:
        raise DataError(
            f"of {len(labels)} labelled training samples those to fit have labels of one class "
            "only: nothing to classify"
        )
    judge = _logistic if config.classifier == "logistic" else _adam
    return judge(
        (fitted[fit], labels[fit], fitted[validation], labels[validation]),
        (fitted[order], labels[order], unseen, unseen_labels),
        config,
        seed,
    )


def parts_of(
    count: int, config: ProbeConfig, *, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Training samples in the order they are fitted in; of them those to fit while choices are
    made, and those to choose by.
    """
    order = np.random.default_rng(derive_seed(seed, "probe")).permutation(count)
    held = max(1, round(config.validation * count))
    if config.validation_part == "last":
        last = order >= count - held
        return order, order[~last], order[last]
    return order, order[held:], order[:held]


# Features and labels to fit, and those to judge by.
Split = tuple[Features, Labels, Features, Labels]


def _logistic(choice: Split, final: Split, config: ProbeConfig, seed: int) -> Accuracy:
    """Multinomial logistic regression, fitted to convergence."""
    from sklearn.exceptions import ConvergenceWarning
    from threadpoolctl import threadpool_limits

    # One thread: on problems of this size threads cost twenty times what they save.
    with warnings.catch_warnings(), threadpool_limits(1):
        # Features that are constant, a class for each sample: the accuracy says it all.
        warnings.filterwarnings("ignore", category=ConvergenceWarning)
        warnings.filterwarnings("ignore", message=".*regression problem.*")
        found: list[float] = []
        for accuracy in _along(STRENGTHS, choice):
            found.append(accuracy)
            # Weaker regularisation takes ever longer, and will not help any more.
            if len(found) >= 3 and max(found[-2:]) < max(found):
                break
        best = STRENGTHS[found.index(max(found))]
        (last,) = _along([best], final)
        return Accuracy(last, max(found))


def _along(strengths: Sequence[float], split: Split) -> Iterator[float]:
    """Accuracies by strength; each fit begins where the one before ended."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    x, y, unseen, truth = split
    scaler = StandardScaler().fit(x)
    x, unseen = scaler.transform(x), scaler.transform(unseen)
    few = x.shape[1] * len(np.unique(y)) <= MOST_NEWTON
    solver = "newton-cholesky" if few else "lbfgs"
    logistic = LogisticRegression(solver=solver, tol=1e-5, max_iter=5000, warm_start=True)
    for strength in strengths:
        logistic.set_params(C=strength).fit(x, y)
        yield float(logistic.score(unseen, truth))


def _adam(choice: Split, final: Split, config: ProbeConfig, seed: int) -> Accuracy:
    """A linear layer under cross-entropy, trained by Adam (paper, appendix A.1)."""
    accuracies = [judge() for judge in _epochs(choice, config, seed, config.epochs)]
    *_, judge = _epochs(final, config, seed, 1 + int(np.argmax(accuracies)))
    return Accuracy(judge(), max(accuracies))


def _epochs(
    split: Split, config: ProbeConfig, seed: int, count: int
) -> Iterator[Callable[[], float]]:
    """Train a linear layer; gives, after every epoch, what computes its accuracy."""
    x, y, unseen, truth = split
    mean, std = x.mean(0), x.std(0)
    std[std == 0] = 1.0
    inputs, judged = (torch.from_numpy((part - mean) / std).float() for part in (x, unseen))
    # Labels may be any numbers; one that is not among those to fit is never given.
    classes = np.unique(y)
    targets = torch.from_numpy(np.searchsorted(classes, y))
    with seeded(derive_seed(seed, "classifier")):
        linear = nn.Linear(x.shape[1], len(classes))
    optimizer = torch.optim.Adam(linear.parameters(), lr=config.lr)

    @torch.no_grad()
    def accuracy() -> float:
        given = classes[linear(judged).argmax(1).numpy()]
        return float((given == truth).mean())

    for epoch in range(count):
        generator = torch.Generator().manual_seed(derive_seed(seed, "classifier order", epoch))
        order = torch.randperm(len(inputs), generator=generator)
        for rows in torch.split(order, config.batch):
            optimizer.zero_grad()
            F.cross_entropy(linear(inputs[rows]), targets[rows]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        yield accuracy
