"""Commands as a person meets them: output, exit codes, no tracebacks."""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import edit, one_error, weights_of
from rich.console import Console
from warm import gim_stage

from gim_stagewise.cli import main
from gim_stagewise.config import ProbeConfig
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.probe.classifier import parts_of
from gim_stagewise.report.tables import ResultsTable, percent
from gim_stagewise.units import format_bytes


def test_the_tour_step_by_step_equals_run(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gim_stage("run", tiny, "--dir", out, "--json", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert [stage["module"] for stage in record["modules"]] == [1, 2, 3]
    assert {"pipeline", "probes", "seconds"} <= record.keys()

    steps = tmp_path / "steps"
    for module in ("1", "2"):
        first = ["--pipeline", str(tiny), "--dir", str(steps)]
        where = first if module == "1" else ["--input", str(steps / "m1.zarr")]
        trained = gim_stage("train", "--module", module, *where, "--json")
        assert json.loads(trained.stdout)["trained"] is True, trained.stderr
        extracted = gim_stage("extract", "--module", module, *where, "--json")
        assert json.loads(extracted.stdout)["extracted"] is True, extracted.stderr
    expected, found = weights_of(out), weights_of(steps)
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name])
    probed = gim_stage("probe", "--input", steps / "m2.zarr", "--json")
    assert json.loads(probed.stdout)["probe_accuracy"] == record["modules"][1]["probe_accuracy"]
    again = gim_stage("train", "--module", "2", "--input", steps / "m1.zarr")
    assert "nothing to do" in again.stdout


def test_every_command_shows_an_example() -> None:
    names = ("run", "train", "extract", "probe", "status", "inspect", "clean", "plot")
    for command in ([], *([name] for name in names)):
        done = gim_stage(*command, "--help")
        assert done.returncode == 0
        assert "gim-stage" in done.stdout
        assert "Example" in done.stdout
        assert "\\b" not in done.stdout
        assert "\n    gim-stage" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("lr = 3e-3", "lr = -1", "train.lr: is -1"),
        ("lr = 3e-3", "lrr = 3e-3", "train.lrr: unknown key (value 0.003); did you mean 'lr'?"),
        ("[patches]\nsize = 4", "[patches]\nsize = 40", "patches.size: is 40"),
        ("prediction_steps = 2", "prediction_steps = 4", "module.1.objective.prediction_steps"),
        ("batch = 8", "batch = 800", "module.1.train.batch: is 800, but only 36 samples"),
        ('kind = "npy"', 'kind = "nyp"', "source.kind: is 'nyp'"),
        ('"residual"\noptions = { ch', '"residul"\noptions = { ch', "module.2.build: is 'residul'"),
        ("channels = 8, stride", "chanels = 8, stride", "module.2.options"),
        ('images = "train.npy"', 'images = "gone.npy"', "gone.npy"),
        ("[cache]\nchunk = 7", "[cache]\nchunk = 0", "cache.chunk: is 0"),
    ],
)
def test_a_wrong_file_ends_in_one_message(
    tiny: Path, tmp_path: Path, old: str, new: str, expected: str
) -> None:
    edit(tiny, old, new)
    message = one_error(gim_stage("run", tiny, "--dir", tmp_path / "out"), 2)
    assert expected in message
    if "gone" not in new:
        assert str(tiny) in message
    assert not (tmp_path / "out").exists()


def test_modules_that_do_not_fit_one_another_are_named(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "options = { channels = 5 }", "options = { channels = 5, in_channels = 3 }")
    message = one_error(gim_stage("run", tiny, "--dir", tmp_path / "out"), 2)
    assert "module.3: cannot take its input of 8×2×2 (channels×height×width)" in message


def test_bad_input_on_the_command_line_is_explained(tiny: Path, tmp_path: Path) -> None:
    missing = one_error(gim_stage("train", "--module", "2", "--input", tmp_path / "no.zarr"), 2)
    assert "no cache at" in missing
    no_module = gim_stage("train", "--module", "9", "--pipeline", tiny, "--dir", tmp_path / "out")
    assert "there is no module 9; this pipeline has modules 1 to 3" in one_error(no_module, 2)
    unfrozen = gim_stage("extract", "--module", "1", "--pipeline", tiny, "--dir", tmp_path / "out")
    assert "no frozen weights at" in one_error(unfrozen, 2)
    gone = one_error(gim_stage("run", tmp_path / "gone.toml"), 2)
    assert "no such pipeline file" in gone
    usage = gim_stage("train", "--module", "2")
    assert usage.returncode == 2
    assert "--input CACHE" in usage.stderr


