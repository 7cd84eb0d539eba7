"""What is projected, what is refused, and what it really takes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from helpers import edit, one_error, weights_of
from warm import gim_stage

from gim_stagewise.cache import Cache, CacheLayout
from gim_stagewise.config import parse_pipeline
from gim_stagewise.errors import OverBudgetError
from gim_stagewise.memory import Budget
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.plan import plan_pipeline
from gim_stagewise.processes import in_fresh_process
from gim_stagewise.stage.fit import plan_training
from gim_stagewise.stage.forward import project_forward
from gim_stagewise.stage.freeze import FrozenModule
from gim_stagewise.stage.needs import StageNeeds
from gim_stagewise.stage.project import count_step, measure_step, project_step
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.spec import StepSpec
from gim_stagewise.stage.stage import Stage

RESNET = """
name = "resnet"
[source]
kind = "npy"
[patches]
size = 16
stride = 8
[objective]
prediction_steps = 2
[module.1]
build = "resnet50"
options = { blocks = [1, 2], width = 32 }
"""


def spec(micro_batch: int, *, shape: tuple[int, ...] = (8, 4, 4), lean: bool = True) -> StepSpec:
    return StepSpec(
        config=parse_pipeline(RESNET, file="resnet.toml"),
        code_folder=None,
        indexes=(1,),
        shapes=(Shape((4, 4), (4, 4), (1, 16, 16), (128, 16, 16), 128),),
        classes=0,
        label_steps=0,
        forward_cell=(1, 16, 16),
        shape=shape,
        piece=256,
        micro_batch=micro_batch,
        device="cpu",
        threads=1,
        lean=lean,
    )


def needs(spec: StepSpec, *, asked: int | Literal["auto"] | None = None) -> StageNeeds:
    train = spec.config.stage(1).train.model_copy(update={"micro_batch": asked})
    module = spec.config.stage(1).model_copy(update={"train": train})
    config = spec.config.model_copy(update={"module": {1: module}})
    layout = CacheLayout(8, 1, (4, 4), (128, 8, 8), 128, 1, "lz4")
    return StageNeeds(
        replace(spec, config=config), 0, 0, item_bytes=1024, block=100_000, layout=layout
    )


def test_a_count_has_parameters_gradients_and_optimizer_to_the_byte() -> None:
    counted = count_step(spec(8)).counted
    module, objective = spec(8).parts()
    parameters = [*module.parameters(), *objective.parameters()]
    size = sum(parameter.nbytes for parameter in parameters)
    assert counted["parameters"] == size
    assert counted["gradients"] == size
    # Adam's two moments, and a step counter for each parameter.
    assert counted["optimizer"] == 2 * size + 4 * len(parameters)
    assert counted["input"] == 8 * 1 * 16 * 16 * 4


def test_a_micro_batch_takes_its_share_of_the_activations() -> None:
    whole, eighth = count_step(spec(128)).counted, count_step(spec(16)).counted
    # All that grows with the batch alone is embeddings and scores.
    assert whole["activations"] / 8 <= eighth["activations"] <= whole["activations"] / 5


@pytest.mark.parametrize("micro_batch", [8, 32, 128])
@pytest.mark.parametrize("lean", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_projection_is_not_below_what_is_measured(micro_batch: int, lean: bool) -> None:
    asked = spec(micro_batch, lean=lean)
    projected = project_step(asked, exact=True)
    assert projected.basis == "counted, with the workspace of real micro-batches"
    measured = in_fresh_process(measure_step, asked, steps=3)
    assert 0.98 * measured - 32e6 <= projected.total <= 1.25 * measured + 192e6


def test_a_forward_is_counted_and_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(*arguments: object) -> int:
        raise AssertionError("a process was started to measure what can be counted")

    monkeypatch.setattr("gim_stagewise.stage.forward.measured_bytes", measured)
    asked = spec(8)
    counted = project_forward(asked, measure=False, margin=False)
    # Of 256 patches: what the widest block gets and gives, 128 channels of 16×16 in float32.
    assert 2 * 256 * 128 * 256 * 4 < counted < 6 * 256 * 128 * 256 * 4


def user_pipeline(tmp_path: Path, tiny: Path, code: str) -> Path:
    (tmp_path / "nets.py").write_text(code)
    edit(tiny, 'build = "residual"\noptions = { stem = 4, channels = 6 }', 'build = "nets:block"')
    return tiny


LOOKS_AT_VALUES = """
from torch import nn

