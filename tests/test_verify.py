"""Damage is found wherever it is, and what is mended is what was sealed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import numpy as np
import pytest
from helpers import edit, one_error
from warm import gim_stage

from gim_stagewise.cache import Cache, find_damage
from gim_stagewise.errors import CorruptCacheError, StaleCacheError
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.progress import Silent
from gim_stagewise.verify import mend, verify


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, new_tiny: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("made")
    Pipeline.from_file(new_tiny(folder), folder=folder / "out", device="cpu").run(until=2)
    return folder / "out"


@pytest.fixture
def done(made: Path, tmp_path: Path) -> Path:
    """A run of two modules of this test's own."""
    return Path(shutil.copytree(made, tmp_path / "out"))


def tree(folder: Path) -> dict[str, bytes]:
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != ".lock"
    }


CHUNK = "activations/c.0.1.0.0.0.0.0"


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-9])


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def swap(file: Path) -> None:
    """Whole, but of another block."""
    shutil.copyfile(file.with_name(file.name.replace("c.0.1", "c.0.2")), file)


DAMAGE: list[tuple[str, Callable[[Path], None], str]] = [
    (CHUNK, Path.unlink, "missing"),
    (CHUNK, cut, "torn"),
    (CHUNK, flip, "altered"),
    (CHUNK, swap, "altered"),
    ("pooled/c.0.2.0.0.0", flip, "altered"),
    ("ids/c.0", flip, "altered"),
    ("labels/class/c.0", Path.unlink, "missing"),
    ("activations/zarr.json", flip, "altered"),
    ("checksums/pooled/c.0.0", flip, "altered"),
]


@pytest.mark.parametrize(("file", "harm", "kind"), DAMAGE)
def test_damage_is_found_and_mended_bit_for_bit(
    tiny: Path, done: Path, file: str, harm: Callable[[Path], None], kind: str
) -> None:
    before = tree(done)
    path = done / "m2.zarr"
    assert find_damage(path, Silent()) == []
    harm(path / file)
    damage = find_damage(path, Silent())
    assert [(one.file, one.kind) for one in damage] == [(file, kind)]
    mend(Pipeline.from_file(tiny, folder=done, device="cpu"), path, damage)
    assert tree(done) == before


def test_all_damage_is_listed_at_once_and_mended_at_once(done: Path) -> None:
    before = tree(done)
    path = done / "m1.zarr"
    files = sorted(file for file in tree(path) if file != "zarr.json")
    for file in files:
        flip(path / file)
    result = gim_stage("verify", path, "--json")
    assert result.returncode == 4
    found = json.loads(result.stdout)["problems"]
    assert sorted(one["file"] for one in found) == sorted(str(path / file) for file in files)
    repaired = gim_stage("verify", path, "--repair", "--device", "cpu", "-q")
    assert repaired.returncode == 0, repaired.stderr
    assert tree(done) == before


def test_values_that_are_not_finite_are_found(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "[cache]\n", '[cache]\nprecision = "float32"\ncodec = "none"\n')
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run(until=1)
    file = tmp_path / "out" / "m1.zarr" / CHUNK
    values = np.frombuffer(file.read_bytes()[:-4], np.float32).copy()
    values[3] = np.nan
    content = values.tobytes()
    file.write_bytes(content + google_crc32c.value(content).to_bytes(4, "little"))
    damage = find_damage(tmp_path / "out" / "m1.zarr", Silent())
    assert [(one.file, one.kind) for one in damage] == [(CHUNK, "non-finite")]


