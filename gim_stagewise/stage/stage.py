"""One stage: train a module on its source, freeze it, extract its cache.

What is current is kept, what is stale is made again, and both are said with the reason.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from gim_stagewise.cache import (
    Cache,
    CacheLayout,
    CacheWriter,
    Digest,
    Manifest,
    auto_chunk,
    discard_cache,
    metadata_problem,
    read_manifest,
)
from gim_stagewise.config import PipelineConfig
from gim_stagewise.errors import (
    CacheNotFoundError,
    ConfigError,
    CorruptCacheError,
    StaleCacheError,
)
from gim_stagewise.lock import exclusive
from gim_stagewise.memory import Budget, PeakMeter, use_lean_allocator, warm_up
from gim_stagewise.objectives import build_objective
from gim_stagewise.sources import Source
from gim_stagewise.stage import identity
from gim_stagewise.stage.checkpoint import FrozenWeights, module_tensors, peek_checkpoint
from gim_stagewise.stage.code import code_staleness
from gim_stagewise.stage.extract import BlockJob, VirtualCache, extract
from gim_stagewise.stage.fit import TrainingPlan, plan_forward, plan_training, smallest_training
from gim_stagewise.stage.freeze import (
    FrozenModule,
    behaviour_digest,
    numerics,
    training_digest,
)
from gim_stagewise.stage.loader import loader_bytes
from gim_stagewise.stage.parallel import BASE_BYTES, Workers, choose_executor
from gim_stagewise.stage.project import (
    StepSpec,
    block_bytes,
    forward_bytes,
    step_spec,
)
from gim_stagewise.stage.shape import Cell, Shape, check_shape
from gim_stagewise.stage.train import TrainJob, train_module
from gim_stagewise.stage.workspace import Workspace, with_absolute_places

IN_PROCESS = Workers(0)


class Stage:
    """The work of one module.

    Parameters
    ----------
    workspace : Workspace
    index : int
        The module's number, from 1.
    source : Source
        Its input: patches of the dataset, or the cache of the module below.
    grid, cell
        Geometry of a sample of the source: rows and columns, and one patch.
    """

    def __init__(
        self, workspace: Workspace, index: int, source: Source, grid: tuple[int, int], cell: Cell
    ) -> None:
        self.workspace = workspace
        self.index = index
        self.source = source
        self._grid = grid
        self._cell = cell
        self._config = workspace.module_config(index)

    @cached_property
    def shape(self) -> Shape:
        return check_shape(self.workspace, self.index, self._grid, self._cell)

    @cached_property
    def recipe(self) -> Digest:
        """What the weights would be made of now."""
        return identity.stage_recipe(self.workspace.config, self.index)

    @cached_property
    def input_content(self) -> str:
        return self.source.content_digest()

    @property
    def _weights_below(self) -> str | None:
        if not isinstance(self.source, Cache):
            return None
        return str(self.source.manifest.content.parts["weights"])

    @property
    def run_digest(self) -> str:
        """What is trained on what with which code; a checkpoint of anything else is not used."""
        builder = self.workspace.builder(self.index)
        parts = {"recipe": self.recipe.value, "input": self.input_content}
        return Digest.of({**parts, "builder": builder.source_digest}).value

    # Weights

    def train(self, *, force: bool = False) -> tuple[FrozenWeights, bool]:
        """Train and freeze the module, unless current weights are there.

        Returns
        -------
        (FrozenWeights, bool)
            The weights, and whether they were trained now.
        """
        if not force:
            weights, reason = self.current_weights()
            if weights is not None:
                return weights, False
            if reason:
                self._note(f"trained again: {reason}")
        self._check_trainable()
        checkpoint = self.workspace.checkpoint_path(self.index)
        with exclusive(self.workspace.folder):
            if force:
                checkpoint.unlink(missing_ok=True)
            weights = self._train()
            checkpoint.unlink(missing_ok=True)
        return weights, True

    def load_weights(self) -> FrozenWeights:
        """The frozen weights in the run's folder, if they belong to file, data and code.

        Raises
        ------
        CacheNotFoundError, CorruptCacheError
            If there are none that can be read.
        StaleCacheError
            If they belong to something else.
        """
        path = self.workspace.weights_path(self.index)
        weights = FrozenWeights.load(path)
        reason = self._staleness(weights)
        if reason:
            raise StaleCacheError(
                f"{path} is stale: {reason}; train module {self.index} again first"
            )
        return weights

    def current_weights(self) -> tuple[FrozenWeights | None, str]:
        """Weights that can be kept; else None and the reason, if there is more to say than that."""
        try:
            weights = FrozenWeights.load(self.workspace.weights_path(self.index))
        except CacheNotFoundError:
            return None, ""
        except CorruptCacheError as error:
            return None, str(error)
        reason = self._staleness(weights)
        return (None, reason) if reason else (weights, "")

    def _staleness(self, weights: FrozenWeights) -> str:
        """Why frozen weights do not belong to this file, data or code; empty if they do."""
        changes = identity.recipe_differences(weights.recipe, self.recipe)
        if changes:
            return "; ".join(changes)
        if weights.input_content != self.input_content:
            old, new = weights.input_content[:8], self.input_content[:8]
            return f"the data of its input changed ({old}… → {new}…)"
        return code_staleness(self.workspace, weights)

    def _check_trainable(self) -> None:
        if len(self.source.split("unlabeled")) < 2:
            raise ConfigError(
                "the input has fewer than 2 unlabeled samples: nothing to train on",
                key="source" if self.index == 1 else "--input",
            )

    @property
    def spec(self) -> StepSpec:
        """What decides the memory of a training step."""
        return step_spec(self.workspace, self.index, self.shape)

    @property
    def loader_bytes(self) -> int:
        """Bytes of samples that are held while the module trains."""
        return loader_bytes(
            self._config.train,
            samples=len(self.source.split("unlabeled")),
            item_bytes=self.source.item_bytes,
            chunk_items=self.source.chunk_items,
            views=self.source.views or 0,
        )

    @property
    def chain_bytes(self) -> int:
        """Bytes that modules below take to compute an input that is not stored."""
        return chain_bytes(self.source)

    def smallest_budget(self) -> Budget:
        """The smallest budgets that training works with."""
        device, host = smallest_training(
            self.spec, loader=self.loader_bytes, chain=self.chain_bytes
        )
        return Budget(device, host)

    def plan_training(self) -> TrainingPlan:
        """What training will take, within the budget (see `gim_stagewise.stage.fit`)."""
        begun = peek_checkpoint(self.workspace.checkpoint_path(self.index), run=self.run_digest)
        return plan_training(
            self.spec,
            asked=self._config.train.micro_batch,
            recorded=None if begun is None else begun["micro_batch"],
            loader=self.loader_bytes,
            chain=self.chain_bytes,
            budget=self.workspace.budget,
        )

    def _train(self) -> FrozenWeights:
        space = self.workspace
        plan = self.plan_training()
        if space.budget.lean:
            use_lean_allocator()
        warm_up(space.device)
        with PeakMeter(space.device) as meter:
            tensors, record = train_module(self._train_job(plan), space.progress)
        record = replace(record, projected_mem=plan.projected, measured_mem=meter.peak)
        module = space.build(self.index, self._cell[0])
        module.load_state_dict(tensors)
        weights = FrozenWeights(
            module=self.index,
            recipe=identity.resolved(
                self.recipe,
                self.source.manifest.recipe.parts if isinstance(self.source, Cache) else {},
                {identity.micro_batch_key(self.index): plan.micro_batch},
            ),
            input_content=self.input_content,
            builder_source=space.builder(self.index).source_digest,
            behaviour=behaviour_digest(FrozenModule(module, torch.device("cpu")), self._cell),
            training=training_digest(space.build(self.index, self._cell[0]), self._cell),
            in_shape=self._cell,
            chain=self._weights_below,
            pipeline_text=space.text,
            record=record,
            tensors=module_tensors(module),
        )
        weights.save(space.weights_path(self.index))
        return weights

    def _train_job(self, plan: TrainingPlan) -> TrainJob:
        space, config = self.workspace, self._config
        step_listener = space.on_step
        return TrainJob(
            stage=self.index,
            module=space.build(self.index, self._cell[0]),
            objective=build_objective(
                config.objective,
                channels=self.shape.embedding,
                seed=space.config.seed,
                index=self.index,
            ),
            source=self.source,
            config=config.train,
            micro_batch=plan.micro_batch,
            seed=space.config.seed,
            device=space.device,
            checkpoint=space.checkpoint_path(self.index),
            logs=space.logs_path(self.index),
            run=self.run_digest,
            on_step=None if step_listener is None else lambda n: step_listener(self.index, n),
        )

    # Cache

    def extract(
        self, weights: FrozenWeights, *, force: bool = False, workers: Workers = IN_PROCESS
    ) -> tuple[Manifest, bool]:
        """Build the module's cache, or go on building it, unless a valid one is there.

        Returns
        -------
        (Manifest, bool)
            The sealed cache's manifest, and whether work was done now.
        """
        manifest = self.manifest(weights)
        with exclusive(self.workspace.folder):
            if force:
                discard_cache(self.workspace.cache_path(self.index))
            found, reason = self.current_cache(manifest)
            if found is not None and found.sealed:
                return found, False
            if reason:
                self._note(f"cache built again: {reason}")
            return self._extract(weights, manifest, workers), True

    def _extract(self, weights: FrozenWeights, manifest: Manifest, workers: Workers) -> Manifest:
        space, source = self.workspace, self.source
        # Before anything is replaced: these weights fit the module as it is built now.
        self._frozen(weights, torch.device("cpu"))
        on_gpu = space.device.type == "cuda"
        forward = plan_forward(self.spec, space.budget)
        block = block_bytes(source.item_bytes, manifest.layout)
        executor = choose_executor(
            workers,
            threads=space.config.extract.threads,
            on_gpu=on_gpu,
            worker_bytes=BASE_BYTES + block + (0 if on_gpu else forward),
            host_bytes=space.budget.host_bytes(),
        )
        writer = CacheWriter(space.cache_path(self.index).absolute(), manifest, source)
        job = self._block_job(weights, manifest, writer.staging)
        return extract(job, writer, source, executor, space.progress)

    def _block_job(self, weights: FrozenWeights, manifest: Manifest, staging: Path) -> BlockJob:
        space, source = self.workspace, self.source
        below: Path | BlockJob | None = None
        if isinstance(source, VirtualCache):
            below = source.job
        elif isinstance(source, Cache):
            below = source.path.absolute()
        return BlockJob(
            config=with_absolute_places(space.config),
            code_folder=space.code_folder,
            input=below,
            in_channels=self._cell[0],
            device=space.device.type,
            weights=weights.tensors,
            builder_source=space.builder(self.index).source_digest,
            input_content=self.input_content,
            cache=space.cache_path(self.index).absolute(),
            staging=staging,
            manifest=manifest,
        )

    def virtual_cache(self) -> VirtualCache:
        """The module's outputs, computed when they are read.

        Raises
        ------
        CacheNotFoundError, StaleCacheError
            If there are no current weights, or no cache of their embeddings.
        """
        weights = self.load_weights()
        job = self._block_job(weights, self.manifest(weights), Path())
        return VirtualCache(job, self.source)

    def current_cache(self, wanted: Manifest) -> tuple[Manifest | None, str]:
        """A cache that can be kept, or gone on with; else None and the reason, if there is one."""
        try:
            found = read_manifest(self.workspace.cache_path(self.index))
        except CacheNotFoundError:
            return None, ""
        except CorruptCacheError as error:
            return None, str(error)
        changes = identity.cache_differences(found, wanted.recipe, wanted.content)
        if changes:
            return None, "; ".join(changes)
        # Where old activations may go, those that are gone are computed if they are needed again.
        may_go = self.workspace.config.keep != "all"
        if wanted.layout.materialized and not found.layout.materialized and not may_go:
            return None, "its activations are not stored"
        return (None, damage) if found.sealed and (damage := self._damage(found)) else (found, "")

    def _damage(self, manifest: Manifest) -> str:
        """What is wrong with a sealed cache that can be seen without reading its chunks."""
        path = self.workspace.cache_path(self.index)
        if problem := metadata_problem(path, manifest):
            return f"damaged: {problem}"
        missing = self._missing_chunks(manifest)
        return f"damaged: {missing} chunk files are missing" if missing else ""

    def _missing_chunks(self, manifest: Manifest) -> int:
        path = self.workspace.cache_path(self.index)
        blocks = manifest.layout.blocks(self.source)
        files = [file for block in blocks for file in manifest.layout.chunk_files(block)]
        return sum(not (path / file).is_file() for file in files)

    def _frozen(self, weights: FrozenWeights, device: torch.device) -> FrozenModule:
        module = self.workspace.build(self.index, self._cell[0])
        try:
            module.load_state_dict(weights.tensors)
        except RuntimeError as error:
            reason = str(error).splitlines()[-1].strip()
            raise StaleCacheError(
                f"{self.workspace.weights_path(self.index)} does not fit the module that "
                f"{self._config.build!r} builds now: {reason}; train module {self.index} again"
            ) from None
        return FrozenModule(module, device)

    def manifest(self, weights: FrozenWeights) -> Manifest:
        """What a cache of these weights' outputs would say about itself, unsealed."""
        space, cache = self.workspace, self._config.cache
        layout = cache_layout(space, self.index, self.shape, self.source)
        record = numerics(space.device, space.config.extract, cache)
        content = identity.cache_content(
            weights,
            self._config,
            input_content=self.input_content,
            in_shape=self._cell,
            views=layout.views,
            numerics=record,
        )
        return Manifest(
            pipeline=space.config.name,
            module=self.index,
            pipeline_text=space.text,
            recipe=identity.resolved(
                identity.cache_recipe(space.config, self.index), weights.recipe.parts
            ),
            content=content,
            numerics=record,
            precision={"name": cache.precision, "decode": None},
            stored_operation=None,
            encoding="patch",
            layout=layout,
        )

    def _note(self, text: str) -> None:
        self.workspace.progress.note(f"module {self.index}: {text}")


