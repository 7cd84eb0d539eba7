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
    nowhere = tmp_path / "nowhere"
    assert available_host_bytes(tmp_path, nowhere) == 2_000_000
    (tmp_path / use_file).write_text("4000000\n")
    assert available_host_bytes(tmp_path, nowhere) == 0


@pytest.mark.parametrize(
    ("limit_file", "use_file", "reclaimable"),
    [
        ("memory.max", "memory.current", "inactive_file"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_page_cache_that_would_be_given_up_is_free(
    tmp_path: Path, limit_file: str, use_file: str, reclaimable: str
) -> None:
    (tmp_path / "memory").mkdir()
    (tmp_path / limit_file).write_text("3000000\n")
    (tmp_path / use_file).write_text("2900000\n")
    statistics = (tmp_path / limit_file).with_name("memory.stat")
    statistics.write_text(f"anon 400000\n{reclaimable} 2500000\nactive_file 1\n")
    assert available_host_bytes(tmp_path, tmp_path / "nowhere") == 2_600_000


@pytest.mark.parametrize("line", ["0::/user/job", "4:cpu,memory:/user/job"])
def test_the_limit_of_a_group_within_counts(tmp_path: Path, line: str) -> None:
    (tmp_path / "membership").write_text(f"1:name=systemd:/other\n{line}\n")
    old = "memory" in line
    root = tmp_path / "cgroup" / ("memory" if old else "")
    limit, used = (
        ("memory.limit_in_bytes", "memory.usage_in_bytes")
        if old
        else ("memory.max", "memory.current")
    )
    (root / "user" / "job").mkdir(parents=True)
    for folder, most in ((root, 9_000_000), (root / "user", 5_000_000), (root / "user/job", 7e6)):
        (folder / limit).write_text(f"{int(most)}\n")
        (folder / used).write_text("1000000\n")
    assert available_host_bytes(tmp_path / "cgroup", tmp_path / "membership") == 4_000_000


def test_no_limit_leaves_the_machines_memory(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000000\n")
    for folder in (tmp_path, tmp_path / "none"):
        assert 0 < available_host_bytes(folder) <= psutil.virtual_memory().total
