"""The cache of one module's outputs: what it should be, whether it is, and making it."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from gim_stagewise.cache import (
    BuildFolder,
    Cache,
    CacheWriter,
    Damage,
    Digest,
    Manifest,
    Precision,
    discard_cache,
    encoded_bytes,
    read_manifest,
    visible_damage,
)
from gim_stagewise.durable import sweep
from gim_stagewise.errors import (
    CacheNotFoundError,
    CorruptCacheError,
    PrecisionLossError,
    StaleCacheError,
)
from gim_stagewise.lock import exclusive
from gim_stagewise.models import INPUT_OPERATIONS
from gim_stagewise.sources import Request, Source, read_stacked
from gim_stagewise.stage import identity
from gim_stagewise.stage.calibrate import calibration_samples, value_range
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.choose import Choice, Reading, input_seconds, measure_choice
from gim_stagewise.stage.disk import (
    bytes_of_caches,
    folder_bytes,
    require_free,
    stored_samples,
)
from gim_stagewise.stage.extract import BlockJob, VirtualCache, extract
from gim_stagewise.stage.extraction_plan import Workers, plan_extraction
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward, numerics
from gim_stagewise.stage.needs import cache_layout, stage_needs
from gim_stagewise.stage.parallel import choose_executor
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.storing import Storing, check_error, compute_block
from gim_stagewise.stage.workspace import Workspace, with_absolute_places


@dataclass(frozen=True)
class FoundCache:
    """What there is of a module's cache.

    Parameters
    ----------
    manifest : Manifest or None
        Of one that can be kept or gone on with; None if there is none.
    reason : str
        Why not, where there is more to say than that nothing is there.
    damage : list of Damage
        What a sealed one has lost, which can be computed again.
    unreadable : bool
        Whether there is one that nobody can read.
    """

    manifest: Manifest | None
    reason: str = ""
    damage: list[Damage] = field(default_factory=list)
    unreadable: bool = False

    @property
    def usable(self) -> bool:
        """Whether there is a sealed cache with all that it should have."""
        return self.manifest is not None and self.manifest.sealed and not self.damage


def described(damage: list[Damage]) -> str:
    """Damage in a few words."""
    first = f"{damage[0].file} {damage[0].what}"
    return first if len(damage) == 1 else f"{first}, and {len(damage) - 1} more"


class StageOutputs:
    """The outputs of one frozen module for the whole dataset.

    Parameters
    ----------
    workspace : Workspace
    index : int
        The module's number, from 1.
    source : Source
        The module's input.
    shape : Shape
        What goes into it and comes out.
    """

    def __init__(self, workspace: Workspace, index: int, source: Source, shape: Shape) -> None:
        self.workspace = workspace
        self.index = index
        self.source = source
        self.shape = shape
        self._config = workspace.module_config(index)

    @cached_property
    def stored_operation(self) -> str | None:
        """What the next module begins with, if outputs are stored after that."""
        above = self.index + 1
        last = above not in self.workspace.config.module
        if last or self._config.cache.stored_operation == "none":
            return None
        module = self.workspace.build(above, self.shape.cell_out[0])
        found: str | None = getattr(module, "input_op", None)
        return found

    def extract(
        self,
        weights: FrozenWeights,
        *,
        force: bool = False,
        workers: Workers,
        reserved: int = 0,
    ) -> tuple[Manifest, bool]:
        """Build the module's cache, or go on building it, unless a valid one is there.

        ``reserved`` bytes of the disk budget belong to caches above.

        Returns
        -------
        (Manifest, bool)
            The sealed cache's manifest, and whether work was done now.
        """
        manifest = self.manifest(weights)
        with exclusive(self.workspace.folder):
            sweep(self.workspace.folder)
            if force:
                discard_cache(self.workspace.cache_path(self.index))
            there = self.current(manifest)
            found, reason = there.manifest, there.reason
            if found is not None and there.damage:
                found, reason = self._mended(weights, found, there.damage)
                if found is not None:
                    return found, True
            if found is not None and found.sealed:
                BuildFolder(self.workspace.cache_path(self.index)).remove()
                self._check_recorded_error(found)
                return found, False
            if reason:
                self._note(f"cache built again: {reason}")
            # Before anything is replaced: these weights fit the module as it is built now.
            frozen = self._frozen(weights, self.workspace.device)
            if found is not None:
                manifest = self._gone_on_with(manifest, found)
            else:
                manifest = self._calibrated(frozen, manifest)
                if self._config.cache.materialize == "auto":
                    manifest = self._chosen(frozen, manifest, reserved)
                manifest = self._with_sampled_error(frozen, manifest)
                self._check_free(frozen, manifest)
            del frozen
            return self._extract(weights, manifest, workers), True

    def _mended(
        self, weights: FrozenWeights, manifest: Manifest, damage: list[Damage]
    ) -> tuple[Manifest | None, str]:
        """The cache with what it lost computed again; or None, and why that cannot be."""
        from gim_stagewise.stage.repair import repair

        try:
            repair(self, weights, damage)
        except (StaleCacheError, CorruptCacheError) as error:
            return None, f"damaged ({described(damage)}), and not mended: {error}"
        self._note(f"cache mended: {described(damage)}")
        return manifest, ""

    def _gone_on_with(self, wanted: Manifest, begun: Manifest) -> Manifest:
        """The manifest of a build that goes on: what was found out when it began stays."""
        chosen = self._config.cache.materialize == "auto"
        stored = begun.layout.materialized if chosen else wanted.layout.materialized
        return replace(
            wanted,
            layout=replace(wanted.layout, materialized=stored),
            precision=begun.precision,
            calibration=begun.calibration,
            error=begun.error,
            choice=begun.choice,
        )

    def _check_recorded_error(self, manifest: Manifest) -> None:
        allowed = self._config.cache.max_error
        if manifest.error is None or allowed is None or manifest.error["relative_l2"] <= allowed:
            return
        path, error = self.workspace.cache_path(self.index), manifest.error["relative_l2"]
        raise PrecisionLossError(
            f"{path} was stored as {manifest.precision.name} with an error of {error:.2e} "
            f"(relative L2), cache.max_error allows {allowed:g}: use a finer cache.precision, or "
            "allow more"
        )

    def _calibrated(self, frozen: FrozenModule, manifest: Manifest) -> Manifest:
        """With scales, found on a few samples."""
        if manifest.precision.lossless:
            return manifest
        ids, view = self._calibration_samples()
        lowest, highest = value_range(
            frozen, self.source, ids, view, self.workspace.config.extract, manifest.stored_operation
        )
        precision = manifest.precision.calibrated(lowest, highest)
        count = sum(map(len, ids))
        said = f"{count} samples, evenly spaced, view {view}" if precision.has_scales else None
        return replace(manifest, precision=precision, calibration=said)

    def _calibration_samples(self) -> tuple[list[list[str]], int]:
        config = self.workspace.config.extract
        return calibration_samples(self.source, math.prod(self.shape.grid), config)

    def _with_sampled_error(self, frozen: FrozenModule, manifest: Manifest) -> Manifest:
        """With the error that storing makes on a few samples, refused if that is not allowed.

        What is stored is measured whole; what is computed whenever it is read is not seen whole
        before, though it goes through the same precision.
        """
        cache, stored = self._config.cache, manifest.layout.materialized
        if manifest.precision.lossless or (stored and cache.max_error is None):
            return manifest
        ids, view = self._calibration_samples()
        errors = []
        for some in ids:
            storing = Storing.of(manifest)
            samples = read_stacked(self.source, [Request(item_id, view) for item_id in some])
            compute_block(frozen, samples, some, self.workspace.config.extract, storing)
            assert storing.error is not None
            errors.append(storing.error)
        error = sum(errors[1:], start=errors[0])
        check_error(error, cache, manifest)
        if stored:
            return manifest
        return replace(manifest, error={**error.as_json(), "sampled": sum(map(len, ids))})

    def _chosen(self, frozen: FrozenModule, manifest: Manifest, reserved: int) -> Manifest:
        """With the faster of storing and computing again; the last module's outputs are stored."""
        space = self.workspace
        if self.index + 1 not in space.config.module:
            return manifest
        ids, view = self._calibration_samples()
        samples = read_stacked(self.source, [Request(item_id, view) for item_id in ids[0]])
        choice, _ = self._measured(frozen, samples, input_seconds(self.source, view), manifest)
        if space.budget.disk is not None:
            room = max(0, space.budget.disk - bytes_of_caches(space) - reserved)
            choice = choice if choice.stored_bytes <= room else replace(choice, room=room)
        self._note(str(choice))
        layout = replace(manifest.layout, materialized=choice.store)
        return replace(manifest, layout=layout, choice=choice.as_json())

    def _check_free(self, frozen: FrozenModule, manifest: Manifest) -> None:
        """Refuse to begin a cache that the disk has no room for."""
        layout = manifest.sample_layout
        each = float(layout.embedding_bytes)
        if layout.materialized:
            ids, view = self._calibration_samples()
            samples = read_stacked(self.source, [Request(item_id, view) for item_id in ids[0]])
            storing = Storing.of(manifest)
            arrays = compute_block(frozen, samples, ids[0], self.workspace.config.extract, storing)
            each += encoded_bytes(arrays["activations"], layout.codec) / len(samples)
        path = self.workspace.cache_path(self.index)
        needed = round(each * stored_samples(self.source, layout)) - folder_bytes(path)
        require_free(path.parent, needed, f"cache {path}")

    def measure(
        self, frozen: FrozenModule, samples: NDArray[np.float32], input_seconds: float
    ) -> tuple[Choice, NDArray[np.float32]]:
        """What storing takes against computing again, and outputs; for a plan.

        Parameters
        ----------
        frozen : FrozenModule
            With any weights.
        samples : array
            Inputs.
        input_seconds : float
            To read one of them.
        """
        layout = cache_layout(self.workspace, self.index, self.shape, self.source)
        nothing = Digest({"weights": "", "input": ""})
        manifest = Manifest(
            pipeline="",
            module=self.index,
            pipeline_text="",
            recipe=nothing,
            content=nothing,
            numerics={},
            precision=Precision(self._config.cache.precision),
            stored_operation=self.stored_operation,
            encoding="patch",
            layout=layout,
        )
        rows = torch.from_numpy(samples).flatten(0, 2)
        z, _ = frozen_forward(frozen, rows, self.workspace.config.extract)
        if self.stored_operation is not None:
            z = INPUT_OPERATIONS[self.stored_operation](z)
        extremes = z.transpose(0, 1).flatten(1).aminmax(dim=1)
        manifest = replace(manifest, precision=manifest.precision.calibrated(*extremes))
        return self._measured(frozen, samples, input_seconds, manifest)

    def _reading_above(self) -> Reading:
        """How the next stage reads these outputs."""
        train = self.workspace.module_config(self.index + 1).train
        rows = train.micro_batch if isinstance(train.micro_batch, int) else None
        return Reading(train.batch, train.shuffle_window, rows)

    def _measured(
        self,
        frozen: FrozenModule,
        samples: NDArray[np.float32],
        input_seconds: float,
        manifest: Manifest,
    ) -> tuple[Choice, NDArray[np.float32]]:
        space = self.workspace
        return measure_choice(
            frozen,
            samples,
            manifest,
            space.config.extract,
            input_seconds=input_seconds,
            reading=self._reading_above(),
            passes=space.module_config(self.index + 1).train.max_epochs + 1,
            folder=space.folder,
        )

    def _extract(self, weights: FrozenWeights, manifest: Manifest, workers: Workers) -> Manifest:
        space, source = self.workspace, self.source
        needs = stage_needs(space, self.index, self.shape, source)
        plan = plan_extraction(needs, budget=space.budget, workers=workers)
        executor = choose_executor(workers, plan)
        writer = CacheWriter(space.cache_path(self.index).absolute(), manifest, source)
        job = self.block_job(weights, manifest, writer.staging)
        return extract(job, writer, source, executor, space.progress)

    def block_job(self, weights: FrozenWeights, manifest: Manifest, staging: Path) -> BlockJob:
        """What any process needs to compute blocks of a cache."""
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
            in_channels=self.shape.cell_in[0],
            device=space.device.type,
            lean=space.budget.lean,
            weights=weights.tensors,
            builder_source=space.builder(self.index).source_digest,
            input_content=self.source.content_digest(),
            cache=space.cache_path(self.index).absolute(),
            staging=staging,
            manifest=manifest,
        )

    def virtual(self, weights: FrozenWeights) -> VirtualCache:
        """The outputs, computed when they are read."""
        return VirtualCache(self.block_job(weights, self.manifest(weights), Path()), self.source)

    def current(self, wanted: Manifest) -> FoundCache:
        """What there is of a cache, and whether it can be kept, gone on with or mended."""
        path = self.workspace.cache_path(self.index)
        try:
            found = read_manifest(path)
        except CacheNotFoundError:
            return FoundCache(None)
        except CorruptCacheError as error:
            return FoundCache(None, str(error), unreadable=True)
        changes = identity.cache_differences(found, wanted.recipe, wanted.content)
        if changes:
            return FoundCache(None, "; ".join(changes))
        if not found.sealed and found.content.value != wanted.content.value:
            begun = "; ".join(found.content.differences(wanted.content))
            return FoundCache(None, f"what was begun would not be of one piece: {begun}")
        # Where old activations may go, or were not worth storing, they are computed when needed.
        may_go = self.workspace.config.keep != "all" or self._config.cache.materialize == "auto"
        if wanted.layout.materialized and not found.layout.materialized and not may_go:
            return FoundCache(None, "its activations are not stored")
        if not found.sealed:
            return FoundCache(found)
        return FoundCache(
            found, damage=visible_damage(path, found, found.layout.blocks(self.source))
        )

    def _frozen(self, weights: FrozenWeights, device: torch.device) -> FrozenModule:
        module = self.workspace.build(self.index, self.shape.cell_in[0])
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
            stored_operation=self.stored_operation,
            input_content=self.source.content_digest(),
            in_shape=self.shape.cell_in,
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
            precision=Precision(cache.precision),
            stored_operation=self.stored_operation,
            encoding="patch",
            layout=layout,
        )

    def _note(self, text: str) -> None:
        self.workspace.progress.note(f"module {self.index}: {text}")
