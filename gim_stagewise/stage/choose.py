"""Store a module's outputs, or compute them again whenever they are read? Measured, not guessed."""

from __future__ import annotations

import os
import shutil
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache import Block, Manifest, create_arrays, read_frame, stage_block
from gim_stagewise.config import ExtractConfig
from gim_stagewise.memory import available_host_bytes
from gim_stagewise.sources import Request, Source, read_stacked
from gim_stagewise.stage.freeze import FrozenModule
from gim_stagewise.stage.storing import Storing, compute_block
from gim_stagewise.units import format_bytes
from gim_stagewise.windows import Span, even_ranges

# Seconds that each thing is done again and again, to be told from noise.
SECONDS = 0.5

# Inputs that are read to find how long that takes: whole chunks, up to so much together.
_INPUT_SAMPLES = 16
_INPUT_BYTES = 64_000_000

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """What storing and computing again take, for one sample on this machine, in one thread.

    Parameters
    ----------
    compute : float
        Seconds to read the sample's input and run the frozen module on it.
    write : float
        Seconds to compress, write and flush its outputs.
    read_warm, read_cold : float
        Seconds to read and decode them, from the page cache and from the disk.
    sample_bytes : int
        Their bytes on disk.
    samples : int
    passes : int
        How often the next stage reads all of them: its epochs, and its own extraction.
    memory : int
        Bytes that the page cache may have.
    embedding_bytes : int
        Of all samples' embeddings, which are stored in any case.
    room : int or None
        Bytes that the disk budget leaves, where storing would take more than that.
    """

    compute: float
    write: float
    read_warm: float
    read_cold: float
    sample_bytes: int
    samples: int
    passes: int
    memory: int
    embedding_bytes: int = 0
    room: int | None = None

    @property
    def stored_bytes(self) -> int:
        """Bytes of the cache if outputs are stored."""
        return self.samples * self.sample_bytes + self.embedding_bytes

    @property
    def read(self) -> float:
        """Seconds to read a sample, from memory if the whole cache fits there."""
        return self.read_warm if self.fits else self.read_cold

    @property
    def fits(self) -> bool:
        """Whether the page cache can hold the whole cache."""
        return self.samples * self.sample_bytes <= self.memory

    @property
    def stored(self) -> float:
        """Seconds that all passes take from a cache, its writing included."""
        return self.samples * (self.write + self.passes * self.read)

    @property
    def computed(self) -> float:
        """Seconds that all passes take when outputs are computed again."""
        return self.samples * self.passes * self.compute

    @property
    def store(self) -> bool:
        """Whether storing is the faster, and there is room for it."""
        return self.stored <= self.computed and self.room is None

    def as_json(self) -> dict[str, Any]:
        own = {"store": self.store, "stored": self.stored, "computed": self.computed}
        return own | asdict(self)

    def __str__(self) -> str:
        chosen, other = ("stored", "computing") if self.store else ("computed", "storing")
        mine, its = (self.stored, self.computed) if self.store else (self.computed, self.stored)
        where = "memory" if self.fits else "disk"
        if self.room is not None:
            return (
                f"outputs are computed: storing them takes {format_bytes(self.stored_bytes)}, and "
                f"the disk budget leaves {format_bytes(self.room)}; {self.passes} passes over "
                f"{self.samples} samples take about {mine:.0f} s, storing {its:.0f} s"
            )
        return (
            f"outputs are {chosen}: {self.passes} passes over {self.samples} samples take about "
            f"{mine:.0f} s, {other} {its:.0f} s (a sample: {1e3 * self.compute:.1f} ms to compute, "
            f"{1e3 * self.read:.1f} ms to read from {where}, {1e3 * self.write:.1f} ms to write)"
        )


