"""A run that is killed goes on where it was, and ends in the same bits."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import (
    Heard,
    StopError,
    assert_same_files,
    assert_same_run,
    edit,
    results_of,
    shorten,
)

from gim_stagewise.cache import BuildFolder, Cache, read_manifest
from gim_stagewise.errors import NonFiniteError, PartialCacheError
from gim_stagewise.models.build import forget_user_code
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.progress import Silent, Task
from gim_stagewise.report.record import save_record
from gim_stagewise.stage.extraction_plan import Workers

# Runs a pipeline, counts the work as it is done, and kills itself without warning at a point.
SCRIPT = """
import os, signal, sys
from contextlib import contextmanager
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.progress import Silent, Task
from gim_stagewise.report.record import save_record
from gim_stagewise.stage.extraction_plan import Workers

file, folder, label, limit, log, workers = sys.argv[1:7]
log = open(log, "a")

class Deadly(Silent):
    @contextmanager
    def task(self, name, *, total, done=0, unit):
        class Counter(Task):
            advances = 0
            def advance(self, count=1, **figures):
                log.write(name + "\\n"); log.flush()
                self.advances += 1
                if name == label and self.advances == int(limit):
                    os.kill(os.getpid(), signal.SIGKILL)
        yield Counter()

pipeline = Pipeline.from_file(file, folder=folder, device="cpu", progress=Deadly())
save_record(pipeline, pipeline.run(workers=Workers(int(workers))))
"""


def run_and_die(
    file: Path, folder: Path, label: str, limit: int, log: Path, workers: int = 0
) -> int:
    arguments = [file, folder, label, limit, log, workers]
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, check=False, capture_output=True).returncode


@pytest.fixture
def undisturbed(tiny: Path, tmp_path: Path) -> Path:
    pipeline = Pipeline.from_file(tiny, folder=tmp_path / "undisturbed", device="cpu")
    save_record(pipeline, pipeline.run(workers=Workers(0)))
    return tmp_path / "undisturbed"


# With Dask workers it is killed in test_kill as well.
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_run_killed_in_training_and_in_extraction_ends_in_the_same_bits(
    tiny: Path, tmp_path: Path, undisturbed: Path, workers: int
) -> None:
    folder, log = tmp_path / "killed", tmp_path / "log"
    # 36 training samples make 4 steps an epoch; step 7 is in the middle of the second epoch.
    assert run_and_die(tiny, folder, "module 2: train", 7, log, workers) == -signal.SIGKILL
    assert not (folder / "m2.safetensors").exists()
    assert run_and_die(tiny, folder, "module 2: extract", 3, log, workers) == -signal.SIGKILL
    with pytest.raises(PartialCacheError):
        Cache(folder / "m2.zarr")
    assert run_and_die(tiny, folder, "none", 0, log, workers) == 0
    assert_same_run(folder, undisturbed)
    assert results_of(folder) == results_of(undisturbed)

    # The repeated work: checkpoints come every 2 steps, blocks are never done twice.
    work = log.read_text().splitlines()
    assert work.count("module 1: train") == 12
    assert 12 <= work.count("module 2: train") <= 12 + 2
    assert work.count("module 2: extract") == 8


def test_training_goes_on_from_the_middle_of_an_epoch_bit_for_bit(
    tiny: Path, tmp_path: Path, undisturbed: Path
) -> None:
    def stop_at_step_6(module: int, step: int) -> None:
        if (module, step) == (1, 6):
            raise StopError

    folder = tmp_path / "stopped"
    with pytest.raises(StopError):
        Pipeline.from_file(tiny, folder=folder, device="cpu", on_step=stop_at_step_6).run()
    state = torch.load(folder / "checkpoints" / "m1.pt", weights_only=True)
    assert state["counters"]["step_in_epoch"] == 2
    steps: list[int] = []
    resumed = Pipeline.from_file(
        tiny, folder=folder, device="cpu", on_step=lambda m, s: steps.append(s) if m == 1 else None
    )
    resumed.run()
    assert steps == list(range(7, 13))
    assert_same_run(folder, undisturbed)


def test_dropout_resumes_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "noisy.py").write_text(
        "from torch import nn\n"
        "def block(in_channels):\n"
        "    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.Dropout(0.5))\n"
    )
    edit(tiny, 'build = "residual"\noptions = { stem = 4, channels = 6 }', 'build = "noisy:block"')
    tiny.write_text(tiny.read_text().partition("[module.2]")[0])

    def stop(module: int, step: int) -> None:
        if step == 6:
            raise StopError

    Pipeline.from_file(tiny, folder=tmp_path / "whole", device="cpu").run()
    torch.rand(17)  # the global random state has no part in it
    with pytest.raises(StopError):
        Pipeline.from_file(tiny, folder=tmp_path / "parts", device="cpu", on_step=stop).run()
    Pipeline.from_file(tiny, folder=tmp_path / "parts", device="cpu").run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


BLOCK = """
from torch import nn
def block(in_channels):
    return nn.Sequential(nn.Conv2d(in_channels, 4, 3), nn.ReLU())
