"""The memory there is, as the machine and its container say."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from gim_stagewise.memory import available_host_bytes


@pytest.mark.parametrize(
    ("limit_file", "use_file"),
    [
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ],
)
def test_a_containers_limit_counts_and_not_the_machines(
    tmp_path: Path, limit_file: str, use_file: str
) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / limit_file).write_text("3000000\n")
    (tmp_path / use_file).write_text("1000000\n")
    assert available_host_bytes(tmp_path) == 2_000_000
    (tmp_path / use_file).write_text("4000000\n")
    assert available_host_bytes(tmp_path) == 0


def test_no_limit_leaves_the_machines_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    for folder in (tmp_path, tmp_path / "none"):
        assert 0 < available_host_bytes(folder) <= psutil.virtual_memory().total
