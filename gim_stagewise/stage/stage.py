"""One stage: train a module on its source, freeze it, extract its cache.

What is current is kept, what is stale is made again, and both are said with the reason.
"""

from __future__ import annotations

from functools import cached_property

from gim_stagewise.cache import Digest, Manifest, SealedCache
from gim_stagewise.durable import remove, sweep
from gim_stagewise.errors import (
    CacheNotFoundError,
    ConfigError,
    CorruptCacheError,
    StaleCacheError,
)
from gim_stagewise.lock import exclusive
from gim_stagewise.sources import Source
from gim_stagewise.stage import identity
from gim_stagewise.stage.assemble import assemble
from gim_stagewise.stage.checkpoint import FrozenWeights, peek_checkpoint
from gim_stagewise.stage.code import frozen_weights, weights_staleness
from gim_stagewise.stage.extract import VirtualCache
from gim_stagewise.stage.extraction_plan import Workers
from gim_stagewise.stage.fit import TrainingPlan, plan_training
from gim_stagewise.stage.job import TrainJob
from gim_stagewise.stage.measured import train_within
from gim_stagewise.stage.needs import StageNeeds, stage_needs
from gim_stagewise.stage.outputs import StageOutputs
from gim_stagewise.stage.shape import Cell, Shape, check_shape
from gim_stagewise.stage.windowed import Windowable, training_windows
from gim_stagewise.stage.workspace import Workspace

IN_PROCESS = Workers(0)


class Stage:
    """The work of one module.

    Parameters
    ----------
    workspace : Workspace
    index : int
        The module's number, from 1.
    source : Source
        Its input: the dataset, or the cache of the module below.
    grid, cell
        Geometry of a sample that the module is trained on: rows and columns, and one row.
    """

    def __init__(
        self, workspace: Workspace, index: int, source: Source, grid: tuple[int, ...], cell: Cell
    ) -> None:
        self.workspace = workspace
        self.index = index
        self.source = source
        self._grid = grid
        self._cell = cell
        self._config = workspace.module_config(index)

    @cached_property
    def shape(self) -> Shape:
        """What goes in and comes out.

        Raises
        ------
        ConfigError, ModuleRefusedError
            If the module or its objective does not fit the input.
        StaleCacheError
            If the input was stored after an operation that the module does not begin with.
        """
        shape = check_shape(self.workspace, self.index, self._grid, self._cell)
        if isinstance(self.source, SealedCache):
            stored = self.source.manifest.stored_operation
            if stored not in (None, shape.input_op):
                raise StaleCacheError(
                    f"{self.source.path} holds activations after {stored!r}, with which module "
                    f"{self.index} does not begin; build it again with `gim-stage run`, or for any "
                    'module with cache.stored_operation = "none"'
                )
        return shape

    @cached_property
    def samples(self) -> Source:
        """What the module is trained on: its input, or windows of it.

        Raises
        ------
        ConfigError
            If there is no place for windows.
        """
        if not self.workspace.config.windowed:
            return self.source
        source: Windowable = self.source  # type: ignore[assignment]
        return training_windows(self.workspace.config, self.index, source)

    @cached_property
    def recipe(self) -> Digest:
        """What the weights would be made of now."""
        return identity.stage_recipe(self.workspace.config, self.index)

    @cached_property
    def input_content(self) -> str:
        return self.source.content_digest()

    @property
    def _weights_below(self) -> str | None:
        if not isinstance(self.source, SealedCache):
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
            sweep(self.workspace.folder)
            if force:
                remove(checkpoint)
            plan = self.plan_training()
            if force:  # once it is interrupted, it goes on without being forced again
                remove(self.workspace.weights_path(self.index))
            weights = self._train(plan)
            remove(checkpoint)
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
                f"{path} is stale: {reason}; train it again first, with `gim-stage train --module "
                f"{self.index}` and the same input or pipeline"
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
        return weights_staleness(self.workspace, weights, self.recipe, self.input_content)

    def _check_trainable(self) -> None:
        self.outputs.require_input()
        if len(self.samples.split("unlabeled")) < 2:
            raise ConfigError(
                "the input has fewer than 2 unlabeled samples: nothing to train on",
                key="source" if self.index == 1 else "--input",
            )

    @property
    def needs(self) -> StageNeeds:
        """What decides the memory of training."""
        return stage_needs(self.workspace, self.index, self.shape, self.source)

    def plan_training(self) -> TrainingPlan:
        """What training will take, within the budget (see `gim_stagewise.stage.fit`)."""
        begun = peek_checkpoint(self.workspace.checkpoint_path(self.index), run=self.run_digest)
        recorded = None if begun is None else begun["micro_batch"]
        return plan_training(self.needs, recorded=recorded, budget=self.workspace.budget)

    def _train(self, plan: TrainingPlan) -> FrozenWeights:
        space = self.workspace
        tensors, (record,) = train_within(space, plan, lambda: self._train_job(plan))
        below = self.source.manifest.recipe.parts if isinstance(self.source, SealedCache) else {}
        weights = frozen_weights(
            space,
            self.index,
            in_shape=self._cell,
            tensors=tensors,
            recipe=identity.resolved(
                self.recipe, below, {identity.micro_batch_key(self.index): plan.micro_batch}
            ),
            input_content=self.input_content,
            chain=self._weights_below,
            record=record,
        )
        weights.save(space.weights_path(self.index))
        return weights

    def _train_job(self, plan: TrainingPlan) -> TrainJob:
        space = self.workspace
        step_listener = space.on_step
        module, objective = assemble(space, [self.index], [self.shape])
        return TrainJob(
            label=f"module {self.index}",
            stage=self.index,
            module=module,
            objective=objective,
            source=self.samples,
            grid=self.shape.trained_grid,
            trains=[self._config.train],
            micro_batch=plan.micro_batch,
            seed=space.config.seed,
            device=space.device,
            checkpoint=space.checkpoint_path(self.index),
            logs=[space.logs_path(self.index)],
            run=self.run_digest,
            on_step=None if step_listener is None else lambda n: step_listener(self.index, n),
        )

    # Outputs

    @cached_property
    def outputs(self) -> StageOutputs:
        return StageOutputs(self.workspace, self.index, self.source, self.samples, self.shape)

    def extract(
        self,
        weights: FrozenWeights,
        *,
        force: bool = False,
        workers: Workers = IN_PROCESS,
        reserved: int = 0,
    ) -> tuple[Manifest, bool]:
        """Build the module's cache, or go on building it, unless a valid one is there.

        ``reserved`` bytes of the disk budget belong to caches above.

        Returns
        -------
        (Manifest, bool)
            The sealed cache's manifest, and whether work was done now.
        """
        return self.outputs.extract(weights, force=force, workers=workers, reserved=reserved)

    def virtual_cache(self) -> VirtualCache:
        """The module's outputs, computed when they are read.

        Raises
        ------
        CacheNotFoundError, StaleCacheError
            If there are no current weights, or no cache of their embeddings.
        """
        return self.outputs.virtual(self.load_weights())

    def _note(self, text: str) -> None:
        self.workspace.progress.note(f"module {self.index}: {text}")
