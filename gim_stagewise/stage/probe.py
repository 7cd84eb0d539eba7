"""How good frozen features are: a linear classifier on top of them.

Every row of a table gets the same pooling, standardisation, choices of regularisation and split:
the strength is chosen on a validation part of the training split, the classifier is fitted again
on all of it, and the test split is read once, at the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from einops import rearrange, reduce
from numpy.typing import NDArray

from gim_stagewise.cache import Cache, TiledCache, open_sealed
from gim_stagewise.config import ExtractConfig, PipelineConfig, ProbeConfig, parse_pipeline
from gim_stagewise.errors import DataError
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources import (
    MISSING_LABEL,
    PatchSource,
    RegionSource,
    Request,
    Source,
    read_stacked,
)
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward
from gim_stagewise.stage.shape import trained_part
from gim_stagewise.stage.workspace import Workspace, patch_grid
from gim_stagewise.windows import centre

Pooling = Literal["mean", "all"]

# Inverse regularisation strengths that are tried, on standardised features.
STRENGTHS = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0, 1e3, 1e4)


@dataclass(frozen=True)
class ProbeSplit:
    """Labelled samples of one split: ids and their labels."""

    ids: list[str]
    labels: NDArray[np.int64]


def probe_splits(source: Source) -> tuple[ProbeSplit, ProbeSplit] | None:
    """Train and test samples with labels, or None where there are none."""
    if not source.label_names:
        return None
    labels = dict(
        zip(
            source.ids,
            source.labels(source.label_names[0]).tolist(),
            strict=True,
        )
    )
    splits = []
    for name in ("train", "test"):
        ids = [i for i in source.split(name) if labels[i] != MISSING_LABEL]
        splits.append(ProbeSplit(ids, np.array([labels[i] for i in ids], dtype=np.int64)))
    train, test = splits
    return (train, test) if len(train.ids) > 1 and test.ids else None


def pool_features(embeddings: NDArray[np.float32], config: PipelineConfig) -> NDArray[np.float32]:
    """[sample, grid_row, grid_col, channel] to [sample, feature], by ``probe.pooling``.

    Of the patches that modules are trained on (``augment.grid_crop``).
    """
    grid = (embeddings.shape[1], embeddings.shape[2])
    rows, columns = centre(grid, trained_part(config.augment, grid))
    embeddings = embeddings[:, rows.slice, columns.slice]
    if config.probe.pooling == "mean":
        return reduce(embeddings, "s r c ch -> s ch", "mean")
    return rearrange(embeddings, "s r c ch -> s (r c ch)")


def probe_accuracy(
    features: NDArray[np.floating],
    train: ProbeSplit,
    test: ProbeSplit,
    config: ProbeConfig,
    *,
    seed: int,
) -> float:
    """Test accuracy of a linear classifier, in [0, 1].

    Multinomial logistic regression (L-BFGS, to convergence) on features standardised with the
    training split's statistics; the L2 strength is the best of `STRENGTHS` on a validation part
    of the training split.

    Parameters
    ----------
    features : array
        [sample, feature], the training samples first, then the test samples.
    train, test : ProbeSplit
    config : ProbeConfig
    seed : int

    Raises
    ------
    DataError
        If the training split has only one class.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from threadpoolctl import threadpool_limits

    # In double precision the optimum, and so the table, is the same on every processor.
    features = features.astype(np.float64)
    fitted, unseen = features[: len(train.ids)], features[len(train.ids) :]
    if len(np.unique(train.labels)) < 2:
        raise DataError("the training split has labels of one class only: nothing to classify")
    order = np.random.default_rng(derive_seed(seed, "probe")).permutation(len(fitted))
    held = max(1, round(config.validation * len(order)))
    validation, fit = order[:held], order[held:]
    if len(np.unique(train.labels[fit])) < 2:
        raise DataError(
            f"{len(train.ids)} labelled training samples are too few for a probe with "
            f"probe.validation = {config.validation}"
        )

    def accuracy(strength: float, rows: NDArray[np.int64], x: object, y: object) -> float:
        logistic = LogisticRegression(C=strength, tol=1e-6, max_iter=5000)
        classifier = make_pipeline(StandardScaler(), logistic)
        classifier.fit(fitted[rows], train.labels[rows])
        return float(classifier.score(x, y))

    # One thread: on problems of this size threads cost twenty times what they save.
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.filterwarnings("ignore", message=".*lbfgs failed to converge.*")
        best = max(
            STRENGTHS,
            key=lambda c: accuracy(c, fit, fitted[validation], train.labels[validation]),
        )
        return accuracy(best, order, unseen, test.labels)


