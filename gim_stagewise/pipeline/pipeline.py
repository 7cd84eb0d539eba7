"""A chain of stages over one dataset."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

from gim_stagewise.cache import (
    SealedCache,
    TiledCache,
    open_sealed,
    read_manifest,
)
from gim_stagewise.config import PipelineConfig, load_pipeline, parse_pipeline
from gim_stagewise.errors import (
    ConfigError,
    CorruptCacheError,
    DataError,
    DataNotFoundError,
    OverBudgetError,
    StaleCacheError,
)
from gim_stagewise.lock import exclusive
from gim_stagewise.memory import Budget
from gim_stagewise.pipeline.results import RunResult
from gim_stagewise.pipeline.running import run_pipeline
from gim_stagewise.probe.fit import check_probe_of_patches, check_probe_of_recordings
from gim_stagewise.probe.walks import check_mfcc
from gim_stagewise.progress import Progress, Silent
from gim_stagewise.sources import PatchSource, RegionSource
from gim_stagewise.stage.chain import open_windowed
from gim_stagewise.stage.check import check_chain, first_input
from gim_stagewise.stage.choose import Choice
from gim_stagewise.stage.disk import DiskPlan, plan_disk
from gim_stagewise.stage.extraction_plan import Workers, plan_extraction
from gim_stagewise.stage.fit import plan_training
from gim_stagewise.stage.freeze import resolve_device
from gim_stagewise.stage.identity import cache_recipe, recipe_differences
from gim_stagewise.stage.joint import JointStage
from gim_stagewise.stage.labels import chosen_labels
from gim_stagewise.stage.left_out import leave_out, noted, take_back
from gim_stagewise.stage.lineage import foreign_content
from gim_stagewise.stage.needs import chain_needs
from gim_stagewise.stage.shape import Shape, windowed_input
from gim_stagewise.stage.stage import Stage
from gim_stagewise.stage.workspace import Workspace, open_data

StepListener = Callable[[int, int], None]


def run_name(config: PipelineConfig) -> str:
    """What the folder of a run is called by default."""
    return config.name if config.iterative else f"{config.name}-{config.mode}"


class Pipeline:
    """A chain of stages over one dataset.

    Parameters
    ----------
    workspace : Workspace
    source : PatchSource or RegionSource, optional
        The dataset, if it is not the one that the pipeline file names.
    """

    def __init__(
        self, workspace: Workspace, source: PatchSource | RegionSource | None = None
    ) -> None:
        self.workspace = workspace
        self._source = source
        # Items that earlier runs left out, and this one tries again.
        self._again: set[str] = set()
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
        budget: Budget | None = None,
        mode: str | None = None,
        seed: int | None = None,
        changes: Mapping[str, Any] | None = None,
    ) -> Pipeline:
        """Read a pipeline file.

        Parameters
        ----------
        path : str or Path
        folder : str or Path, optional
            Where the run's files lie; by default ``cache/<name>``, or ``cache/<name>-<mode>`` where
            the mode is not "iterative".
        device : str
            "auto" (CUDA where there is a GPU), "cpu" or "cuda".
        progress : Progress, optional
            Told what is going on; nobody by default.
        on_step : callable, optional
            Called after every training step with (module, steps done so far).
        budget : Budget, optional
            Memory and disk that may be used; by default what is free.
        mode, seed : optional
            Instead of the file's.
        changes : mapping, optional
            Other values to replace, by their keys (see `gim_stagewise.config.with_values`).

        Raises
        ------
        ConfigError
            If the file is missing or wrong.
        """
        stated = {"mode": mode, "seed": seed, **(changes or {})}
        config, text = load_pipeline(path, stated)
        return cls(
            Workspace(
                config,
                text,
                Path(folder) if folder is not None else Path("cache") / run_name(config),
                Path(path).resolve().parent,
                resolve_device(device),
                progress or Silent(),
                on_step,
                budget or Budget(),
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
        budget: Budget | None = None,
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
                budget=budget or Budget(),
            )
        )

    @cached_property
    def source(self) -> PatchSource | RegionSource:
        """The dataset as module 1 sees it: patches, or regions of large items.

        Raises
        ------
        GimStageError
            If it cannot be used, or items are too small for the modules.
        """
        if self._source is not None:
            return self._source
        if self.config.windowed:
            return open_windowed(self.workspace, again=self._again)
        return open_data(self.config)

    @property
    def skipped(self) -> dict[str, str]:
        """Why items of the dataset were left out, by id."""
        return dict(self.source.skipped)

    @property
    def notices(self) -> tuple[str, ...]:
        """What is to be said of how the dataset is read, such as recordings that are resampled."""
        return tuple(getattr(self.source, "notices", ()))

    def note_data(self) -> None:
        """Tell whoever watches of `notices`, and what was left out of the dataset."""
        for notice in self.notices:
            self.workspace.progress.note(notice)
        for why in self.skipped.values():
            self.workspace.progress.note(f"left out: {why}")

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
        if not self.config.iterative:
            raise ConfigError(
                f"is {self.config.mode!r}, in which all modules are trained in one step, and not "
                "each from the cache of the one below; use `gim-stage run`",
                key="mode",
            )
        if index == 1:
            if input_path is not None:
                raise ConfigError("module 1 is trained on the source itself", key="--input")
            grid, cell = first_input(self.workspace, self.source)
            return Stage(self.workspace, 1, self.source, grid, cell)
        verify = self.config.stage(index - 1).cache.verify_reads
        cache = open_sealed(input_path or self.workspace.cache_path(index - 1), verify=verify)
        if cache.manifest.module != index - 1:
            raise ConfigError(
                f"{cache.path} holds the outputs of module {cache.manifest.module}; module {index} "
                f"is trained on those of module {index - 1}",
                key="--input",
            )
        changes = recipe_differences(cache.manifest.recipe, cache_recipe(self.config, index - 1))
        reason = "; ".join(changes) or foreign_content(
            self.workspace, lambda: self._data_of(cache), cache
        )
        if reason:
            raise StaleCacheError(
                f"{cache.path} is stale: {reason}; build it again with `gim-stage run`"
            )
        if isinstance(cache, TiledCache):
            grid, cell = windowed_input(self.config, index, cache.layout.cell)
            return Stage(self.workspace, index, cache, grid, cell)
        if not cache.materialized:
            cache = self._below(cache).virtual_cache()
        return Stage(self.workspace, index, cache, cache.layout.grid, cache.layout.cell)

    def joint_stage(self, shapes: list[Shape] | None = None) -> JointStage:
        """The stage of all modules together, where the mode is not "iterative"."""
        return JointStage(self.workspace, self.source, self.check() if shapes is None else shapes)

    def _beside(self, cache: SealedCache) -> Pipeline:
        """The pipeline in a cache's own folder."""
        folder = cache.path.absolute().parent
        if folder == self.workspace.folder.absolute():
            return self
        return Pipeline(replace(self.workspace, folder=folder), self._source)

    def _data_of(self, cache: SealedCache) -> PatchSource | RegionSource:
        """The dataset, without what runs in a cache's folder left out."""
        return self._beside(cache).source if self.config.windowed else self.source

    def _below(self, cache: SealedCache) -> Stage:
        """The stage that made a cache, in the cache's own folder."""
        return self._beside(cache).stage(cache.manifest.module)

    def check(self) -> list[Shape]:
        """Check data, geometry and modules before anything runs, one module in memory at a time.

        Raises
        ------
        GimStageError
            For whatever does not fit.
        """
        chosen_labels(self.config, self.source)
        check_mfcc(self.source)
        return check_chain(self.workspace, self.source)

    def check_budget(
        self, shapes: list[Shape], *, first: int = 1, workers: Workers | None = None
    ) -> None:
        """Refuse a budget that a stage does not fit, before any work.

        Parameters
        ----------
        shapes : list of Shape
            Of the modules that are asked for.
        first : int
            The first module that is to be made; those below are there.
        workers : Workers, optional

        Raises
        ------
        OverBudgetError
            Of several stages, for the one that needs most; or for the probe.
        """
        check_probe_of_recordings(self.workspace, self.source, shapes)
        budget = self.workspace.budget
        errors = []
        stored = {index: self._is_materialized(index) for index in range(1, first)}
        asked = chain_needs(self.workspace, self.source, shapes, stored)[first - 1 :]
        if not asked:
            return
        # Steps of large modules are measured, which may take minutes.
        with self.workspace.progress.task("memory", total=len(asked), unit="module") as task:
            for needs in asked:
                try:
                    plan_training(needs, recorded=None, budget=budget)
                    plan_extraction(needs, budget=budget, workers=workers)
                except OverBudgetError as error:
                    errors.append(error)
                task.advance()
        if errors:
            raise max(errors, key=lambda error: error.needed)
        check_probe_of_patches(self.workspace, self.source, shapes)

    def plan_disk(
        self,
        shapes: list[Shape],
        *,
        first: int,
        last: int,
        choices: Mapping[int, Choice] | None = None,
    ) -> DiskPlan:
        """What the caches up to ``last`` take, those below ``first`` being there already."""
        there = {index: self.workspace.cache_path(index) for index in range(1, first)}
        return plan_disk(
            self.workspace, self.source, shapes, last=last, there=there, choices=choices
        )

    def _is_materialized(self, index: int) -> bool:
        return SealedCache(self.workspace.cache_path(index)).materialized

    def first_to_make(self, last: int) -> int:
        """The lowest module up to ``last`` of which something is missing or stale; else beyond."""
        for index in range(1, last + 1):
            try:
                stage = self.stage(index)
                weights, _ = stage.current_weights()
                if weights is None:
                    return index
                found = stage.outputs.current(stage.outputs.manifest(weights))
            except (StaleCacheError, CorruptCacheError):
                return index
            if not found.usable:
                return index
        return last + 1

    def run(
        self,
        *,
        start: int | None = None,
        until: int | None = None,
        workers: Workers | int | None = None,
    ) -> RunResult:
        """Train, freeze and extract every module in order, then probe them all.

        What is current is kept, what is unfinished goes on. One module is in memory at a time,
        but for the row of random modules in the probe, and for modes that train all in one step.

        Parameters
        ----------
        start : int, optional
            Forget this module and those above it first, and make them again; nothing is forgotten
            by default.
        until : int, optional
            The last module to make; the top one by default.
        workers : Workers or int, optional
            Who extracts, or how many processes; by default decided by cores, memory and the work
            there is.

        Raises
        ------
        GimStageError
            For whatever the user can mend.
        """
        if workers is None or isinstance(workers, int):
            workers = Workers(workers)
        return run_pipeline(self, start=start, until=until, workers=workers)

    def try_all_again(self) -> None:
        """Read also what earlier runs left out of the dataset."""
        self._again = noted(self.workspace.folder)
        if self._again:
            self.__dict__.pop("source", None)

    def take_all_back(self) -> None:
        """Forget that earlier runs left out what is tried again; for who holds the folder."""
        take_back(self.workspace.folder, self._again)

    def leave_out(self, error: DataError | DataNotFoundError) -> bool:
        """Whether the dataset can do without what went wrong; it is another dataset then."""
        if not self.config.windowed or self.config.source.on_error != "skip":
            return False
        before = self.source
        if error.item is not None:
            with exclusive(self.workspace.folder):
                leave_out(self.workspace.folder, before, error.item, str(error))
            self._again.discard(error.item)
        del self.source
        gone = set(before.ids) - set(self.source.ids)
        for item_id in gone:
            self.source.skipped.setdefault(item_id, str(error))
        if gone:
            self.workspace.progress.note(
                f"{', '.join(sorted(gone))} left out: without it the dataset is another one, and "
                "what was made of it is made again"
            )
        return bool(gone)
