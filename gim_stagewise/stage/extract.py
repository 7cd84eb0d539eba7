"""Run a frozen module over a whole dataset, block by block, into a cache.

A `BlockJob` says all that any process needs to compute and stage blocks; a `BlockWorker` does it.
Who runs the workers (this process, or Dask's) is decided in `gim_stagewise.stage.parallel`; the
coordinator alone commits what they staged.
"""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from threading import Event, Lock
from typing import Any, Protocol

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from gim_stagewise.cache import (
    Block,
    Cache,
    CacheWriter,
    Manifest,
    Precision,
    PrecisionError,
    StagedBlock,
    stage_block,
)
from gim_stagewise.config import CacheConfig, ExtractConfig, PipelineConfig
from gim_stagewise.errors import NonFiniteError, PrecisionLossError, StaleCacheError
from gim_stagewise.models import INPUT_OPERATIONS, forget_user_code
from gim_stagewise.progress import Progress
from gim_stagewise.sources import Request, Source, read_stacked
from gim_stagewise.stage.freeze import (
    FrozenModule,
    check_numerics,
    frozen_forward,
    resolve_device,
)
from gim_stagewise.stage.workspace import Workspace, open_patches
from gim_stagewise.windows import Span

# Blocks that a process has in hand: one is computed, the others come or go.
BLOCKS_AT_ONCE = 2


@dataclass(frozen=True)
class BlockJob:
    """What is needed to compute blocks of one cache, in this process or another.

    Parameters
    ----------
    config : PipelineConfig
    code_folder : Path or None
        From where the user's own builders are imported.
    input : Path, BlockJob or None
        The input's cache, what computes its blocks if they are not stored; None for the dataset
        itself.
    in_channels : int
    device : str
        "cpu" or "cuda".
    weights : dict
        State of the frozen module.
    builder_source, input_content : str
        Digests of the builder's code and of the input, which a worker must have as well.
    cache, staging : Path
        The cache that is built, and this run's staging folder; its name is the run's token.
    manifest : Manifest
    """

    config: PipelineConfig
    code_folder: Path | None
    input: Path | BlockJob | None
    in_channels: int
    device: str
    weights: dict[str, Tensor]
    builder_source: str
    input_content: str
    cache: Path
    staging: Path
    manifest: Manifest

    def open(self, source: Source | None = None) -> BlockWorker:
        """Load the module and open the input, unless the caller has it open already.

        Raises
        ------
        StaleCacheError
            If this process has other code or data than the coordinator, or would compute other
            bits than the manifest records.
        """
        device = resolve_device(self.device)
        cache_config = self.config.stage(self.manifest.module).cache
        check_numerics(self.manifest.numerics, device, self.config.extract, cache_config)
        space = Workspace(self.config, "", self.cache.parent, self.code_folder, device)
        if space.builder(self.manifest.module).source_digest != self.builder_source:
            forget_user_code()  # a worker that served an earlier run still has the code of then
        if space.builder(self.manifest.module).source_digest != self.builder_source:
            raise StaleCacheError(
                f"the worker on {platform.node()} has other code of the module than this process; "
                "give all workers the same files, and the same release of gim-stagewise"
            )
        module = space.build(self.manifest.module, self.in_channels)
        module.load_state_dict(self.weights)
        if source is None:
            source = self._open_input()
            if source.content_digest() != self.input_content:
                raise StaleCacheError(
                    f"the worker on {platform.node()} finds other data at the input's place; "
                    "all workers need the same files under the same paths"
                )
        return BlockWorker(self, FrozenModule(module, device), source)

    def _open_input(self) -> Source:
        if isinstance(self.input, BlockJob):
            return VirtualCache(self.input, self.input._open_input())
        return Cache(self.input) if self.input else open_patches(self.config)


@dataclass(frozen=True)
class BlockWorker:
    """Computes and stages blocks: the unit of work, for any process."""

    job: BlockJob
    frozen: FrozenModule
    source: Source
    # Set when nobody waits for blocks any more: the one that is computed ends early.
    stop: Event = field(default_factory=Event)
    _reading: Lock = field(default_factory=Lock)

    def compute(self, ids: list[str], view: int) -> dict[str, NDArray[Any]]:
        """Activations, as they would be stored, and embeddings of the samples of a block."""
        return self._compute(ids, view, Storing.of(self.job.manifest))

    def _compute(self, ids: list[str], view: int, storing: Storing) -> dict[str, NDArray[Any]]:
        with self._reading:  # sources need not be made for several threads
            samples = read_stacked(self.source, [Request(item_id, view) for item_id in ids])
        return compute_block(self.frozen, samples, ids, self.job.config.extract, storing)

    def __call__(self, block: Block) -> StagedBlock:
        job = self.job
        ids = list(self.source.ids[block.samples.slice])
        storing = Storing.of(job.manifest) if job.manifest.layout.materialized else Storing(None)
        storing.stop = self.stop
        arrays = self._compute(ids, block.view, storing)
        return stage_block(job.cache, job.staging, job.manifest, block, arrays, error=storing.error)


