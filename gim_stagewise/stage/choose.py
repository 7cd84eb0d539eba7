"""Store a module's outputs, or compute them again whenever they are read? Measured, not guessed."""

from __future__ import annotations

import math
import os
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache import (
    Block,
    Cache,
    Manifest,
    create_arrays,
    stage_block,
    write_manifest,
    write_samples,
)
from gim_stagewise.config import ExtractConfig
from gim_stagewise.durable import fsync_file, token
from gim_stagewise.lock import exclusive
from gim_stagewise.memory import available_host_bytes
from gim_stagewise.sources import Request, Source, Split, read_stacked
from gim_stagewise.stage.freeze import FrozenModule
from gim_stagewise.stage.loader import Loader
from gim_stagewise.stage.storing import Storing, compute_block
from gim_stagewise.units import format_bytes
from gim_stagewise.windows import even_ranges

# Seconds that each thing is done again and again, to be told from noise.
SECONDS = 0.5
LEAST_CALLS = 3
# Chunks, and batches, that reading is measured on, at least.
_CHUNKS_READ = 4

# Inputs that are read to find how long that takes: whole chunks, up to so much together.
_INPUT_SAMPLES = 16
_INPUT_BYTES = 64_000_000

T = TypeVar("T")


@dataclass(frozen=True)
class Choice:
    """What storing and computing again take, for one sample on this machine.

    Parameters
    ----------
    compute : float
        Seconds to read the sample's input and run the frozen module on it.
    write : float
        Seconds to compress, write and flush its outputs.
    read_warm, read_cold : float
        Seconds to read and decode them in shuffled batches, as the next stage does, from the page
        cache and from the disk.
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


@dataclass(frozen=True)
class Reading:
    """How the next stage reads its input.

    Parameters
    ----------
    batch : int
        Samples in a batch.
    window : int
        Bytes of samples that may be held to be mixed.
    rows : int or None
        Patches that are decoded together; a whole batch by default.
    """

    batch: int
    window: int
    rows: int | None


def measure_choice(
    frozen: FrozenModule,
    samples: NDArray[np.float32],
    manifest: Manifest,
    config: ExtractConfig,
    *,
    input_seconds: float,
    reading: Reading,
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
    reading : Reading
    passes : int
    folder : Path
        Where the cache would lie; it need not be there yet.

    Returns
    -------
    (Choice, array)
        And the outputs as they would be read.
    """
    names = [str(number) for number in range(len(samples))]

    def compute() -> tuple[dict[str, NDArray[Any]], Storing]:
        storing = Storing.of(manifest)
        return compute_block(frozen, samples, names, config, storing), storing

    compute_seconds, (arrays, storing) = _timed(compute)
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    scratch = place / f".measure-{token()}"
    try:
        with exclusive(scratch):
            write_seconds, cache = _scratch_cache(scratch, manifest, arrays, storing, reading)
            warm_seconds = _read_seconds(cache, reading, whole=manifest.sample_layout.samples)
            files = [file for file in cache.path.rglob("c.*") if file.is_file()]
            cold_seconds = _read_seconds(
                cache,
                reading,
                whole=manifest.sample_layout.samples,
                before=lambda: _forget_pages(files),
            )
        size = sum(file.stat().st_size for file in files if file.parent.name == "activations")
        samples_there = len(cache.ids)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    choice = Choice(
        compute=input_seconds + compute_seconds / len(samples),
        write=write_seconds,
        read_warm=warm_seconds,
        read_cold=max(cold_seconds, warm_seconds),
        sample_bytes=size // samples_there,
        samples=manifest.sample_layout.samples,
        passes=passes,
        memory=available_host_bytes(),
        embedding_bytes=manifest.sample_layout.samples * manifest.sample_layout.embedding_bytes,
    )
    return choice, manifest.precision.decode_array(arrays["activations"])


@dataclass(frozen=True)
class _Numbered:
    """Samples that are all unlabeled."""

    ids: Sequence[str]
    label_names: tuple[str, ...] = ()

    def split(self, name: Split) -> Sequence[str]:
        return self.ids if name == "unlabeled" else ()

    def labels(self, name: str) -> NDArray[np.int64]:
        raise KeyError(name)


def _scratch_cache(
    scratch: Path,
    manifest: Manifest,
    arrays: dict[str, NDArray[Any]],
    storing: Storing,
    reading: Reading,
) -> tuple[float, Cache]:
    """A few chunks of these outputs, over and over; and the seconds to write a sample of them."""
    chunk = manifest.sample_layout.chunk
    batch = _batch_read(reading, manifest.sample_layout.sample_bytes)
    chunks = max(_CHUNKS_READ, math.ceil(_CHUNKS_READ * batch / chunk))
    layout = replace(
        manifest.sample_layout, samples=chunks * chunk, views=1, chunk=chunk, materialized=True
    )
    manifest = replace(manifest, layout=layout, sealed=True, files={})
    path = scratch / "cache"
    create_arrays(path, layout, manifest.precision)
    write_samples(path, _Numbered([str(number) for number in range(layout.samples)]))
    write_manifest(path, manifest)
    places = np.arange(chunk) % len(arrays["pooled"])
    full = {name: values[places] for name, values in arrays.items()}
    blocks = [Block(n, 0, span) for n, span in enumerate(even_ranges(layout.samples, chunk))]
    seconds, staged = _timed(
        lambda: stage_block(path, scratch, manifest, blocks[0], full, error=storing.error)
    )
    for block in blocks:
        for source, target in zip(staged.files, layout.chunk_files(block), strict=True):
            shutil.copyfile(staged.folder / source, path / target)
            fsync_file(path / target)
    return seconds / chunk, Cache(path)


def _batch_read(reading: Reading, sample_bytes: int) -> int:
    return max(1, min(reading.batch, _INPUT_BYTES // sample_bytes))


def _read_seconds(
    cache: Cache, reading: Reading, *, whole: int, before: Callable[[], None] | None = None
) -> float:
    """Seconds to read and decode a sample in shuffled batches, as a stage does."""
    held = len(cache.ids) * cache.item_bytes
    # What is kept of the whole dataset is kept here, and what is not is not.
    keeps_all = before is None and whole * cache.item_bytes <= reading.window
    least = max(cache.chunk_items * cache.item_bytes, cache.item_bytes * reading.batch)
    window = held if keeps_all else max(min(reading.window, held // 2), min(least, held - 1))
    batch = _batch_read(reading, cache.item_bytes)
    loader = Loader(cache, cache.ids, batch=batch, window=window, seed=0, stage=0)
    epochs = count()

    def epoch() -> None:
        for samples in loader.batches(next(epochs)):
            for rows in even_ranges(samples.rows, reading.rows or samples.rows):
                samples.read(rows)

    seconds, _ = _timed(epoch, before=before)
    return seconds / (loader.steps * batch)


def _timed(work: Callable[[], T], *, before: Callable[[], None] | None = None) -> tuple[float, T]:
    """The median seconds of several calls, and the last result; the first call only warms up."""
    result, taken = work(), list[float]()
    end = time.monotonic() + SECONDS
    while len(taken) < LEAST_CALLS or time.monotonic() < end:
        if before is not None:
            before()
        started = time.perf_counter()
        result = work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken), result


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
