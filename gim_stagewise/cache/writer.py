"""Writing a cache so that it is never wrong about itself.

A block is written into staging and flushed (`stage_block`, which any process may run); then the
coordinator alone moves its files into place, flushes the folders and records the block in the
journal (`CacheWriter.commit`); the seal comes last. Whatever is killed whenever, a block that is
in the journal is whole, and a cache that is sealed has all its blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray

from gim_stagewise.cache.columns import write_checksums, write_samples
from gim_stagewise.cache.create import create_arrays, padding
from gim_stagewise.cache.digests import files_digest
from gim_stagewise.cache.frames import write_frame
from gim_stagewise.cache.journal import BuildFolder
from gim_stagewise.cache.layout import Block, BlockPart
from gim_stagewise.cache.manifest import (
    Manifest,
    file_digests,
    read_manifest,
    write_manifest,
)
from gim_stagewise.cache.precision_error import PrecisionError
from gim_stagewise.cache.removal import discard_cache
from gim_stagewise.cache.tiles import Layout
from gim_stagewise.durable import (
    flush_tree,
    fsync_directory,
    fsync_file,
    operation,
    remove,
    rename,
    storage_errors,
    token,
)
from gim_stagewise.errors import CacheNotFoundError, CorruptCacheError
from gim_stagewise.sources import Source


@dataclass(frozen=True)
class StagedBlock:
    """A block's files, complete and flushed, still in the staging area.

    ``sha256`` has a hash for each array. With the files lies ``error.npy`` where something is lost
    (see `PrecisionError`).
    """

    block: Block
    folder: Path
    files: tuple[str, ...]
    sha256: dict[str, str]


def stage_block(
    cache: Path,
    staging: Path,
    manifest: Manifest,
    block: Block,
    arrays: Mapping[str, NDArray[Any]],
    error: PrecisionError | None = None,
) -> StagedBlock:
    """Write a block's arrays into a staging folder and flush them.

    Parameters
    ----------
    cache : Path
        The cache that is being built, for messages.
    staging : Path
        The staging folder of this run.
    manifest : Manifest
    block : Block
    arrays : mapping
        "activations" in their stored form and "pooled" in float32, each [sample, ...] for the
        block's samples; what the layout does not store is left out.
    error : PrecisionError, optional
        What storing does to the values; needed where the precision is not lossless.

    Raises
    ------
    StorageError
        If the disk is full or failing; the block's staging folder is removed.
    """
    # Of its own for each attempt: a block whose worker was lost is computed again by another.
    folder = staging / f"block-{block.index}-{token()}"
    parts = manifest.layout.parts(block)
    files = manifest.layout.chunk_files(block)
    with storage_errors(f"writing block {block.index} of {cache}"):
        try:
            with operation("mkdir", folder):
                folder.mkdir()  # not its parent: if that is gone, another took over
            for name, part in parts.items():
                own = folder
                for step in Path(part.array).parts:
                    own /= step
                    own.mkdir(exist_ok=True)
                with operation("write", own):
                    _write_part(folder, manifest, name, part, arrays[name])
            if error is not None:
                with operation("write", folder / "error.npy"):
                    error.save(folder / "error.npy")
                fsync_file(folder / "error.npy")
            for file in files:
                fsync_file(folder / file)
            sha256 = block_digests(folder, manifest.layout, block)
        except BaseException:
            remove(folder)
            raise
    return StagedBlock(block, folder, tuple(files), sha256)


def _write_part(
    folder: Path, manifest: Manifest, kind: str, part: BlockPart, values: NDArray[Any]
) -> None:
    """Write the chunk files that hold a block's values in one array."""
    layout = manifest.layout
    array = layout.arrays[part.array]
    nothing = np.asarray(padding(kind, manifest.precision), array.dtype)
    for file, inside, of_file in zip(part.files, part.inside, part.values, strict=True):
        own, chunk = values[of_file], np.broadcast_to(nothing, array.chunks)
        room = chunk[inside].shape
        if own.dtype != chunk.dtype or own.shape != room:
            raise ValueError(
                f"{part.array} takes {chunk.dtype} {room} here, got {own.dtype} {own.shape}"
            )
        if own.size == chunk.size:
            chunk = own
        else:
            chunk = chunk.copy()
            chunk[inside] = own
        write_frame(folder / file, chunk, layout.codec)