class VirtualCache(Cache):
    """A cache whose activations are computed when they are read.

    A whole block is computed at a time, by the same forward, in the same pieces and on the same
    chunk grid as in extraction, so that a stored cache and a virtual one give the same bits.

    Parameters
    ----------
    job : BlockJob
        Of the frozen module, with the sealed cache of its embeddings, ids, splits and labels.
    source : Source
        The frozen module's input.
    """

    def __init__(self, job: BlockJob, source: Source) -> None:
        super().__init__(job.cache)
        # Bits of other numerics than those recorded would not be what the digest says.
        self.job = replace(job, manifest=self.manifest)
        self.source = source
        self._last: tuple[tuple[int, int], NDArray[Any]] | None = None

    @cached_property
    def worker(self) -> BlockWorker:
        """The frozen module, opened at the first read.

        Raises
        ------
        StaleCacheError
            If this process would compute other bits than were sealed.
        """
        return self.job.open(self.source)

    def read_stored(
        self, requests: Sequence[Request], *, empty: Callable[..., NDArray[Any]] = np.empty
    ) -> list[NDArray[Any]]:
        return self._read("activations", requests, empty)

    def _read_chunk(
        self, name: str, view: int, number: int, needed: Span
    ) -> Iterator[tuple[Span, NDArray[Any]]]:
        if name != "activations":
            yield from super()._read_chunk(name, view, number, needed)
            return
        # The last one is kept: batches in storage order end within a chunk.
        if self._last is None or self._last[0] != (view, number):
            self._last = None
            layout = self.manifest.layout
            start = number * layout.chunk
            ids = list(self.ids[start : min(start + layout.chunk, layout.samples)])
            self._last = ((view, number), self.worker.compute(ids, view)["activations"])
        yield Span(0, self.manifest.layout.grid[0]), self._last[1]


class Executor(Protocol):
    """Runs blocks somewhere."""

    def run(self, job: BlockJob, source: Source, blocks: list[Block]) -> Generator[StagedBlock]:
        """Stage all blocks, in any order."""


class InProcess:
    """Runs blocks in this process: while one is computed, others are read, compressed, written.

    There is one forward at a time, whatever the number of threads (see `frozen_forward`).
    """

    def __init__(self, threads: int = BLOCKS_AT_ONCE) -> None:
        self._threads = threads

    def run(self, job: BlockJob, source: Source, blocks: Iterable[Block]) -> Generator[StagedBlock]:
        worker = job.open(source)
        waiting = iter(blocks)
        running: deque[Future[StagedBlock]] = deque()
        executor = ThreadPoolExecutor(self._threads, "blocks")
        try:
            for block in islice(waiting, self._threads):
                running.append(executor.submit(worker, block))
            while running:
                staged = running.popleft().result()
                running += [executor.submit(worker, block) for block in islice(waiting, 1)]
                yield staged
        finally:
            worker.stop.set()
            executor.shutdown(cancel_futures=True)


def extract(
    job: BlockJob, writer: CacheWriter, source: Source, executor: Executor, progress: Progress
) -> Manifest:
    """Build, or go on building, the cache of a frozen module, and seal it.

    Parameters
    ----------
    job : BlockJob
    writer : CacheWriter
        Of the job's cache.
    source : Source
        The stage's input.
    executor : Executor
    progress : Progress

    Returns
    -------
    Manifest
        Sealed.

    Raises
    ------
    NonFiniteError
        If an output is NaN or infinite; nothing is sealed.
    PrecisionLossError
        If values are too large for the precision, or its error is above ``cache.max_error``.
    StorageError
        If the disk is full or failing; blocks that are done stay valid.
    """
    pending = writer.pending
    total = sum(len(block.samples) for block in writer.blocks)
    done = total - sum(len(block.samples) for block in pending)
    label = f"module {job.manifest.module}: extract"
    with (
        progress.task(label, total=total, done=done, unit="sample") as task,
        # Closed at once when anything goes wrong, and its processes with it.
        closing(executor.run(job, source, pending)) as blocks,
    ):
        for staged in blocks:
            writer.commit(staged)
            task.advance(len(staged.block.samples))
    check_error(writer.error(), job.config.stage(job.manifest.module).cache, job.manifest)
    return writer.seal()


