"""Run a pipeline: make or keep each stage, and say why; then probe all modules."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError
from gim_stagewise.lock import exclusive
from gim_stagewise.pipeline.results import RunResult, StageResult
from gim_stagewise.probe.fit import check_probe_of_patches, check_probe_of_recordings
from gim_stagewise.probe.probe import (
    RANDOM,
    TRAINED,
    Probes,
    ProbeScores,
    cached_features,
    chain_features,
    probe_chain,
)
from gim_stagewise.probe.remembered import remembered_scores
from gim_stagewise.probe.sequences import probe_recordings
from gim_stagewise.probe.step_classifier import Walk
from gim_stagewise.probe.walks import cached_walk, chain_walk
from gim_stagewise.sources import PatchSource
from gim_stagewise.stage.disk import CacheSize, folder_bytes
from gim_stagewise.stage.extraction_plan import Workers
from gim_stagewise.stage.parallel import check_scheduler
from gim_stagewise.stage.removing import drop_outputs, forget
from gim_stagewise.stage.shape import Shape

if TYPE_CHECKING:
    from gim_stagewise.pipeline.pipeline import Pipeline


def run_pipeline(
    pipeline: Pipeline, *, start: int | None, until: int | None, workers: Workers
) -> RunResult:
    """See `Pipeline.run`."""
    started = time.monotonic()
    last = _last(pipeline, start, until)
    _check_options(pipeline, workers)
    if start == 1:
        pipeline.try_all_again()

    def forgotten() -> None:
        nonlocal start
        start = None

    while True:
        try:
            if pipeline.config.iterative:
                result = _run_stages(pipeline, start, last, workers, forgotten)
            else:
                result = _run_joint(pipeline)
        except (DataError, DataNotFoundError) as error:
            if not pipeline.leave_out(error):
                raise
        else:
            return replace(result, seconds=time.monotonic() - started)


def _last(pipeline: Pipeline, start: int | None, until: int | None) -> int:
    """The last module to make."""
    count = len(pipeline.config.module)
    last = count if until is None else until
    for index, option in ((start, "--from"), (until, "--until")):
        if index is None:
            continue
        if not pipeline.config.iterative:
            raise ConfigError(
                f"has no meaning where mode = {pipeline.config.mode!r}, which trains all modules "
                "in one step; leave it out",
                key=option,
            )
        if index not in pipeline.config.module:
            raise ConfigError(f"is {index}; this pipeline has modules 1 to {count}", key=option)
    if start is not None and start > last:
        raise ConfigError(f"is {start}, above --until {last}: nothing to make", key="--from")
    return last


def _check_options(pipeline: Pipeline, workers: Workers) -> None:
    """Refuse what is about caches where none are made."""
    if pipeline.config.iterative:
        return
    given = {
        "--workers": workers.count,
        "--scheduler": workers.scheduler,
        "--allowed-disk": pipeline.workspace.budget.disk,
    }
    for option, value in given.items():
        if value is not None:
            raise ConfigError(
                f"has no meaning where mode = {pipeline.config.mode!r}, which makes no caches; "
                "leave it out",
                key=option,
            )


def _run_stages(
    pipeline: Pipeline,
    start: int | None,
    last: int,
    workers: Workers,
    forgotten: Callable[[], None],
) -> RunResult:
    """Stage by stage, through caches; calls ``forgotten`` once ``start`` and those above are."""
    check_scheduler(workers)
    space = pipeline.workspace
    shapes, caches = check_stages(pipeline, start=start, last=last, workers=workers)
    pipeline.note_data()
    with exclusive(space.folder):
        if start is not None:
            pipeline.stage(start).outputs.require_input()  # what the first forgotten module needs
            for index in range(start, len(pipeline.config.module) + 1):
                forget(space, index)
            if start == 1:
                pipeline.take_all_back()
            forgotten()
        features, fresh, stages = [], [], []
        for index in range(1, last + 1):
            stage, content, training = _run_stage(pipeline, index, workers, above=caches[index:])
            stages.append(stage)
            features.append(content)
            fresh.append(training)
        paths = [space.cache_path(index) for index in range(1, last + 1)]
        probes = _probes(
            pipeline,
            shapes[:last],
            lambda ids: (cached_features(path, ids, pipeline.config) for path in paths),
            lambda: cached_walk(paths),
        )
        scores = remembered_scores(
            space,
            probes,
            dataset=pipeline.source.content_digest(),
            features=features,
            fresh=fresh,
        )
    return _result(pipeline, stages, scores)


def check_stages(
    pipeline: Pipeline, *, start: int | None = None, last: int, workers: Workers | None = None
) -> tuple[list[Shape], list[CacheSize]]:
    """Refuse stages up to ``last`` that cannot be made, before any work.

    Parameters
    ----------
    pipeline : Pipeline
        Of the iterative mode.
    start : int, optional
        The first module that is made again.
    last : int
    workers : Workers, optional

    Returns
    -------
    (list of Shape, list of CacheSize)
        Of all modules; and what is going to be stored.

    Raises
    ------
    GimStageError
        For whatever does not fit: data, geometry, memory, disk.
    """
    shapes = pipeline.check()
    first = min(start or last + 1, pipeline.first_to_make(last))
    if first > last:
        return shapes, []
    pipeline.check_budget(shapes[:last], first=first, workers=workers)
    disk = pipeline.plan_disk(shapes, first=first, last=last)
    disk.check(pipeline.workspace)
    return shapes, disk.caches


def _run_stage(
    pipeline: Pipeline, index: int, workers: Workers, above: list[CacheSize]
) -> tuple[StageResult, str, str]:
    """What became of a stage; digests of its cache's content, and of its module when fresh."""
    space, keep = pipeline.workspace, pipeline.config.keep
    stage = pipeline.stage(index)
    weights, trained = stage.train()
    if keep != "all":
        drop_outputs(space, index - 2)
    reserved = sum(cache.bytes for cache in above)
    manifest, extracted = stage.extract(weights, workers=workers, reserved=reserved)
    if keep == "last":
        drop_outputs(space, index - 1)
    path = space.cache_path(index)
    if not trained and not extracted:
        space.progress.note(f"module {index}: nothing to do, weights and cache match")
    result = StageResult(index, weights.record, trained, extracted, path, folder_bytes(path))
    return result, manifest.content.value, weights.training


