"""A pipeline file with the folder its runs write to, and the modules it builds."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from gim_stagewise.config import ModuleConfig, PipelineConfig
from gim_stagewise.memory import Budget
from gim_stagewise.models import Builder, build_module, resolve_builder
from gim_stagewise.progress import Progress, Silent
from gim_stagewise.sources import PatchSource, Subset, open_source
from gim_stagewise.windows import PatchGrid


def with_absolute_places(config: PipelineConfig) -> PipelineConfig:
    """The pipeline with its data's places as absolute paths, for processes that start elsewhere."""
    source = config.source
    root = source.root
    if root is None and source.kind in {"npy", "zarr"}:
        root = "."
    splits = {
        name: {**table, "root": str(Path(table["root"]).absolute())} if "root" in table else table
        for name, table in source.splits.items()
    }
    update = {"splits": splits} if splits else {}
    if root is not None:
        update["root"] = str(Path(root).absolute())  # type: ignore[assignment]
    return config.model_copy(update={"source": source.model_copy(update=update)})


def open_patches(config: PipelineConfig, *, only: Collection[str] | None = None) -> PatchSource:
    """The dataset of a pipeline as patches: what module 1 is trained on; ``only`` some samples."""
    patches = config.patches
    images = open_source(config.source)
    return PatchSource(
        images if only is None else Subset(images, only),
        config.augment,
        PatchGrid(patches.size, patches.stride),
        seed=config.seed,
    )


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

    def build(self, index: int, in_channels: int) -> nn.Module:
        """Module ``index`` with its initial weights, on the CPU."""
        return build_module(
            self.builder(index),
            self.module_config(index).options,
            in_channels=in_channels,
            seed=self.config.seed,
            index=index,
            key=f"module.{index}.options",
        )
