"""Whether every byte of a sealed cache is what was sealed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache.columns import read_checksums, read_numbers, read_strings
from gim_stagewise.cache.digests import files_digest
from gim_stagewise.cache.frames import FrameError, TornFrameError, read_chunk_file
from gim_stagewise.cache.layout import Block, CacheLayout
from gim_stagewise.cache.manifest import Manifest, read_manifest
from gim_stagewise.cache.precision import PLAIN, Precision
from gim_stagewise.cache.tiles import TiledLayout
from gim_stagewise.errors import CorruptCacheError, PartialCacheError
from gim_stagewise.processes import usable_cores
from gim_stagewise.progress import Progress
from gim_stagewise.sources import SPLITS, Split

Kind = Literal["missing", "torn", "altered", "non-finite"]
# Each holds one chunk, so that memory stays bounded.
_MOST_THREADS = 8
# Blocks that are looked for on the word of the layout alone, which might be anyone's.
_MOST_UNCONFIRMED = 1_000_000


@dataclass(frozen=True)
class Damage:
    """Something in a sealed cache that is not what was sealed.

    Parameters
    ----------
    file : str
        Path below the cache, with forward slashes.
    kind : str
        *missing*: it is not there. *torn*: it is cut off. *altered*: its bytes are others.
        *non-finite*: its values are NaN or infinite.
    what : str
        For people.
    block : Block or None
        The block it belongs to, if it is a chunk.
    """

    file: str
    kind: Kind
    what: str
    block: Block | None = None


class _StoredSamples:
    """Ids and splits as a cache has them on disk, whether they can be believed or not."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.ids: Sequence[str] = []
        self._mask: NDArray[Any] | None = None
        if manifest.layout.views > 1:
            self.ids = [str(number) for number in range(manifest.layout.samples)]
            self._mask = read_numbers(path / "splits", (manifest.layout.samples,), "uint8")

    def split(self, name: Split) -> list[str]:
        """Numbers of the samples of a split."""
        if self._mask is None:
            return []
        chosen = np.flatnonzero(self._mask & (1 << SPLITS.index(name)))
        return [str(number) for number in chosen]


def find_damage(path: Path, progress: Progress) -> list[Damage]:
    """Check all files of a sealed cache, several blocks at a time.

    Parameters
    ----------
    path : Path
    progress : Progress

    Returns
    -------
    list of Damage
        All there is, in storage order; empty if the cache is what was sealed.

    Raises
    ------
    CacheNotFoundError, CorruptCacheError
        If there is no manifest that can be read: nothing can be compared with anything then.
    PartialCacheError
        If it was never sealed.
    """
    manifest = read_manifest(path)
    if not manifest.sealed:
        raise PartialCacheError(f"{path} was never sealed: there is nothing to compare it with")
    found = _small_files(path, manifest)
    broken = {damage.file.split("/")[0] for damage in found}
    if not _confirmed(path, manifest, broken):
        return found
    blocks = manifest.layout.blocks(_StoredSamples(path, manifest))
    recorded = None if "checksums" in broken else sealed_digests(path, manifest, len(blocks))
    with (
        progress.task(f"verify {path.name}", total=len(blocks), unit="block") as task,
        ThreadPoolExecutor(min(_MOST_THREADS, usable_cores()), "verify") as executor,
    ):

        def check(block: Block) -> list[Damage]:
            return _block(path, manifest, block, recorded[block.index] if recorded else None)

        parts = []
        for part in executor.map(check, blocks):
            parts.append(part)
            task.advance()
    return [*found, *chain.from_iterable(parts)]


def visible_damage(path: Path, manifest: Manifest, blocks: Sequence[Block]) -> list[Damage]:
    """What is wrong with a sealed cache that can be seen without reading its chunks.

    Parameters
    ----------
    path : Path
    manifest : Manifest
    blocks : sequence of Block
        Those that it should have.
    """
    return _small_files(path, manifest) + [
        Damage(file, "missing", "is missing", block)
        for block in blocks
        for file in manifest.layout.chunk_files(block)
        if not (path / file).is_file()
    ]


