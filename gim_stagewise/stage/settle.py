"""What is found out on a few samples before a cache is begun: scales, error, where it goes."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gim_stagewise.cache import Digest, Manifest, Precision
from gim_stagewise.models import INPUT_OPERATIONS
from gim_stagewise.sources import Request, Source, read_stacked
from gim_stagewise.stage.calibrate import calibration_samples, grid_axes, value_range
from gim_stagewise.stage.choose import Choice, Reading, input_seconds, measure_choice
from gim_stagewise.stage.disk import (
    bytes_of_caches,
    folder_bytes,
    projected_bytes,
    require_free,
)
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward
from gim_stagewise.stage.needs import cache_layout
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.storing import Storing, check_error, compute_block, refuse_untrained
from gim_stagewise.stage.workspace import Workspace


@dataclass(frozen=True)
class Settling:
    """Settles what a module's cache will be, on some of the samples that the module is trained on.

    Parameters
    ----------
    workspace : Workspace
    index : int
        The module's number.
    source : Source
        The module's input.
    samples : Source
        Of one size: the input, or windows of it.
    shape : Shape
    """

    workspace: Workspace
    index: int
    source: Source
    samples: Source
    shape: Shape

    def settled(self, frozen: FrozenModule, manifest: Manifest, reserved: int) -> Manifest:
        """The manifest with which a cache is begun.

        ``reserved`` bytes of the disk budget belong to caches above.

        Raises
        ------
        PrecisionLossError
            If storing changes values by more than is allowed.
        StorageError
            If the disk surely has no room for it.
        """
        manifest = self._calibrated(frozen, manifest)
        if self.workspace.module_config(self.index).cache.materialize == "auto":
            manifest = self._chosen(frozen, manifest, reserved)
        manifest = self._with_sampled_error(frozen, manifest)
        self._check_free(frozen, manifest)
        return manifest

    def _chosen_samples(self) -> tuple[list[list[str]], int]:
        patches = math.prod(self.shape.grid)
        return calibration_samples(self.samples, patches, self.workspace.config.extract)

    def _calibrated(self, frozen: FrozenModule, manifest: Manifest) -> Manifest:
        """With scales, where the precision has any."""
        if manifest.precision.lossless:
            return manifest
        ids, view = self._chosen_samples()
        config = self.workspace.config.extract
        lowest, highest = value_range(
            frozen, self.samples, ids, view, config, manifest.stored_operation
        )
        precision = manifest.precision.calibrated(lowest, highest)
        count = sum(map(len, ids))
        said = f"{count} samples, evenly spaced, view {view}" if precision.has_scales else None
        return replace(manifest, precision=precision, calibration=said)

    def _computed(
        self, frozen: FrozenModule, manifest: Manifest, some: list[str], view: int
    ) -> tuple[dict[str, NDArray[Any]], Storing]:
        storing = Storing.of(manifest)
        inputs = read_stacked(self.samples, [Request(item_id, view) for item_id in some])
        config = self.workspace.config.extract
        grid = grid_axes(self.samples)
        return compute_block(frozen, inputs, some, config, storing, grid=grid), storing

    def _with_sampled_error(self, frozen: FrozenModule, manifest: Manifest) -> Manifest:
        """With the error that storing makes on a few samples, refused if that is not allowed.

        What is stored is measured whole; what is computed whenever it is read is not seen whole
        before, though it goes through the same precision.
        """
        cache = self.workspace.module_config(self.index).cache
        stored = manifest.layout.materialized
        if manifest.precision.lossless or (stored and cache.max_error is None):
            return manifest
        ids, view = self._chosen_samples()
        errors = []
        for some in ids:
            _, storing = self._computed(frozen, manifest, some, view)
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
        ids, view = self._chosen_samples()
        samples = read_stacked(self.source, [Request(item_id, view) for item_id in ids[0]])
        choice, _ = self._measured(frozen, samples, input_seconds(self.source, view), manifest)
        if space.budget.disk is not None:
            room = max(0, space.budget.disk - bytes_of_caches(space) - reserved)
            choice = choice if choice.stored_bytes <= room else replace(choice, room=room)
        space.progress.note(f"module {self.index}: {choice}")
        layout = replace(manifest.layout, materialized=choice.store)
        return replace(manifest, layout=layout, choice=choice.as_json())

    def _check_free(self, frozen: FrozenModule, manifest: Manifest) -> None:
        """Refuse to begin a cache that the disk has no room for."""
        layout = manifest.layout
        activations = None
        if layout.materialized:
            ids, view = self._chosen_samples()
            arrays, _ = self._computed(frozen, manifest, ids[0], view)
            activations = arrays["activations"]
        path = self.workspace.cache_path(self.index)
        needed = projected_bytes(layout, self.source, activations) - folder_bytes(path)
        require_free(path.parent, needed, f"cache {path}")

    def measure(
        self,
        frozen: FrozenModule,
        samples: NDArray[np.float32],
        input_seconds: float,
        operation: str | None,
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
        operation : str or None
            Applied before outputs are stored.
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
            precision=Precision(self.workspace.module_config(self.index).cache.precision),
            stored_operation=operation,
            encoding="patch",
            layout=layout,
        )
        rows = torch.from_numpy(samples).flatten(0, 2)
        z, _ = frozen_forward(frozen, rows, self.workspace.config.extract)
        refuse_untrained(z, self.index)
        if operation is not None:
            z = INPUT_OPERATIONS[operation](z)
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
