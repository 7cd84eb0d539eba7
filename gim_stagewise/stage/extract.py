"""Run a frozen module over a whole dataset, block by block, into a cache.

A `BlockJob` says all that any process needs to compute and stage blocks; a `BlockWorker` does it.
Who runs the workers (this process, or Dask's) is decided in `gim_stagewise.stage.parallel`; the
coordinator alone commits what they staged.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from gim_stagewise.cache import (
    Block,
    Cache,
    CacheWriter,
    Manifest,
    PrecisionError,
    StagedBlock,
    TiledLayout,
    open_sealed,
    padding,
    stage_block,
)
from gim_stagewise.config import PipelineConfig
from gim_stagewise.errors import StaleCacheError
from gim_stagewise.memory import trim_heap, use_allocator
from gim_stagewise.models import forget_user_code
from gim_stagewise.progress import Progress
from gim_stagewise.sources import Request, Source, read_stacked
from gim_stagewise.stage.freeze import (
    FrozenModule,
    check_numerics,
    resolve_device,
)
from gim_stagewise.stage.storing import Storing, check_error, compute_block
from gim_stagewise.stage.workspace import Workspace, open_data
from gim_stagewise.windows import Geometry, Span, Window

# Blocks that a worker has in hand: one is computed, the other comes or goes.
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
    geometry : tuple of Geometry
        Of the module along each axis, in dense encoding.
    device : str
        "cpu" or "cuda".
    lean : bool
        Whether processes that compute shall hold little more memory than is in use.
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
    geometry: tuple[Geometry, ...]
    device: str
    lean: bool
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
        use_allocator(lean=self.lean)
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
        module = space.build(self.manifest.module, self.in_channels, storing=True)
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
        if self.input is None:
            layout = self.manifest.layout
            return open_data(
                self.config, only=layout.ids if isinstance(layout, TiledLayout) else None
            )
        below = self.config.stage(self.manifest.module - 1)
        return open_sealed(self.input, verify=below.cache.verify_reads)


@dataclass(frozen=True)
class BlockWorker:
    """Computes and stages blocks: the unit of work, for any process."""

    job: BlockJob
    frozen: FrozenModule
    source: Source
    _reading: Lock = field(default_factory=Lock)

    def compute(self, ids: list[str], view: int) -> dict[str, NDArray[Any]]:
        """Activations, as they would be stored, and embeddings of the samples of a block."""
        return self._computed(ids, view, self._samples(ids, view), Storing.of(self.job.manifest))

    def _computed(
        self, ids: list[str], view: int, samples: NDArray[np.float32], storing: Storing
    ) -> dict[str, NDArray[Any]]:
        """What becomes of `_samples`, in the places that they have in their block."""
        own = self._own(ids, view)
        named = [item_id for item_id, is_own in zip(ids, own, strict=True) if is_own]
        arrays = compute_block(self.frozen, samples, named, self.job.config.extract, storing)
        if all(own):
            return arrays
        block = {}
        for name, values in arrays.items():
            nothing = padding(name, self.job.manifest.precision)
            block[name] = np.full((len(ids), *values.shape[1:]), nothing, values.dtype)
            block[name][own] = values
        return block

    def _read(self, requests: Sequence[Request]) -> NDArray[np.float32]:
        with self._reading:  # sources need not be made for several threads
            return read_stacked(self.source, requests)

    def read(self, block: Block) -> NDArray[np.float32]:
        """The input of a block: those of its samples that it is stored for, or one window."""
        layout = self.job.manifest.layout
        if isinstance(layout, TiledLayout):
            (item_id,) = self.ids(block)
            window = self._window(layout, block)
            region = window.inputs if window else layout.region(block)
            return self._read([Request(item_id, region=region)])
        return self._samples(self.ids(block), block.view)

    def _samples(self, ids: list[str], view: int) -> NDArray[np.float32]:
        """Samples of a block that the view is stored for; a module may not even take others."""
        own = self._own(ids, view)
        return self._read(
            [Request(item_id, view) for item_id, is_own in zip(ids, own, strict=True) if is_own]
        )

    def _own(self, ids: list[str], view: int) -> list[bool]:
        """Which of a block's samples the view is stored for."""
        wanted = self._wanted[view]
        return [item_id in wanted for item_id in ids]

    @cached_property
    def _wanted(self) -> list[frozenset[str]]:
        layout = self.job.manifest.layout
        assert not isinstance(layout, TiledLayout)
        return [layout.wanted(self.source, view) for view in range(layout.views)]

    def _window(self, layout: TiledLayout, block: Block) -> Window | None:
        """What a tile is computed from in dense encoding; patches have no halo."""
        if not self.job.geometry:
            return None
        (item_id,) = self.ids(block)
        return Window.over(layout.region(block), self.job.geometry, self._extents[item_id])

    @cached_property
    def _extents(self) -> dict[str, tuple[int, ...]]:
        return {item.id: item.extent for item in self.source.items()}

    def __call__(self, block: Block) -> StagedBlock:
        """Read, compute and stage a block."""
        return self.stage(block, *self.outputs(block, self.read(block)))

    def ids(self, block: Block) -> list[str]:
        return list(self._ids[block.samples.slice])

    @cached_property
    def _ids(self) -> Sequence[str]:
        return self.source.ids  # of a large dataset it takes milliseconds to list them

    def outputs(
        self, block: Block, samples: NDArray[np.float32]
    ) -> tuple[dict[str, NDArray[Any]], PrecisionError | None]:
        """What a block's inputs become, as it is stored, and what that does to it."""
        layout, config = self.job.manifest.layout, self.job.config.extract
        storing = Storing.of(self.job.manifest) if layout.materialized else Storing(None)
        if not isinstance(layout, TiledLayout):
            arrays = self._computed(self.ids(block), block.view, samples, storing)
            return arrays, storing.error
        (item_id,) = self.ids(block)
        place = ", ".join(f"{span.start} to {span.stop}" for span in layout.region(block))
        window = self._window(layout, block)
        arrays = compute_block(
            self.frozen,
            samples,
            [f"{item_id} (outputs {place})"],
            config,
            storing,
            grid=0 if window else 2,
            trim=tuple(span.slice for span in window.kept) if window else None,
        )
        return {name: values[0] for name, values in arrays.items()}, storing.error

    def stage(
        self, block: Block, arrays: dict[str, NDArray[Any]], error: PrecisionError | None
    ) -> StagedBlock:
        job = self.job
        return stage_block(job.cache, job.staging, job.manifest, block, arrays, error=error)


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
        try:
            return self.job.open(self.source)
        except StaleCacheError as error:
            raise StaleCacheError(
                f"{self.path} has no activations stored, and they cannot be computed again here: "
                f"{error}. Build it anew with `gim-stage extract --module {self.manifest.module} "
                "--force` and the same input or pipeline"
            ) from None

    def read_stored(
        self, requests: Sequence[Request], *, empty: Callable[..., NDArray[Any]] = np.empty
    ) -> list[NDArray[Any]]:
        return self._read("activations", requests, empty)

    def read_chunk(
        self, name: str, view: int, number: int, needed: Span
    ) -> Iterator[tuple[Span, NDArray[Any]]]:
        if name != "activations":
            yield from super().read_chunk(name, view, number, needed)
            return
        # The last one is kept: batches in storage order end within a chunk.
        if self._last is None or self._last[0] != (view, number):
            self._last = None
            layout = self.layout
            start = number * layout.chunk
            ids = list(self.ids[start : min(start + layout.chunk, layout.samples)])
            self._last = ((view, number), self.worker.compute(ids, view)["activations"])
        yield Span(0, self.layout.grid[0]), self._last[1]


class Executor(Protocol):
    """Runs blocks somewhere."""

    def run(self, job: BlockJob, source: Source, blocks: list[Block]) -> Generator[StagedBlock]:
        """Stage all blocks, in any order."""


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
    unit = "tile" if isinstance(job.manifest.layout, TiledLayout) else "sample"
    try:
        with (
            progress.task(label, total=total, done=done, unit=unit) as task,
            # Closed at once when anything goes wrong, and its processes with it.
            closing(executor.run(job, source, pending)) as blocks,
        ):
            for staged in blocks:
                writer.commit(staged)
                task.advance(len(staged.block.samples))
        trim_heap()
        check_error(writer.error(), job.config.stage(job.manifest.module).cache, job.manifest)
        return writer.seal()
    except BaseException:
        writer.abandon()
        raise