def stored_blocks(path: Path, manifest: Manifest) -> list[Block]:
    """The blocks that a sealed cache should have.

    Raises
    ------
    CorruptCacheError
        If its ids or splits are not what the layout claims, so that nobody can say.
    """
    try:
        read_strings(path / "ids", manifest.layout.samples)
        if isinstance(manifest.layout, TiledLayout):
            sealed_digests(path, manifest, manifest.layout.block_count)
        return manifest.layout.blocks(_StoredSamples(path, manifest))
    except (FileNotFoundError, ValueError) as error:
        raise CorruptCacheError(f"{path}: ids or splits cannot be used ({error})") from None


def _confirmed(path: Path, manifest: Manifest, broken: set[str]) -> bool:
    """Whether it can be known which blocks there should be, whatever the layout claims.

    Raises
    ------
    CorruptCacheError
        If the layout claims more or fewer samples than there are.
    """
    if "splits" in broken and manifest.layout.views > 1:
        return False
    if "ids" not in broken:
        try:
            read_strings(path / "ids", manifest.layout.samples)
        except (FileNotFoundError, ValueError) as error:
            raise CorruptCacheError(f"{path}: ids {error}") from None
        if isinstance(manifest.layout, CacheLayout):
            return True
    blocks = manifest.layout.block_count
    if "checksums" not in broken and manifest.layout.views == 1:
        sealed_digests(path, manifest, blocks)
        return True
    return blocks <= _MOST_UNCONFIRMED


def sealed_digests(path: Path, manifest: Manifest, blocks: int) -> list[dict[str, str]]:
    """SHA-256 of every block's files, by array, as they were sealed.

    Raises
    ------
    CorruptCacheError
        If there are not so many.
    """
    columns = {}
    for name in manifest.layout.kinds:
        try:
            rows, _ = read_checksums(path, name)
            _check_count(len(rows), blocks)
        except (FileNotFoundError, ValueError) as error:
            raise CorruptCacheError(f"{path}: checksums/{name} cannot be read ({error})") from None
        columns[name] = [bytes(row).hex() for row in rows]
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _check_count(found: int, blocks: int) -> None:
    if found != blocks:
        raise ValueError(f"is of {found} blocks, not {blocks}")


def _small_files(path: Path, manifest: Manifest) -> list[Damage]:
    """What is wrong with the files that are neither chunks nor the manifest."""
    return [
        damage for name, digest in manifest.files.items() if (damage := _file(path, name, digest))
    ]


def _file(path: Path, name: str, digest: str) -> Damage | None:
    try:
        found = files_digest(path, [name])
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return Damage(name, "missing", "is missing")
    if found != digest:
        return Damage(name, "altered", "is not what was sealed")
    return None


def _block(
    path: Path, manifest: Manifest, block: Block, recorded: dict[str, str] | None
) -> list[Damage]:
    """What is wrong with a block's files."""
    found: list[Damage] = []
    for name, part in manifest.layout.parts(block).items():
        precision = manifest.precision if name == "activations" else PLAIN
        own = [
            damage
            for file, inside in zip(part.files, part.inside, strict=True)
            if (damage := _chunk(path, manifest, block, file, inside, precision))
        ]
        if not own and recorded and files_digest(path, list(part.files)) != recorded[name]:
            what = "is whole, but not what was sealed"
            own = [Damage(file, "altered", what, block) for file in part.files]
        found += own
    return found


def _chunk(
    path: Path,
    manifest: Manifest,
    block: Block,
    file: str,
    inside: tuple[int | slice, ...],
    precision: Precision,
) -> Damage | None:
    if (path / file).exists() and not (path / file).is_file():
        return Damage(file, "altered", "is no file", block)
    try:
        values = read_chunk_file(path, manifest.layout, file)
    except (FileNotFoundError, NotADirectoryError):
        return Damage(file, "missing", "is missing", block)
    except TornFrameError as error:
        return Damage(file, "torn", str(error), block)
    except (FrameError, RuntimeError) as error:
        return Damage(file, "altered", str(error), block)
    if not np.isfinite(precision.decode_array(values[inside], space=manifest.layout.space)).all():
        return Damage(file, "non-finite", "has values that are NaN or infinite", block)
    return None
