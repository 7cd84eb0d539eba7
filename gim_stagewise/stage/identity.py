"""What decides a stage's weights (recipe) and its stored bytes (content).

See `gim_stagewise.cache.digests` for what the two are for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from gim_stagewise.cache import Digest, Layout, Manifest, TiledLayout
from gim_stagewise.config import ModuleConfig, PipelineConfig
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.freeze import STEPS_AT_ONCE
from gim_stagewise.windows import Geometry

# Where data lies and whether it may be fetched says nothing about what it is; its content digest
# does.
_PLACES = {"root", "download"}


def stage_recipe(config: PipelineConfig, index: int) -> Digest:
    """The recipe of module ``index``'s weights, down to the source.

    Its parts are named as in the pipeline file, so that a difference names what was changed. Where
    all modules are trained in one step, they have one recipe.
    """
    if not config.iterative:
        return _joint_recipe(config)
    table: dict[str, Any] = {"seed": config.seed, "module": {}, **_source_table(config)}
    for number in range(1, index + 1):
        table["module"][str(number)] = _module_table(config, number)
        if number < index:
            table = _merged(table, _storing(config, number))
    return Digest.of(table)


def _joint_recipe(config: PipelineConfig) -> Digest:
    context = {"context": config.context.model_dump(mode="json")} if config.mode == "cpc" else {}
    labels = {"labels": config.labels} if config.supervised and config.labels else {}
    modules = {str(number): _module_table(config, number) for number in config.module}
    table = {"seed": config.seed, "mode": config.mode, **context, **labels, "module": modules}
    return Digest.of({**table, **_source_table(config)})


def _module_table(config: PipelineConfig, number: int) -> dict[str, Any]:
    """What decides a module's weights, besides its input.

    What is switched off does not stand there, so that weights stay current when a release brings a
    new switch.
    """
    module = config.stage(number)
    table: dict[str, Any] = {"build": module.build, "options": module.options}
    if config.mode == "random":
        return table
    if not config.supervised:
        objective = module.objective.model_dump(mode="json", exclude_none=True)
        if not config.dense:
            del objective["pool"]
        table["objective"] = objective
    # How often state is saved changes nothing about the weights.
    unused = {"checkpoint_every"} if config.windowed else {"checkpoint_every", "window"}
    train = module.train.model_dump(mode="json", exclude=unused)
    if config.mode not in ("simultaneous", "greedy_supervised"):
        del train["update_every"]
    off = [("dropout", 0.0), ("noise", 0.0), ("average", 0.0), ("update_every", 1)]
    table["train"] = {key: value for key, value in train.items() if (key, value) not in off}
    return table


def cache_recipe(config: PipelineConfig, index: int) -> Digest:
    """The recipe of module ``index``'s cache: that of its weights, and how it is stored."""
    codec = {f"module.{index}.cache.codec": config.stage(index).cache.codec}
    storing = Digest.of(_storing(config, index)).parts
    return Digest({**stage_recipe(config, index).parts, **storing, **codec})


def _storing(config: PipelineConfig, index: int) -> dict[str, Any]:
    """What decides the values that are read from a cache; codecs lose nothing."""
    cache = config.stage(index).cache
    tile = {"windows": {"tile": config.windows.tile}} if config.windowed else {}
    return tile | {
        "module": {
            str(index): {
                "cache": cache.model_dump(
                    mode="json", include={"precision", "stored_operation", "chunk"}
                )
            }
        },
        "extract": config.extract.model_dump(mode="json"),
        "augment": {"views": config.augment.views if config.augment.random else 0},
    }