"""


@pytest.mark.parametrize("mode", ["iterative", "simultaneous"])
@pytest.mark.parametrize("what", ["settings", "data", "code"])
def test_a_checkpoint_of_other_settings_data_or_code_is_not_taken_up(
    tiny: Path, tmp_path: Path, mode: str, what: str
) -> None:
    (tmp_path / "blocks.py").write_text(BLOCK)
    built_in = 'build = "residual"\noptions = { stem = 4, channels = 6 }'
    edit(tiny, built_in, 'build = "blocks:block"')
    shorten(tiny, modules=2, batch=8, epochs=3, chunk=7, probe=False)

    def train(folder: Path, stop_at: int | None = None) -> list[int]:
        steps = []

        def on_step(module: int, step: int) -> None:
            steps.append(step)
            if step == stop_at:
                raise StopError

        forget_user_code()
        pipeline = Pipeline.from_file(tiny, folder=folder, device="cpu", mode=mode, on_step=on_step)
        (pipeline.stage(1) if mode == "iterative" else pipeline.joint_stage()).train()
        return steps

    with pytest.raises(StopError):
        train(tmp_path / "out", stop_at=7)
    shutil.copytree(tmp_path / "out", tmp_path / "same")
    assert train(tmp_path / "same") == list(range(7, 13))
    if what == "settings":
        edit(tiny, "lr = 3e-3", "lr = 1e-3")
    elif what == "data":
        images = np.load(tmp_path / "train.npy")
        np.save(tmp_path / "train.npy", images[:, ::-1])
    else:
        edit(tmp_path / "blocks.py", "ReLU", "Sigmoid")
    assert train(tmp_path / "out") == list(range(1, 13))
    train(tmp_path / "fresh")
    assert_same_run(tmp_path / "out", tmp_path / "fresh")


def test_a_partial_cache_of_other_content_is_begun_again(tiny: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    run_and_die(tiny, tmp_path / "out", "module 1: extract", 3, log)
    manifest = read_manifest(tmp_path / "out" / "m1.zarr")
    assert BuildFolder(tmp_path / "out" / "m1.zarr").done_blocks(manifest.content)[0] >= 2
    edit(tiny, "[extract]\nbatch = 50", "[extract]\nbatch = 49")
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run()
    Pipeline.from_file(tiny, folder=tmp_path / "fresh", device="cpu").run()
    assert_same_run(tmp_path / "out", tmp_path / "fresh")


def test_a_partial_cache_of_other_numerics_is_begun_again_and_a_sealed_one_kept(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shorten(tiny, modules=1, batch=8, epochs=1, chunk=7, probe=False)

    class Blocks(Silent):
        """Counts blocks, and stops after some."""

        def __init__(self, stop_after: int | None = None) -> None:
            self.count, self.notes = 0, list[str]()
            self.stop_after = stop_after

        def note(self, text: str) -> None:
            self.notes.append(text)

        @contextmanager
        def task(self, name: str, *, total: int, done: int = 0, unit: str) -> Iterator[Task]:
            blocks = self

            class Counter(Task):
                def advance(self, count: int = 1, **figures: float) -> None:
                    blocks.count += name == "module 1: extract"
                    if blocks.count == blocks.stop_after:
                        raise StopError

            yield Counter()

    def run(blocks: Blocks, folder: Path = tmp_path / "out") -> Blocks:
        Pipeline.from_file(tiny, folder=folder, device="cpu", progress=blocks).run()
        return blocks

    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "1.0")
        with pytest.raises(StopError):
            run(Blocks(stop_after=3))
    manifest = read_manifest(tmp_path / "out" / "m1.zarr")
    assert manifest.numerics["torch"] == "1.0"
    assert BuildFolder(tmp_path / "out" / "m1.zarr").done_blocks(manifest.content)[0] >= 2
    again = run(Blocks())
    assert again.count == 8
    begun = "cache built again: what was begun would not be of one piece: numerics.torch"
    assert any(begun in note for note in again.notes)
    assert Cache(tmp_path / "out" / "m1.zarr").manifest.numerics["torch"] == torch.__version__
    run(Blocks(), tmp_path / "fresh")
    assert_same_files(tmp_path / "out", tmp_path / "fresh")

    monkeypatch.setattr(torch, "__version__", "1.0")
    assert run(Blocks()).count == 0


EXPLODES = """
import torch
from torch import nn


