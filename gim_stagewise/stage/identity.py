"""What decides a stage's weights (recipe) and its stored bytes (content).

See `gim_stagewise.cache.digests` for what the two are for.
"""

from __future__ import annotations

from typing import Any

from gim_stagewise.cache import Digest, Manifest
from gim_stagewise.config import ModuleConfig, PipelineConfig
from gim_stagewise.stage.checkpoint import FrozenWeights

# Where data lies and whether it may be fetched says nothing about what it is; its content digest
# does.
_PLACES = {"root", "download"}


def stage_recipe(config: PipelineConfig, index: int) -> Digest:
    """The recipe of module ``index``'s weights, down to the source."""
    module = config.stage(index)
    table: dict[str, Any] = {
        "seed": config.seed,
        "module": index,
        "build": module.build,
        "options": module.options,
        "objective": module.objective.model_dump(mode="json"),
        # How often state is saved changes nothing about the weights.
        "train": module.train.model_dump(mode="json", exclude={"checkpoint_every"}),
    }
    if index == 1:
        table |= _source_table(config)
    else:
        table["input"] = _as_input(cache_recipe(config, index - 1)).value
    return Digest.of(table)


def cache_recipe(config: PipelineConfig, index: int) -> Digest:
    """The recipe of module ``index``'s cache: that of its weights, and how it is stored."""
    cache = config.stage(index).cache
    storing = {
        "cache": {"precision": cache.precision, "chunk": cache.chunk, "codec": cache.codec},
        "extract": config.extract.model_dump(mode="json"),
        "augment": {"views": config.augment.views if config.augment.random else 0},
    }
    return Digest({**stage_recipe(config, index).parts, **Digest.of(storing).parts})


def _as_input(recipe: Digest) -> Digest:
    """A cache's recipe as far as it decides what is read: codecs lose nothing."""
    return Digest({key: value for key, value in recipe.parts.items() if key != "cache.codec"})


def _source_table(config: PipelineConfig) -> dict[str, Any]:
    source = config.source
    return {
        "source": {
            "kind": source.kind,
            "options": _without_places(source.options),
            "splits": {name: _without_places(table) for name, table in source.splits.items()},
        },
        "augment": config.augment.model_dump(mode="json", exclude={"views"}),
        "patches": config.patches.model_dump(mode="json"),
    }


def _without_places(table: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in table.items() if key not in _PLACES}


def cache_content(
    weights: FrozenWeights,
    module: ModuleConfig,
    *,
    input_content: str,
    in_shape: tuple[int, ...],
    views: int,
    numerics: dict[str, Any],
) -> Digest:
    """The content of a cache: everything that decides its bytes."""
    return Digest.of(
        {
            "weights": weights.digest,
            "builder": {"source": weights.builder_source, "behaviour": weights.behaviour},
            "geometry": list(in_shape),
            "views": views,
            "precision": module.cache.precision,
            "stored_operation": None,
            "numerics": numerics,
            "input": input_content,
        }
    )


def cache_differences(manifest: Manifest, recipe: Digest, content: Digest) -> list[str]:
    """Why a stored cache is not the one wanted; empty if it is.

    Numerics are not compared: bytes made on another machine still belong to these weights and
    this data, and say how they were made. Nor is the builder's source where its behaviour is
    the same.
    """
    numerics = [
        key for key in {**manifest.content.parts, **content.parts} if key.startswith("numerics")
    ]
    return manifest.recipe.differences(recipe) or manifest.content.differences(
        content, ignore=[*numerics, "builder.source"]
    )
