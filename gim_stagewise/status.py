"""Where a pipeline stands, without changing anything: the state of each stage, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gim_stagewise.cache import BuildFolder, read_manifest
from gim_stagewise.errors import CorruptCacheError, GimStageError
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.stage.checkpoint import FrozenWeights, TrainingRecord, peek_checkpoint
from gim_stagewise.stage.disk import folder_bytes
from gim_stagewise.stage.identity import cache_recipe, recipe_differences, stage_recipe
from gim_stagewise.stage.joint import JointStage
from gim_stagewise.stage.outputs import described
from gim_stagewise.stage.stage import Stage
from gim_stagewise.stage.workspace import Workspace

State = Literal["missing", "training", "frozen", "partial", "sealed", "waiting", "stale", "corrupt"]

_CHECKPOINT_OF_OTHERS = "its checkpoint is damaged, or of other settings, data or code"


@dataclass(frozen=True)
class StageStatus:
    """State of one stage.

    *missing*: nothing is there. *training*: a checkpoint is. *frozen*: weights are, the cache is
    not; none is made where all modules are trained in one step. *partial*: some blocks of the cache
    are done. *sealed*: weights and cache are complete and belong to file, code and data. *waiting*:
    they belong to the file, and will be compared with the module below when that is sealed.
    *stale*: what is there belongs to something else. *corrupt*: it cannot be read.

    Parameters
    ----------
    module : int
    state : str
    why : str
        What was found that gives the state its name; empty if there is nothing to add.
    done : float or None
        Share of the work that is done, in [0, 1], while training or partial; of training, at most.
    record : TrainingRecord or None
        How training went, where weights are frozen.
    cache_bytes : int
    made_again : "weights", "cache" or None
        What `run` makes again of what is stale, where that is known.
    """

    module: int
    state: State
    why: str = ""
    done: float | None = None
    record: TrainingRecord | None = None
    cache_bytes: int = 0
    made_again: Literal["weights", "cache"] | None = None


def pipeline_status(pipeline: Pipeline) -> list[StageStatus]:
    """The state of every stage, bottom first. Reads only.

    Raises
    ------
    GimStageError
        If the pipeline itself is wrong, or its data cannot be found.
    """
    if not pipeline.config.iterative:
        return _joint_status(pipeline)
    found: list[StageStatus] = []
    for index in pipeline.config.module:
        below = found[-1] if found else None
        found.append(_stage_status(pipeline, index, below))
    return found


def _joint_status(pipeline: Pipeline) -> list[StageStatus]:
    """States where all modules are trained in one step."""
    space, stage = pipeline.workspace, pipeline.joint_stage()
    found: list[StageStatus] = []
    counters = peek_checkpoint(space.joint_checkpoint_path, run=stage.run_digest)
    below: FrozenWeights | None = None
    for index in pipeline.config.module:
        weights, state, why = _joint_weights(space, stage, index, below)
        unknown = found and below is None  # whether it was trained with the module below
        if weights and unknown and not recipe_differences(weights.recipe, stage.recipe):
            state, why = "waiting", f"waits for module {index - 1}, which is {found[-1].state}"
            weights = None
        below = weights
        if state in ("missing", "stale", "waiting") and counters is not None:
            limit, epoch = pipeline.config.stage(1).train.max_epochs, int(counters["epoch"])
            why = f"epoch {epoch + 1} of at most {limit}, with all modules"
            found.append(StageStatus(index, "training", why, done=epoch / limit))
            continue
        if state == "missing" and space.joint_checkpoint_path.exists():
            state, why = "stale", _CHECKPOINT_OF_OTHERS
        record = weights.record if weights is not None and state == "frozen" else None
        again: Literal["weights"] | None = "weights" if state == "stale" else None
        found.append(StageStatus(index, state, why, record=record, made_again=again))
    return found


def _joint_weights(
    space: Workspace, stage: JointStage, index: int, below: FrozenWeights | None
) -> tuple[FrozenWeights | None, State, str]:
    path = space.weights_path(index)
    if not path.exists():
        return None, "missing", ""
    try:
        weights = FrozenWeights.load(path)
    except CorruptCacheError as error:
        return None, "corrupt", str(error)
    why = stage.staleness(weights, below)
    return weights, "stale" if why else "frozen", why


def _stage_status(pipeline: Pipeline, index: int, below: StageStatus | None) -> StageStatus:
    space = pipeline.workspace
    path = space.cache_path(index)
    size = folder_bytes(path)
    if below is not None and below.state != "sealed":
        return _above_unfinished(pipeline, index, below, size)
    try:
        stage = pipeline.stage(index)
    except CorruptCacheError as error:
        return StageStatus(index, "corrupt", f"its input: {error}", cache_bytes=size)
    try:
        weights, why = stage.current_weights()
    except GimStageError as error:
        return StageStatus(index, "stale", str(error), cache_bytes=size)
    if weights is None:
        return _without_weights(pipeline, stage, why, size)
    return _with_weights(stage, weights, size)


def _above_unfinished(pipeline: Pipeline, index: int, below: StageStatus, size: int) -> StageStatus:
    """State of a stage whose input is not there: what its own files say."""
    space = pipeline.workspace
    waits = f"waits for module {below.module}, which is {below.state}"
    places = (space.weights_path(index), space.cache_path(index), space.checkpoint_path(index))
    if not any(place.exists() for place in places):
        return StageStatus(index, "missing", waits)
    changes: list[str] = []
    record = None
    try:
        if places[0].exists():
            weights = FrozenWeights.load(places[0])
            changes = recipe_differences(weights.recipe, stage_recipe(pipeline.config, index))
            record = None if changes else weights.record
        if places[1].exists() and not changes:
            recipe = read_manifest(places[1]).recipe
            changes = recipe_differences(recipe, cache_recipe(pipeline.config, index))
    except CorruptCacheError as error:
        return StageStatus(index, "corrupt", str(error), cache_bytes=size)
    if changes:
        return _stale(index, "; ".join(changes), size, record)
    return StageStatus(index, "waiting", waits, record=record, cache_bytes=size)


def _stale(index: int, why: str, size: int, record: TrainingRecord | None = None) -> StageStatus:
    """Of a stage whose cache is made again, and without a record of current weights, these too."""
    return StageStatus(
        index,
        "stale",
        why,
        record=record,
        cache_bytes=size,
        made_again="weights" if record is None else "cache",
    )


def _without_weights(pipeline: Pipeline, stage: Stage, why: str, size: int) -> StageStatus:
    checkpoint = pipeline.workspace.checkpoint_path(stage.index)
    counters = peek_checkpoint(checkpoint, run=stage.run_digest)
    if counters is not None:
        limit = pipeline.config.stage(stage.index).train.max_epochs
        epoch = int(counters["epoch"])
        return StageStatus(
            stage.index,
            "training",
            f"epoch {epoch + 1} of at most {limit}",
            done=epoch / limit,
            cache_bytes=size,
        )
    if not why:
        if checkpoint.exists():
            return _stale(stage.index, _CHECKPOINT_OF_OTHERS, size)
        return StageStatus(stage.index, "missing", cache_bytes=size)
    try:
        FrozenWeights.load(pipeline.workspace.weights_path(stage.index))
    except CorruptCacheError:
        return StageStatus(stage.index, "corrupt", why, cache_bytes=size)
    return _stale(stage.index, why, size)


def _with_weights(stage: Stage, weights: FrozenWeights, size: int) -> StageStatus:
    record = weights.record
    found = stage.outputs.current(stage.outputs.manifest(weights))
    if found.damage:
        why = f"{described(found.damage)}; `gim-stage run` computes it again"
        return StageStatus(stage.index, "corrupt", why, record=record, cache_bytes=size)
    if found.manifest is None:
        if not found.reason:
            return StageStatus(stage.index, "frozen", "its cache is not there yet", record=record)
        if found.unreadable:
            return StageStatus(
                stage.index, "corrupt", found.reason, record=record, cache_bytes=size
            )
        return _stale(stage.index, found.reason, size, record)
    cache = found.manifest
    if cache.sealed:
        return StageStatus(stage.index, "sealed", record=record, cache_bytes=size)
    done, blocks = BuildFolder(stage.workspace.cache_path(stage.index)).done_blocks(cache.content)
    return StageStatus(
        stage.index,
        "partial",
        f"{done} of {blocks} blocks",
        done=done / blocks if blocks else 0.0,
        record=record,
        cache_bytes=size,
    )