def test_a_cuda_that_is_not_there_is_explained(tiny: Path, tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    done = gim_stage("run", tiny, "--dir", tmp_path / "out", "--device", "cuda")
    assert "finds no GPU" in one_error(done, 2)


def test_a_diverging_training_says_where(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "lr = 3e-3", "lr = 1e30")
    message = one_error(gim_stage("run", tiny, "--dir", tmp_path / "out"), 2)
    assert "lr 1e+30" in message
    assert "step" in message
    assert not (tmp_path / "out" / "m1.safetensors").exists()


def test_damaged_weights_are_made_again(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert gim_stage("run", tiny, "--dir", out).returncode == 0
    whole = (out / "m2.safetensors").read_bytes()
    damaged = bytearray(whole)
    damaged[-3] ^= 4
    (out / "m2.safetensors").write_bytes(bytes(damaged))
    assert "damaged" in one_error(
        gim_stage("extract", "--module", "2", "--input", out / "m1.zarr"), 2
    )
    done = gim_stage("run", tiny, "--dir", out)
    assert done.returncode == 0
    assert "module 2: trained again" in done.stderr
    shutil.rmtree(out)


@pytest.mark.parametrize("columns", ["", "abc", "0", "-5", "60", "132"])
def test_any_width_that_the_environment_states_prints(
    tiny: Path, tmp_path: Path, columns: str
) -> None:
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run(until=1)
    command: list[str | Path] = [sys.executable, "-m", "gim_stagewise.cli", "status", tiny]
    command += ["--dir", tmp_path / "out"]
    environment = os.environ | {"COLUMNS": columns, "PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert "sealed" in done.stdout
    assert done.stderr == ""


def test_results_fit_any_terminal_with_all_their_figures(tiny: Path, tmp_path: Path) -> None:
    result = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run()
    for columns in (45, 60, 80, 100, 132):
        printed = io.StringIO()
        Console(width=columns, file=printed).print(ResultsTable(result))
        lines = printed.getvalue().splitlines()
        assert max(map(len, lines)) <= columns
        text = " ".join(lines)
        assert "…" not in text
        for stage in result.stages:
            assert f" {stage.record.train_loss:.3f} " in text
            assert f" {percent(result.accuracy(stage.module))} " in text
            assert f" {format_bytes(stage.cache_bytes)} " in text


@pytest.mark.parametrize("stream", ["stdout", "stderr"])
def test_a_closed_stream_is_no_defect(tiny: Path, tmp_path: Path, stream: str) -> None:
    closed = {"stdout": ">&-", "stderr": "2>&-"}[stream]
    program = f"{sys.executable} -m gim_stagewise.cli"
    command = f"{program} run {tiny} --dir {tmp_path / 'out'} --until 1 {closed}"
    assert subprocess.run(["sh", "-c", command], check=False).returncode == 0


def test_one_rare_class_is_not_probed_and_nothing_is_lost(tiny: Path, tmp_path: Path) -> None:
    """All samples of the class may be held out to choose by."""
    labels = np.zeros(40, np.int64)
    order, _, held = parts_of(40, ProbeConfig(), seed=3)
    assert sorted(order.tolist()) == list(range(40))
    labels[held[0]] = 1
    np.save(tiny.parent / "train_labels.npy", labels)
    done = gim_stage("run", tiny, "--dir", tmp_path / "out", "--device", "cpu")
    assert done.returncode == 0
    assert "but some that are held out" in " ".join(done.stderr.split())
    assert (tmp_path / "out" / "run.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give the same command again to go on"),
        (["--from", "2"], "give the same command again without --from to go on"),
        (["--from=2"], "give the same command again without --from to go on"),
    ],
)
def test_who_goes_on_is_not_told_to_start_anew(
    tiny: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], said: str
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "run", interrupted)
    found = CliRunner().invoke(main, ["run", str(tiny), *options])
    assert found.exit_code == 130
    assert said in found.stderr
