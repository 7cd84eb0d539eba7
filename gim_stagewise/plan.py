"""What a pipeline will need, before anything runs."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from einops import rearrange

from gim_stagewise.cache import CacheLayout, Precision, encoded_bytes, read_manifest
from gim_stagewise.errors import GimStageError, OverBudgetError
from gim_stagewise.memory import Budget
from gim_stagewise.models import INPUT_OPERATIONS
from gim_stagewise.pipeline import Pipeline, folder_bytes
from gim_stagewise.sources import PatchSource, Request, read_stacked
from gim_stagewise.stage.choose import Choice
from gim_stagewise.stage.extract import BLOCKS_AT_ONCE
from gim_stagewise.stage.fit import (
    TrainingPlan,
    plan_forward,
    plan_training,
    smallest_training,
)
from gim_stagewise.stage.forward import block_bytes
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward
from gim_stagewise.stage.loader import loading_quality, positions_of
from gim_stagewise.stage.needs import cache_layout, chain_needs
from gim_stagewise.stage.parallel import BASE_BYTES, extraction_workers
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.stage import Stage
from gim_stagewise.units import format_bytes

# Samples that an estimate of a cache's size looks at, within so many bytes.
SAMPLES_SEEN = 16
SAMPLE_BYTES_SEEN = 32_000_000


@dataclass(frozen=True)
class ExtractionPlan:
    """What extracting a cache will take.

    Parameters
    ----------
    forward : int
        Bytes of the frozen module's forward, on the device.
    block : int
        Bytes of the blocks that are on their way from input to disk in one process, on the host.
    workers : int
        Processes besides this one; 0 for this one alone.
    base : int
        Bytes of a process before it begins.
    on_gpu : bool
    """

    forward: int
    block: int
    workers: int
    base: int
    on_gpu: bool

    @property
    def host(self) -> int:
        """Bytes on the host, all processes together."""
        each = self.block + (0 if self.on_gpu else self.forward)
        return self.base + (self.workers * (self.base + each) if self.workers else each)


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
    pooled_bytes : int
        Of it, what stays when activations may go.
    patches : int
        Patches of one sample.
    shuffle_quality : float
        How often batches will repeat a chunk of the input, against a perfect shuffle.
    choice : Choice or None
        What storing the outputs takes against computing them again, where that is to be chosen.
    """

    module: int
    training: TrainingPlan
    extraction: ExtractionPlan
    cache_bytes: int
    cache_basis: str
    pooled_bytes: int
    patches: int
    shuffle_quality: float
    choice: Choice | None = None

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
    """What a pipeline will need, stage by stage."""

    pipeline: str
    device: str
    stages: list[StagePlan]

    def disk(self, keep: str) -> int:
        """The most bytes of caches on disk at once.

        Parameters
        ----------
        keep : "all", "last-two" or "last"
            Which activations stay: a stage needs those of the one below, and none before them.
            Embeddings always stay.
        """
        sizes = [stage.cache_bytes for stage in self.stages]
        if keep == "all":
            return sum(sizes)
        pooled = [stage.pooled_bytes for stage in self.stages]
        return max(
            sum(sizes[max(0, top - 1) : top + 1]) + sum(pooled[: max(0, top - 1)])
            for top in range(len(sizes))
        )


def plan_pipeline(pipeline: Pipeline) -> PipelinePlan:
    """Project memory, disk and work of every stage, one module in memory at a time.

    Raises
    ------
    OverBudgetError
        If a stage does not fit the budget of the pipeline's workspace.
    GimStageError
        For whatever else does not fit together.
    """
    shapes = pipeline.check()
    space, source = pipeline.workspace, pipeline.source
    pipeline.check_budget(shapes, start=1)
    choices = _choices(pipeline, shapes)
    sizes = _cache_sizes(pipeline, shapes, choices)
    stages = []
    item_bytes, chunk_items = source.item_bytes, 1
    unlabeled = positions_of(source, source.split("unlabeled"))
    for needs, shape in zip(chain_needs(space, source, shapes), shapes, strict=True):
        spec = needs.spec
        index = spec.index
        layout = cache_layout(space, index, shape, source)
        training = plan_training(needs, recorded=None, budget=space.budget)
        on_gpu = space.device.type == "cuda"
        forward = plan_forward(spec, space.budget)
        block = BLOCKS_AT_ONCE * block_bytes(item_bytes, layout)
        workers = extraction_workers(
            threads=space.config.extract.threads,
            on_gpu=on_gpu,
            worker_bytes=BASE_BYTES + block + (0 if on_gpu else forward),
            host_bytes=space.budget.host_bytes(),
        )
        cache_bytes, basis = sizes[index - 1]
        stages.append(
            StagePlan(
                module=index,
                training=training,
                extraction=ExtractionPlan(forward, block, workers, BASE_BYTES, on_gpu),
                cache_bytes=cache_bytes,
                cache_basis=basis,
                pooled_bytes=_stored_samples(source, layout) * layout.embedding_bytes,
                patches=math.prod(shape.grid),
                shuffle_quality=loading_quality(
                    unlabeled,
                    batch=space.module_config(index).train.batch,
                    window=space.module_config(index).train.shuffle_window,
                    item_bytes=item_bytes,
                    chunk_items=chunk_items,
                    seed=space.config.seed,
                ),
                choice=choices.get(index),
            )
        )
        item_bytes, chunk_items = layout.sample_bytes, layout.chunk
    plan = PipelinePlan(space.config.name, str(space.device), stages)
    _check_disk(pipeline, plan)
    return plan


