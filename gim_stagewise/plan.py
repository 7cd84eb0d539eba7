"""What a pipeline will need, before anything runs."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from gim_stagewise.cache import CacheLayout, Layout, TiledLayout
from gim_stagewise.errors import ConfigError
from gim_stagewise.memory import Budget
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.sources import Request, read_stacked
from gim_stagewise.stage.choose import Choice, input_seconds
from gim_stagewise.stage.disk import DiskPlan
from gim_stagewise.stage.extraction_plan import ExtractionPlan, plan_extraction
from gim_stagewise.stage.fit import (
    TrainingPlan,
    plan_training,
    smallest_training,
)
from gim_stagewise.stage.freeze import FrozenModule
from gim_stagewise.stage.loader import loading_quality, positions_of
from gim_stagewise.stage.needs import chain_needs
from gim_stagewise.stage.shape import Shape, window_of
from gim_stagewise.stage.stage import Stage
from gim_stagewise.stage.workspace import patch_grid
from gim_stagewise.windows import Geometry, Span, computed_overhead


@dataclass(frozen=True)
class WindowPlan:
    """How a module's input is read where items are read in windows.

    Parameters
    ----------
    window : tuple of int
        What it is trained on: patches, or positions of its input.
    pixels : tuple of int
        What windows show of the dataset: pixels, or steps.
    tile : tuple of int
        What is computed and stored at once: patches, or positions of its output.
    halo : float
        Inputs computed over inputs kept, at least 1.
    """

    window: tuple[int, ...]
    pixels: tuple[int, ...]
    tile: tuple[int, ...]
    halo: float


@dataclass(frozen=True)
class StagePlan:
    """What one stage will need.

    Parameters
    ----------
    module : int
    training : TrainingPlan
    extraction : ExtractionPlan
    cache_bytes : int
        On disk.
    cache_basis : str
        How that was found.
    forward_flops, backward_flops : int
        Floating-point operations of training on one sample; the forward is done twice where there
        are micro-batches. 0 where they could not be counted.
    shuffle_quality : float
        How often batches will repeat a chunk of the input, against a perfect shuffle.
    choice : Choice or None
        What storing the outputs takes against computing them again, where that is to be chosen.
    windows : WindowPlan or None
        Where items are read in windows.
    """

    module: int
    training: TrainingPlan
    extraction: ExtractionPlan
    cache_bytes: int
    cache_basis: str
    forward_flops: int
    backward_flops: int
    shuffle_quality: float
    choice: Choice | None = None
    windows: WindowPlan | None = None

    @property
    def device_mem(self) -> int:
        """Bytes on the device at the worst moment."""
        return max(self.training.device, self.extraction.forward)

    @property
    def host_mem(self) -> int:
        """Bytes on the host at the worst moment; on a CPU, all there are."""
        return max(self.training.host, self.extraction.host)


@dataclass(frozen=True)
class PipelinePlan:
    """What a pipeline will need, stage by stage; ``skipped`` says why items are left out."""

    pipeline: str
    device: str
    stages: list[StagePlan]
    disk: DiskPlan
    skipped: dict[str, str]


@dataclass(frozen=True)
class JointPlan:
    """What training all modules in one step will need.

    Parameters
    ----------
    pipeline, mode, device : str
    modules : int
        How many.
    training : TrainingPlan
    forward_flops, backward_flops : int
        As of `StagePlan`.
    skipped : dict
    """

    pipeline: str
    mode: str
    device: str
    modules: int
    training: TrainingPlan
    forward_flops: int
    backward_flops: int
    skipped: dict[str, str]


def plan_joint(pipeline: Pipeline) -> JointPlan:
    """Project memory and work of training all modules in one step.

    Raises
    ------
    OverBudgetError
        If it does not fit the budget of the pipeline's workspace.
    ConfigError
        If nothing is trained, or labels are missing.
    """
    config = pipeline.config
    if config.mode == "random":
        raise ConfigError("is 'random', which trains nothing: nothing to plan", key="mode")
    stage = pipeline.joint_stage()
    stage.check()
    training = plan_training(stage.needs, recorded=None, budget=pipeline.workspace.budget)
    spec = stage.needs.spec
    patches = math.prod(spec.shape[1:])
    forwards = 1 if training.micro_batch >= spec.rows else 2
    return JointPlan(
        pipeline=config.name,
        mode=config.mode,
        device=str(pipeline.workspace.device),
        modules=len(config.module),
        training=training,
        forward_flops=forwards * patches * training.step.forward_flops,
        backward_flops=patches * training.step.backward_flops,
        skipped=pipeline.skipped,
    )


def plan_pipeline(pipeline: Pipeline) -> PipelinePlan:
    """Project memory, disk and work of every stage, one module in memory at a time.

    Raises
    ------
    OverBudgetError
        If a stage does not fit the budget of the pipeline's workspace.
    StorageError
        If the disk surely has no room for the caches.
    GimStageError
        For whatever else does not fit together.
    """
    shapes = pipeline.check()
    space, source = pipeline.workspace, pipeline.source
    pipeline.check_budget(shapes)
    first = pipeline.first_to_make(len(shapes))
    choices = _choices(pipeline, shapes)
    last = len(shapes)
    disk = pipeline.plan_disk(shapes, first=first, last=last, choices=choices)
    allowed = space.budget.disk
    for index in sorted(choices, reverse=True):
        over = 0 if allowed is None else disk.needed(space.config.keep) - allowed
        if over > 0 and choices[index].store:
            room = max(0, disk.caches[index - 1].bytes - over)
            choices[index] = replace(choices[index], room=room)
            disk = pipeline.plan_disk(shapes, first=first, last=last, choices=choices)
    stored = {index: choice.store for index, choice in choices.items()}
    stages = []
    chunk_items = 1
    unlabeled = positions_of(source, source.split("unlabeled"))
    for needs, shape, cache in zip(
        chain_needs(space, source, shapes, stored), shapes, disk.caches, strict=True
    ):
        spec = needs.spec
        index = spec.index
        train = space.module_config(index).train
        training = plan_training(needs, recorded=None, budget=space.budget)
        patches = math.prod(shape.trained_grid)
        forwards = 1 if training.micro_batch >= spec.rows else 2
        stages.append(
            StagePlan(
                module=index,
                training=training,
                extraction=plan_extraction(needs, budget=space.budget),
                cache_bytes=cache.bytes,
                cache_basis=cache.basis,
                forward_flops=forwards * patches * training.step.forward_flops,
                backward_flops=patches * training.step.backward_flops,
                shuffle_quality=loading_quality(
                    unlabeled,
                    batch=train.batch,
                    window=train.shuffle_window,
                    item_bytes=needs.item_bytes,
                    chunk_items=chunk_items,
                    seed=space.config.seed,
                ),
                choice=choices.get(index),
                windows=_windows(pipeline, shapes, index, needs.layout),
            )
        )
        chunk_items = needs.layout.chunk if isinstance(needs.layout, CacheLayout) else 1
    disk.check(space)
    return PipelinePlan(space.config.name, str(space.device), stages, disk, pipeline.skipped)


def _windows(
    pipeline: Pipeline, shapes: list[Shape], index: int, layout: Layout
) -> WindowPlan | None:
    if not isinstance(layout, TiledLayout):
        return None
    config, own = pipeline.config, shapes[index - 1]
    window = window_of(config, index)
    if (grid := patch_grid(config)) is not None:
        pixels = tuple(len(grid.pixels(Span(0, side))) for side in window)
        return WindowPlan(window, pixels, layout.tile, 1.0)
    seen = []
    for axis, side in enumerate(window):
        below = Geometry()
        for shape in shapes[: index - 1]:
            below = below.then(shape.geometry[axis])
        seen.append((side - 1) * below.stride + below.kernel)
    extents = [item.extent for item in pipeline.source.items()]
    for shape in shapes[: index - 1]:
        extents = [shape.extent_out(extent) for extent in extents]
    overhead = computed_overhead(own.geometry, layout.tile, extents)
    return WindowPlan(window, tuple(seen), layout.tile, overhead)


def smallest_budget(pipeline: Pipeline) -> Budget:
    """The smallest budgets that all stages of a pipeline work with."""
    if pipeline.config.mode == "random":
        return Budget()
    if not pipeline.config.iterative:
        return smallest_training(pipeline.joint_stage().needs)
    shapes = pipeline.check()
    needs = chain_needs(pipeline.workspace, pipeline.source, shapes)
    least = [smallest_training(stage) for stage in needs]
    # A budget as large as can be, so that all is measured and nothing is refused.
    unlimited = Budget(device=2**62, host=2**62)
    plan = plan_pipeline(Pipeline(replace(pipeline.workspace, budget=unlimited)))
    return Budget(
        device=max(
            *(budget.device or 0 for budget in least),
            *(stage.extraction.forward for stage in plan.stages),
        ),
        host=max(
            *(budget.host or 0 for budget in least),
            *(stage.extraction.host_alone for stage in plan.stages),
        ),
        disk=plan.disk.needed("last"),
    )


def _choices(pipeline: Pipeline, shapes: list[Shape]) -> dict[int, Choice]:
    """What storing takes against computing again, for each module that leaves it to that.

    Measured on untrained modules: what they take is the same, how their outputs compress is not.
    """
    space, source, config = pipeline.workspace, pipeline.source, pipeline.config
    asked = [i for i in config.module if config.stage(i).cache.materialize == "auto"]
    if not asked or space.device.type == "cuda":
        return {}
    count = max(1, config.extract.batch // math.prod(shapes[0].grid))
    samples = read_stacked(source, [Request(item_id) for item_id in source.ids[:count]])
    seconds = input_seconds(source, 0)
    found: dict[int, Choice] = {}
    for index, shape in enumerate(shapes[:-1], start=1):
        frozen = FrozenModule(space.build(index, shape.cell_in[0]), torch.device("cpu"))
        stage = Stage(space, index, source, shape.grid, shape.cell_in)
        choice, samples = stage.outputs.settling.measure(
            frozen, samples, seconds, stage.outputs.stored_operation
        )
        if index in asked:
            found[index] = choice
        stored = (index in found and choice.store) or config.stage(
            index
        ).cache.materialize == "always"
        seconds = choice.read_warm if stored else choice.compute
    return found
