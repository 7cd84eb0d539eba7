"""Compute again what is damaged in a sealed cache, and nothing else."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import zarr

from gim_stagewise.cache import (
    Block,
    Damage,
    Manifest,
    block_digests,
    create_arrays,
    files_digest,
    read_manifest,
    sealed_digests,
    write_checksums,
    write_samples,
)
from gim_stagewise.durable import (
    aside,
    flush_tree,
    fsync_directory,
    remove,
    rename,
    storage_errors,
)
from gim_stagewise.errors import CorruptCacheError, StaleCacheError
from gim_stagewise.lock import exclusive
from gim_stagewise.stage import identity
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.lanes import block_stager
from gim_stagewise.stage.outputs import StageOutputs


def repair(outputs: StageOutputs, weights: FrozenWeights, damage: list[Damage]) -> None:
    """Replace what is damaged by what was sealed, bit for bit.

    Parameters
    ----------
    outputs : StageOutputs
        Of the cache's module.
    weights : FrozenWeights
        The module's.
    damage : list of Damage
        See `gim_stagewise.cache.find_damage`.

    Raises
    ------
    StaleCacheError
        If the cache is of other weights, data or settings than there are, or this process computes
        other bits than those that were sealed.
    CorruptCacheError
        If what was computed is not what was sealed. Nothing was replaced by it, but for blocks
        that were damaged together with the checksums.
    StorageError
        If the disk is full or failing.
    """
    space = outputs.workspace
    path = space.cache_path(outputs.index).absolute()
    manifest = read_manifest(path)
    wanted = outputs.manifest(weights)
    changes = identity.cache_differences(manifest, wanted.recipe, wanted.content)
    if changes:
        raise StaleCacheError(
            f"{path} belongs to something else than what is here ({'; '.join(changes)}): it cannot "
            f"be repaired from it. {_rebuild(outputs)}"
        )
    staging = aside(path, "repair")
    with exclusive(space.folder), storage_errors(f"repairing {path}"):
        staging.mkdir()
        try:
            _Repair(outputs, weights, path, manifest, staging).run(damage)
        finally:
            remove(staging)


def _rebuild(outputs: StageOutputs) -> str:
    return (
        f"Build it anew with `gim-stage extract --module {outputs.index} --force` and the same "
        "input or pipeline"
    )


class _Repair:
    def __init__(
        self,
        outputs: StageOutputs,
        weights: FrozenWeights,
        path: Path,
        manifest: Manifest,
        staging: Path,
    ) -> None:
        self.outputs = outputs
        self.weights = weights
        self.path = path
        self.manifest = manifest
        self.staging = staging

    def run(self, damage: list[Damage]) -> None:
        files = [one.file for one in damage if one.block is None]
        self._small([name for name in files if not name.startswith("checksums")])
        blocks = {one.block.index: one.block for one in damage if one.block is not None}
        known = not any(name.startswith("checksums") for name in files)
        count = len(self.manifest.layout.blocks(self.outputs.source))
        digests = sealed_digests(self.path, self.manifest, count) if known else None
        if blocks:
            self._blocks(list(blocks.values()), digests)
        if not known:
            self._checksums([name for name in files if name.startswith("checksums")])

    def _small(self, names: list[str]) -> None:
        """Metadata, ids, splits and labels, which follow from the layout and the input."""
        if not names:
            return
        new = self.staging / "new"
        create_arrays(new, self.manifest.layout, self.manifest.precision)
        write_samples(new, self.outputs.source)
        zarr.open_group(str(new), mode="r+").require_group("checksums")
        self._replace(new, names)

    def _checksums(self, names: list[str]) -> None:
        new = self.staging / "checksums-of"
        zarr.open_group(str(new), mode="w", zarr_format=3)
        blocks = self.manifest.layout.blocks(self.outputs.source)
        digests = [block_digests(self.path, self.manifest.layout, block) for block in blocks]
        write_checksums(new, self.path, self.manifest.layout, blocks, digests)
        self._replace(new, names)

    def _replace(self, new: Path, names: list[str]) -> None:
        for name in names:
            file = new / name
            known = file.is_file() and not file.is_symlink()
            if not known or files_digest(new, [name]) != self.manifest.files[name]:
                raise CorruptCacheError(
                    f"{self.path}: {name} is damaged, and what would replace it is not what was "
                    f"sealed. {_rebuild(self.outputs)}"
                )
        flush_tree(new)
        for name in names:
            target = self._target(name)
            rename(new / name, target)
            fsync_directory(target.parent)
            fsync_directory(target.parent.parent)

    def _target(self, name: str) -> Path:
        """Where a file of the cache goes: in folders of the cache alone, in nobody's way.

        Raises
        ------
        CorruptCacheError
            If a link leads elsewhere, or a folder has the file's name.
        """
        target = self.path / name
        folders = [folder for folder in target.parents if folder.is_relative_to(self.path)]
        for folder in reversed(folders):
            if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
                raise CorruptCacheError(
                    f"{folder} is no folder of a cache but a link or a file; remove it, and give "
                    "the same command again"
                )
            folder.mkdir(exist_ok=True)
        if target.is_dir() and not target.is_symlink():
            raise CorruptCacheError(
                f"{target} is a folder where a file belongs; remove it, and give the same command "
                "again"
            )
        return target

    def _blocks(self, blocks: list[Block], digests: list[dict[str, str]] | None) -> None:
        outputs, staging = self.outputs, self.staging / "blocks"
        staging.mkdir()
        # As it was sealed, so that the worker refuses to compute under other numerics.
        unsealed = replace(self.manifest, sealed=False)
        job = outputs.block_job(self.weights, unsealed, staging)
        try:
            stage = block_stager(job.open(outputs.source))
        except StaleCacheError as error:
            raise StaleCacheError(f"{error}. {_rebuild(outputs)}") from None
        label = f"module {outputs.index}: repair"
        with outputs.workspace.progress.task(label, total=len(blocks), unit="block") as task:
            for block in blocks:
                staged = stage(block)
                if digests is not None and staged.sha256 != digests[block.index]:
                    raise CorruptCacheError(
                        f"{self.path}: block {block.index} was computed again, and is not what was "
                        f"sealed: its input has changed. {_rebuild(outputs)}"
                    )
                folders = set()
                for file in staged.files:
                    target = self._target(file)
                    rename(staged.folder / file, target)
                    folders.add(target.parent)
                for folder in sorted(folders):
                    fsync_directory(folder)
                task.advance()