@dataclass(frozen=True)
class ProbeScores:
    """Accuracies of the same probe on trained, random and no features, in [0, 1]."""

    trained: list[float]
    random: list[float]
    raw: float


def probe_chain(
    workspace: Workspace, source: PatchSource | RegionSource, in_channels: Sequence[int]
) -> ProbeScores | None:
    """Probe the caches of the first modules, the same modules before training, and raw pixels.

    Parameters
    ----------
    workspace : Workspace
        With sealed caches of modules 1, 2, ...
    source : PatchSource or RegionSource
        The dataset.
    in_channels : sequence of int
        Channels of the input of each module to probe, from module 1 on.

    Returns
    -------
    ProbeScores or None
        None where the dataset has no labels, or items are of any size.
    """
    splits = probe_splits(source)
    if splits is None or isinstance(source, RegionSource):
        return None
    train, test = splits
    ids = [*train.ids, *test.ids]
    config = workspace.config
    rows = 2 * len(in_channels) + 1
    with workspace.progress.task("probe", total=rows, unit="row") as task:

        def score(features: NDArray[np.float32]) -> float:
            accuracy = probe_accuracy(features, train, test, config.probe, seed=config.seed)
            task.advance()
            return accuracy

        trained = []
        for index in range(1, len(in_channels) + 1):
            pooled = Cache(workspace.cache_path(index)).read_pooled(ids)
            trained.append(score(pool_features(pooled, config)))
        chain = [
            FrozenModule(workspace.build(index, channels), workspace.device)
            for index, channels in enumerate(in_channels, start=1)
        ]
        embeddings = chain_embeddings(chain, source, ids, config.extract)
        random = [score(pool_features(part, config)) for part in embeddings]
        raw = score(_raw_pixels(source, ids, config))
    return ProbeScores(trained, random, raw)


def _raw_pixels(source: PatchSource, ids: list[str], config: PipelineConfig) -> NDArray[np.float32]:
    """The pixels that the probed patches show: [sample, feature]."""
    grid = patch_grid(config)
    assert grid is not None
    part = centre(source.extent, trained_part(config.augment, source.extent))
    images = source.read_images(ids)
    if config.augment.grid_crop is not None:
        rows, columns = (grid.pixels(span) for span in part)
        images = images[:, :, rows.slice, columns.slice]
    return images.reshape(len(ids), -1)


def probe_cache(path: str | Path, *, pooling: Pooling | None = None) -> tuple[int, Pooling, float]:
    """Probe the features in a cache.

    Parameters
    ----------
    path : str or Path
    pooling : "mean" or "all", optional
        By default as in the pipeline that made the cache.

    Returns
    -------
    (int, str, float)
        The module, the pooling, and the test accuracy in [0, 1].

    Raises
    ------
    CacheNotFoundError, PartialCacheError, CorruptCacheError
        If the cache cannot be used.
    DataError
        If its samples have no labels.
    """
    cache = open_sealed(path)
    if isinstance(cache, TiledCache):
        raise DataError(f"{path} holds items that are read in windows: there is no probe for those")
    text = cache.manifest.pipeline_text
    config = parse_pipeline(text, file=f"the pipeline recorded in {path}")
    probe = config.probe.model_copy(update={"pooling": pooling or config.probe.pooling})
    splits = probe_splits(cache)
    if splits is None:
        raise DataError(f"{path} has no labelled train and test samples: nothing to probe")
    train, test = splits
    config = config.model_copy(update={"probe": probe})
    features = pool_features(cache.read_pooled([*train.ids, *test.ids]), config)
    accuracy = probe_accuracy(features, train, test, probe, seed=config.seed)
    return cache.manifest.module, probe.pooling, accuracy


def chain_embeddings(
    modules: Sequence[FrozenModule], source: Source, ids: list[str], config: ExtractConfig
) -> list[NDArray[np.float32]]:
    """Embeddings of every module of a frozen chain, without storing activations.

    Returns
    -------
    list of arrays
        One per module: [sample, grid_row, grid_col, channel].
    """
    collected: list[list[NDArray[np.float32]]] = [[] for _ in modules]
    for start in range(0, len(ids), 64):  # so many that pieces are full, few enough for memory
        batch = read_stacked(source, [Request(item_id) for item_id in ids[start : start + 64]])
        samples, rows, columns = batch.shape[:3]
        patches = torch.from_numpy(rearrange(batch, "s r c ch h w -> (s r c) ch h w"))
        for number, frozen in enumerate(modules):
            patches, embeddings = frozen_forward(frozen, patches, config)
            grid = rearrange(embeddings, "(s r c) e -> s r c e", s=samples, r=rows, c=columns)
            collected[number].append(grid.numpy())
    return [np.concatenate(parts) for parts in collected]
