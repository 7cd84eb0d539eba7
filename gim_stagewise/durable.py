"""Files that are whole or absent: write under a temporary name, fsync, then replace.

Presence of a file written here means that it is complete, also after a power cut.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gim_stagewise.errors import CorruptCacheError, StorageError

_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a disk that is full or failing into a `StorageError` that says what was written."""
    try:
        yield
    except StorageError:
        raise
    except (OSError, RuntimeError) as error:
        number = _number_of(error)
        if number not in _STORAGE_ERRNOS:
            raise
        reason = os.strerror(number or 0).lower()
        raise StorageError(
            f"{what}: {reason}; what was complete stays valid. "
            "Make space, then give the same command again"
        ) from error


def _number_of(error: BaseException | None) -> int | None:
    """The system's error number behind an error; None if there is none.

    Where PyTorch fails to write, it fails again when it cleans up after that.
    """
    if error is None:
        return None
    if isinstance(error, OSError):
        return error.errno
    return _number_of(error.__context__)


# Called before and after every operation below, with "before" or "after", its name and its path:
# a crash can fall between any two of them, and tests make it do so.
observers: list[Callable[[str, str, Path], None]] = []


@contextmanager
def operation(name: str, path: Path) -> Iterator[None]:
    """Tell the observers of something that changes the disk."""
    for observer in observers:
        observer("before", name, path)
    yield
    for observer in observers:
        observer("after", name, path)


def fsync_file(path: Path) -> None:
    """Flush a file's bytes to the device."""
    with operation("fsync", path):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# A directory can be opened read-only and flushed like a file; this makes renames in it durable.
fsync_directory = fsync_file


def rename(source: Path, target: Path) -> None:
    """Move a file or folder within a file system, in place of what is there."""
    with operation("rename", target):
        source.replace(target)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file, and flush it."""
    with operation("append", path), path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, if it is there."""
    with operation("remove", path):
        if not path.is_dir() or path.is_symlink():
            path.unlink(missing_ok=True)
            return
        try:
            shutil.rmtree(path)
        except FileNotFoundError:  # a worker that was lost is cleaning up as well
            shutil.rmtree(path, ignore_errors=True)


def token() -> str:
    """Of a temporary name: nothing else in a folder is called so (see `leftovers`)."""
    return uuid.uuid4().hex[:8]


def aside(path: Path, purpose: str) -> Path:
    """A name beside ``path`` that nobody else uses, for "trash" or "repair"."""
    return path.with_name(f".{path.name.lstrip('.')}.{purpose}-{token()}")


def discard(path: Path) -> None:
    """Remove a file or folder, under another name first: nothing half-removed keeps its own.

    Nor can a worker of a killed run add to it meanwhile.
    """
    trash = aside(path, "trash")
    rename(path, trash)
    remove(trash)


# What operations that were killed leave behind, and where below a run's folder they work. A run may
# lie in a folder of the user's, with hidden files of theirs, so names are matched in full.
_TEMPORARY = re.compile(r"\..+\.([0-9a-f]{8}\.tmp|(trash|repair)-[0-9a-f]{8})")
_PLACES = (".*", "checkpoints/.*", "logs/m*/.*", "m*.zarr/.*")


def leftovers(folder: Path) -> list[Path]:
    """Files and folders that an operation left when it was killed in a run's folder."""
    found = (path for place in _PLACES for path in folder.glob(place))
    return sorted(path for path in found if _TEMPORARY.fullmatch(path.name))


def sweep(folder: Path) -> None:
    """Remove what operations left; for the one who holds the folder (see `lock.exclusive`)."""
    for path in leftovers(folder):
        remove(path)


def flush_tree(root: Path) -> None:
    """Flush every file and folder below ``root``."""
    for folder, _, files in os.walk(root, topdown=False):
        for file in files:
            fsync_file(Path(folder) / file)
        fsync_directory(Path(folder))


def write_atomic(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a temporary file, then put it in place of ``path``.

    Parameters
    ----------
    path : Path
        Where the file shall be; its folder is made if needed.
    write : callable
        Gets the temporary path and writes the whole file there.

    Raises
    ------
    StorageError
        If the disk is full or failing. The temporary file is gone, ``path`` is untouched.
    """
    with storage_errors(str(path)):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{token()}.tmp")
        try:
            with operation("write", temporary):
                write(temporary)
            fsync_file(temporary)
            rename(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(path.parent)


def json_checksum(content: dict[str, Any]) -> str:
    """Hash of JSON content, whatever the order of its keys; "checksum" itself is left out."""
    own = {key: value for key, value in content.items() if key != "checksum"}
    text = json.dumps(own, sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically (see `write_atomic`)."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_checked_json(path: Path) -> dict[str, Any]:
    """Read JSON that carries its own checksum (see `json_checksum`).

    Raises
    ------
    CorruptCacheError
        If it was altered or damaged.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        intact = content["checksum"] == json_checksum(content)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CorruptCacheError(f"{path} is damaged ({type(error).__name__}: {error})") from None
    if not intact:
        raise CorruptCacheError(f"{path} does not match its checksum: it was altered or damaged")
    return content
