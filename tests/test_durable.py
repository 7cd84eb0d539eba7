"""Files are whole or absent, and a failing disk is called one."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from gim_stagewise.durable import storage_errors, write_atomic, write_json
from gim_stagewise.errors import GimStageError, StorageError


def half_then(error: BaseException) -> Callable[[Path], object]:
    """A writer that fails after half of its work."""

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise error

    return write


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def test_a_file_appears_whole_and_its_folder_is_made(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b" / "file.bin"
    write_atomic(path, lambda temporary: temporary.write_bytes(b"whole"))
    assert path.read_bytes() == b"whole"
    assert names(path.parent) == ["file.bin"]


def test_the_old_file_stands_until_the_new_one_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("new")
        assert path.read_text() == "old"

    write_atomic(path, write)
    assert path.read_text() == "new"
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize(
    "error", [ValueError("no"), OSError(errno.ENOSPC, "full"), KeyboardInterrupt()]
)
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, error: BaseException, existing: bool
) -> None:
    path = tmp_path / "file"
    if existing:
        path.write_text("old")
    with pytest.raises((type(error), StorageError)):
        write_atomic(path, half_then(error))
    assert names(tmp_path) == (["file"] if existing else [])
    assert not existing or path.read_text() == "old"


@pytest.mark.parametrize("code", ["ENOSPC", "EDQUOT", "EIO", "EROFS", "EFBIG"])
def test_a_failing_disk_is_a_storage_error_with_exit_code_4(tmp_path: Path, code: str) -> None:
    path = tmp_path / "weights.bin"
    number = getattr(errno, code)
    with pytest.raises(StorageError) as caught:
        write_atomic(path, half_then(OSError(number, "anything")))
    assert caught.value.exit_code == 4
    assert isinstance(caught.value, GimStageError)
    assert isinstance(caught.value, OSError)
    assert str(path) in str(caught.value)
    assert os.strerror(number).lower() in str(caught.value)


def test_a_disk_that_fails_within_a_library_is_one_too() -> None:
    failed = RuntimeError("unexpected position")
    failed.__context__ = OSError(errno.EIO, "failed")
    with pytest.raises(StorageError, match="input/output error"), storage_errors("a checkpoint"):
        raise failed
    with pytest.raises(RuntimeError, match="something else"), storage_errors("a file"):
        raise RuntimeError("something else")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_device_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no space left"):
        write_atomic(tmp_path / "file", lambda _: Path("/dev/full").write_bytes(b"x"))
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "no"), FileNotFoundError("gone")])
def test_other_os_errors_keep_their_type(error: OSError) -> None:
    with pytest.raises(type(error)) as caught, storage_errors("a file"):
        raise error
    assert caught.value is error


def test_a_storage_error_is_not_wrapped_again() -> None:
    inner = StorageError("inner")
    with pytest.raises(StorageError) as caught, storage_errors("outer"):
        raise inner
    assert caught.value is inner


def test_a_folder_in_the_way_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "file" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="file"):
        write_atomic(tmp_path / "file", lambda temporary: temporary.write_text("x"))
    assert names(tmp_path) == ["file"]


def test_bytes_are_flushed_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "file"
    flushed: list[tuple[str, bool]] = []
    real_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        flushed.append(("folder" if is_folder else "file", path.exists()))
        real_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(path, lambda temporary: temporary.write_text("x"))
    assert flushed == [("file", False), ("folder", True)]


def test_writers_at_once_leave_one_whole_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    texts = [str(n) * 50_000 for n in range(8)]

    def write(text: str) -> None:
        write_atomic(path, lambda temporary: temporary.write_text(text))

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, texts))
    assert path.read_text() in texts
    assert names(tmp_path) == ["file"]


def test_json_comes_back_as_it_was(tmp_path: Path) -> None:
    content = {"change": "0.001 → 0.002", "sizes": [1, 2], "none": None}
    write_json(tmp_path / "run.json", content)
    text = (tmp_path / "run.json").read_text(encoding="utf-8")
    assert json.loads(text) == content
    assert "→" in text
    assert text.endswith("\n")


def test_what_json_cannot_say_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_json(path, {"old": 1})
    with pytest.raises(TypeError):
        write_json(path, {"new": object()})
    assert json.loads(path.read_text()) == {"old": 1}
    assert names(tmp_path) == ["run.json"]