def _run_joint(pipeline: Pipeline) -> RunResult:
    """All modules in one step."""
    space = pipeline.workspace
    shapes = pipeline.check()
    stage = pipeline.joint_stage(shapes)
    stage.check()
    check_probe_of_recordings(space, pipeline.source, shapes)
    check_probe_of_patches(space, pipeline.source, shapes)
    pipeline.note_data()
    with exclusive(space.folder):
        weights, trained = stage.train()
        features = [stage.input_content]
        for own in weights:
            # The same tensors can give other features once the code changed.
            features += [own.digest, own.behaviour]
        if not trained:
            space.progress.note(f"{stage.label}: nothing to do, weights match")
        probes = _probes(
            pipeline,
            shapes,
            lambda ids: chain_features(
                stage.frozen(weights), pipeline.source, ids, pipeline.config
            ),
            lambda: chain_walk(stage.frozen(weights), pipeline.source, space),
        )
        if pipeline.config.mode == "random" and probes.parts:
            once = cache(probes.parts[RANDOM])  # modules are what they were
            probes = replace(probes, parts=probes.parts | {TRAINED: once, RANDOM: once})
        scores = remembered_scores(
            space,
            probes,
            dataset=pipeline.source.content_digest(),
            features=features,
            fresh=[own.training for own in weights],
        )
    stages = [
        StageResult(own.module, own.record, trained, extracted=False, cache=None, cache_bytes=0)
        for own in weights
    ]
    return _result(pipeline, stages, scores)


def _probes(
    pipeline: Pipeline,
    shapes: Sequence[Shape],
    features: Callable[[list[str]], Iterable[NDArray[np.float32]]],
    embeddings: Callable[[], Walk],
) -> Probes:
    """Modules are probed by features of samples, or of recordings by embeddings of steps."""
    space, source = pipeline.workspace, pipeline.source
    if isinstance(source, PatchSource):
        return probe_chain(space, source, [shape.cell_in[0] for shape in shapes], features)
    if pipeline.config.sequences:
        return probe_recordings(space, source, shapes, embeddings)
    return Probes([], {})


def _result(pipeline: Pipeline, stages: list[StageResult], probes: list[ProbeScores]) -> RunResult:
    return RunResult(
        pipeline=pipeline.config.name,
        mode=pipeline.config.mode,
        folder=pipeline.workspace.folder,
        stages=stages,
        probes=probes,
        seconds=0.0,
        skipped=pipeline.skipped,
        notices=pipeline.notices,
    )
