"""What decides the memory of a stage, whether its input is there yet or not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gim_stagewise.cache import Cache, CacheLayout, Precision, auto_chunk
from gim_stagewise.sources import PatchSource, Source
from gim_stagewise.stage.extract import VirtualCache
from gim_stagewise.stage.forward import block_bytes, project_forward
from gim_stagewise.stage.loader import loader_bytes
from gim_stagewise.stage.project import StepSpec, step_spec
from gim_stagewise.stage.shape import Shape, check_shape
from gim_stagewise.stage.workspace import Workspace


@dataclass(frozen=True)
class StageNeeds:
    """What decides the memory of a module's training and extraction.

    Parameters
    ----------
    spec : StepSpec
        Of a whole batch in one pass.
    loader : int
        Bytes of samples that its loader holds.
    chain : int
        Bytes of the modules below, where their outputs are not stored.
    item_bytes : int
        Of one sample of its input, as it is stored.
    layout : CacheLayout
        Of its outputs.
    """

    spec: StepSpec
    loader: int
    chain: int
    item_bytes: int
    layout: CacheLayout


def stage_needs(workspace: Workspace, index: int, shape: Shape, source: Source) -> StageNeeds:
    """What a module on the input that is there will need."""
    loader = loader_bytes(
        workspace.module_config(index).train,
        samples=len(source.split("unlabeled")),
        item_bytes=source.item_bytes,
        chunk_items=source.chunk_items,
        views=source.views,
    )
    spec, layout = step_spec(workspace, index, shape), cache_layout(workspace, index, shape, source)
    return StageNeeds(spec, loader, chain_bytes(source), source.item_bytes, layout)


def chain_needs(
    workspace: Workspace,
    source: PatchSource,
    shapes: list[Shape],
    stored: Mapping[int, bool] | None = None,
) -> list[StageNeeds]:
    """What each module will need, before anything is there.

    Parameters
    ----------
    workspace : Workspace
    source : PatchSource
    shapes : list of Shape
    stored : mapping, optional
        Whether outputs are stored, of modules where that is known. Where it is not, with
        ``materialize = "auto"``, they count as computed again, which takes more.
    """
    needs: list[StageNeeds] = []
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
        spec = step_spec(workspace, index, shape)
        layout = cache_layout(workspace, index, shape, source)
        needs.append(StageNeeds(spec, held, chain, item_bytes, layout))
        always = workspace.module_config(index).cache.materialize == "always"
        if (stored or {}).get(index, always):
            chain = 0
        elif index < len(shapes):
            chain += virtual_bytes(spec, item_bytes, layout)
        item_bytes, chunk_items, views = layout.sample_bytes, layout.chunk, layout.views - 1
    return needs


def chain_bytes(source: Source) -> int:
    """Bytes of the modules, and of their blocks, that compute what a source does not store."""
    total = 0
    while isinstance(source, VirtualCache):
        job, below = source.job, source.source
        space = Workspace(job.config, "", Path(), job.code_folder, torch.device(job.device))
        size = job.config.patches.size
        grid, cell = (
            (below.layout.grid, below.layout.cell)
            if isinstance(below, Cache)
            else (source.layout.grid, (job.in_channels, size, size))
        )
        shape = check_shape(space, job.manifest.module, grid, cell)
        spec = step_spec(space, job.manifest.module, shape)
        total += virtual_bytes(spec, below.item_bytes, source.layout)
        source = below
    return total


def virtual_bytes(spec: StepSpec, item_bytes: int, layout: CacheLayout) -> int:
    """Bytes that one frozen module takes to compute blocks on demand."""
    return project_forward(spec, measure=False, margin=False) + block_bytes(item_bytes, layout)


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
