"""What decides the memory of a stage, whether its input is there yet or not."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from gim_stagewise.cache import Cache, CacheLayout, Precision, auto_chunk
from gim_stagewise.config import PipelineConfig
from gim_stagewise.sources import PatchSource, Source
from gim_stagewise.stage.extract import VirtualCache
from gim_stagewise.stage.forward import block_bytes, forward_bytes
from gim_stagewise.stage.loader import loader_bytes
from gim_stagewise.stage.project import StepSpec, step_spec
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.workspace import Workspace


@dataclass(frozen=True)
class TrainingNeeds:
    """What decides the memory of a module's training.

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


def stage_needs(workspace: Workspace, index: int, shape: Shape, source: Source) -> TrainingNeeds:
    """What training a module on the input that is there will need."""
    loader = loader_bytes(
        workspace.module_config(index).train,
        samples=len(source.split("unlabeled")),
        item_bytes=source.item_bytes,
        chunk_items=source.chunk_items,
        views=source.views,
    )
    return TrainingNeeds(step_spec(workspace, index, shape), loader, chain_bytes(source))


def chain_needs(
    workspace: Workspace, source: PatchSource, shapes: list[Shape]
) -> list[TrainingNeeds]:
    """What training each module will need, before anything is there."""
    needs: list[TrainingNeeds] = []
    item_bytes, chunk_items, views = source.item_bytes, 1, source.views
    chain = 0
    for index, shape in enumerate(shapes, start=1):
        held = loader_bytes(
            workspace.module_config(index).train,
            samples=len(source.split("unlabeled")),
            item_bytes=item_bytes,
            chunk_items=chunk_items,
            views=views,
        )
        needs.append(TrainingNeeds(step_spec(workspace, index, shape), held, chain))
        layout = cache_layout(workspace, index, shape, source)
        if layout.materialized:
            chain = 0
        else:
            module = workspace.build(index, shape.cell_in[0])
            precision = Precision(workspace.module_config(index).cache.precision)
            chain += virtual_bytes(
                module, shape.cell_in, workspace.config, item_bytes, layout, precision
            )
        item_bytes, chunk_items, views = layout.sample_bytes, layout.chunk, layout.views - 1
    return needs


def chain_bytes(source: Source) -> int:
    """Bytes of the modules, and of their blocks, that compute what a source does not store."""
    total = 0
    while isinstance(source, VirtualCache):
        job, below = source.job, source.source
        space = Workspace(job.config, "", Path(), job.code_folder, torch.device("cpu"))
        module = space.build(job.manifest.module, job.in_channels)
        size = job.config.patches.size
        cell = (
            below.manifest.layout.cell
            if isinstance(below, Cache)
            else (job.in_channels, size, size)
        )
        layout, precision = source.manifest.layout, source.precision
        total += virtual_bytes(module, cell, job.config, below.item_bytes, layout, precision)
        source = below
    return total


def virtual_bytes(
    module: nn.Module,
    cell: tuple[int, ...],
    config: PipelineConfig,
    item_bytes: int,
    layout: CacheLayout,
    precision: Precision,
) -> int:
    """Bytes that one frozen module takes to compute blocks on demand; uses the module up."""
    try:
        forward = forward_bytes(module, cell, config.extract.batch, precision=precision)
    except Exception:  # a module that has to run to be counted
        forward = sum(parameter.nbytes for parameter in module.parameters())
    return forward + block_bytes(item_bytes, layout)


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
    layout = CacheLayout(
        samples=len(source.ids),
        views=1 + (augment.views if augment.random else 0),
        grid=shape.grid,
        cell=shape.cell_out,
        embedding=shape.embedding,
        chunk=1,
        codec=cache.codec,
        materialized=cache.materialize != "never",
        dtype=Precision(cache.precision).stored_dtype,
    )
    chunk = auto_chunk(layout.sample_bytes) if cache.chunk == "auto" else cache.chunk
    return replace(layout, chunk=min(chunk, layout.samples))
