"""Show that stored and computed inputs give the same weights, to the last bit."""

from __future__ import annotations

import math
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from gim_stagewise.cache import Cache
from gim_stagewise.cache.views import DecodedArray
from gim_stagewise.config import PipelineConfig
from gim_stagewise.errors import ConfigError
from gim_stagewise.lock import exclusive
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.stage.fit import plan_training
from gim_stagewise.stage.needs import chain_needs
from gim_stagewise.stage.workspace import open_data

# Steps of an epoch, and epochs, of the slice that is trained both ways.
STEPS = 3
EPOCHS = 2
# Labelled samples that are extracted as well.
LABELLED = 8


@dataclass(frozen=True)
class Proof:
    """One module trained from stored activations, and from activations computed when read.

    ``stored`` and ``computed`` are digests of its weights; ``embeddings_equal`` compares what was
    extracted with them; seconds are for training and extraction together.
    """

    module: int
    stored: str
    computed: str
    embeddings_equal: bool
    stored_seconds: float
    computed_seconds: float

    @property
    def equal(self) -> bool:
        return self.stored == self.computed and self.embeddings_equal


@dataclass(frozen=True)
class _Trained:
    weights: str
    embeddings: np.ndarray[tuple[int, ...], np.dtype[np.float32]]
    seconds: float


def prove(pipeline: Pipeline) -> list[Proof]:
    """Train a small slice of the data both ways, in a folder of its own that is removed again.

    Raises
    ------
    GimStageError
        For whatever is wrong with the pipeline.
    """
    if pipeline.config.windowed:
        raise ConfigError(
            f"is {pipeline.config.source.kind!r}, and outputs of items read in windows are always "
            "stored: there is nothing to compare them with",
            key="source.kind",
        )
    samples = _slice(pipeline)
    pipeline = _with_micro_batches(pipeline)
    folder = pipeline.workspace.folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".prove-") as place, exclusive(Path(place)):
        stored = _train(pipeline, samples, "always", Path(place) / "stored")
        computed = _train(pipeline, samples, "never", Path(place) / "computed")
    return [
        Proof(
            module=index,
            stored=one.weights,
            computed=other.weights,
            embeddings_equal=np.array_equal(one.embeddings, other.embeddings),
            stored_seconds=one.seconds,
            computed_seconds=other.seconds,
        )
        for index, (one, other) in enumerate(zip(stored, computed, strict=True), start=1)
    ]


def _with_micro_batches(pipeline: Pipeline) -> Pipeline:
    """The pipeline with every "auto" replaced by what fits where all inputs are computed.

    That leaves a step less room than where they are stored; what is proven is that the input is
    the same, and so the micro-batch has to be.
    """
    space = pipeline.workspace
    if all(module.train.micro_batch != "auto" for module in space.config.module.values()):
        return pipeline
    config = _short(space.config, "never")
    shapes = pipeline.check()
    needs = chain_needs(replace(space, config=config), pipeline.source, shapes)
    modules = dict(space.config.module)
    for index, module in modules.items():
        if module.train.micro_batch == "auto":
            plan = plan_training(needs[index - 1], recorded=None, budget=space.budget)
            train = module.train.model_copy(update={"micro_batch": plan.micro_batch})
            modules[index] = module.model_copy(update={"train": train})
    config = space.config.model_copy(update={"module": modules})
    return Pipeline(replace(space, config=config))


def _slice(pipeline: Pipeline) -> list[str]:
    """A few batches of unlabeled samples, and a few labelled ones."""
    batch = max(module.train.batch for module in pipeline.config.module.values())
    share = 1 - max(module.train.validation for module in pipeline.config.module.values())
    unlabeled = list(pipeline.source.split("unlabeled"))[: math.ceil(STEPS * batch / share) + 1]
    labelled = [i for name in ("train", "test") for i in pipeline.source.split(name)[:LABELLED]]
    return [*unlabeled, *labelled]


def _train(
    pipeline: Pipeline, samples: list[str], materialize: Literal["always", "never"], folder: Path
) -> list[_Trained]:
    space = pipeline.workspace
    config = _short(space.config, materialize)
    work = Pipeline(
        replace(space, config=config, folder=folder), source=open_data(config, only=samples)
    )
    trained = []
    for index in config.module:
        started = time.monotonic()
        stage = work.stage(index)
        weights, _ = stage.train()
        stage.extract(weights)
        seconds = time.monotonic() - started
        cache = Cache(work.workspace.cache_path(index))
        # Of all views; NaN, where one is not stored for a sample, equals nothing.
        pooled = np.nan_to_num(np.asarray(DecodedArray(cache, "pooled")))
        trained.append(_Trained(weights.digest, pooled, seconds))
    return trained


def _short(config: PipelineConfig, materialize: Literal["always", "never"]) -> PipelineConfig:
    """The pipeline with few epochs, and inputs that are all stored or all computed."""
    modules = {
        index: module.model_copy(
            update={
                "train": module.train.model_copy(update={"max_epochs": EPOCHS}),
                "cache": module.cache.model_copy(update={"materialize": materialize}),
            }
        )
        for index, module in config.module.items()
    }
    return config.model_copy(update={"module": modules, "keep": "all"})