def _merged(table: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    merged = dict(table)
    for key, value in other.items():
        both = isinstance(value, dict) and isinstance(table.get(key), dict)
        merged[key] = _merged(table[key], value) if both else value
    return merged


def _source_table(config: PipelineConfig) -> dict[str, Any]:
    source = config.source
    windows = {}
    if config.windowed:
        windows = {
            "encoding": config.encoding,
            "windows": config.windows.model_dump(mode="json", exclude={"tile", "lanes"}),
        }
    patches = config.patches.model_dump(mode="json") if config.patches else None
    return windows | {
        "source": {
            "kind": source.kind,
            "digest": source.digest,
            "options": _without_places(source.options),
            "splits": {name: _without_places(table) for name, table in source.splits.items()},
        },
        "augment": config.augment.model_dump(mode="json", exclude={"views"}),
        "patches": patches,
    }


def _without_places(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in _PLACES}


def recipe_differences(recorded: Digest, wanted: Digest) -> list[str]:
    """What the file says now that a recorded recipe does not.

    Where the file leaves the micro-batch to the budget, whatever it came to will do.
    """
    modes = [digest.parts.get("mode", "iterative") for digest in (recorded, wanted)]
    if modes[0] != modes[1]:
        return [f"mode {modes[0]} → {modes[1]}"]
    automatic = [key for key, value in wanted.parts.items() if _is_automatic(key, value)]
    return recorded.differences(wanted, ignore=automatic)


def resolved(recipe: Digest, *recorded: Mapping[str, Any]) -> Digest:
    """A recipe with what "auto" came to, from parts of recorded recipes."""
    known = {key: value for parts in recorded for key, value in parts.items()}
    return Digest(
        {
            key: known.get(key, value) if _is_automatic(key, value) else value
            for key, value in recipe.parts.items()
        }
    )


def micro_batch_key(index: int) -> str:
    """The part of a recipe that says how many patches of module ``index`` were in memory."""
    return f"module.{index}.train.micro_batch"


def _is_automatic(key: str, value: Any) -> bool:
    return value == "auto" and key.endswith(".train.micro_batch")


def cache_content(
    weights: FrozenWeights,
    module: ModuleConfig,
    *,
    stored_operation: str | None,
    input_content: str,
    geometry: Any,
    views: int,
    numerics: dict[str, Any],
) -> Digest:
    """The content of a cache: everything that decides its bytes."""
    return Digest.of(
        {
            "weights": weights.digest,
            "builder": {"source": weights.builder_source, "behaviour": weights.behaviour},
            "geometry": geometry,
            "views": views,
            "precision": module.cache.precision,
            "stored_operation": stored_operation,
            "numerics": numerics,
            "input": input_content,
        }
    )


def geometry_record(
    layout: Layout, cell_in: tuple[int, ...], geometry: Sequence[Geometry], lanes: int
) -> list[int] | dict[str, Any]:
    """What decides the bytes of a block besides its inputs and the module.

    Parameters
    ----------
    layout : CacheLayout or TiledLayout
    cell_in : tuple of int
        A patch of the input.
    geometry : sequence of Geometry
        Of the module along each axis, in dense encoding.
    lanes : int
        Recordings that a stateful module goes over at once.
    """
    if not isinstance(layout, TiledLayout):
        return list(cell_in)
    record: dict[str, Any] = {"tile": list(layout.tile), "pool": layout.pool}
    if layout.state:
        record |= {"lanes": lanes, "steps": STEPS_AT_ONCE}
    if geometry:
        return record | {"chain": [list(vars(own).values()) for own in geometry]}
    return record | {"patch": list(cell_in)}


def cache_differences(manifest: Manifest, recipe: Digest, content: Digest) -> list[str]:
    """Why a stored cache is not the one wanted; empty if it is.

    Numerics are not compared: bytes made on another machine still belong to these weights and
    this data, and say how they were made. Nor is the builder's source where its behaviour is
    the same.
    """
    numerics = [
        key for key in {**manifest.content.parts, **content.parts} if key.startswith("numerics")
    ]
    return recipe_differences(manifest.recipe, recipe) or manifest.content.differences(
        content, ignore=[*numerics, "builder.source"]
    )