@pytest.mark.parametrize("name", ["m1.safetensors", "run.json", "m1.zarr/zarr.json"])
def test_no_flipped_bit_in_a_runs_files_goes_unnoticed(tiny: Path, done: Path, name: str) -> None:
    gim_stage("run", tiny, "--dir", done, "--until", "2", "-q")
    whole = (done / name).read_bytes()
    draw = np.random.default_rng(0)
    places = draw.integers(0, 8 * len(whole), 60)
    for place in places.tolist():
        damaged = bytearray(whole)
        damaged[place // 8] ^= 1 << place % 8
        (done / name).write_bytes(damaged)
        problems = verify(done, Silent()).problems
        harmless = name.endswith(".json") and _same_json(whole, bytes(damaged))
        assert [file for file, _, _ in problems] == ([] if harmless else [done / name]), place
    (done / name).write_bytes(whole)
    assert verify(done, Silent()).problems == []


def _same_json(one: bytes, other: bytes) -> bool:
    """White space and the like may change without changing what is said."""
    try:
        return bool(json.loads(one) == json.loads(other))
    except ValueError:
        return False


def test_what_would_be_something_else_is_not_put_in_place(tiny: Path, done: Path) -> None:
    path = done / "m2.zarr"
    flip(path / CHUNK)
    damage = find_damage(path, Silent())
    before = tree(done)
    edit(tiny, "channels = 8, stride = 2", "channels = 9, stride = 2")
    with pytest.raises((StaleCacheError, CorruptCacheError)):
        mend(Pipeline.from_file(tiny, folder=done, device="cpu"), path, damage)
    assert tree(done) == before


def test_other_numerics_refuse_to_repair_and_offer_a_rebuild(
    tiny: Path, done: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = done / "m2.zarr"
    flip(path / CHUNK)
    damage = find_damage(path, Silent())
    before = tree(done)
    monkeypatch.setattr("torch.__version__", "9.9.9")
    with pytest.raises(StaleCacheError, match="Build it anew with"):
        mend(Pipeline.from_file(tiny, folder=done, device="cpu"), path, damage)
    assert tree(done) == before


def test_what_cannot_be_verified_is_said(tiny: Path, done: Path, tmp_path: Path) -> None:
    assert "no cache" in one_error(gim_stage("verify", tmp_path / "nothing"), 2)
    assert "is a Zarr array" in one_error(gim_stage("verify", done / "m2.zarr" / "activations"), 2)
    assert gim_stage("verify", done).returncode == 0
    shutil.copytree(done / "m2.zarr", tmp_path / "elsewhere" / "m2.zarr")
    flip(tmp_path / "elsewhere" / "m2.zarr" / CHUNK)
    result = gim_stage("verify", tmp_path / "elsewhere" / "m2.zarr", "--repair", "--device", "cpu")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert Cache(done / "m2.zarr").ids


def test_a_folder_in_a_files_place_is_listed_with_all_else(done: Path) -> None:
    for name in ("run.json", "m1.safetensors", f"m1.zarr/{CHUNK}"):
        (done / name).unlink(missing_ok=True)
        (done / name).mkdir()
    flip(done / "m2.zarr" / CHUNK)
    result = gim_stage("verify", done, "--json")
    assert result.returncode == 4
    found = {one["file"] for one in json.loads(result.stdout)["problems"]}
    names = ("run.json", "m1.safetensors", f"m1.zarr/{CHUNK}", f"m2.zarr/{CHUNK}")
    assert found == {str(done / name) for name in names}


def test_modules_are_verified_from_the_bottom_up(tmp_path: Path) -> None:
    for number in (10, 9, 2):
        (tmp_path / f"m{number}.zarr").mkdir()
        (tmp_path / f"m{number}.zarr" / "zarr.json").write_text("{}")
    checked = verify(tmp_path, Silent()).checked
    assert [path.name for path in checked] == ["m2.zarr", "m9.zarr", "m10.zarr"]


def test_what_a_run_has_lost_or_swapped_is_found(tiny: Path, done: Path) -> None:
    """Nothing is unreadable: there is less than the record of the run says, or it is elsewhere."""
    gim_stage("run", tiny, "--dir", done, "--until", "2", "-q")
    whole = shutil.copytree(done, done.with_name("whole"))

    def found(change: Callable[[], object]) -> dict[str, str]:
        change()
        problems = verify(done, Silent()).problems
        shutil.rmtree(done)
        shutil.copytree(whole, done)
        return {file.relative_to(done).as_posix(): kind for file, kind, _ in problems}

    assert found(lambda: None) == {}
    assert found((done / "m2.safetensors").unlink) == {"m2.safetensors": "missing"}
    assert found((done / "m1.zarr" / "zarr.json").unlink) == {"m1.zarr/zarr.json": "missing"}
    assert found(lambda: shutil.rmtree(done / "m1.zarr")) == {"m1.zarr": "missing"}
    swapped = found(lambda: shutil.copy(done / "m2.safetensors", done / "m1.safetensors"))
    assert swapped == {"m1.safetensors": "altered"}
