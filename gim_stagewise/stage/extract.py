"""Run a frozen module over a whole dataset, block by block, into a cache."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray

from gim_stagewise.cache import Block, CacheWriter, Manifest, StagedBlock, stage_block
from gim_stagewise.config import ExtractConfig
from gim_stagewise.errors import NonFiniteError
from gim_stagewise.progress import Progress
from gim_stagewise.sources import Request, Source, read_stacked
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward


def compute_block(
    frozen: FrozenModule, source: Source, ids: list[str], view: int, config: ExtractConfig
) -> dict[str, NDArray[np.float32]]:
    """Activations and embeddings of a block's samples.

    Parameters
    ----------
    frozen : FrozenModule
    source : Source
        The input, with patch axes.
    ids : list of str
        The block's samples, in storage order.
    view : int
    config : ExtractConfig

    Returns
    -------
    dict
        "activations" [sample, grid_row, grid_col, channel, height, width] and
        "pooled" [sample, grid_row, grid_col, channel], float32.

    Raises
    ------
    NonFiniteError
        If an output is NaN or infinite; the message names the samples.
    """
    batch = torch.from_numpy(read_stacked(source, [Request(item_id, view) for item_id in ids]))
    samples, rows, columns = batch.shape[:3]
    patches = rearrange(batch, "s r c ch h w -> (s r c) ch h w")
    activations, embeddings = frozen_forward(frozen, patches, config)
    _refuse_non_finite(activations, ids, rows * columns)
    sizes = {"s": samples, "r": rows, "c": columns}
    return {
        "activations": rearrange(activations, "(s r c) ... -> s r c ...", **sizes).numpy(),
        "pooled": rearrange(embeddings, "(s r c) e -> s r c e", **sizes).numpy(),
    }


def extract_block(
    writer_path: Path,
    staging: Path,
    manifest: Manifest,
    block: Block,
    frozen: FrozenModule,
    source: Source,
    config: ExtractConfig,
) -> StagedBlock:
    """Compute one block and stage it: the unit of work, for any process."""
    ids = [item.id for item in source.items()[block.samples.slice]]
    arrays = compute_block(frozen, source, ids, block.view, config)
    return stage_block(writer_path, staging, manifest, block, arrays)


def extract(
    frozen: FrozenModule,
    source: Source,
    path: Path,
    manifest: Manifest,
    config: ExtractConfig,
    progress: Progress,
) -> Manifest:
    """Build, or go on building, the cache of a frozen module, and seal it.

    Parameters
    ----------
    frozen : FrozenModule
    source : Source
        The stage's input.
    path : Path
        Where the cache shall be.
    manifest : Manifest
        Unsealed.
    config : ExtractConfig
    progress : Progress

    Returns
    -------
    Manifest
        Sealed.

    Raises
    ------
    NonFiniteError
        If an output is NaN or infinite; nothing is sealed.
    StorageError
        If the disk is full or failing; blocks that are done stay valid.
    """
    writer = CacheWriter(path, manifest, source)
    pending = writer.pending
    label = f"module {manifest.module}: extract"
    done = len(writer.blocks) - len(pending)
    with progress.task(label, total=len(writer.blocks), done=done, unit="block") as task:
        for block in pending:
            staged = extract_block(path, writer.staging, manifest, block, frozen, source, config)
            writer.commit(staged)
            task.advance()
    return writer.seal()


def _refuse_non_finite(activations: torch.Tensor, ids: list[str], patches: int) -> None:
    finite = activations.flatten(1).isfinite().all(1)
    if finite.all():
        return
    bad = sorted({int(row) // patches for row in torch.nonzero(~finite)[:, 0]})
    named = ", ".join(ids[sample] for sample in bad[:5]) + (" ..." if len(bad) > 5 else "")
    raise NonFiniteError(
        f"the frozen module gives NaN or infinity for {len(bad)} samples: {named}; nothing was "
        "sealed. Look at these samples, or train the module again with a lower train.lr"
    )
