"""What a power cut leaves: SIGKILL cannot show that something was not flushed, this can.

The operations of a run are watched, and with them what the disk is sure to have: bytes of files
that were flushed, and names in folders that were flushed. After every operation the power may go;
then the folder is what was flushed, or that and names whose bytes are not there. A run that goes on
from any such folder ends as if nothing had happened, and no cache in it claims what is not so.
"""

from __future__ import annotations

import hashlib
import os
import random
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers import assert_same_files, results_of, run_and_record, shorten

from gim_stagewise import durable
from gim_stagewise.cache import BuildFolder, Cache, find_damage, read_manifest
from gim_stagewise.errors import CacheNotFoundError, PartialCacheError
from gim_stagewise.progress import Silent

Tree = dict[str, bytes | None]
"""Files with their bytes, and folders, by path."""


class Disk:
    """Watches a folder: what of it is sure to survive.

    A file or folder is known by a number of its own, whatever its name; names are what folders
    say, and survive once the folder was flushed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.flushed: dict[int, bytes] = {}
        self.names: dict[int, dict[str, int]] = {}
        self.folders: set[int] = set()
        self.states: dict[str, tuple[str, Tree, int]] = {}
        self.operations = 0
        self.committed = -1  # blocks; the journal's first line is of none
        self._numbers: dict[int, int] = {}
        self._next = 0
        self._lock = threading.Lock()

    def __call__(self, when: str, name: str, path: Path) -> None:
        with self._lock:
            self._look()
            if when == "after" and name in ("fsync", "append"):
                self._flush(path)
            if when == "after" and path.name == "journal.jsonl":
                self.committed += name == "append"
            self.operations += 1
            for kind in ("flushed", "named"):
                tree = self._survives(kind)
                digest = hashlib.sha256(repr(sorted(tree.items())).encode()).hexdigest()
                self.states.setdefault(
                    digest, (f"{kind}, {when} {name} {path.name}", tree, self.committed)
                )

    def _look(self) -> None:
        """Give what is new a number; one that is used again by the system is new."""
        alive = {self.root.stat().st_ino}
        for folder, folders, files in os.walk(self.root):
            for name in (*folders, *files):
                try:
                    alive.add((Path(folder) / name).stat().st_ino)
                except FileNotFoundError:
                    continue
        self._numbers = {inode: n for inode, n in self._numbers.items() if inode in alive}
        for inode in alive - self._numbers.keys():
            self._next += 1
            self._numbers[inode] = self._next

    def _number(self, path: Path) -> int | None:
        try:
            return self._numbers.get(path.stat().st_ino)
        except FileNotFoundError:
            return None

    def _flush(self, path: Path) -> None:
        number = self._number(path)
        if number is None:
            return
        if not path.is_dir():
            self.flushed[number] = path.read_bytes()
            return
        entries = {child.name: self._number(child) for child in path.iterdir()}
        self.names[number] = {name: n for name, n in entries.items() if n is not None}
        self.folders |= {n for c in path.iterdir() if c.is_dir() and (n := self._number(c))}

    def _survives(self, kind: str) -> Tree:
        """Only what was flushed; or all names, with half of the bytes that were not."""
        tree: Tree = {}
        if kind == "flushed":
            self._flushed_below(self._number(self.root) or 0, "", tree)
            return tree
        for path in sorted(self.root.rglob("*")):
            name = path.relative_to(self.root).as_posix()
            if path.is_dir():
                tree[name] = None
            elif (number := self._number(path)) is not None:
                try:
                    content = path.read_bytes()
                except FileNotFoundError:
                    continue
                tree[name] = self.flushed.get(number, content[: len(content) // 2])
        return tree

    def _flushed_below(self, folder: int, prefix: str, tree: Tree) -> None:
        for name, number in self.names.get(folder, {}).items():
            if number in self.folders:
                tree[prefix + name] = None
                self._flushed_below(number, f"{prefix}{name}/", tree)
            else:
                tree[prefix + name] = self.flushed.get(number, b"")


def restore(tree: Tree, folder: Path) -> None:
    folder.mkdir()
    for name, content in tree.items():
        if content is None:
            (folder / name).mkdir(parents=True, exist_ok=True)
        else:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)


@pytest.fixture
def small(tiny: Path) -> Path:
    """One module, two training steps, two blocks."""
    return shorten(tiny, modules=1, batch=18, epochs=1, chunk=26, probe=False)


PARTS = 4


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, PARTS))]
)
def test_a_power_cut_after_any_operation_loses_no_truth(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, part: int
) -> None:
    run_and_record(small, tmp_path / "undisturbed")
    (tmp_path / "watched").mkdir()
    disk = Disk(tmp_path / "watched")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "observers", [disk])
        run_and_record(small, tmp_path / "watched")
    assert disk.operations > 100
    assert len(disk.states) > 40
    content = read_manifest(tmp_path / "undisturbed" / "m1.zarr").content
    states = list(enumerate(disk.states.values()))
    # Every operation gives a state of either kind, so that a fixed step would leave one kind out.
    random.Random(0).shuffle(states)
    chosen = states[part::PARTS]
    assert {when.partition(",")[0] for _, (when, _, _) in chosen} == {"flushed", "named"}
    for number, (when, tree, committed) in chosen:
        folder = tmp_path / str(number)
        restore(tree, folder)
        if not claims_nothing_false(folder / "m1.zarr", when):
            done, _ = BuildFolder(folder / "m1.zarr").done_blocks(content)
            assert done >= committed, f"{when}: a block that was done was forgotten"
        run_and_record(small, folder)
        assert_same_files(folder, tmp_path / "undisturbed")
        assert results_of(folder) == results_of(tmp_path / "undisturbed"), when


def claims_nothing_false(path: Path, when: str) -> bool:
    """What is sealed is whole; returns whether it is sealed."""
    try:
        Cache(path)
    except (CacheNotFoundError, PartialCacheError):
        return False
    assert find_damage(path, Silent()) == [], when
    return True


def test_a_missing_flush_would_be_noticed(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same, with a writer that does not flush chunk files."""
    flush: Callable[[Path], None] = durable.fsync_file

    def careless(path: Path) -> None:
        if not path.name.startswith("c."):
            flush(path)

    monkeypatch.setattr("gim_stagewise.cache.writer.fsync_file", careless)
    (tmp_path / "watched").mkdir()
    disk = Disk(tmp_path / "watched")
    with monkeypatch.context() as patch:
        patch.setattr(durable, "observers", [disk])
        run_and_record(small, tmp_path / "watched")
    wrong = 0
    for number, (when, tree, _) in enumerate(disk.states.values()):
        folder = tmp_path / str(number)
        restore(tree, folder)
        try:
            claims_nothing_false(folder / "m1.zarr", when)
        except AssertionError:
            wrong += 1
    assert wrong > 0
