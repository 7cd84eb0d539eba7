"""A disk that is full or failing ends a run with exit code 4, and nothing that was done is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from helpers import assert_same_files, edit, files_of, run_and_record, shorten

from gim_stagewise import durable
from gim_stagewise.cache import BuildFolder, Cache, find_damage, read_manifest
from gim_stagewise.errors import CacheNotFoundError, PartialCacheError, StorageError
from gim_stagewise.progress import Silent

CODES = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


class Full:
    """From the n-th operation on the disk takes nothing more; removing still works."""

    def __init__(self, number: int, code: int) -> None:
        self.left = number
        self.code = code
        self.reached = False
        self._lock = threading.Lock()

    def __call__(self, when: str, name: str, path: Path) -> None:
        if when == "after" or name == "remove":
            return
        with self._lock:
            self.left -= 1
            if self.left < 0:
                self.reached = True
                raise OSError(self.code, os.strerror(self.code), str(path))


@pytest.fixture
def small(tiny: Path) -> Path:
    """One module, one training step, two blocks."""
    return shorten(tiny, modules=1, batch=36, epochs=1, chunk=26, probe=False)


@pytest.mark.parametrize(
    "step",
    [pytest.param(5, id="every fifth"), pytest.param(1, marks=pytest.mark.slow)],
)
def test_every_operation_may_find_the_disk_full(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    run_and_record(small, tmp_path / "undisturbed")
    number = 0
    while True:
        folder = tmp_path / str(number)
        full = Full(number, CODES[number % len(CODES)])
        with monkeypatch.context() as patch:
            patch.setattr(durable, "observers", [full])
            if number == 0:
                run_and_fail(small, folder, full)
            else:
                try:
                    run_and_record(small, folder)
                except StorageError as error:
                    check_message(error, full)
        if not full.reached:
            break
        done = check_what_is_left(folder)
        run_and_record(small, folder)
        assert_same_files(folder, tmp_path / "undisturbed")
        for file, inode in done.items():
            assert (folder / file).stat().st_ino == inode, "a block that was done was done again"
        number += step
    assert number > 60
    assert_same_files(folder, tmp_path / "undisturbed")


def run_and_fail(file: Path, folder: Path, full: Full) -> None:
    with pytest.raises(StorageError) as caught:
        run_and_record(file, folder)
    check_message(caught.value, full)


def check_message(error: StorageError, full: Full) -> None:
    assert error.exit_code == 4
    assert os.strerror(full.code).lower() in str(error)
    assert "what was complete stays valid" in str(error)


def check_what_is_left(folder: Path) -> dict[str, int]:
    """No temporary files; what is sealed is whole. Returns the files of blocks that are done."""
    cache = folder / "m1.zarr"
    temporary = [p for p in folder.rglob("*") if p.name.endswith(".tmp") or "block-" in p.name]
    assert temporary == []
    try:
        Cache(cache)
        assert find_damage(cache, Silent()) == []
        return {}
    except CacheNotFoundError:
        return {}
    except PartialCacheError:
        manifest = read_manifest(cache)
    count, _ = BuildFolder(cache).done_blocks(manifest.content)
    files = sorted((cache / "pooled").glob("c.*"))
    assert len(files) >= count
    return {f"m1.zarr/pooled/{f.name}": f.stat().st_ino for f in files[:count]}


SCRIPT = """
set -e
mount -t tmpfs -o size=16m tmpfs "$DISK"
head -c $FILLER /dev/zero > "$DISK/filler"
set +e
$RUN; echo "status $?"
find "$DISK/out" -name '*.tmp' -o -name 'block-*' | sed 's/^/left /'
rm "$DISK/filler"
$RUN; echo "status $?"
set -e
cp -r "$DISK/out" "$COPY"
"""


@pytest.mark.parametrize(
    "left",
    [
        pytest.param(3_000_000, id="no room for chunks"),
        pytest.param(200_000, id="no room for a checkpoint", marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_is_really_full(small: Path, tmp_path: Path, left: int) -> None:
    namespace = ["unshare", "--map-root-user", "--mount"]
    if (
        shutil.which("unshare") is None
        or subprocess.run([*namespace, "true"], check=False, capture_output=True).returncode
    ):
        pytest.skip("no mount namespaces here")
    (tmp_path / "disk").mkdir()
    # Checkpoints of half a megabyte, and chunks of 8 MB.
    edit(small, "channels = 6", "channels = 96")
    edit(small, "[cache]\n", '[cache]\nprecision = "float32"\n')
    code = (
        "import gim_stagewise.stage.disk as d;"
        "d.SURELY = 0.0;"  # found while writing, not before
        "from gim_stagewise.cli import main; main()"
    )
    (tmp_path / "run.py").write_text(code)
    command = [
        sys.executable,
        tmp_path / "run.py",
        "run",
        small,
        "--dir",
        tmp_path / "disk" / "out",
    ]
    done = subprocess.run(
        [*namespace, "sh", "-c", SCRIPT],
        env={
            **os.environ,
            "DISK": str(tmp_path / "disk"),
            "FILLER": str(16 * 2**20 - left),
            "COPY": str(tmp_path / "copy"),
            "RUN": " ".join(map(str, [*command, "-q", "--device", "cpu", "--workers", "0"])),
        },
        check=False,
        capture_output=True,
        text=True,
    )
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("status")] == ["status 4", "status 0"], (
        done.stdout + done.stderr
    )
    assert not [line for line in lines if line.startswith("left")]
    assert "no space left on device" in done.stderr
    assert "Traceback" not in done.stderr
    run_and_record(small, tmp_path / "undisturbed")
    assert files_of(tmp_path / "copy").keys() == files_of(tmp_path / "undisturbed").keys()
