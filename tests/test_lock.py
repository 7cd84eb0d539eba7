"""Two runs at once in one folder: the second is told who has it; nobody waits, nothing is mixed."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from helpers import one_error
from warm import gim_stage

from gim_stagewise.errors import FolderInUseError
from gim_stagewise.lock import exclusive

HOLDS = """
import sys
from pathlib import Path
from gim_stagewise.lock import exclusive
with exclusive(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def held_by_another(folder: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDS, folder],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
        process.kill()


def test_every_command_that_writes_is_told_who_has_the_folder(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert gim_stage("run", tiny, "--dir", out, "--until", "1", "-q").returncode == 0
    before = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    with held_by_another(out) as other:
        commands: list[list[str | Path]] = [
            ["run", tiny, "--dir", out, "-q"],
            ["train", "--module", "1", "--pipeline", tiny, "--dir", out, "--force", "-q"],
            ["extract", "--module", "1", "--pipeline", tiny, "--dir", out, "--force", "-q"],
        ]
        for command in commands:
            # Also where it is said that other hosts' locks are to be broken: this one is alive.
            for extra in ([], ["--break-lock"]):
                error = one_error(gim_stage(*command, *extra), 2)
                assert f"process {other.pid} on {socket.gethostname()} since 2" in error
        # Looking is allowed.
        assert gim_stage("status", tiny, "--dir", out).returncode == 0
        assert gim_stage("verify", out).returncode == 0
    own = {file: file.stat().st_mtime_ns for file in out.rglob("*") if file.is_file()}
    del before[out / ".lock"], own[out / ".lock"]
    assert own == before


def test_a_lock_left_by_a_dead_process_of_this_host_holds_nobody_up(tmp_path: Path) -> None:
    with held_by_another(tmp_path) as other:
        other.kill()
        other.wait()
        left = json.loads((tmp_path / ".lock").read_text())
        assert left["pid"] == other.pid
        with exclusive(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text())["pid"] != other.pid
    assert (tmp_path / ".lock").read_text() == ""


def test_a_lock_of_another_host_is_broken_only_if_somebody_says_so(
    tiny: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    held = {"host": "elsewhere", "pid": 17, "since": "2026-01-02T03:04:05+00:00"}
    (out / ".lock").write_text(json.dumps(held))
    command: list[str | Path] = ["run", tiny, "--dir", out, "--until", "1", "-q"]
    for _ in range(2):
        error = one_error(gim_stage(*command), 2)
        assert "locked by process 17 on elsewhere since 2026-01-02T03:04:05+00:00" in error
        assert "--break-lock" in error
        assert json.loads((out / ".lock").read_text()) == held
    assert gim_stage(*command, "--break-lock").returncode == 0
    assert gim_stage(*command).returncode == 0


@pytest.mark.parametrize("content", ["", "nonsense", "[]", '{"pid": 3}', '{"host": 7}', "\0" * 50])
def test_a_lock_file_with_anything_in_it_is_no_obstacle(tmp_path: Path, content: str) -> None:
    (tmp_path / ".lock").write_text(content)
    if content == '{"host": 7}':
        with pytest.raises(FolderInUseError, match="--break-lock"), exclusive(tmp_path):
            pass
        return
    with exclusive(tmp_path):
        pass


def test_two_threads_are_two_runs(tmp_path: Path) -> None:
    found: list[BaseException] = []

    def other() -> None:
        try:
            with exclusive(tmp_path):
                pass
        except FolderInUseError as error:
            found.append(error)

    with exclusive(tmp_path), exclusive(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(10)
    assert "another thread of this process" in str(found[0])
    with exclusive(tmp_path):
        pass