def check_error(error: PrecisionError | None, cache: CacheConfig, manifest: Manifest) -> None:
    """Refuse a precision that loses more than ``cache.max_error``.

    Raises
    ------
    PrecisionLossError
        With both numbers.
    """
    if error is None or cache.max_error is None or error.relative <= cache.max_error:
        return
    channel, worst = error.worst_channel
    raise PrecisionLossError(
        f"module {manifest.module}: storing as {cache.precision} changes activations by "
        f"{error.relative:.2e} (relative L2; channel {channel} by {worst:.2e}, "
        f"{error.saturated} values saturated), cache.max_error allows {cache.max_error:g}: use a "
        "finer cache.precision, or allow more"
    )


class Storing:
    """Makes of a piece's activations what is stored of them, and keeps account of what that does.

    Parameters
    ----------
    precision : Precision or None
        None stores no activations.
    operation : str or None
        Applied first; see `gim_stagewise.models.INPUT_OPERATIONS`.

    Attributes
    ----------
    finite : list of Tensor
        For each piece, whether a row is finite: bool [row].
    error : PrecisionError or None
        What storing did to all pieces so far; None where nothing is lost.
    """

    def __init__(self, precision: Precision | None, operation: str | None = None) -> None:
        self.precision = precision
        self.operation = operation
        self.stop: Event | None = None
        self.finite: list[Tensor] = []
        self.error: PrecisionError | None = None

    @classmethod
    def of(cls, manifest: Manifest) -> Storing:
        """As the cache that a manifest describes has it."""
        return cls(manifest.precision, manifest.stored_operation)

    def __call__(self, z: Float[Tensor, "row channel height width"]) -> Tensor:
        if self.stop is not None and self.stop.is_set():
            raise CancelledError
        self.finite.append(_finite_rows(z).cpu())
        if self.precision is None:
            return z[:, :0]
        if self.operation is not None:
            z = INPUT_OPERATIONS[self.operation](z)
        stored, error = self.precision.encode(z)
        if error is not None:
            self.error = error if self.error is None else self.error + error
        return stored


def _finite_rows(z: Tensor) -> Tensor:
    """Whether all values of a row are finite: bool [row]."""
    # A sum costs a fraction of looking at every value, and is finite only if they all are.
    finite = z.flatten(1).sum(1).isfinite()
    return finite if finite.all() else z.flatten(1).isfinite().all(1)


def compute_block(
    frozen: FrozenModule,
    samples: NDArray[np.float32],
    ids: list[str],
    config: ExtractConfig,
    storing: Storing,
) -> dict[str, NDArray[Any]]:
    """Activations and embeddings of a block's samples.

    Parameters
    ----------
    frozen : FrozenModule
    samples : array
        The input, [sample, grid_row, grid_col, channel, height, width].
    ids : list of str
        The block's samples, in storage order, for errors.
    config : ExtractConfig
    storing : Storing
        A new one.

    Returns
    -------
    dict
        "activations" [sample, grid_row, grid_col, channel, height, width] as they are stored, and
        "pooled" [sample, grid_row, grid_col, channel], float32.

    Raises
    ------
    NonFiniteError
        If an output is NaN or infinite; the message names the samples.
    PrecisionLossError
        If outputs are too large for float16.
    """
    count, rows, columns = samples.shape[:3]
    patches = torch.from_numpy(samples).flatten(0, 2)
    activations, embeddings = frozen_forward(frozen, patches, config, keep=storing)
    finite = torch.cat(storing.finite) & embeddings.isfinite().all(1)
    _refuse_non_finite(finite, ids, rows * columns)
    _refuse_overflow(storing, ids)
    sizes = {"s": count, "r": rows, "c": columns}
    return {
        "activations": rearrange(activations, "(s r c) ... -> s r c ...", **sizes).numpy(),
        "pooled": rearrange(embeddings, "(s r c) e -> s r c e", **sizes).numpy(),
    }


def _refuse_non_finite(finite: Tensor, ids: list[str], patches: int) -> None:
    if finite.all():
        return
    bad = sorted({int(row) // patches for row in torch.nonzero(~finite)[:, 0]})
    named = ", ".join(ids[sample] for sample in bad[:5]) + (" ..." if len(bad) > 5 else "")
    raise NonFiniteError(
        f"the frozen module gives NaN or infinity for {len(bad)} samples: {named}; nothing was "
        "sealed. Look at these samples, or train the module again with a lower train.lr"
    )


def _refuse_overflow(storing: Storing, ids: list[str]) -> None:
    error = storing.error
    if error is None or storing.precision is None or storing.precision.has_scales:
        return
    if error.saturated:
        raise PrecisionLossError(
            f"{error.saturated} values of samples {ids[0]} to {ids[-1]} are beyond what "
            f"{storing.precision.name} can store; nothing was sealed. Set cache.precision to "
            '"bfloat16" or "bitround-N", which reach as far as float32'
        )