class Explode(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, at):
        ctx.at = at
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * (float("inf") if ctx.at else 1.0), None


class Net(nn.Module):
    def __init__(self, in_channels, what, step):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3)
        self.what, self.step, self.forwards = what, step, 0

    def forward(self, x):
        z = self.conv(x)
        if self.training and torch.is_grad_enabled():
            self.forwards += 1
        now = self.training and self.forwards >= self.step
        if self.what == "loss" and now:
            return z * float("nan")
        if self.what == "validation loss" and not self.training and self.forwards >= self.step:
            return z * float("inf")
        return Explode.apply(z, self.what == "weights" and now)
"""


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("loss", "the loss became nan at step"),
        ("validation loss", "the validation loss became nan at step"),
        ("weights", "weights became NaN or infinite at step"),
    ],
)
def test_training_that_diverges_says_where_and_keeps_the_last_good_checkpoint(
    tiny: Path, tmp_path: Path, what: str, said: str
) -> None:
    (tmp_path / "nets.py").write_text(EXPLODES)
    options = f'options = {{ what = "{what}", step = 4 }}'
    edit(
        tiny,
        'build = "residual"\noptions = { stem = 4, channels = 6 }',
        f'build = "nets:Net"\n{options}',
    )
    tiny.write_text(tiny.read_text().partition("[module.2]")[0])
    with pytest.raises(NonFiniteError, match=said) as caught:
        Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run()
    checkpoint = tmp_path / "out" / "checkpoints" / "m1.pt"
    assert "lr 0.003" in str(caught.value)
    assert f"the last good checkpoint is {checkpoint}" in str(caught.value)
    state = torch.load(checkpoint, weights_only=True)
    assert all(tensor.isfinite().all() for tensor in state["module"].values())
    assert not (tmp_path / "out" / "m1.safetensors").exists()


def test_a_training_that_goes_on_under_other_numerics_says_so(tiny: Path, tmp_path: Path) -> None:
    out, heard = tmp_path / "out", Heard()

    def stop(_module: int, step: int) -> None:
        if step == 7:
            raise StopError

    with pytest.raises(StopError):
        Pipeline.from_file(tiny, folder=out, device="cpu", on_step=stop).run(until=1)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        pipeline = Pipeline.from_file(tiny, folder=out, device="cpu", progress=heard)
        record = pipeline.run(until=1).stages[0].record
    finally:
        torch.set_num_threads(before)
    assert record.numerics["threads"] == [before, before + 1]
    assert record.numerics["device"] == "cpu"
    assert any(f"threads {before} → {before + 1}" in note for note in heard.notes)
    assert pipeline.stage(1).load_weights().record == record


def test_training_anew_that_is_stopped_goes_on_without_being_forced(
    tiny: Path, tmp_path: Path
) -> None:
    def stop(_module: int, step: int) -> None:
        if step == 7:
            raise StopError

    whole = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").stage(1)
    expected, _ = whole.train()
    stopped = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu", on_step=stop)
    with pytest.raises(StopError):
        stopped.stage(1).train(force=True)
    found, trained = whole.train()
    assert trained
    assert not whole.workspace.checkpoint_path(1).exists()
    assert found.digest == expected.digest