def chain_bytes(source: Source) -> int:
    """Bytes of the modules, and of their blocks, that compute what a source does not store."""
    total = 0
    while isinstance(source, VirtualCache):
        job, below = source.job, source.source
        space = Workspace(job.config, "", Path(), job.code_folder, torch.device("cpu"))
        module = space.build(job.manifest.module, job.in_channels)
        size = job.config.patches.size
        cell = (
            below.manifest.layout.cell
            if isinstance(below, Cache)
            else (job.in_channels, size, size)
        )
        total += virtual_bytes(module, cell, job.config, below.item_bytes, source.manifest.layout)
        source = below
    return total


def virtual_bytes(
    module: nn.Module,
    cell: tuple[int, ...],
    config: PipelineConfig,
    item_bytes: int,
    layout: CacheLayout,
) -> int:
    """Bytes that one frozen module takes to compute blocks on demand; uses the module up."""
    try:
        forward = forward_bytes(module, cell, config.extract.batch)
    except Exception:  # a module that has to run to be counted
        forward = sum(parameter.nbytes for parameter in module.parameters())
    return forward + block_bytes(item_bytes, layout)


def cache_layout(workspace: Workspace, index: int, shape: Shape, source: Source) -> CacheLayout:
    """How the cache of module ``index`` is laid out, whether it is there or not.

    Parameters
    ----------
    workspace : Workspace
    index : int
    shape : Shape
        Of the module.
    source : Source
        Anything with the dataset's samples.
    """
    cache, augment = workspace.module_config(index).cache, workspace.config.augment
    layout = CacheLayout(
        samples=len(source.ids),
        views=1 + (augment.views if augment.random else 0),
        grid=shape.grid,
        cell=shape.cell_out,
        embedding=shape.embedding,
        chunk=1,
        codec=cache.codec,
        materialized=cache.materialize == "always",
    )
    chunk = auto_chunk(layout.sample_bytes) if cache.chunk == "auto" else cache.chunk
    return replace(layout, chunk=min(chunk, layout.samples))
