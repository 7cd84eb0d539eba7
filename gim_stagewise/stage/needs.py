"""What decides the memory of a stage, whether its input is there yet or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from gim_stagewise.cache import Cache, CacheLayout, Layout, Precision, TiledCache
from gim_stagewise.sources import PatchSource, RegionSource, Source, Split
from gim_stagewise.stage.extract import VirtualCache
from gim_stagewise.stage.feed import MOST_THREADS
from gim_stagewise.stage.forward import block_bytes, project_forward
from gim_stagewise.stage.freeze import STEPS_AT_ONCE
from gim_stagewise.stage.labels import Labels
from gim_stagewise.stage.loader import loader_bytes
from gim_stagewise.stage.shape import Shape, check_shape, window_of
from gim_stagewise.stage.spec import StepSpec, joint_spec, step_spec
from gim_stagewise.stage.tiling import largest_input, tiled_layout
from gim_stagewise.stage.windowed import window_count
from gim_stagewise.stage.workspace import Workspace


@dataclass(frozen=True)
class TrainingNeeds:
    """What decides the memory of training a module, or all in one step.

    Parameters
    ----------
    spec : StepSpec
        Of a whole batch in one pass.
    loader : int
        Bytes of samples that its loader holds.
    chain : int
        Bytes of the modules below, where their outputs are not stored.
    """

    spec: StepSpec
    loader: int
    chain: int


@dataclass(frozen=True)
class StageNeeds(TrainingNeeds):
    """What decides the memory of a module's training and extraction.

    Parameters
    ----------
    item_bytes : int
        Of one sample of its input, as it is stored.
    block : int
        Bytes of one block on its way from the input to the disk.
    layout : CacheLayout or TiledLayout
        Of its outputs.
    """

    item_bytes: int
    block: int
    layout: Layout


def stage_needs(workspace: Workspace, index: int, shape: Shape, source: Source) -> StageNeeds:
    """What a module on the input that is there will need."""
    if workspace.config.windowed:
        chunk = _chunk_bytes(source)
        extents = [item.extent for item in source.items()]
        return _windowed_needs(workspace, index, shape, source.ids, extents, chunk)
    loader = loader_bytes(
        workspace.module_config(index).train,
        samples=len(source.split("unlabeled")),
        item_bytes=source.item_bytes,
        chunk_items=source.chunk_items,
        views=source.views,
    )
    layout = cache_layout(workspace, index, shape, source)
    reading = 2 * _chunk_bytes(source)  # the one that is kept, and the next
    return StageNeeds(
        spec=step_spec(workspace, index, shape),
        loader=loader + reading,
        chain=chain_bytes(source),
        item_bytes=source.item_bytes,
        block=_block_bytes(shape, layout) + reading,
        layout=layout,
    )


def joint_needs(
    workspace: Workspace,
    shapes: Sequence[Shape],
    samples: Source,
    split: Split,
    labels: Labels | None,
) -> TrainingNeeds:
    """What training all modules in one step will need.

    Parameters
    ----------
    workspace : Workspace
    shapes : sequence of Shape
        Of all modules.
    samples : Source
        What they are trained on.
    split : str
        Which of them.
    labels : Labels, optional
        For supervised modes.
    """
    held = loader_bytes(
        workspace.module_config(1).train,
        samples=len(samples.split(split)),
        item_bytes=samples.item_bytes,
        chunk_items=samples.chunk_items,
        views=samples.views,
    )
    known = {} if labels is None else {"classes": labels.classes, "label_steps": labels.steps}
    held += 2 * _chunk_bytes(samples)
    return TrainingNeeds(joint_spec(workspace, shapes, **known), held, 0)


def _block_bytes(shape: Shape, layout: CacheLayout) -> int:
    return block_bytes(layout.chunk * shape.input_bytes, layout.block_bytes)


def _windowed_needs(
    workspace: Workspace,
    index: int,
    shape: Shape,
    ids: Sequence[str],
    extents: Sequence[tuple[int, ...]],
    chunk: int,
) -> StageNeeds:
    """What a module needs whose input has these extents, and chunks of so many bytes."""
    config, window = workspace.config, window_of(workspace.config, index)
    layout = tiled_layout(workspace, index, shape, ids, extents)
    largest = largest_input(shape.geometry, layout.tile, extents)
    cell = shape.cell_in[:1] if config.dense else shape.cell_in
    below = Precision("float32" if index == 1 else config.stage(index - 1).cache.precision)
    item_bytes = below.itemsize * math.prod(cell) * math.prod(window)
    train = config.stage(index).train
    held = loader_bytes(
        train,
        samples=window_count(config.windows, extents, window, train.batch),
        item_bytes=item_bytes,
        chunk_items=1,
        views=None,
    )
    # What is in memory together: a window, or of a stateful module some steps of all its lanes.
    forward = (*cell, *largest) if config.dense else None
    blocks = 1
    if shape.state:
        forward = (*cell, min(largest[0], STEPS_AT_ONCE))
        blocks = config.windows.lanes
    block = block_bytes(4 * math.prod(cell) * math.prod(largest) + chunk, layout.block_bytes)
    return StageNeeds(
        spec=step_spec(workspace, index, shape, forward),
        # Chunks, compressed and not, from which windows are cut.
        loader=held + 2 * MOST_THREADS * chunk,
        chain=0,
        item_bytes=item_bytes,
        block=blocks * block,
        layout=layout,
    )


def chain_needs(
    workspace: Workspace,
    source: PatchSource | RegionSource,
    shapes: list[Shape],
    stored: Mapping[int, bool] | None = None,
) -> list[StageNeeds]:
    """What each module will need, before anything is there.

    Parameters
    ----------
    workspace : Workspace
    source : PatchSource or RegionSource
    shapes : list of Shape
    stored : mapping, optional
        Whether outputs are stored, of modules where that is known. Where it is not, with
        ``materialize = "auto"``, they count as computed again, which takes more.
    """
    if isinstance(source, RegionSource):
        return _windowed_chain(workspace, source, shapes)
    needs: list[StageNeeds] = []
    item_bytes, chunk_items, views = source.item_bytes, 1, source.views
    chain, reading = 0, 2 * _chunk_bytes(source)
    for index, shape in enumerate(shapes, start=1):
        held = loader_bytes(
            workspace.module_config(index).train,
            samples=len(source.split("unlabeled")),
            item_bytes=item_bytes,
            chunk_items=chunk_items,
            views=views,
        )
        spec = step_spec(workspace, index, shape)
        layout = cache_layout(workspace, index, shape, source)
        block = _block_bytes(shape, layout) + reading
        needs.append(StageNeeds(spec, held + reading, chain, item_bytes, block, layout))
        reading = 0
        always = workspace.module_config(index).cache.materialize == "always"
        if (stored or {}).get(index, always):
            chain = 0
        elif index < len(shapes):
            chain += virtual_bytes(spec, shape, layout)
        item_bytes, chunk_items, views = layout.sample_bytes, layout.chunk, layout.views - 1
    return needs


def _chunk_bytes(source: Source) -> int:
    """Bytes that are read at once for the smallest region of a source."""
    if isinstance(source, TiledCache):
        return source.layout.block_bytes
    return source.chunk_bytes if isinstance(source, RegionSource | PatchSource) else 0


def _windowed_chain(
    workspace: Workspace, source: RegionSource, shapes: list[Shape]
) -> list[StageNeeds]:
    extents = [item.extent for item in source.items()]
    needs: list[StageNeeds] = []
    chunk = source.chunk_bytes
    for index, shape in enumerate(shapes, start=1):
        needs.append(_windowed_needs(workspace, index, shape, source.ids, extents, chunk))
        extents = [shape.extent_out(extent) for extent in extents]
        chunk = needs[-1].layout.block_bytes
    return needs


def chain_bytes(source: Source) -> int:
    """Bytes of the modules, and of their blocks, that compute what a source does not store."""
    total = 0
    while isinstance(source, VirtualCache):
        job, below = source.job, source.source
        space = Workspace(job.config, "", Path(), job.code_folder, torch.device(job.device))
        size = job.config.patches.size if job.config.patches else 0
        grid, cell = (
            (below.layout.grid, below.layout.cell)
            if isinstance(below, Cache)
            else (source.layout.grid, (job.in_channels, size, size))
        )
        shape = check_shape(space, job.manifest.module, grid, cell)
        spec = step_spec(space, job.manifest.module, shape)
        total += virtual_bytes(spec, shape, source.layout)
        source = below
    return total


def virtual_bytes(spec: StepSpec, shape: Shape, layout: CacheLayout) -> int:
    """Bytes that one frozen module takes to compute blocks on demand."""
    return project_forward(spec, measure=False, margin=False) + _block_bytes(shape, layout)


def layout_of(workspace: Workspace, index: int, shape: Shape, source: Source) -> Layout:
    """How the cache of module ``index`` is laid out, given its input."""
    if not workspace.config.windowed:
        return cache_layout(workspace, index, shape, source)
    extents = [item.extent for item in source.items()]
    return tiled_layout(workspace, index, shape, source.ids, extents)


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
    rows, columns = shape.grid
    channels, height, width = shape.cell_out
    return CacheLayout(
        samples=len(source.ids),
        views=1 + (augment.views if augment.random else 0),
        grid=(rows, columns),
        cell=(channels, height, width),
        embedding=shape.embedding,
        chunk=shape.chunk(cache, len(source.ids)),
        codec=cache.codec,
        materialized=cache.materialize != "never",
        dtype=Precision(cache.precision).stored_dtype,
    )
