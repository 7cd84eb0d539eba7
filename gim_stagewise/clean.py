"""What can go from a run's folder: leftovers, and what is stale."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gim_stagewise.cache import is_cache, read_manifest
from gim_stagewise.durable import discard, leftovers
from gim_stagewise.errors import CorruptCacheError
from gim_stagewise.lock import is_in_use
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.disk import folder_bytes
from gim_stagewise.stage.identity import cache_recipe, recipe_differences, stage_recipe
from gim_stagewise.status import StageStatus, pipeline_status


@dataclass(frozen=True)
class Removable:
    """Something in a run's folder that is of no more use."""

    path: Path
    bytes: int
    why: str


def removable(pipeline: Pipeline) -> list[Removable]:
    """What can go from a pipeline's folder: leftovers, and what is stale. Removes nothing.

    Sealed and current things, and work that can be gone on with, are never among it.

    Raises
    ------
    GimStageError
        If the pipeline cannot run as it is: then nobody knows what belongs to it.
    """
    pipeline.check()
    listed = []
    for path, why in _candidates(pipeline):
        size = path.stat().st_size if path.is_file() else folder_bytes(path)
        listed.append(Removable(path, size, why))
    return listed


def _candidates(pipeline: Pipeline) -> Iterator[tuple[Path, str]]:
    space = pipeline.workspace
    states = {status.module: status for status in pipeline_status(pipeline)}
    for path in leftovers(space.folder):
        yield path, "left over from something that was interrupted"
    for pattern in (".measure-*", ".prove-*"):
        for path in sorted(space.folder.glob(pattern)):
            if not is_in_use(path):
                yield path, "left over from a measurement"
    for path in sorted(space.folder.glob(".m*.zarr.build")):
        index = _number(path.name.removeprefix(".").removesuffix(".build"), ".zarr")
        if index not in states or states[index].state not in {"partial", "waiting"}:
            yield path, "left over from building a cache"
    places = [
        ("m*.zarr", ".zarr"),
        ("m*.safetensors", ".safetensors"),
        ("checkpoints/m*.pt", ".pt"),
    ]
    yield from _joint_candidates(pipeline, states)
    for pattern, suffix in places:
        for path in sorted(space.folder.glob(pattern)):
            index = _number(path.name, suffix)
            # What is no cache of this version is not ours to remove (see `discard_cache`).
            if index is None or (suffix == ".zarr" and not is_cache(path)):
                continue
            if index not in states:
                yield path, f"the pipeline has no module {index}"
            elif reason := _why_removable(pipeline, path, states[index]):
                yield path, reason


def _joint_candidates(
    pipeline: Pipeline, states: Mapping[int, StageStatus]
) -> Iterator[tuple[Path, str]]:
    """The checkpoint of all modules, if it is of no more use."""
    path = pipeline.workspace.joint_checkpoint_path
    if not path.exists() or any(status.state == "training" for status in states.values()):
        return
    done = all(status.state == "frozen" for status in states.values())
    if pipeline.config.iterative:
        yield path, "of another mode: modules are trained one after another"
    else:
        yield path, "training is done" if done else "stale: of other settings, data or code"


def _why_removable(pipeline: Pipeline, path: Path, status: StageStatus) -> str:
    """Why a file of a stage is of no use; empty if it is, or will be once something is mended."""
    if path.suffix == ".pt":
        if status.record is not None:
            return "training is done"
        return f"stale: {status.why}" if status.state == "stale" else ""
    if not pipeline.config.iterative:
        if path.suffix == ".zarr":
            return f"no cache is made where mode = {pipeline.config.mode!r}"
        return f"{status.state}: {status.why}" if status.state in ("stale", "corrupt") else ""
    try:
        read: Any = read_manifest if path.suffix == ".zarr" else FrozenWeights.load
        recipe = read(path).recipe
    except CorruptCacheError as error:
        return f"cannot be read: {error}"
    if status.state == "stale" and (path.suffix == ".zarr" or status.record is None):
        # Current weights under a stale cache are kept.
        return f"stale: {status.why}"
    wanted = (cache_recipe if path.suffix == ".zarr" else stage_recipe)(
        pipeline.config, status.module
    )
    changes = recipe_differences(recipe, wanted)
    return f"stale: {'; '.join(changes)}" if changes else ""


def _number(name: str, suffix: str) -> int | None:
    digits = name.removeprefix("m").removesuffix(suffix)
    return int(digits) if digits.isdecimal() else None


def remove(thing: Removable) -> None:
    """Remove exactly this file or folder."""
    discard(thing.path)