class CacheWriter:
    """Coordinates the building of one cache, new or resumed.

    Parameters
    ----------
    path : Path
        Where the cache shall be. What lies there is kept if it is an unfinished build of the
        same content, and replaced otherwise.
    manifest : Manifest
        Unsealed.
    source : Source
        The input, for ids, splits and labels.
    """

    def __init__(self, path: Path, manifest: Manifest, source: Source) -> None:
        self.path = path
        self.manifest = manifest
        self._build = BuildFolder(path)
        for leftover in path.glob(".*.tmp"):
            remove(leftover)  # of a seal that was killed: no file of the cache
        self._blocks = manifest.layout.blocks(source)
        with storage_errors(str(path)):
            resumed = self._build.resume(manifest.content) if self._is_ours() else None
            if resumed is None or not self._metadata_intact(resumed[0], source):
                discard_cache(path)
                self.staging = self._build.start(manifest.content, len(self._blocks))
                self._done: dict[int, dict[str, str]] = {}
                try:
                    self._create(source)
                except BaseException:
                    self.abandon()
                    raise
            else:
                self.staging, recorded = resumed
                self._done = {
                    block.index: recorded[block.index]
                    for block in self._blocks
                    if block.index in recorded and self._intact(block, recorded[block.index])
                }

    @property
    def _has_errors(self) -> bool:
        """Whether something is lost, so that it has to be known how much."""
        return self.manifest.layout.materialized and not self.manifest.precision.lossless

    def _is_ours(self) -> bool:
        try:
            found = read_manifest(self.path)
        except (CacheNotFoundError, CorruptCacheError):
            return False
        same = found.content.value == self.manifest.content.value
        return not found.sealed and same and found.layout == self.manifest.layout

    def _intact(self, block: Block, sha256: dict[str, str]) -> bool:
        """Whether a recorded block's files are still those that were recorded."""
        try:
            if self._has_errors:
                PrecisionError.load(self._build.error_path(block))
            return block_digests(self.path, self.manifest.layout, block) == sha256
        except (FileNotFoundError, ValueError):
            return False

    def _create(self, source: Source) -> None:
        # Built aside and moved into place whole: a folder at `path` always has its metadata.
        new = self.staging / "new"
        self._write_metadata(new, source)
        write_manifest(new, self.manifest)
        flush_tree(new)
        rename(new, self.path)
        fsync_directory(self.path.parent)

    def _write_metadata(self, folder: Path, source: Source) -> None:
        with operation("write", folder):
            create_arrays(folder, self.manifest.layout, self.manifest.precision)
        with operation("write", folder / "ids"):
            write_samples(folder, source)

    def _metadata_intact(self, staging: Path, source: Source) -> bool:
        """Whether an unfinished build has what it began with: the seal would vouch for it."""
        expected = staging / "expected"
        self._write_metadata(expected, source)
        files = [file for file in expected.rglob("*") if file.is_file()]
        own = (file for file in files if file != expected / "zarr.json")  # has its own checksum
        same = all(_same_bytes(file, self.path / file.relative_to(expected)) for file in own)
        remove(expected)
        return same

    @property
    def pending(self) -> list[Block]:
        """Blocks that are still to be written."""
        return [block for block in self._blocks if block.index not in self._done]

    @property
    def blocks(self) -> list[Block]:
        return self._blocks

    def commit(self, staged: StagedBlock) -> None:
        """Move a staged block into place and record it; after this it survives anything.

        Raises
        ------
        CorruptCacheError
            If another run has taken this build over.
        """
        if not self.staging.is_dir():
            raise CorruptCacheError(f"another run has begun to build {self.path}; this one ends")
        with storage_errors(f"committing block {staged.block.index} of {self.path}"):
            for file in staged.files:
                rename(staged.folder / file, self.path / file)
            folders = {(self.path / file).parent for file in staged.files}
            if self._has_errors:
                kept = self._build.error_path(staged.block)
                rename(staged.folder / "error.npy", kept)
                folders.add(kept.parent)
            for folder in sorted(folders):
                fsync_directory(folder)
            self._build.record(staged.block, staged.sha256)
            remove(staged.folder)
        self._done[staged.block.index] = staged.sha256

    def _write_checksums(self) -> None:
        """Put the blocks' hashes beside the arrays."""
        aside = self.staging / "seal"
        with operation("write", aside):
            zarr.open_group(str(aside), mode="w", zarr_format=3)
            done = [self._done[block.index] for block in self._blocks]
            write_checksums(aside, self.path, self.manifest.layout, self._blocks, done)
        flush_tree(aside)
        remove(self.path / "checksums")
        rename(aside / "checksums", self.path / "checksums")
        fsync_directory(self.path)

    def abandon(self) -> None:
        """Remove what is staged; blocks that are done stay."""
        with suppress(OSError):  # a disk that fails now has failed already
            remove(self.staging)

    def error(self) -> PrecisionError | None:
        """What storing did to the values of all blocks that are done; None if nothing."""
        done = [block for block in self._blocks if block.index in self._done]
        if not self._has_errors or not done:
            return None
        # Added up in one order, so that the last bit does not depend on who was first.
        first, *others = (PrecisionError.load(self._build.error_path(block)) for block in done)
        return sum(others, start=first)

    def seal(self) -> Manifest:
        """Declare the cache complete.

        Raises
        ------
        RuntimeError
            If blocks are missing: a defect of the caller.
        """
        if self.pending:
            raise RuntimeError(f"{len(self.pending)} blocks of {self.path} are not written yet")
        with storage_errors(f"sealing {self.path}"):
            self._write_checksums()
            error = self.error()
            sealed = replace(
                self.manifest,
                sealed=True,
                error=error.as_json() if error else None,
                files=file_digests(self.path, self.manifest.layout),
            )
            write_manifest(self.path, sealed)
        self._build.remove()
        return sealed


def _same_bytes(one: Path, other: Path) -> bool:
    return other.is_file() and one.read_bytes() == other.read_bytes()


def block_digests(folder: Path, layout: Layout, block: Block) -> dict[str, str]:
    """SHA-256 of a block's files, by array; errors as of `files_digest`."""
    return {
        name: files_digest(folder, list(part.files)) for name, part in layout.parts(block).items()
    }
