"""How good frozen features of recordings are: who speaks, and what (section 4.2).

A recording as a whole is classified by the mean of its embeddings over time, a step by its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gim_stagewise.cache import TiledCache
from gim_stagewise.config import PipelineConfig
from gim_stagewise.sources import RegionSource, Request, Source, StepLabelled, step_labelled
from gim_stagewise.stage.classifier import Accuracy
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward
from gim_stagewise.stage.probe import (
    ProbeScores,
    ProbeSplit,
    mean_feature,
    probe_accuracy,
    probe_splits,
)
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.step_classifier import Walk, step_accuracies
from gim_stagewise.stage.workspace import Workspace

# Features that are kept in memory rather than read or computed for each epoch.
MOST_KEPT = 1_000_000_000
MFCC, MFCC_STATISTICS = "MFCC", "MFCC statistics"
# As mel-frequency cepstral coefficients are usually taken.
LABELS_PER_SECOND = 100


def cached_walk(paths: Sequence[Path]) -> Walk:
    """Embeddings of recordings in the caches of modules."""
    caches = [TiledCache(path) for path in paths]
    return lambda ids: ([cache.read_pooled(item_id) for cache in caches] for item_id in ids)


def chain_walk(modules: Sequence[FrozenModule], source: Source, space: Workspace) -> Walk:
    """Embeddings of recordings, each computed as a whole by modules one on top of another."""

    def walk(ids: Sequence[str]) -> Iterator[list[NDArray[np.float32]]]:
        for item_id in ids:
            rows = torch.from_numpy(source.read([Request(item_id)])[0])[None]
            found = []
            for frozen in modules:
                rows, embeddings = frozen_forward(frozen, rows, space.config.extract)
                found.append(embeddings[0].numpy())
            yield found

    return walk


def mfcc_walk(source: Source, rate: int) -> Walk:
    """Mel-frequency cepstral coefficients: 13 every 10 ms, with first and second differences."""
    from torchaudio import transforms
    from torchaudio.functional import compute_deltas

    transform = transforms.MFCC(
        sample_rate=rate,
        n_mfcc=13,
        melkwargs={
            "n_fft": 512,
            "win_length": 400,
            "hop_length": rate // LABELS_PER_SECOND,
            "n_mels": 40,
        },
    )

    def walk(ids: Sequence[str]) -> Iterator[list[NDArray[np.float32]]]:
        for item_id in ids:
            (samples,) = source.read([Request(item_id)])
            plain = transform(torch.from_numpy(samples.mean(0)))
            first = compute_deltas(plain)
            yield [torch.cat([plain, first, compute_deltas(first)]).T.numpy()]

    return walk


def probe_recordings(
    space: Workspace, source: RegionSource, shapes: Sequence[Shape], trained: Walk
) -> list[ProbeScores]:
    """Probe trained modules, the same before training, and MFCC, for each kind of labels.

    Parameters
    ----------
    space : Workspace
    source : RegionSource
        The dataset.
    shapes : sequence of Shape
        Of the modules to probe, from module 1 on.
    trained : callable
        Embeddings of the trained modules.

    Returns
    -------
    list of ProbeScores
        For the labels of recordings, and for those of steps; empty where there are none. Modules
        whose embeddings lie closer together than labels of steps, or further apart, have no
        accuracy for those.
    """
    splits, stepped = probe_splits(source), step_labelled(source)
    if splits is None:
        return []
    chain = [
        FrozenModule(space.build(index, shape.cell_in[0], storing=True), space.device)
        for index, shape in enumerate(shapes, start=1)
    ]
    ids = [*splits[0].ids, *splits[1].ids]
    walks = {"trained": trained, "random": chain_walk(chain, source, space)}
    if stepped is not None:
        walks[MFCC] = mfcc_walk(source, LABELS_PER_SECOND * stepped.step_label_hop)
        fitting = _fitting(space, shapes, stepped.step_label_hop)
    whole: dict[str, list[Accuracy | None]] = {}
    steps: dict[str, list[Accuracy | None]] = {}
    with space.progress.task("probe", total=len(walks), unit="encoder") as task:
        for name, walk in walks.items():
            kept = _kept(walk, ids)
            whole[name] = [*_of_recordings(kept, splits, space.config, deviation=False)]
            if name == MFCC:
                whole[MFCC_STATISTICS] = [
                    *_of_recordings(kept, splits, space.config, deviation=True)
                ]
            if stepped is not None:
                modules = [0] if name == MFCC else fitting
                found = _of_steps(kept, modules, splits, stepped, space.config)
                steps[name] = [found.get(number) for number in range(len(whole[name]))]
            task.advance()
    scores = [_scores(source.label_names[0], whole)]
    return [*scores, _scores(str(stepped.step_label_name), steps)] if stepped else scores


def _scores(labels: str, found: dict[str, list[Accuracy | None]]) -> ProbeScores:
    trained, random = found.pop("trained"), found.pop("random")
    baselines = {name: own for name, (own,) in found.items() if own is not None}
    return ProbeScores(labels, trained, random, baselines)


def _kept(walk: Walk, ids: Sequence[str]) -> Walk:
    """The same features, kept in memory where they are few enough."""
    kept: dict[str, Sequence[NDArray[np.float32]]] = {}
    size = 0
    for item_id, features in zip(ids, walk(ids), strict=True):
        size += sum(own.nbytes for own in features)
        if size > MOST_KEPT:
            return walk
        kept[item_id] = features
    return lambda chosen: [kept[item_id] for item_id in chosen]


def _of_recordings(
    walk: Walk, splits: tuple[ProbeSplit, ProbeSplit], config: PipelineConfig, *, deviation: bool
) -> Iterator[Accuracy]:
    """Accuracies by the mean over time of each module's features, and by their deviation too."""
    train, test = splits
    pooled = [
        [mean_feature(own, deviation=deviation) for own in features]
        for features in walk([*train.ids, *test.ids])
    ]
    for own in zip(*pooled, strict=True):
        yield probe_accuracy(np.stack(own), train, test, config.probe, seed=config.seed)


def _fitting(space: Workspace, shapes: Sequence[Shape], hop: int) -> list[int]:
    """Modules, counted from 0, of which there is a stored embedding for each label of a step."""
    found, spacing = [], 1
    for number, shape in enumerate(shapes):
        spacing *= math.prod(own.stride for own in shape.geometry)
        if spacing * space.config.stored_pool(number + 1) == hop:
            found.append(number)
        else:
            space.progress.note(
                f"module {number + 1}: its steps are not probed; it has an embedding every "
                f"{spacing * space.config.stored_pool(number + 1)} samples, and labels come every "
                f"{hop}: set module.{number + 1}.cache.pool"
            )
    return found


def _of_steps(
    walk: Walk,
    modules: Sequence[int],
    splits: tuple[ProbeSplit, ProbeSplit],
    source: StepLabelled,
    config: PipelineConfig,
) -> dict[int, Accuracy]:
    """Accuracies of chosen modules' features of steps."""
    if not modules:
        return {}
    train, test = ({i: source.step_labels(i) for i in split.ids} for split in splits)
    found = step_accuracies(
        lambda ids: ([own[number] for number in modules] for own in walk(ids)),
        train,
        test,
        config.probe,
        seed=config.seed,
    )
    return dict(zip(modules, found, strict=True))