def input_seconds(source: Source, view: int) -> float:
    """Seconds to read a sample where whole chunks are read, as a stage reads them."""
    ids = source.split("unlabeled") or source.ids
    chunks = max(1, min(_INPUT_SAMPLES // source.chunk_items, _INPUT_BYTES // source.item_bytes))
    count = chunks * source.chunk_items
    # The first ones only warm up: files are opened, a module below is loaded.
    first, second = ids[:count], ids[count : 2 * count]
    if len(second) == count:
        read_stacked(source, [Request(item_id, view) for item_id in first])
        first = second
    started = time.perf_counter()
    read_stacked(source, [Request(item_id, view) for item_id in first])
    return (time.perf_counter() - started) / len(first)


def measure_choice(
    frozen: FrozenModule,
    samples: NDArray[np.float32],
    manifest: Manifest,
    config: ExtractConfig,
    *,
    input_seconds: float,
    passes: int,
    folder: Path,
) -> tuple[Choice, NDArray[np.float32]]:
    """Measure on a few samples.

    Parameters
    ----------
    frozen : FrozenModule
    samples : array
        Inputs, [sample, grid_row, grid_col, channel, height, width].
    manifest : Manifest
        Of the cache that would be built, with its scales.
    config : ExtractConfig
    input_seconds : float
        What reading one of the inputs took.
    passes : int
    folder : Path
        Where the cache would lie; it need not be there yet.

    Returns
    -------
    (Choice, array)
        And the outputs as they would be read.
    """
    count, samples_in_all = len(samples), manifest.layout.samples
    layout = replace(manifest.layout, samples=count, views=1, chunk=count, materialized=True)
    manifest = replace(manifest, layout=layout)
    block = Block(0, 0, Span(0, count))
    names = [str(number) for number in range(count)]

    def compute() -> tuple[dict[str, NDArray[Any]], Storing]:
        storing = Storing.of(manifest)
        return compute_block(frozen, samples, names, config, storing), storing

    compute_seconds, (arrays, storing) = _timed(compute)
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    scratch = place / f".measure-{uuid.uuid4().hex[:8]}"
    try:
        scratch.mkdir()
        create_arrays(scratch / "cache", layout, manifest.precision)
        write_seconds, staged = _timed(
            lambda: stage_block(
                scratch / "cache", scratch, manifest, block, arrays, error=storing.error
            )
        )
        files = [staged.folder / file for file in layout.chunk_files(block, "activations")]
        shape = layout.chunks["activations"][1:]

        def read() -> NDArray[np.float32]:
            outputs = np.empty((count, *layout.grid, *layout.cell), np.float32)
            for rows, file in zip(even_ranges(layout.grid[0], shape[1]), files, strict=True):
                part = read_frame(file, shape, layout.dtype, compressed=layout.codec != "none")
                decoded = manifest.precision.decode_array(part[:, : len(rows)])
                outputs[:, rows.slice] = decoded
            return outputs

        warm_seconds, outputs = _timed(read)
        cold_seconds, _ = _timed(read, before=lambda: _forget_pages(files))
        size = sum(file.stat().st_size for file in files)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    choice = Choice(
        compute=input_seconds + compute_seconds / count,
        write=write_seconds / count,
        read_warm=warm_seconds / count,
        read_cold=max(cold_seconds, warm_seconds) / count,
        sample_bytes=size // count,
        samples=samples_in_all,
        passes=passes,
        memory=available_host_bytes(),
        embedding_bytes=samples_in_all * layout.embedding_bytes,
    )
    return choice, outputs


def _timed(work: Callable[[], T], *, before: Callable[[], None] | None = None) -> tuple[float, T]:
    """The fewest seconds of several calls, and the last result; the first call only warms up."""
    result, best = work(), float("inf")
    end = time.monotonic() + SECONDS
    while best == float("inf") or time.monotonic() < end:
        if before is not None:
            before()
        started = time.perf_counter()
        result = work()
        best = min(best, time.perf_counter() - started)
    return best, result


def _forget_pages(files: list[Path]) -> None:
    """Let the system drop what it holds of files, where it can be asked to."""
    if not hasattr(os, "posix_fadvise"):
        return
    for file in files:
        descriptor = os.open(file, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
