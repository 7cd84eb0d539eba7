"""Stored or computed again: the faster is taken and kept, and never changes a number."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import edit, weights_of
from warm import gim_stage

from gim_stagewise.cache import Cache
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.stage import settle
from gim_stagewise.stage.choose import Choice, measure_choice

CHOICE = Choice(
    compute=0.010,
    write=0.004,
    read_warm=0.001,
    read_cold=0.005,
    sample_bytes=1000,
    samples=100,
    passes=10,
    memory=10**6,
)


def test_the_faster_is_chosen() -> None:
    assert CHOICE.fits
    assert CHOICE.stored == pytest.approx(100 * (0.004 + 10 * 0.001))
    assert CHOICE.computed == pytest.approx(100 * 10 * 0.010)
    assert CHOICE.store
    assert "outputs are stored" in str(CHOICE)
    on_disk = replace(CHOICE, memory=10**4)
    assert on_disk.read == 0.005
    cheap = replace(on_disk, compute=0.003)
    assert not cheap.store
    assert "outputs are computed" in str(cheap)


def auto(file: Path) -> Path:
    edit(file, "[cache]\n", '[cache]\nmaterialize = "auto"\n')
    return file


@pytest.mark.parametrize("compute", [1e-9, 1.0])
def test_either_choice_gives_the_same_bits_and_is_kept(
    tiny: Path, tmp_path: Path, compute: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    Pipeline.from_file(tiny, folder=tmp_path / "always", device="cpu").run()

    def measured(*args: Any, **options: Any) -> Any:
        choice, values = measure_choice(*args, **options)
        return replace(choice, compute=compute), values

    file, folder = auto(tiny), tmp_path / "auto"
    with monkeypatch.context() as patch:
        patch.setattr(settle, "measure_choice", measured)
        Pipeline.from_file(file, folder=folder, device="cpu").run()
    stored = compute == 1.0
    for index, expected in ((1, stored), (2, stored), (3, True)):
        cache = Cache(folder / f"m{index}.zarr")
        assert cache.materialized is expected
        assert (cache.manifest.choice is None) is (index == 3)
    choice = Cache(folder / "m1.zarr").manifest.choice
    assert choice is not None
    assert choice["store"] is stored
    assert choice["passes"] == 4  # 3 epochs of module 2 and its extraction
    one, other = weights_of(tmp_path / "always"), weights_of(folder)
    assert all(torch.equal(one[name], other[name]) for name in one)
    # Whatever would be measured now: what was chosen stays.
    again = Pipeline.from_file(file, folder=folder, device="cpu").run()
    assert not any(stage.trained or stage.extracted for stage in again.stages)
    assert not list(folder.glob(".measure-*"))


def test_a_plan_says_what_would_be_chosen(tiny: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = [auto(tiny), "--dir", tmp_path / "new", "--device", "cpu"]
    done = gim_stage("plan", *arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("outputs are ") == 2
    found = json.loads(gim_stage("plan", *arguments, "--json").stdout)
    first, _, last = found["modules"]
    assert last["choice"] is None
    assert first["choice"]["read_cold"] >= first["choice"]["read_warm"] > 0
    assert first["choice"]["compute"] > 0
    assert not (tmp_path / "new").exists()
    assert not list(tmp_path.glob(".measure-*"))
