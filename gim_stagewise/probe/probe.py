"""How good frozen features are: a linear classifier on top of them.

Every row of a table gets the same pooling, standardisation, choices and splits (see
`gim_stagewise.probe.classifier`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from gim_stagewise.cache import (
    Cache,
    Pooling,
    TiledCache,
    grid_features,
    mean_feature,
    open_sealed,
    pool_grid,
)
from gim_stagewise.config import PipelineConfig, ProbeConfig, parse_pipeline
from gim_stagewise.errors import DataError
from gim_stagewise.probe.classifier import Accuracy, classify
from gim_stagewise.probe.splits import (
    ProbeSplit,
    half_labelled,
    left_out_of_test,
    nothing_to_probe,
    of_known_labels,
    probe_splits,
)
from gim_stagewise.sources import (
    PatchSource,
    Request,
    Source,
    read_stacked,
)
from gim_stagewise.stage.chain import fresh_chain
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward
from gim_stagewise.stage.shape import trained_part
from gim_stagewise.stage.workspace import Workspace, patch_grid
from gim_stagewise.windows import centre

# With more raw pixels than this, a classifier on them takes longer than training modules does.
MOST_RAW = 1024
PIXEL_STATISTICS, RAW_PIXELS = "pixel statistics", "raw pixels"
# Of what is probed.
PARTS = TRAINED, RANDOM, BASELINES = "trained", "random", "baselines"
Rows = dict[str, Accuracy | None]


def pool_features(embeddings: NDArray[np.float32], config: PipelineConfig) -> NDArray[np.float32]:
    """[sample, grid_row, grid_col, channel] to [sample, feature], by ``probe.pooling``.

    Of the patches that modules are trained on (``augment.grid_crop``).
    """
    return pool_grid(embeddings, crop=config.augment.grid_crop, pooling=config.probe.pooling)


def probe_accuracy(
    features: NDArray[np.floating],
    train: ProbeSplit,
    test: ProbeSplit,
    config: ProbeConfig,
    *,
    seed: int,
) -> Accuracy:
    """Accuracy of a linear classifier (see `gim_stagewise.probe.classifier`).

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
        If the training split has only one class, or too few samples.
    """
    fitted, unseen = features[: len(train.ids)], features[len(train.ids) :]
    return classify(fitted, train.labels, unseen, test.labels, config, seed=seed)


@dataclass(frozen=True)
class ProbeScores:
    """Accuracies of the same probe on different features.

    Parameters
    ----------
    labels : str
        Name of the labels.
    trained, random : list of Accuracy or None
        On features of modules, after and before training; None of a module that they do not fit.
    baselines : dict
        On what was made without learning, by name: `PIXEL_STATISTICS` of patches, pooled like
        features; `RAW_PIXELS`, where there are no more than `MOST_RAW`; of recordings see
        `gim_stagewise.probe.sequences`.
    """

    labels: str
    trained: list[Accuracy | None]
    random: list[Accuracy | None]
    baselines: dict[str, Accuracy]


@dataclass(frozen=True)
class Probes:
    """What is to be probed, in parts that are computed, and remembered, one by one.

    Parameters
    ----------
    labels : list of str
        Names of the kinds of labels.
    parts : dict
        Of `PARTS` those that there are: each gives accuracies, for each kind of labels, by row: the
        number of a module, or the name of a baseline.
    """

    labels: list[str]
    parts: dict[str, Callable[[], list[Rows]]]


def probe_chain(
    workspace: Workspace,
    source: PatchSource,
    in_channels: Sequence[int],
    trained: Callable[[list[str]], Iterable[NDArray[np.float32]]],
) -> Probes:
    """Trained modules, the same modules before training, statistics of pixels, and pixels.

    Parameters
    ----------
    workspace : Workspace
    source : PatchSource
        The dataset.
    in_channels : sequence of int
        Channels of the input of each module to probe, from module 1 on.
    trained : callable
        Features of samples, [sample, feature], by module.
    """
    splits = probe_splits(source)
    if splits is None:
        if why := half_labelled(source):
            workspace.progress.note(why)
        return Probes([], {})
    train, test = splits
    if why := nothing_to_probe(train, test, source.label_names[0], workspace.config):
        workspace.progress.note(why)
        return Probes([], {})
    if left_out := left_out_of_test(train, test, source.label_names[0]):
        workspace.progress.note(left_out)
        test = of_known_labels(train, test)
    ids = [*train.ids, *test.ids]
    config = workspace.config
    numbers = [str(number) for number in range(1, 1 + len(in_channels))]

    def scored(
        what: str, names: Sequence[str], features: Iterable[NDArray[np.float32]]
    ) -> list[Rows]:
        found: Rows = {}
        with workspace.progress.task(what, total=len(names), unit="row") as task:
            for name, own in zip(names, features, strict=True):
                found[name] = probe_accuracy(own, train, test, config.probe, seed=config.seed)
                task.advance()
        return [found]

    def random() -> list[NDArray[np.float32]]:
        return chain_features(fresh_chain(workspace, in_channels), source, ids, config)

    def pixels(names: Sequence[str]) -> Iterator[NDArray[np.float32]]:
        batches = _read_in_batches(source, ids, config)
        seen = [pool_features(pixel_statistics(batch), config) for batch in batches]
        yield np.concatenate(seen)
        if RAW_PIXELS in names:
            yield _raw_pixels(source, ids, config)

    few = source.image_values <= MOST_RAW
    names = [PIXEL_STATISTICS, RAW_PIXELS] if few else [PIXEL_STATISTICS]
    return Probes(
        [source.label_names[0]],
        {
            TRAINED: lambda: scored("probe", numbers, trained(ids)),
            RANDOM: lambda: scored("probe: random modules", numbers, random()),
            BASELINES: lambda: scored("probe: pixels", names, pixels(names)),
        },
    )


def pixel_statistics(
    patches: NDArray[np.float32],
) -> NDArray[np.float32]:
    """What simple statistics say of patches, to compare features with.

    Of each channel: mean, standard deviation, the 10th, 25th, 50th, 75th and 90th percentile, and
    the mean absolute difference of neighbours along each axis of space.

    Parameters
    ----------
    patches : array
        [sample, grid_row, grid_col, channel, height, width].

    Returns
    -------
    array
        [sample, grid_row, grid_col, 9 · channel].
    """
    flat = patches.reshape(*patches.shape[:4], -1)
    parts = [flat.mean(-1), flat.std(-1), *np.percentile(flat, [10, 25, 50, 75, 90], axis=-1)]
    parts += [np.abs(np.diff(patches, axis=axis)).mean((-2, -1)) for axis in (-2, -1)]
    return np.concatenate(parts, axis=-1).astype(np.float32)


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


def probe_cache(
    path: str | Path, *, pooling: Pooling | None = None
) -> tuple[int, Pooling, float, str]:
    """Probe the features in a cache.

    Parameters
    ----------
    path : str or Path
    pooling : "mean" or "all", optional
        By default as in the pipeline that made the cache.

    Returns
    -------
    (int, str, float, str)
        The module, the pooling, the test accuracy in [0, 1], and which test samples are left out,
        if any are.

    Raises
    ------
    CacheNotFoundError, PartialCacheError, CorruptCacheError
        If the cache cannot be used.
    DataError
        If its samples have no labels, or none that something can be learned of.
    """
    cache = open_sealed(path)
    text = cache.manifest.pipeline_text
    config = parse_pipeline(text, file=f"the pipeline recorded in {path}")
    probe = config.probe.model_copy(update={"pooling": pooling or config.probe.pooling})
    splits = probe_splits(cache)
    if splits is None:
        raise DataError(f"{path} has no labelled train and test samples: nothing to probe")
    train, test = splits
    config = config.model_copy(update={"probe": probe})
    name = cache.label_names[0]
    if why := nothing_to_probe(train, test, name, config):
        raise DataError(f"{path}: {why}")
    left_out = left_out_of_test(train, test, name)
    test = of_known_labels(train, test)
    ids = [*train.ids, *test.ids]
    if isinstance(cache, TiledCache):
        if probe.pooling != "mean":
            raise DataError(f"{path} holds items of any size, of which features are means")
        features = np.stack([mean_feature(cache.read_pooled(item_id)) for item_id in ids])
    else:
        features = cached_features(Path(path), ids, config)
    accuracy = probe_accuracy(features, train, test, probe, seed=config.seed)
    return cache.manifest.module, probe.pooling, accuracy.test, left_out


def chain_features(
    modules: Sequence[FrozenModule], source: Source, ids: list[str], config: PipelineConfig
) -> list[NDArray[np.float32]]:
    """Features of every module of a frozen chain, all of which are in memory.

    Returns
    -------
    list of arrays
        One per module: [sample, feature].
    """
    collected: list[list[NDArray[np.float32]]] = [[] for _ in modules]
    for batch in _read_in_batches(source, ids, config):
        samples, rows, columns = batch.shape[:3]
        patches = torch.from_numpy(rearrange(batch, "s r c ch h w -> (s r c) ch h w"))
        for number, frozen in enumerate(modules):
            patches, embeddings = frozen_forward(frozen, patches, config.extract)
            grid = rearrange(embeddings, "(s r c) e -> s r c e", s=samples, r=rows, c=columns)
            collected[number].append(pool_features(grid.numpy(), config))
    return [np.concatenate(parts) for parts in collected]


def cached_features(path: Path, ids: Sequence[str], config: PipelineConfig) -> NDArray[np.float32]:
    """Features of samples in a module's cache, [sample, feature]."""
    return grid_features(
        Cache(path), ids, crop=config.augment.grid_crop, pooling=config.probe.pooling
    )


def samples_at_once(source: Source, config: PipelineConfig) -> int:
    """So many samples of patches as fill a piece of the frozen forward."""
    return max(1, config.extract.batch // math.prod(source.items()[0].extent))


def _read_in_batches(
    source: Source, ids: list[str], config: PipelineConfig
) -> Iterator[NDArray[np.float32]]:
    count = samples_at_once(source, config)
    for start in range(0, len(ids), count):
        yield read_stacked(source, [Request(item_id) for item_id in ids[start : start + count]])