def smallest_budget(pipeline: Pipeline) -> Budget:
    """The smallest budgets that all stages of a pipeline work with."""
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
        host=max(budget.host or 0 for budget in least),
        disk=plan.disk("last"),
    )


def _check_disk(pipeline: Pipeline, plan: PipelinePlan) -> None:
    allowed, keep = pipeline.workspace.budget.disk, pipeline.config.keep
    needed = plan.disk(keep)
    if allowed is None or needed <= allowed:
        return
    others = [
        f'keep = "{name}" needs {format_bytes(plan.disk(name))}'
        for name in ("last-two", "last")
        if name != keep and plan.disk(name) <= allowed
    ]
    advice = others or ["store less, with fewer views or another cache.codec"]
    raise OverBudgetError(
        f"the caches project {format_bytes(needed)} on disk, allowed {format_bytes(allowed)}: "
        f"{advice[0]}, or allow --allowed-disk {-(-needed // 1_000_000)}MB"
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
    started = time.perf_counter()
    samples = read_stacked(source, [Request(item_id) for item_id in source.ids[:count]])
    seconds = (time.perf_counter() - started) / len(samples)
    found: dict[int, Choice] = {}
    for index, shape in enumerate(shapes[:-1], start=1):
        frozen = FrozenModule(space.build(index, shape.cell_in[0]), torch.device("cpu"))
        stage = Stage(space, index, source, shape.grid, shape.cell_in)
        choice, samples = stage.outputs.measure(frozen, samples, seconds)
        if index in asked:
            found[index] = choice
        stored = (index in found and choice.store) or config.stage(
            index
        ).cache.materialize == "always"
        seconds = choice.read_warm if stored else choice.compute
    return found


def _cache_sizes(
    pipeline: Pipeline, shapes: list[Shape], choices: dict[int, Choice]
) -> list[tuple[int, str]]:
    """Bytes on disk of each cache, and how they were found."""
    space, source = pipeline.workspace, pipeline.source
    sizes: list[tuple[int, str]] = []
    estimates = _encoded_bytes(pipeline, shapes)
    for index, (shape, (encoded, seen)) in enumerate(zip(shapes, estimates, strict=True), start=1):
        path = space.cache_path(index)
        if _is_sealed(path):
            sizes.append((folder_bytes(path), "the sealed cache that is there"))
            continue
        layout = cache_layout(space, index, shape, source)
        stored = _stored_samples(source, layout)
        if not layout.materialized or (index in choices and not choices[index].store):
            sizes.append((stored * layout.embedding_bytes, "embeddings alone"))
            continue
        many = "sample" if seen == 1 else "samples"
        sizes.append(
            (
                round(stored * (encoded + layout.embedding_bytes)),
                f"{seen} {many} through untrained modules, encoded",
            )
        )
    return sizes


def _is_sealed(path: Path) -> bool:
    try:
        return read_manifest(path).sealed
    except GimStageError:
        return False


def _stored_samples(source: PatchSource, layout: CacheLayout) -> int:
    """Samples that are written, once for each view."""
    return sum(len(block.samples) for block in layout.blocks(source))


def _encoded_bytes(pipeline: Pipeline, shapes: list[Shape]) -> Iterator[tuple[float, int]]:
    """Bytes of one sample's encoded activations for each module, and the samples looked at."""
    space, source = pipeline.workspace, pipeline.source
    largest = max(source.item_bytes, *(_sample_bytes(shape) for shape in shapes))
    count = max(1, min(SAMPLES_SEEN, SAMPLE_BYTES_SEEN // largest, len(source.ids)))
    ids = [source.ids[int(i)] for i in np.linspace(0, len(source.ids) - 1, count)]
    batch = read_stacked(source, [Request(item_id) for item_id in ids])
    rows = torch.from_numpy(rearrange(batch, "s r c ch h w -> (s r c) ch h w"))
    for index, shape in enumerate(shapes, start=1):
        # Smaller pieces than in extraction: their bits decide nothing here, their memory does.
        config = space.config.extract.model_copy(
            update={"batch": min(space.config.extract.batch, len(rows))}
        )
        frozen = FrozenModule(space.build(index, shape.cell_in[0]), torch.device("cpu"))
        cache = space.module_config(index).cache
        rows, _ = frozen_forward(frozen, rows, config)
        op = shapes[index].input_op if index < len(shapes) else None
        if op is not None and cache.stored_operation == "auto":
            rows = INPUT_OPERATIONS[op](rows)
        extremes = rows.transpose(0, 1).flatten(1).aminmax(dim=1)
        stored, _ = Precision(cache.precision).calibrated(*extremes).encode(rows)
        yield encoded_bytes(stored.numpy(), cache.codec) / count, count


def _sample_bytes(shape: Shape) -> int:
    return 4 * math.prod(shape.grid) * math.prod(shape.cell_out)
