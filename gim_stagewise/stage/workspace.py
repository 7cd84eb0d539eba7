"""A pipeline file with the folder its runs write to, and the modules it builds."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from gim_stagewise.config import ModuleConfig, PipelineConfig
from gim_stagewise.errors import ModuleRefusedError
from gim_stagewise.memory import Budget
from gim_stagewise.models import Builder, CellMean, build_module, resolve_builder
from gim_stagewise.progress import Progress, Silent
from gim_stagewise.sources import PatchSource, RegionSource, Subset, default_root, open_source
from gim_stagewise.windows import PatchGrid


def with_absolute_places(config: PipelineConfig) -> PipelineConfig:
    """The pipeline with its data's places as absolute paths, for processes that start elsewhere."""
    source = config.source
    root = source.root or default_root(source.kind)
    splits = {
        name: {**table, "root": str(Path(table["root"]).absolute())} if "root" in table else table
        for name, table in source.splits.items()
    }
    update = {"splits": splits} if splits else {}
    if root is not None:
        update["root"] = str(Path(root).absolute())  # type: ignore[assignment]
    return config.model_copy(update={"source": source.model_copy(update=update)})


def patch_grid(config: PipelineConfig) -> PatchGrid | None:
    """The grid of patches; None in dense encoding.

    Where items are read in windows, none of their pixels is left out.
    """
    if config.patches is None:
        return None
    return PatchGrid(config.patches.size, config.patches.stride, fill=config.windowed)


def open_data(
    config: PipelineConfig, *, only: Collection[str] | None = None
) -> PatchSource | RegionSource:
    """The dataset of a pipeline as module 1 sees it: patches, or regions; ``only`` some samples."""
    grid = patch_grid(config)
    data = open_source(config.source)
    if only is not None and (set(only) != set(data.ids) or not config.windowed):
        data = Subset(data, only)
    if config.windowed:
        return RegionSource(data, config.augment, grid)
    assert grid is not None
    return PatchSource(data, config.augment, grid, seed=config.seed)


@dataclass(frozen=True)
class Workspace:
    """What all stages of a pipeline share.

    Parameters
    ----------
    config : PipelineConfig
    text : str
        The pipeline file's text; every cache carries it along.
    folder : Path
        Where weights, caches, checkpoints and the run's record lie.
    code_folder : Path or None
        From where the user's own builders are imported; None forbids it.
    device : torch.device
    progress : Progress
    on_step : callable, optional
        Called after every training step with (module, steps done so far).
    budget : Budget
        What may be used of memory and disk.
    """

    config: PipelineConfig
    text: str
    folder: Path
    code_folder: Path | None
    device: torch.device
    progress: Progress = field(default_factory=Silent)
    on_step: Callable[[int, int], None] | None = None
    budget: Budget = field(default_factory=Budget)

    def weights_path(self, index: int) -> Path:
        return self.folder / f"m{index}.safetensors"

    def cache_path(self, index: int) -> Path:
        return self.folder / f"m{index}.zarr"

    def checkpoint_path(self, index: int) -> Path:
        return self.folder / "checkpoints" / f"m{index}.pt"

    @property
    def joint_checkpoint_path(self) -> Path:
        """Of all modules, where they are trained in one step."""
        return self.folder / "checkpoints" / "joint.pt"

    def logs_path(self, index: int) -> Path:
        return self.folder / "logs" / f"m{index}"

    @property
    def record_path(self) -> Path:
        return self.folder / "run.json"

    def module_config(self, index: int) -> ModuleConfig:
        return self.config.stage(index)

    def builder(self, index: int) -> Builder:
        """The callable behind ``module.<index>.build``."""
        return resolve_builder(
            self.module_config(index).build,
            code_folder=self.code_folder,
            key=f"module.{index}.build",
        )

    def build(self, index: int, in_channels: int, *, storing: bool = False) -> nn.Module:
        """Module ``index`` with its initial weights, on the CPU.

        In dense encoding its ``pool`` gives embeddings as the objective sees them, or with
        ``storing`` as they are stored.
        """
        module = build_module(
            self.builder(index),
            self.module_config(index).options,
            in_channels=in_channels,
            seed=self.config.seed,
            index=index,
            key=f"module.{index}.options",
        )
        if self.config.dense:
            if callable(getattr(module, "pool", None)):
                raise ModuleRefusedError(
                    'has a pool of its own, which is for patches; with encoding = "dense" '
                    "embeddings are means over objective.pool positions",
                    key=f"module.{index}",
                )
            # A plain attribute: no part of the module's layers or state.
            trained, stored = (
                self.module_config(index).objective.pool,
                self.config.stored_pool(index),
            )
            module.pool = CellMean(stored if storing else trained)  # type: ignore[assignment]
        return module
