"""Files that are whole or absent: write under a temporary name, fsync, then replace.

Presence of a file written here means that it is complete, also after a power cut.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from gim_stagewise.errors import StorageError

_STORAGE_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS, errno.EFBIG}


@contextmanager
def storage_errors(what: str) -> Iterator[None]:
    """Turn a disk that is full or failing into a `StorageError` that says what was written."""
    try:
        yield
    except StorageError:
        raise
    except OSError as error:
        if error.errno not in _STORAGE_ERRNOS:
            raise
        reason = os.strerror(error.errno or 0).lower()
        raise StorageError(
            f"{what}: {reason}; what was complete stays valid. "
            "Make space, then give the same command again"
        ) from error


def fsync_file(path: Path) -> None:
    """Flush a file's bytes to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# A directory can be opened read-only and flushed like a file; this makes renames in it durable.
fsync_directory = fsync_file


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
        temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")
        try:
            write(temporary)
            fsync_file(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        fsync_directory(path.parent)


def write_json(path: Path, content: Any) -> None:
    """Write ``content`` as JSON, atomically (see `write_atomic`)."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
