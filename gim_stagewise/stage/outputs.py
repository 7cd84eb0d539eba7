"""The cache of one module's outputs: what it should be, whether it is, and making it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch

from gim_stagewise.cache import (
    BuildFolder,
    CacheWriter,
    Damage,
    Manifest,
    Precision,
    SealedCache,
    TiledCache,
    discard_cache,
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
from gim_stagewise.models import input_operation
from gim_stagewise.processes import end_fresh_processes
from gim_stagewise.sources import Source
from gim_stagewise.stage import identity
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.extract import BlockJob, VirtualCache, extract
from gim_stagewise.stage.extraction_plan import Workers, plan_extraction
from gim_stagewise.stage.freeze import FrozenModule, numerics
from gim_stagewise.stage.needs import layout_of, stage_needs
from gim_stagewise.stage.parallel import choose_executor
from gim_stagewise.stage.settle import Settling
from gim_stagewise.stage.shape import Shape
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
    samples : Source
        What it is trained on: the same, or windows of it.
    shape : Shape
        What goes into it and comes out.
    """

    def __init__(
        self, workspace: Workspace, index: int, source: Source, samples: Source, shape: Shape
    ) -> None:
        self.workspace = workspace
        self.index = index
        self.source = source
        self.shape = shape
        self.settling = Settling(workspace, index, source, samples, shape)
        self._config = workspace.module_config(index)

    @cached_property
    def stored_operation(self) -> str | None:
        """What the next module begins with, if outputs are stored after that."""
        above = self.index + 1
        last = above not in self.workspace.config.module
        if last or self._config.cache.stored_operation == "none":
            return None
        return input_operation(self.workspace.build(above, self.shape.cell_out[0]))

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
                self.require_input()
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
            self.require_input()
            if reason:
                self._note(f"cache built again: {reason}")
            # Before anything is replaced: these weights fit the module as it is built now.
            frozen = self._frozen(weights, self.workspace.device)
            if found is not None:
                manifest = self._gone_on_with(manifest, found)
            else:
                manifest = self.settling.settled(frozen, manifest, reserved)
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

    def require_input(self) -> None:
        """Refuse to begin where the input is not there any more.

        Raises
        ------
        StaleCacheError
            If activations of the module below were removed, and cannot be computed when read.
        """
        if isinstance(self.source, TiledCache):
            self.source.require_activations()

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

    def _extract(self, weights: FrozenWeights, manifest: Manifest, workers: Workers) -> Manifest:
        space, source = self.workspace, self.source
        needs = stage_needs(space, self.index, self.shape, source)
        plan = plan_extraction(needs, budget=space.budget, workers=workers)
        if space.budget.lean:
            end_fresh_processes()
        stateful = self.shape.state > 0
        if stateful and (workers.count or workers.scheduler):
            self._note("computed in this process: each tile needs the state after the one before")
        executor = choose_executor(workers, plan, stateful=stateful)
        writer = CacheWriter(space.cache_path(self.index).absolute(), manifest, source)
        job = replace(self.block_job(weights, manifest, writer.staging), lean=plan.lean)
        return extract(job, writer, source, executor, space.progress)

    def block_job(self, weights: FrozenWeights, manifest: Manifest, staging: Path) -> BlockJob:
        """What any process needs to compute blocks of a cache."""
        space, source = self.workspace, self.source
        below: Path | BlockJob | None = None
        if isinstance(source, VirtualCache):
            below = source.job
        elif isinstance(source, SealedCache):
            below = source.path.absolute()
        return BlockJob(
            config=with_absolute_places(space.config),
            code_folder=space.code_folder,
            input=below,
            in_channels=self.shape.cell_in[0],
            geometry=self.shape.geometry,
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
        last = len(self.workspace.config.module)
        # Where old activations may go, or were not worth storing, they are computed when needed.
        kept = {"all": self.index, "last-two": last - 1, "last": last}[self.workspace.config.keep]
        may_go = self.index < kept or self._config.cache.materialize == "auto"
        if wanted.layout.materialized and not found.layout.materialized and not may_go:
            return FoundCache(None, "its activations are not stored")
        if not found.sealed:
            return FoundCache(found)
        return FoundCache(
            found, damage=visible_damage(path, found, found.layout.blocks(self.source))
        )

    def _frozen(self, weights: FrozenWeights, device: torch.device) -> FrozenModule:
        module = self.workspace.build(self.index, self.shape.cell_in[0], storing=True)
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
        layout = layout_of(space, self.index, self.shape, self.source)
        record = numerics(space.device, space.config.extract, cache)
        content = identity.cache_content(
            weights,
            self._config,
            stored_operation=self.stored_operation,
            input_content=self.source.content_digest(),
            geometry=identity.geometry_record(
                layout, self.shape.cell_in, self.shape.geometry, space.config.windows.lanes
            ),
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
            encoding=space.config.encoding,
            layout=layout,
        )

    def _note(self, text: str) -> None:
        self.workspace.progress.note(f"module {self.index}: {text}")