class Looking(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 6, 3, padding=1)

    def forward(self, x):
        z = self.conv(x)
        return z if z.detach().abs().max().item() >= 0 else -z

def block(in_channels):
    return Looking(in_channels)
"""


def test_a_module_that_cannot_be_counted_is_measured_and_said_so(
    tmp_path: Path, tiny: Path
) -> None:
    file = user_pipeline(tmp_path, tiny, LOOKS_AT_VALUES)
    plan = plan_pipeline(Pipeline.from_file(file, folder=tmp_path / "out", device="cpu"))
    first, second, _ = plan.stages
    assert first.training.step.basis.startswith("measured only: cannot be counted")
    assert first.training.step.counted == {}
    assert second.training.step.counted
    done = gim_stage("run", file, "--dir", tmp_path / "out", "--device", "cpu", "-q")
    assert done.returncode == 0, done.stderr


def test_one_that_cannot_be_counted_is_refused_over_budget_too(tmp_path: Path, tiny: Path) -> None:
    file = user_pipeline(tmp_path, tiny, LOOKS_AT_VALUES)
    error = one_error(gim_stage("plan", file, "--device", "cpu", "--allowed-mem", "10kB"), 3)
    assert "even with micro_batch = 1" in error


def test_a_step_larger_than_the_machine_is_refused_by_its_count(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Trying it out would take all memory, whatever budget was given."""

    def measured(*arguments: object, **named: object) -> int:
        raise AssertionError("tried out")

    monkeypatch.setattr("gim_stagewise.stage.project.in_fresh_process", measured)
    edit(tiny, "negatives = 4", "negatives = 100_000_000")
    for budget in (Budget(), Budget(device=10**9), Budget(host=4 * 10**9)):
        pipeline = Pipeline.from_file(tiny, device="cpu", budget=budget)
        with pytest.raises(OverBudgetError, match=r"at least [\d.]+ [GT]B .*lower train.batch"):
            plan_pipeline(pipeline)


def test_a_process_that_ran_out_of_memory_is_no_defect(tmp_path: Path, tiny: Path) -> None:
    ends = LOOKS_AT_VALUES.replace(
        "z = self.conv(x)",
        "z = self.conv(x)\n"
        "        if self.training and len(x) > 1 and multiprocessing.parent_process():\n"
        "            os.kill(os.getpid(), 9)  # as the system does",
    )
    file = user_pipeline(tmp_path, tiny, f"import multiprocessing\nimport os\n{ends}")
    error = one_error(gim_stage("plan", file, "--device", "cpu"), 3)
    assert "module 1: the process that measures what it takes was ended" in error


