"""All modules of a pipeline trained in one step: every mode but the iterative one.

Nothing is cached: what comes out are the frozen modules, as those of stages are. ``random`` trains
nothing at all, and freezes modules as they were built.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property

import torch
from torch import Tensor

from gim_stagewise.cache import Digest
from gim_stagewise.durable import remove, sweep
from gim_stagewise.errors import CacheNotFoundError, CorruptCacheError
from gim_stagewise.lock import exclusive
from gim_stagewise.models import Stack
from gim_stagewise.sources import PatchSource, RegionSource, Source, Split
from gim_stagewise.stage import identity
from gim_stagewise.stage.assemble import assemble, observed_modules
from gim_stagewise.stage.check import check_joint
from gim_stagewise.stage.checkpoint import (
    FrozenWeights,
    TrainingRecord,
    module_tensors,
    peek_checkpoint,
)
from gim_stagewise.stage.code import frozen_weights, weights_staleness
from gim_stagewise.stage.fit import TrainingPlan, plan_training
from gim_stagewise.stage.freeze import FrozenModule, training_numerics
from gim_stagewise.stage.job import TrainJob
from gim_stagewise.stage.labels import Labels, item_labels, training_labels
from gim_stagewise.stage.measured import train_within
from gim_stagewise.stage.needs import TrainingNeeds, joint_needs
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.windowed import training_windows
from gim_stagewise.stage.workspace import Workspace


class JointStage:
    """The work of all modules together.

    Parameters
    ----------
    workspace : Workspace
    source : PatchSource or RegionSource
        The dataset.
    shapes : sequence of Shape
        Of all modules.
    """

    def __init__(
        self, workspace: Workspace, source: PatchSource | RegionSource, shapes: Sequence[Shape]
    ) -> None:
        self.workspace = workspace
        self.source = source
        self.shapes = shapes
        self._config = workspace.config

    @property
    def label(self) -> str:
        """What messages call the modules."""
        return f"modules 1 to {len(self.shapes)}" if len(self.shapes) > 1 else "module 1"

    @cached_property
    def samples(self) -> Source:
        """What modules are trained on: the dataset, or windows of it.

        Raises
        ------
        ConfigError
            If there is no place for windows, or there are no labels where they are wanted.
        """
        if isinstance(self.source, RegionSource):
            if self._config.supervised:
                item_labels(self._config, self.source)  # without any there is no place for windows
            return training_windows(self._config, 1, self.source, self._data_split)
        return self.source

    @property
    def _data_split(self) -> Split:
        """Items of the dataset that modules are trained on."""
        return "train" if self._config.supervised else "unlabeled"

    @property
    def split(self) -> Split:
        """Of `samples`; windows of whatever items are unlabeled ones."""
        return "unlabeled" if self._config.windowed else self._data_split

    @cached_property
    def labels(self) -> Labels | None:
        """Labels of training samples, for supervised modes.

        Raises
        ------
        ConfigError
            If there are none.
        """
        return training_labels(self._config, self.samples) if self._config.supervised else None

    @cached_property
    def recipe(self) -> Digest:
        """What the weights would be made of now."""
        return identity.stage_recipe(self._config, len(self.shapes))

    @cached_property
    def input_content(self) -> str:
        return self.source.content_digest()

    @property
    def run_digest(self) -> str:
        """What is trained on what with which code; a checkpoint of anything else is not used."""
        builders = [self.workspace.builder(index).source_digest for index in self._config.module]
        parts = {"recipe": self.recipe.value, "input": self.input_content, "builders": builders}
        return Digest.of(parts).value

    def check(self) -> None:
        """Check labels, and that batches can be delivered, before anything runs.

        Raises
        ------
        ConfigError
            If there are no labels where they are wanted, or too few samples.
        """
        labels = self.labels
        count = len(self.samples.split(self.split) if labels is None else labels.ids)
        check_joint(self.workspace, count, self.shapes)

    # Weights

    def train(self) -> tuple[list[FrozenWeights], bool]:
        """Train and freeze all modules, unless current weights are there.

        Returns
        -------
        (list of FrozenWeights, bool)
            The weights, bottom first, and whether they were trained now.
        """
        weights, reason = self.current_weights()
        if weights is not None:
            return weights, False
        space = self.workspace
        if reason:
            space.progress.note(f"{self.label}: trained again: {reason}")
        with exclusive(space.folder):
            sweep(space.folder)
            weights = self._initial() if self._config.mode == "random" else self._train()
            remove(space.joint_checkpoint_path)
        return weights, True

    def current_weights(self) -> tuple[list[FrozenWeights] | None, str]:
        """Weights that can be kept; else None and the reason, if there is more to say than that."""
        found: list[FrozenWeights] = []
        for index in self._config.module:
            try:
                weights = FrozenWeights.load(self.workspace.weights_path(index))
            except CacheNotFoundError:
                missing = f"module {index} is missing" if found else ""
                return None, missing
            except CorruptCacheError as error:
                return None, str(error)
            if reason := self.staleness(weights, found[-1] if found else None):
                return None, f"module {index}: {reason}"
            found.append(weights)
        return found, ""

    def staleness(self, weights: FrozenWeights, below: FrozenWeights | None) -> str:
        """Why frozen weights do not belong to this file, data or code; empty if they do."""
        why = weights_staleness(self.workspace, weights, self.recipe, self.input_content)
        if not why and weights.chain != (below.digest if below else None):
            return "was trained with another module below"
        return why

    def frozen(self, chain: Sequence[FrozenWeights]) -> list[FrozenModule]:
        """Modules with these weights, bottom first, on the workspace's device."""
        modules = []
        for weights in chain:
            module = self.workspace.build(weights.module, weights.in_shape[0], storing=True)
            module.load_state_dict(weights.tensors)
            modules.append(FrozenModule(module, self.workspace.device))
        return modules

    @property
    def needs(self) -> TrainingNeeds:
        """What decides the memory of training."""
        return joint_needs(self.workspace, self.shapes, self.samples, self.split, self.labels)

    def plan_training(self) -> TrainingPlan:
        """What training will take, within the budget (see `gim_stagewise.stage.fit`)."""
        path = self.workspace.joint_checkpoint_path
        begun = peek_checkpoint(path, run=self.run_digest)
        recorded = None if begun is None else begun["micro_batch"]
        return plan_training(self.needs, recorded=recorded, budget=self.workspace.budget)

    def _train(self) -> list[FrozenWeights]:
        space = self.workspace
        plan = self.plan_training()
        tensors, records = train_within(space, plan, lambda: self._train_job(plan))
        observed = dict(zip(observed_modules(space), records, strict=True))
        unobserved = _without_losses(records[-1])
        own = [
            {
                name.removeprefix(prefix): tensor
                for name, tensor in tensors.items()
                if name.startswith(prefix)
            }
            for prefix in (f"parts.{index - 1}." for index in self._config.module)
        ]
        recipe = identity.resolved(
            self.recipe,
            {identity.micro_batch_key(i): plan.micro_batch for i in self._config.module},
        )
        return self._freeze(own, [observed.get(i, unobserved) for i in self._config.module], recipe)

    def _train_job(self, plan: TrainingPlan) -> TrainJob:
        space, listener = self.workspace, self.workspace.on_step
        classes = 0 if self.labels is None else self.labels.classes
        module, objective = assemble(space, list(self._config.module), self.shapes, classes=classes)
        assert isinstance(module, Stack)
        return TrainJob(
            label=self.label,
            stage=1,
            module=module,
            objective=objective,
            source=self.samples,
            grid=self.shapes[0].trained_grid,
            trains=[module.train for module in self._config.module.values()],
            micro_batch=plan.micro_batch,
            seed=self._config.seed,
            device=space.device,
            checkpoint=space.joint_checkpoint_path,
            logs=[space.logs_path(index) for index in observed_modules(space)],
            run=self.run_digest,
            split=self.split,
            labels=self.labels,
            on_step=None if listener is None else lambda n: listener(1, n),
        )

    def _initial(self) -> list[FrozenWeights]:
        record = TrainingRecord(0, 0, None, None, 0.0, training_numerics(torch.device("cpu")), 0)
        tensors = [
            module_tensors(self.workspace.build(index, shape.cell_in[0]))
            for index, shape in enumerate(self.shapes, start=1)
        ]
        return self._freeze(tensors, [record] * len(tensors), self.recipe)

    def _freeze(
        self,
        tensors: Sequence[dict[str, Tensor]],
        records: Sequence[TrainingRecord],
        recipe: Digest,
    ) -> list[FrozenWeights]:
        """Save the weights of all modules."""
        space = self.workspace
        chain: list[FrozenWeights] = []
        for index, shape in enumerate(self.shapes, start=1):
            weights = frozen_weights(
                space,
                index,
                in_shape=shape.cell_in,
                tensors=tensors[index - 1],
                recipe=recipe,
                input_content=self.input_content,
                chain=chain[-1].digest if chain else None,
                record=records[index - 1],
            )
            weights.save(space.weights_path(index))
            chain.append(weights)
        return chain


def _without_losses(record: TrainingRecord) -> TrainingRecord:
    return replace(record, train_loss=None, validation_loss=None, epoch_losses=[])
