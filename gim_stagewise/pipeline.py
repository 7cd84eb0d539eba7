"""The stages of a pipeline in order: run or skip each, and say why."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache import Cache, read_manifest
from gim_stagewise.config import PipelineConfig, load_pipeline, parse_pipeline
from gim_stagewise.errors import ConfigError, DataError, StaleCacheError
from gim_stagewise.progress import Progress, Silent
from gim_stagewise.sources import PatchSource
from gim_stagewise.stage.checkpoint import TrainingRecord
from gim_stagewise.stage.freeze import FrozenModule, resolve_device
from gim_stagewise.stage.identity import cache_recipe
from gim_stagewise.stage.probe import (
    ProbeSplit,
    chain_embeddings,
    pool_features,
    probe_accuracy,
    probe_splits,
)
from gim_stagewise.stage.stage import Shape, Stage, check_shape
from gim_stagewise.stage.workspace import Workspace, open_patches

Pooling = Literal["mean", "all"]
StepListener = Callable[[int, int], None]


@dataclass(frozen=True)
class StageResult:
    """What became of one stage.

    ``trained`` and ``extracted`` say whether work was done now; ``probe_accuracy`` and
    ``random_probe_accuracy`` are in [0, 1], or None where samples have no labels.
    """

    module: int
    record: TrainingRecord
    trained: bool
    extracted: bool
    cache: Path
    cache_bytes: int
    probe_accuracy: float | None = None
    random_probe_accuracy: float | None = None


@dataclass(frozen=True)
class RunResult:
    """What became of a run."""

    pipeline: str
    folder: Path
    stages: list[StageResult]
    raw_probe_accuracy: float | None
    seconds: float


@dataclass(frozen=True)
class ProbeScores:
    """Accuracies of the same probe on trained, random and no features, in [0, 1]."""

    trained: list[float]
    random: list[float]
    raw: float


class Pipeline:
    """A chain of stages over one dataset.

    Parameters
    ----------
    workspace : Workspace
    """

    def __init__(self, workspace: Workspace) -> None:
        self.workspace = workspace
        self.config: PipelineConfig = workspace.config

    @classmethod
    def from_file(
        cls,
        path: str | Path,
        *,
        folder: str | Path | None = None,
        device: str = "auto",
        progress: Progress | None = None,
        on_step: StepListener | None = None,
    ) -> Pipeline:
        """Read a pipeline file.

        Parameters
        ----------
        path : str or Path
        folder : str or Path, optional
            Where the run's files lie; ``cache/<name>`` by default.
        device : str
            "auto" (CUDA where there is a GPU), "cpu" or "cuda".
        progress : Progress, optional
            Told what is going on; nobody by default.
        on_step : callable, optional
            Called after every training step with (module, steps done so far).

        Raises
        ------
        ConfigError
            If the file is missing or wrong.
        """
        config, text = load_pipeline(path)
        return cls(
            Workspace(
                config,
                text,
                Path(folder) if folder is not None else Path("cache") / config.name,
                Path(path).resolve().parent,
                resolve_device(device),
                progress or Silent(),
                on_step,
            )
        )

    @classmethod
    def from_cache(
        cls,
        path: str | Path,
        *,
        folder: str | Path | None = None,
        device: str = "auto",
        progress: Progress | None = None,
    ) -> Pipeline:
        """The pipeline whose text a cache carries; ``folder`` defaults to the cache's parent.

        The user's own builders are never imported on the word of a cache.

        Raises
        ------
        CacheNotFoundError, CorruptCacheError
            If there is no readable cache.
        """
        path = Path(path)
        text = read_manifest(path).pipeline_text
        return cls(
            Workspace(
                parse_pipeline(text, file=f"the pipeline recorded in {path}"),
                text,
                Path(folder) if folder is not None else path.absolute().parent,
                None,
                resolve_device(device),
                progress or Silent(),
            )
        )

    @cached_property
    def source(self) -> PatchSource:
        """The dataset as patches: what module 1 is trained on."""
        return open_patches(self.config)

    def stage(self, index: int, input_path: str | Path | None = None) -> Stage:
        """Stage ``index`` on the dataset, or on the cache of the module below.

        Parameters
        ----------
        index : int
        input_path : str or Path, optional
            The input's cache; by default the one in the run's folder.

        Raises
        ------
        CacheNotFoundError, PartialCacheError, CorruptCacheError
            If the cache cannot be used.
        StaleCacheError
            If another version of the pipeline file made it.
        ConfigError
            If there is no such module, or ``input_path`` holds the outputs of the wrong one.
        """
        self.config.stage(index)
        if index == 1:
            if input_path is not None:
                raise ConfigError("module 1 is trained on the source itself", key="--input")
            size = self.config.patches.size
            cell = (self.source.channels, size, size)
            return Stage(self.workspace, 1, self.source, self.source.extent, cell)
        cache = Cache(input_path or self.workspace.cache_path(index - 1))
        if cache.manifest.module != index - 1:
            raise ConfigError(
                f"{cache.path} holds the outputs of module {cache.manifest.module}; module {index} "
                f"is trained on those of module {index - 1}",
                key="--input",
            )
        changes = cache.manifest.recipe.differences(cache_recipe(self.config, index - 1))
        if changes:
            raise StaleCacheError(
                f"{cache.path} is stale: {'; '.join(changes)}; build it again with `gim-stage run`"
            )
        layout = cache.manifest.layout
        return Stage(self.workspace, index, cache, layout.grid, layout.cell)

    def check(self) -> list[Shape]:
        """Check data, geometry and modules before anything runs, one module in memory at a time.

        Raises
        ------
        GimStageError
            For whatever does not fit.
        """
        size = self.config.patches.size
        grid, cell = self.source.extent, (self.source.channels, size, size)
        shapes = []
        for index in self.config.module:
            shapes.append(check_shape(self.workspace, index, grid, cell))
            cell = shapes[-1].cell_out
        return shapes

    def run(self) -> RunResult:
        """Train, freeze and extract every module in order, then probe them all.

        What is current is kept. One module is in memory at a time.

        Raises
        ------
        GimStageError
            For whatever the user can mend.
        """
        started = time.monotonic()
        self.check()
        stages = [self._run_stage(index) for index in self.config.module]
        scores = self.probe_all()
        if scores is not None:
            stages = [
                replace(stage, probe_accuracy=trained, random_probe_accuracy=random)
                for stage, trained, random in zip(
                    stages, scores.trained, scores.random, strict=True
                )
            ]
        return RunResult(
            self.config.name,
            self.workspace.folder,
            stages,
            scores.raw if scores else None,
            time.monotonic() - started,
        )

    def _run_stage(self, index: int) -> StageResult:
        stage = self.stage(index)
        weights, trained = stage.train()
        _, extracted = stage.extract(weights)
        path = self.workspace.cache_path(index)
        if not trained and not extracted:
            self.workspace.progress.note(f"module {index}: nothing to do, weights and cache match")
        return StageResult(index, weights.record, trained, extracted, path, folder_bytes(path))

    # Probes

    def probe_all(self) -> ProbeScores | None:
        """Probe every module, random modules and raw pixels; None where there are no labels."""
        splits = probe_splits(self.source)
        if splits is None:
            return None
        train, test = splits
        ids = [*train.ids, *test.ids]
        count = len(self.config.module)
        rows = 2 * count + 1
        with self.workspace.progress.task("probe", total=rows, unit="row") as task:

            def score(features: NDArray[np.float32]) -> float:
                accuracy = self._score(features, train, test)
                task.advance()
                return accuracy

            trained = [score(self._cached_features(index, ids)) for index in self.config.module]
            random = [score(features) for features in self._random_features(ids)]
            raw = score(self.source.read_images(ids).reshape(len(ids), -1))
        return ProbeScores(trained, random, raw)

    def _score(self, features: NDArray[np.float32], train: ProbeSplit, test: ProbeSplit) -> float:
        return probe_accuracy(features, train, test, self.config.probe, seed=self.config.seed)

    def _cached_features(self, index: int, ids: list[str]) -> NDArray[np.float32]:
        pooled = Cache(self.workspace.cache_path(index)).read_pooled(ids)
        return pool_features(pooled, self.config.probe)

    def _random_features(self, ids: list[str]) -> list[NDArray[np.float32]]:
        """Features of the encoder as it was before training, for every depth."""
        channels = [shape.cell_in[0] for shape in self.check()]
        chain = [
            FrozenModule(self.workspace.build(index, size), self.workspace.device)
            for index, size in enumerate(channels, start=1)
        ]
        embeddings = chain_embeddings(chain, self.source, ids, self.config.extract)
        return [pool_features(part, self.config.probe) for part in embeddings]


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
    cache = Cache(path)
    text = cache.manifest.pipeline_text
    config = parse_pipeline(text, file=f"the pipeline recorded in {path}")
    probe = config.probe.model_copy(update={"pooling": pooling or config.probe.pooling})
    splits = probe_splits(cache)
    if splits is None:
        raise DataError(f"{path} has no labelled train and test samples: nothing to probe")
    train, test = splits
    features = pool_features(cache.read_pooled([*train.ids, *test.ids]), probe)
    accuracy = probe_accuracy(features, train, test, probe, seed=config.seed)
    return cache.manifest.module, probe.pooling, accuracy


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