def test_from_forgets_nothing_where_the_budget_is_too_small(tiny: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    Pipeline.from_file(tiny, folder=folder, device="cpu").run(until=2)
    before = weights_of(folder)
    small = Pipeline.from_file(tiny, folder=folder, device="cpu", budget=Budget(device=10_000))
    with pytest.raises(OverBudgetError):
        small.run(start=1, until=2)
    assert weights_of(folder).keys() == before.keys()
    assert Cache(folder / "m2.zarr").materialized


def test_plan_says_what_it_knows(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = gim_stage("plan", tiny, "--dir", out, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert not out.exists()
    plan = json.loads(done.stdout)
    assert [module["module"] for module in plan["modules"]] == [1, 2, 3]
    assert gim_stage("run", tiny, "--dir", out, "--device", "cpu", "-q").returncode == 0
    for module in plan["modules"]:
        stored = sum(f.stat().st_size for f in (out / f"m{module['module']}.zarr").rglob("c.*"))
        assert 0.7 * stored < module["cache_bytes"] < 1.4 * stored
        assert module["micro_batch"] == 8 * 25
        assert module["forward_flops"] > 0
        assert module["cache_basis"].endswith("through untrained modules, encoded")
    disk = plan["disk"]
    assert disk["all"] == sum(module["cache_bytes"] for module in plan["modules"])
    assert disk["last"] <= disk["last-two"] < disk["all"]
    table = gim_stage("plan", tiny, "--dir", out, "--device", "cpu").stdout
    assert "micro-batch" in table
    assert "the cache that is there" in " ".join(table.split())


@pytest.mark.parametrize(
    ("option", "size"),
    [
        ("--allowed-mem", "0"),
        pytest.param("--allowed-host-mem", "abc", marks=pytest.mark.slow),
        pytest.param("--allowed-disk", "-3MB", marks=pytest.mark.slow),
    ],
)
def test_a_budget_that_is_no_size_is_answered_with_the_smallest(
    tiny: Path, option: str, size: str
) -> None:
    error = one_error(gim_stage("plan", tiny, "--device", "cpu", option, size), 2)
    assert f"{option}: is '{size}'" in error
    least = error.split("the smallest workable value here is ")[1]
    assert gim_stage("plan", tiny, "--device", "cpu", option, least).returncode == 0


@pytest.mark.parametrize("command", ["plan", "run"])
@pytest.mark.parametrize(
    ("option", "size"),
    [
        ("--allowed-mem", "10kB"),
        pytest.param("--allowed-host-mem", "10kB", marks=pytest.mark.slow),
        ("--allowed-disk", "10kB"),
    ],
)
def test_a_budget_that_is_too_small_is_refused_with_one_that_works(
    tiny: Path, tmp_path: Path, command: str, option: str, size: str
) -> None:
    out = tmp_path / "out"
    done = gim_stage(command, tiny, "--dir", out, "--device", "cpu", option, size)
    error = one_error(done, 3)
    assert "allowed 10.0 kB" in error
    assert not list(out.glob("m*"))
    assert f"{option} " in error


def test_extract_names_its_own_smallest_budget(tiny: Path, tmp_path: Path) -> None:
    """Not that of training, which takes less than a forward of so many patches."""
    edit(tiny, "batch = 50", "batch = 50000")
    arguments: list[str | Path] = ["--module", "1", "--pipeline", tiny]
    arguments += ["--dir", tmp_path, "--device", "cpu"]
    assert gim_stage("train", *arguments).returncode == 0
    extract = ["extract", *arguments, "--allowed-host-mem"]
    least = one_error(gim_stage(*extract, "abc"), 2).split("workable value here is ")[1].strip()
    megabytes = int(least.removesuffix("MB"))
    assert "extract.batch" in one_error(gim_stage(*extract, f"{megabytes // 2}MB"), 3)
    assert gim_stage(*extract, least).returncode == 0


def test_train_names_the_smallest_budget_too(tiny: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = ["--module", "1", "--pipeline", tiny]
    arguments += ["--dir", tmp_path, "--device", "cpu"]
    error = one_error(gim_stage("train", *arguments, "--allowed-mem", "abc"), 2)
    assert "the smallest workable value here is" in error
    error = one_error(gim_stage("train", *arguments, "--allowed-mem", "10kB"), 3)
    assert "parameters, gradients and optimizer" in error


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0", "greater than 0"),
        ("201", "a batch has 200 rows; use 1 to 200"),
        ('"most"', 'or "auto"'),
    ],
)
def test_a_micro_batch_that_cannot_be_is_refused(tiny: Path, value: str, expected: str) -> None:
    edit(tiny, "batch = 8\n", f"batch = 8\nmicro_batch = {value}\n")
    error = one_error(gim_stage("run", tiny, "--device", "cpu"), 2)
    assert "train.micro_batch" in error
    assert expected in error


def needed(asked: StepSpec) -> int:
    return project_step(asked, exact=True).total


def test_over_budget_names_a_micro_batch_that_fits() -> None:
    whole = spec(128)
    allowed = (needed(spec(8)) + needed(spec(64))) // 2
    budget = Budget(device=allowed)
    with pytest.raises(OverBudgetError, match=r"set module.1.train.micro_batch to (\d+)") as caught:
        plan_training(needs(whole), recorded=None, budget=budget)
    words = str(caught.value).split()
    size = int(words[words.index("to") + 1])
    assert 8 <= size < 64
    fits = plan_training(needs(whole, asked=size), recorded=None, budget=budget)
    assert fits.step.total <= allowed
    automatic = plan_training(needs(whole, asked="auto"), recorded=None, budget=budget)
    # Measured anew, in another process: not exactly the same.
    assert 8 <= automatic.micro_batch < 64
    assert automatic.step.total <= allowed


def test_samples_to_be_mixed_count_on_the_host() -> None:
    held = 4 * 2**30
    asked = replace(needs(spec(8), asked=8), loader=held)
    plan = plan_training(asked, recorded=None, budget=Budget(host=2**40))
    parameters = sum(own.nbytes for part in spec(8).parts() for own in part.parameters())
    # Weights: the best ones, and those that are about to replace them.
    assert plan.host - plan.base == plan.step.total + held + 2 * parameters
    assert plan.projected == plan.host - plan.base
    fits = plan_training(asked, recorded=None, budget=Budget(host=plan.host + 2**28))
    assert fits.loader == held
    with pytest.raises(OverBudgetError, match=r"lower module\.1\.train\.shuffle_window") as caught:
        plan_training(asked, recorded=None, budget=Budget(host=plan.host - held // 2))
    assert caught.value.needed > held


def test_a_plan_counts_the_samples_that_its_loader_holds(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "checkpoint_every = 2", 'checkpoint_every = 2\nshuffle_window = "1 MB"')
    stage = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").stage(1)
    held = len(stage.source.split("unlabeled")) * stage.source.item_bytes
    assert held < 1e6
    assert held <= stage.plan_training().loader < 1.5 * held


def test_what_auto_came_to_is_kept_and_a_smaller_budget_refuses() -> None:
    whole = spec(128)
    budget = Budget(device=needed(spec(8)))
    with pytest.raises(OverBudgetError, match="begun with micro_batch = 64, which is not changed"):
        plan_training(needs(whole, asked="auto"), recorded=64, budget=budget)
    large = Budget(device=2**40)
    kept = plan_training(needs(whole, asked="auto"), recorded=64, budget=large)
    assert kept.micro_batch == 64


def test_auto_is_resolved_once_recorded_and_believed(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edit(tiny, "batch = 8\n", 'batch = 8\nmicro_batch = "auto"\n')
    folder = tmp_path / "out"

    def plan_of_60(self: Stage) -> Any:
        return replace(original(self), micro_batch=60)

    original = Stage.plan_training
    monkeypatch.setattr(Stage, "plan_training", plan_of_60)
    Pipeline.from_file(tiny, folder=folder, device="cpu").run()
    monkeypatch.undo()
    for index in (1, 2, 3):
        parts = Cache(folder / f"m{index}.zarr").manifest.recipe.parts
        assert all(
            parts[f"module.{below}.train.micro_batch"] == 60 for below in range(1, index + 1)
        )
    again = Pipeline.from_file(tiny, folder=folder, device="cpu").run()
    assert [stage.record.micro_batch for stage in again.stages] == [60, 60, 60]
    assert not any(stage.trained or stage.extracted for stage in again.stages)
    edit(tiny, 'micro_batch = "auto"', "micro_batch = 60")
    again = Pipeline.from_file(tiny, folder=folder, device="cpu").run()
    assert not any(stage.trained or stage.extracted for stage in again.stages)
    edit(tiny, "micro_batch = 60", "micro_batch = 40")
    again = Pipeline.from_file(tiny, folder=folder, device="cpu").run()
    assert [stage.record.micro_batch for stage in again.stages] == [40, 40, 40]


def test_training_in_micro_batches_is_close_to_training_in_one(tiny: Path, tmp_path: Path) -> None:
    Pipeline.from_file(tiny, folder=tmp_path / "one", device="cpu").run(until=1)
    edit(tiny, "batch = 8\n", "batch = 8\nmicro_batch = 33\n")
    Pipeline.from_file(tiny, folder=tmp_path / "many", device="cpu").run(until=1)
    one, many = weights_of(tmp_path / "one"), weights_of(tmp_path / "many")
    assert one.keys() == many.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-3, atol=1e-4)


def test_too_many_workers_for_the_memory_are_refused(tiny: Path, tmp_path: Path) -> None:
    arguments: list[str | Path] = ["--module", "1", "--pipeline", tiny, "--dir", tmp_path]
    arguments += ["--device", "cpu", "-q"]
    assert gim_stage("train", *arguments).returncode == 0
    done = gim_stage("extract", *arguments, "--workers", "2", "--allowed-host-mem", "1.4GB")
    error = one_error(done, 3)
    assert "with 2 workers projects" in error
    assert "use --workers 1 or less" in error


def test_a_run_reports_what_was_projected_and_measured(tiny: Path, tmp_path: Path) -> None:
    done = gim_stage("run", tiny, "--dir", tmp_path / "out", "--device", "cpu", "--json", "-q")
    for module in json.loads(done.stdout)["modules"]:
        measured, projected = module["measured_mem"], module["projected_mem"]
        assert measured > 0
        assert 0.98 * measured - 32e6 <= projected <= 1.25 * measured + 192e6


def test_extraction_holds_one_frozen_module(tiny: Path, tmp_path: Path) -> None:
    """Without stored inputs the modules below are frozen ones, in one chain."""
    edit(tiny, "[cache]\n", '[cache]\nmaterialize = "never"\n')
    pipeline = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu")
    pipeline.run(until=2)
    source: Any = pipeline.stage(3).source
    assert isinstance(source.worker.frozen, FrozenModule)
    assert isinstance(source.source.worker.frozen, FrozenModule)
