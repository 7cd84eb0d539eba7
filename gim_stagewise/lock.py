"""One run at a time in a folder.

The lock is held by the operating system for as long as the process lives, so one that was left
by a dead process of this host holds nobody up; the file says who holds it. Not every shared file
system tells other hosts of a lock: a file that names another host is believed until somebody says
that it is wrong.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime
from pathlib import Path

from gim_stagewise.errors import ConfigError, FolderInUseError, StorageError

# Folders that this process holds, and which thread does: a run locks its folder once, and the
# stages within it find it locked by themselves.
_held: dict[Path, int] = {}
_guard = threading.Lock()
_others_ignored = ContextVar("others_ignored", default=False)


def ignore_other_hosts() -> None:
    """Take locks that files say other hosts have; what runs on this host is never ignored."""
    _others_ignored.set(True)


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs; within the thread that holds it, do nothing.

    Raises
    ------
    FolderInUseError
        If another run is working there; it is named by host, process id and start.
    """
    folder = folder.absolute()
    me = threading.get_ident()
    with _guard:
        if _held.get(folder) == me:
            nested = True
        elif folder in _held:
            raise FolderInUseError(f"{folder} is in use by another thread of this process")
        else:
            nested = False
            _held[folder] = me
    if nested:
        yield
        return
    try:
        with _locked_file(folder):
            yield
    finally:
        with _guard:
            del _held[folder]


def is_in_use(folder: Path) -> bool:
    """Whether somebody holds a folder now."""
    with _guard:
        if folder.absolute() in _held:
            return True
    try:
        with exclusive(folder):
            return False
    except FolderInUseError:
        return True


@contextmanager
def _locked_file(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (NotADirectoryError, FileExistsError):
        raise ConfigError(
            f"is {str(folder)!r}, which cannot be a folder: a file is in the way", key="--dir"
        ) from None
    descriptor = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(
                f"{folder} is in use by {_holder(descriptor)}; wait for it, or choose another --dir"
            ) from None
        if not _others_ignored.get() and _host(descriptor) not in (None, socket.gethostname()):
            raise FolderInUseError(
                f"{folder} is locked by {_holder(descriptor)}; whether that still runs cannot be "
                "seen from here. If it does not, give the same command with --break-lock"
            )
        about = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        os.ftruncate(descriptor, 0)
        try:
            os.pwrite(descriptor, json.dumps(about).encode(), 0)
        except OSError as error:
            raise StorageError(
                f"{folder / '.lock'}: {(error.strerror or '').lower()}; what was complete stays "
                "valid. Make space, then give the same command again"
            ) from None
        try:
            yield
        finally:
            os.ftruncate(descriptor, 0)
    finally:
        os.close(descriptor)  # and with it goes the lock


def _host(descriptor: int) -> str | None:
    try:
        return str(json.loads(os.pread(descriptor, 1000, 0))["host"])
    except (ValueError, KeyError, TypeError):
        return None


def _holder(descriptor: int) -> str:
    try:
        about = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {about['pid']} on {about['host']} since {about['since']}"
    except (ValueError, KeyError, TypeError):
        return "another run"
