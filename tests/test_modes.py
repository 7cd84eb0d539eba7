"""All modules trained in one step, and baselines: the same trainer, the same promises."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import StopError, assert_same_run, edit, one_error, shorten, weights_of
from torch import Tensor, nn
from warm import gim_stage

from gim_stagewise.clean import removable
from gim_stagewise.cli.options import mode_option
from gim_stagewise.config import MODES, TrainConfig, parse_pipeline
from gim_stagewise.errors import ConfigError
from gim_stagewise.models import PixelCNN, Stack, embed
from gim_stagewise.models.residual import residual_module
from gim_stagewise.objectives import CPC, CrossEntropy, InfoNCE, Joint, build_objective
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.plan import plan_joint
from gim_stagewise.report.record import save_record
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources import Request, read_stacked
from gim_stagewise.stage.assemble import assemble
from gim_stagewise.stage.checkpoint import FrozenWeights, check_checkpoint
from gim_stagewise.stage.metrics import read_metrics
from gim_stagewise.stage.optimize import WeightAverage, make_optimizer
from gim_stagewise.stage.order import held_out, shuffled_order
from gim_stagewise.stage.step import (
    Corruption,
    MicroBatches,
    accumulate_gradients,
)
from gim_stagewise.status import pipeline_status
from gim_stagewise.windows import Span

CPU = torch.device("cpu")
JOINT = [mode for mode in MODES if mode != "iterative"]
TRAINED = [mode for mode in JOINT if mode != "random"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Objectives


def test_groups_draw_negatives_from_their_own_samples() -> None:
    z = torch.randn(6, 5, 2, 3, generator=generator(), dtype=torch.float64)
    whole, parts = (
        InfoNCE(3, prediction_steps=2, negatives=4, group=group).double() for group in (2, None)
    )
    parts.load_state_dict(whole.state_dict())
    draws = generator(1)
    expected = torch.stack([parts(z[n : n + 2], generator=draws) for n in (0, 2, 4)]).mean()
    torch.testing.assert_close(whole(z, generator=generator(1)), expected, rtol=1e-12, atol=0)
    assert not torch.allclose(parts(z, generator=generator(1)), expected)


def test_a_last_group_that_is_smaller_counts_by_its_samples() -> None:
    z = torch.randn(5, 5, 2, 3, generator=generator(), dtype=torch.float64)
    own = InfoNCE(3, prediction_steps=1, negatives=4, group=3).double()
    draws = generator(1)
    first, last = (own(part, generator=draws) for part in (z[:3], z[3:]))
    expected = (3 * first + 2 * last) / 5
    torch.testing.assert_close(own(z, generator=generator(1)), expected, rtol=1e-12, atol=0)


def test_cross_entropy_by_hand() -> None:
    objective = CrossEntropy(2, classes=3).double()
    z = torch.randn(4, 3, 2, 2, generator=generator(), dtype=torch.float64)
    labels = torch.tensor([0, 2, 1, 1])
    total = 0.0
    weight, bias = (p.detach() for p in objective.classifier.parameters())
    for sample, label in zip(z, labels.tolist(), strict=True):
        mean = sample.reshape(-1, 2).mean(0)
        scores = weight @ mean + bias
        total += float(torch.logsumexp(scores, 0) - scores[label])
    loss = objective(z, generator=generator(), labels=labels)
    assert loss.item() == pytest.approx(total / 4, rel=1e-12)
    with pytest.raises(ValueError, match="labels"):
        objective(z, generator=generator())


def test_contexts_know_rows_above_and_their_own_but_none_below() -> None:
    torch.manual_seed(0)
    network = PixelCNN(3, hidden=4, layers=2).double()
    z = torch.randn(1, 6, 7, 3, dtype=torch.float64, requires_grad=True)
    network(z)[0, 3, 3].sum().backward()
    assert z.grad is not None
    seen = z.grad[0].abs().sum(2) > 0
    assert not seen[4:].any()
    # Two layers see two rows up and two columns to either side.
    assert seen[1:4, 1:6].any(1).all()
    assert not seen[0].any()


def test_context_network_and_projections_are_drawn_apart(tiny: Path) -> None:
    edit(tiny, "[module.1]", CONTEXT)
    pipeline = Pipeline.from_file(tiny, device="cpu", mode="cpc")
    shapes = pipeline.check()
    _, objective = assemble(pipeline.workspace, [*pipeline.config.module], shapes)
    assert isinstance(objective, Joint)
    (cpc,) = objective.parts
    assert isinstance(cpc, CPC)
    narrow = cpc.context.layers[0].narrow.weight.flatten()  # type: ignore[index, union-attr]
    count = min(narrow.numel(), cpc.infonce.W.numel())
    same = narrow[:count] == cpc.infonce.W.flatten()[:count]
    assert not same.any()


def test_cpc_is_infonce_from_contexts_to_embeddings() -> None:
    torch.manual_seed(0)
    z = torch.randn(2, 5, 2, 3, dtype=torch.float64, requires_grad=True)
    context, infonce = nn.Linear(3, 3), InfoNCE(3, targets=3, prediction_steps=2, negatives=4)
    objective = CPC(context, infonce).double()
    plain = InfoNCE(3, prediction_steps=2, negatives=4).double()
    # With contexts that are the embeddings themselves, it is the loss of a module.
    with torch.no_grad():
        context.weight.copy_(torch.eye(3))
        context.bias.zero_()
        plain.W.copy_(infonce.W)
    loss = objective(z, generator=generator())
    torch.testing.assert_close(loss, plain(z, generator=generator()), rtol=1e-12, atol=0)
    loss.backward()
    assert context.weight.grad is not None
    assert z.grad is not None
    assert (z.grad.flatten(0, 2).abs().sum(1) > 0).all()


# A stack of modules


class Rows:
    """A batch in memory."""

    def __init__(self, values: Tensor, shape: tuple[int, ...]) -> None:
        self.values, self.shape = values, shape

    @property
    def rows(self) -> int:
        return len(self.values)

    def read(self, rows: Span, device: torch.device) -> Tensor:
        return self.values[rows.slice].clone()


def chain() -> list[nn.Module]:
    torch.manual_seed(0)
    parts = [
        residual_module(2, stem=3, channels=4),
        residual_module(4, channels=5, stride=2),
        residual_module(5, channels=3),
    ]
    return [part.double() for part in parts]


def objectives() -> list[InfoNCE]:
    return [InfoNCE(n, prediction_steps=2, negatives=4).double() for n in (4, 5, 3)]


def images() -> Rows:
    return Rows(torch.randn(24, 2, 8, 8, dtype=torch.float64, generator=generator()), (3, 4, 2))


def test_blocked_gradients_are_those_of_modules_on_their_own() -> None:
    parts, own = chain(), objectives()
    stack = Stack(parts, isolated=True, observed=[0, 1, 2])
    joint = Joint(own, [(4,), (5,), (3,)])
    batch = images()
    draws = generator(5)
    losses = accumulate_gradients(
        stack, joint, batch, MicroBatches(24, lambda n: n, CPU), generator=draws
    )
    parameters = [*stack.parameters(), *joint.parameters()]
    found = [p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    draws = generator(5)
    x = batch.values
    for part, objective, loss in zip(parts, own, losses, strict=True):
        z = part(x.detach())
        alone = objective(z.mean((2, 3)).reshape(3, 4, 2, -1), generator=draws)
        torch.testing.assert_close(alone, loss, rtol=1e-12, atol=0)
        alone.backward()
        x = z
    for one, other in zip(found, (p.grad for p in parameters), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("size", [1, 5, 24])
@pytest.mark.parametrize("isolated", [True, False])
def test_micro_batches_of_a_stack_give_the_gradients_of_the_batch(
    isolated: bool, size: int
) -> None:
    stack = Stack(chain(), isolated=isolated, observed=[0, 1, 2] if isolated else [2])
    parts: list[InfoNCE] = objectives() if isolated else [objectives()[2]]
    joint = Joint(parts, [(4,), (5,), (3,)] if isolated else [(3,)])
    found = []
    for number in (24, size):
        accumulate_gradients(
            stack,
            joint,
            images(),
            MicroBatches(number, lambda n: n, CPU),
            generator=generator(5),
        )
        found.append([p.grad for p in [*stack.parameters(), *joint.parameters()]])
        for parameter in [*stack.parameters(), *joint.parameters()]:
            parameter.grad = None
    for one, other in zip(*found, strict=True):
        assert one is not None
        assert other is not None
        assert (one - other).norm() <= 1e-12 * one.norm()


def test_end_to_end_the_top_loss_reaches_the_bottom() -> None:
    stack = Stack(chain(), isolated=False, observed=[2])
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)
    assert embed(stack, x).shape == (2, 3)
    embed(stack, x).sum().backward()  # type: ignore[no-untyped-call]
    assert all(p.grad is not None and p.grad.any() for p in stack.parts[0].parameters())


def test_each_module_has_its_own_rate() -> None:
    stack = Stack(chain(), isolated=True, observed=[0, 1, 2])
    joint = Joint(objectives(), [(4,), (5,), (3,)])
    trains = [TrainConfig(lr=rate) for rate in (1e-3, 2e-3, 3e-3)]
    groups = make_optimizer(stack, joint, trains).param_groups
    assert [group["lr"] for group in groups] == [1e-3, 2e-3, 3e-3]
    held = [sum(p.numel() for p in group["params"]) for group in groups]
    own = [
        sum(p.numel() for p in [*part.parameters(), *objective.parameters()])
        for part, objective in zip(stack.parts, joint.parts, strict=True)
    ]
    assert held == own


# Against overfitting


def test_corruption_keeps_the_mean_and_leaves_validation_alone() -> None:
    rows = Rows(torch.ones(1000, 4, 2, 2), (1000,))
    how = MicroBatches(500, lambda n: n, CPU, [Corruption(dropout=0.25, noise=0.2)])
    identity = nn.Identity()
    seen = torch.cat([how.embed(identity.train(), rows, n) for n in (0, 1)])
    assert seen.mean().item() == pytest.approx(1.0, abs=0.02)
    assert not torch.equal(seen[:500], seen[500:])
    torch.testing.assert_close(how.embed(identity.train(), rows, 1), seen[500:])
    assert torch.equal(how.embed(identity.eval(), rows, 0), torch.ones(500, 4))
    assert not Corruption()
    dropped = (Corruption(dropout=0.25)(torch.ones(10000)) == 0).float().mean()
    assert dropped.item() == pytest.approx(0.25, abs=0.03)


def test_averages_are_those_of_a_loop() -> None:
    torch.manual_seed(0)
    module, objective = nn.Linear(2, 2), InfoNCE(2, prediction_steps=1, negatives=1)
    average = WeightAverage(module, objective, 0.7)
    expected = module.weight.detach().clone()
    for step in range(1, 12):
        with torch.no_grad():
            module.weight += torch.randn(2, 2)
        average.update(module, objective, steps=step)
        decay = min(0.7, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * module.weight.detach()
    torch.testing.assert_close(average.module.weight, expected)
    assert not average.module.weight.requires_grad


# Runs


CONTEXT = "[context]\nchannels = 8\nlayers = 2\n\n[module.1]"


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, new_tiny: Callable[[Path], Path]
) -> dict[str, Path]:
    """A run in every mode: folders by mode, and the pipeline file as "file"."""
    place = tmp_path_factory.mktemp("modes")
    file = new_tiny(place)
    text = file.read_text().replace("[module.1]", CONTEXT)
    file.write_text(text)
    found = {"file": file}
    for mode in MODES:
        found[mode] = place / mode
        pipeline = Pipeline.from_file(file, folder=found[mode], device="cpu", mode=mode)
        save_record(pipeline, pipeline.run())
    return found


def record(folder: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((folder / "run.json").read_text())
    return found


@pytest.mark.parametrize("mode", JOINT)
def test_every_mode_freezes_and_probes_all_modules(runs: dict[str, Path], mode: str) -> None:
    found = json.loads((runs[mode] / "run.json").read_text())
    assert found["mode"] == mode
    modules = found["modules"]
    assert [module["module"] for module in modules] == [1, 2, 3]
    with_losses = {"simultaneous": 3, "greedy_supervised": 3, "random": 0}.get(mode, 1)
    assert sum(module["validation_loss"] is not None for module in modules) == with_losses
    assert all(0 <= module["probe_accuracy"] <= 1 for module in modules)
    assert {file.name for file in runs[mode].glob("m*")} == {f"m{n}.safetensors" for n in (1, 2, 3)}
    assert not list((runs[mode] / "checkpoints").glob("*"))
    # Rows that no training touches are the same in all of them.
    iterative = json.loads((runs["iterative"] / "run.json").read_text())
    assert found["probes"][0]["baselines"] == iterative["probes"][0]["baselines"]
    for own, other in zip(modules, iterative["modules"], strict=True):
        assert own["random_probe_accuracy"] == other["random_probe_accuracy"]


def test_random_modules_are_those_that_training_begins_with(runs: dict[str, Path]) -> None:
    found = json.loads((runs["random"] / "run.json").read_text())
    for module in found["modules"]:
        assert module["probe_accuracy"] == module["random_probe_accuracy"]
    space = Pipeline.from_file(runs["file"], device="cpu").workspace
    weights = FrozenWeights.load(runs["random"] / "m1.safetensors")
    for name, tensor in space.build(1, 1).state_dict().items():
        assert torch.equal(weights.tensors[name], tensor)


def test_one_module_is_the_same_in_one_step_and_on_its_own(tiny: Path, tmp_path: Path) -> None:
    tiny.write_text(tiny.read_text().partition("[module.2]")[0])
    for mode in ("iterative", "simultaneous"):
        Pipeline.from_file(tiny, folder=tmp_path / mode, device="cpu", mode=mode).run()
    one, other = (weights_of(tmp_path / mode) for mode in ("iterative", "simultaneous"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_the_first_module_sees_the_same_batches_in_both(runs: dict[str, Path]) -> None:
    logs = [read_metrics(runs[m] / "logs/m1/metrics.jsonl") for m in ("iterative", "simultaneous")]
    first, second = ([line["loss"] for line in log if "loss" in line] for log in logs)
    assert first == second


def test_supervised_modes_learn_labels(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "max_epochs = 3\npatience = 3", "max_epochs = 25\npatience = 25")
    for mode in ("supervised", "greedy_supervised"):
        result = Pipeline.from_file(tiny, folder=tmp_path / mode, device="cpu", mode=mode).run()
        loss = result.stages[-1].record.validation_loss
        assert loss is not None
        assert loss < 0.5 * np.log(2)


@pytest.mark.parametrize("mode", TRAINED)
def test_a_run_that_is_stopped_goes_on_to_the_same_bits(
    runs: dict[str, Path], tmp_path: Path, mode: str
) -> None:
    def stop(module: int, step: int) -> None:
        if step == 7:
            raise StopError

    folder = tmp_path / "stopped"
    arguments = {"folder": folder, "device": "cpu", "mode": mode}
    with pytest.raises(StopError):
        Pipeline.from_file(runs["file"], on_step=stop, **arguments).run()  # type: ignore[arg-type]
    pipeline = Pipeline.from_file(runs["file"], **arguments)  # type: ignore[arg-type]
    states = [status.state for status in pipeline_status(pipeline)]
    assert states == ["training"] * 3
    assert not removable(pipeline)
    pipeline.run()
    assert_same_run(folder, runs[mode])


def test_noise_and_averages_resume_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    switches = "dropout = 0.2\nnoise = 0.3\naverage = 0.9\nmicro_batch = 30"
    edit(tiny, "lr = 3e-3", f"lr = 3e-3\n{switches}")
    tiny.write_text(tiny.read_text().partition("[module.3]")[0])

    def stop(module: int, step: int) -> None:
        if (module, step) == (2, 7):
            raise StopError

    Pipeline.from_file(tiny, folder=tmp_path / "whole", device="cpu").run()
    with pytest.raises(StopError):
        Pipeline.from_file(tiny, folder=tmp_path / "parts", device="cpu", on_step=stop).run()
    Pipeline.from_file(tiny, folder=tmp_path / "parts", device="cpu").run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_what_is_switched_off_is_no_part_of_a_recipe(tiny: Path, tmp_path: Path) -> None:
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run(until=1)
    edit(tiny, "lr = 3e-3", "lr = 3e-3\ndropout = 0.0\naverage = 0.0")
    result = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run(until=1)
    assert not result.stages[0].trained
    edit(tiny, "dropout = 0.0", "dropout = 0.1")
    (status, *_) = pipeline_status(Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu"))
    assert "train.dropout" in status.why


def paced(file: Path) -> Path:
    """Two modules, the second at half the pace, over two epochs of 9 steps: an odd number."""
    edit(file, "[module.2]", "[module.2]\ntrain.update_every = 2")
    edit(file, "checkpoint_every = 2", "checkpoint_every = 1")
    return shorten(file, modules=2, batch=4, epochs=2, chunk=7, probe=False)


def test_a_pace_is_that_of_a_loop(tiny: Path, tmp_path: Path) -> None:
    """In steps 0, 2, 4, …, by the gradients of these steps alone."""
    found: list[dict[str, Tensor]] = []

    def note(module: int, step: int) -> None:
        state = check_checkpoint(pipeline.workspace.joint_checkpoint_path)
        found.append({**state["module"], **state["objective"]})

    pipeline = Pipeline.from_file(
        paced(tiny), folder=tmp_path / "out", device="cpu", mode="simultaneous", on_step=note
    )
    pipeline.run()
    space, source = pipeline.workspace, pipeline.source
    ids, _ = held_out(source.split("unlabeled"), seed=3, fraction=0.1)
    modules = nn.ModuleList([space.build(1, 1), space.build(2, 6)])
    objectives = nn.ModuleList(
        build_objective(pipeline.config.stage(n).objective, channels=channels, seed=3, index=n)
        for n, channels in ((1, 6), (2, 8))
    )
    parts = list(zip(modules, objectives, strict=True))
    adams = [torch.optim.Adam([*m.parameters(), *o.parameters()], lr=3e-3) for m, o in parts]
    assert len(found) == 18
    for step in range(18):
        epoch, number = divmod(step, 9)
        order = shuffled_order(np.arange(36), chunk=1, pool=1, seed=3, epoch=epoch).indexes
        batch = [Request(ids[place]) for place in order[4 * number : 4 * number + 4]]
        samples = torch.from_numpy(read_stacked(source, batch))
        x, draws = samples.flatten(0, 2), generator(derive_seed(3, "negatives", 1, step))
        for index, (module, objective) in enumerate(parts, start=1):
            z = module(x)
            adams[index - 1].zero_grad()
            own = z.mean((2, 3)).reshape(*samples.shape[:3], -1)
            objective(own, generator=draws).backward()
            if index == 1 or step % 2 == 0:
                adams[index - 1].step()
            x = z.detach()
        expected = {**modules.state_dict(prefix="parts."), **objectives.state_dict(prefix="parts.")}
        # An update moves a weight by about the rate, 3e-3.
        torch.testing.assert_close(found[step], expected, rtol=0, atol=1e-4)
        if step > 0:
            still = {n for n in expected if torch.equal(found[step][n], found[step - 1][n])}
            assert still == {n for n in expected if n.startswith("parts.1.") and step % 2}


def test_a_pace_goes_on_where_it_was(tiny: Path, tmp_path: Path) -> None:
    """After an odd number of steps, in the first epoch: whatever is the best one ends later."""

    def stop(module: int, step: int) -> None:
        if step == 3:
            raise StopError

    file, mode = paced(tiny), "simultaneous"
    Pipeline.from_file(file, folder=tmp_path / "whole", device="cpu", mode=mode).run()
    folder = tmp_path / "parts"
    with pytest.raises(StopError):
        Pipeline.from_file(file, folder=folder, device="cpu", mode=mode, on_step=stop).run()
    steps: list[int] = []
    Pipeline.from_file(
        file, folder=folder, device="cpu", mode=mode, on_step=lambda _, step: steps.append(step)
    ).run()
    assert steps[0] == 4
    assert_same_run(folder, tmp_path / "whole")


def test_a_pace_is_for_steps_that_train_all_and_changes_nothing_else(
    runs: dict[str, Path], tmp_path: Path
) -> None:
    text = runs["file"].read_text().replace("[module.2]", "[module.2]\ntrain.update_every = 2")
    file = runs["file"].with_name("paced.toml")
    file.write_text(text)
    for mode in ("iterative", "cpc", "supervised"):
        pipeline = Pipeline.from_file(file, folder=runs[mode], device="cpu", mode=mode)
        assert {status.state for status in pipeline_status(pipeline)} <= {"sealed", "frozen"}
    pipeline = Pipeline.from_file(file, folder=runs["simultaneous"], mode="simultaneous")
    assert "update_every" in pipeline_status(pipeline)[0].why


def test_the_training_loss_is_of_the_frozen_weights(tiny: Path, tmp_path: Path) -> None:
    """With a rate of nothing, it is that of the initial weights on samples that were trained on."""
    edit(tiny, "lr = 3e-3", "lr = 1e-30")
    tiny.write_text(tiny.read_text().partition("[module.2]")[0])
    pipeline = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu")
    record = pipeline.run().stages[0].record
    config, source = pipeline.config, pipeline.source
    ids, held = held_out(source.split("unlabeled"), seed=3, fraction=0.1)
    seen = held_out(ids, seed=derive_seed(3, "seen"), fraction=len(held) / len(ids))[1]
    assert len(seen) == len(held)
    module = pipeline.workspace.build(1, 1).eval()
    objective = build_objective(config.stage(1).objective, channels=6, seed=3, index=1)
    for chosen, recorded in ((seen, record.train_loss), (held, record.validation_loss)):
        values = torch.from_numpy(read_stacked(source, [Request(i) for i in chosen]))
        with torch.no_grad():
            z = module(values.flatten(0, 2)).mean((2, 3)).reshape(*values.shape[:3], -1)
            draws = generator(derive_seed(3, "validation negatives", 1, 0))
            assert recorded == pytest.approx(float(objective(z, generator=draws)), rel=1e-5)


def test_curves_are_of_inputs_as_they_are(tiny: Path, tmp_path: Path) -> None:
    """What is done to inputs in training does not show in a module's losses."""
    tiny.write_text(tiny.read_text().partition("[module.2]")[0] + "train.dropout = 0.9\n")
    edit(tiny, "lr = 3e-3", "lr = 1e-30")
    losses = {}
    for dropout in ("0.9", "0.0"):
        edit(tiny, "dropout = 0.9", f"dropout = {dropout}")
        pipeline = Pipeline.from_file(tiny, folder=tmp_path / dropout, device="cpu")
        record = pipeline.run().stages[0].record
        lines = read_metrics(tmp_path / dropout / "logs" / "m1" / "metrics.jsonl")
        (best,) = [
            line for line in lines if "train_loss" in line and line["epoch"] == record.best_epoch
        ]
        assert best["train_loss"] == record.train_loss
        assert best["validation_loss"] == record.validation_loss
        losses[dropout] = (record.train_loss, record.validation_loss)
    assert losses["0.9"] == pytest.approx(losses["0.0"], rel=1e-6)


def test_targets_are_not_corrupted() -> None:
    class Copy(nn.Module):
        predicts = "input"

        def forward(self, x: Tensor) -> Tensor:
            return x

        def pool(self, z: Tensor) -> Tensor:
            return z.movedim(1, -1)

    rows = Rows(torch.ones(4, 2, 50), (4,))
    how = MicroBatches(4, lambda n: n, CPU, [Corruption(dropout=0.5)])
    seen = how.embed(Copy().train(), rows, 0)
    assert (seen[..., :2] == 0).any()
    assert torch.equal(seen[..., 2:], torch.ones(4, 50, 2))


def test_every_module_of_a_stack_is_corrupted_in_its_own_way() -> None:
    parts = [nn.Identity(), nn.Identity()]
    stack = Stack(parts, isolated=True, observed=[0, 1]).train()
    rows = Rows(torch.ones(500, 4, 1, 1), (500,))
    corruptions = [Corruption(dropout=0.5), Corruption(dropout=0.2)]
    seen = MicroBatches(500, lambda n: n, CPU, corruptions).embed(stack, rows, 0)
    zero = (seen == 0).float().reshape(500, 2, 4).mean((0, 2))
    # The second one sees what the first made of the corrupted input of its own.
    assert zero.tolist() == pytest.approx([0.5, 0.6], abs=0.05)


def test_recorded_losses_are_of_the_frozen_weights(runs: dict[str, Path]) -> None:
    for index in (1, 2, 3):
        lines = read_metrics(runs["simultaneous"] / f"logs/m{index}/metrics.jsonl")
        epochs = [line for line in lines if "validation_loss" in line]
        own = FrozenWeights.load(runs["simultaneous"] / f"m{index}.safetensors").record
        assert own.validation_loss == epochs[own.best_epoch - 1]["validation_loss"]
    logs = [
        read_metrics(runs["simultaneous"] / f"logs/m{index}/metrics.jsonl") for index in (1, 2, 3)
    ]
    sums = [sum(log[row]["validation_loss"] for log in logs) for row in (4, 9, 14)]
    assert own.best_epoch == 1 + sums.index(min(sums))


# What does not fit


def test_what_is_stale_is_trained_again_with_the_reason(
    runs: dict[str, Path], tiny: Path, tmp_path: Path
) -> None:
    arguments = {"folder": tmp_path / "out", "device": "cpu", "mode": "simultaneous"}
    edit(tiny, "max_epochs = 3", "max_epochs = 1")
    assert Pipeline.from_file(tiny, **arguments).run().stages[0].trained  # type: ignore[arg-type]
    assert not Pipeline.from_file(tiny, **arguments).run().stages[0].trained  # type: ignore[arg-type]
    edit(tiny, "lr = 3e-3", "lr = 2e-3")
    pipeline = Pipeline.from_file(tiny, **arguments)  # type: ignore[arg-type]
    for status in pipeline_status(pipeline):
        assert (status.state, status.why[:21]) == ("stale", "module.1.train.lr 0.0")
    assert {thing.path.name for thing in removable(pipeline)} == {
        f"m{n}.safetensors" for n in (1, 2, 3)
    }
    other = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu")
    assert pipeline_status(other)[0].why == "mode simultaneous → iterative"
    assert pipeline.run().stages[0].trained
    (tmp_path / "out" / "m2.safetensors").unlink()
    assert [s.state for s in pipeline_status(pipeline)] == ["frozen", "missing", "waiting"]
    edit(tiny, "lr = 2e-3", "lr = 1e-3")
    changed = pipeline_status(Pipeline.from_file(tiny, **arguments))  # type: ignore[arg-type]
    assert [s.state for s in changed] == ["stale", "missing", "stale"]
    assert pipeline.run().stages[2].trained


def test_labels_are_wanted_by_name(tiny: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        edit(tiny, f', labels = "{split}_labels.npy"', "")
    done = gim_stage("run", tiny, "--dir", tmp_path / "out", "--mode", "supervised")
    message = one_error(done, 2)
    assert "mode: is 'supervised', which needs labels" in message
    assert str(tiny) in message


def test_labels_may_be_any_numbers(tiny: Path, tmp_path: Path) -> None:
    for split in ("train", "test"):
        labels = np.load(tmp_path / f"{split}_labels.npy")
        np.save(tmp_path / f"{split}_labels.npy", np.where(labels == 0, -5, 10**12))
    for classifier in ("logistic", "adam"):
        edit(tiny, "[patches]", f'[probe]\nclassifier = "{classifier}"\n\n[patches]')
        folder = tmp_path / classifier
        result = Pipeline.from_file(tiny, folder=folder, device="cpu", mode="supervised").run()
        assert result.accuracy(3) is not None
        edit(tiny, f'[probe]\nclassifier = "{classifier}"\n\n', "")


def test_code_that_computes_something_else_is_probed_again(tiny: Path, tmp_path: Path) -> None:
    code = (
        "from torch import nn\n"
        "class Block(nn.Module):\n"
        "    def __init__(self, in_channels):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(in_channels, 4, 3)\n"
        "    def forward(self, x):\n"
        "        return self.conv(x).relu()\n"
    )
    (tmp_path / "mine.py").write_text(code)
    text = tiny.read_text().partition("[module.1]")[0]
    tiny.write_text(text + '[module.1]\nbuild = "mine:Block"\n')
    command: list[str | Path] = [
        "run",
        tiny,
        "--mode",
        "random",
        "--dir",
        tmp_path / "out",
        "--json",
        "-q",
    ]
    before = json.loads(gim_stage(*command).stdout)["modules"][0]
    (tmp_path / "mine.py").write_text(code.replace("self.conv(x).relu()", "0 * self.conv(x)"))
    after = json.loads(gim_stage(*command).stdout)["modules"][0]
    assert before["probe_accuracy"] > 0.8
    assert after["probe_accuracy"] < 0.8
    assert after["random_probe_accuracy"] == after["probe_accuracy"]


REFUSED = {
    "module.2.train.batch": ("simultaneous", "[module.2]", "[module.2]\ntrain.batch = 4"),
    "module.3.train.max_epochs": ("cpc", "[module.3]", "[module.3]\ntrain.max_epochs = 4"),
    "module.1.objective.negatives_group": (
        "iterative",
        "negatives = 4",
        "negatives = 4\nnegatives_group = 3",
    ),
    "mode": ("upside down", "seed = 3", "seed = 3"),
    "module.1.train.dropout": ("iterative", "lr = 3e-3", "lr = 3e-3\ndropout = 1.0"),
}


@pytest.mark.parametrize("key", REFUSED)
def test_what_one_step_cannot_have_is_refused_by_name(tiny: Path, key: str) -> None:
    mode, old, new = REFUSED[key]
    edit(tiny, old, new)
    with pytest.raises(ConfigError) as caught:
        Pipeline.from_file(tiny, mode=mode)
    assert key.replace("module.1.train.dropout", "train.dropout") in str(caught.value)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "--module", "1", "--pipeline"],
        ["extract", "--module", "1", "--pipeline"],
        ["prove"],
        ["run", "--from", "2"],
        ["run", "--until", "2"],
        ["run", "--workers", "1"],
        ["run", "--allowed-disk", "1GB"],
    ],
    ids=lambda words: " ".join(words),
)
def test_commands_for_stages_say_that_there_are_none(
    tiny: Path, tmp_path: Path, command: list[str]
) -> None:
    edit(tiny, "seed = 3", 'seed = 3\nmode = "simultaneous"')
    done = gim_stage(*command, tiny, "--dir", tmp_path / "out")
    message = one_error(done, 2)
    assert "in one step" in message or "makes no caches" in message


def test_a_plan_says_what_one_step_takes(runs: dict[str, Path], tmp_path: Path) -> None:
    together = plan_joint(Pipeline.from_file(runs["file"], device="cpu", mode="simultaneous"))
    assert together.modules == 3
    assert together.training.step.counted["parameters"] > 0
    assert together.forward_flops > 0
    done = gim_stage("plan", runs["file"], "--mode", "random", "--dir", tmp_path / "out")
    assert "trains nothing" in one_error(done, 2)
    small = ["--mode", "cpc", "--dir", str(tmp_path / "out"), "--allowed-mem", "1MB"]
    assert "modules 1 to 3" in one_error(gim_stage("run", runs["file"], *small), 3)


# The command line and the text that is recorded


def test_the_option_has_all_modes() -> None:
    @mode_option
    def command() -> None: ...

    (option,) = command.__click_params__  # type: ignore[attr-defined]
    assert tuple(option.type.choices) == MODES


def test_a_mode_has_a_folder_of_its_own_and_exports(
    runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = gim_stage("run", runs["file"], "--mode", "random", "--json", "-q")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["folder"] == "cache/tiny-random"
    done = gim_stage("status", runs["file"], "--mode", "random", "--json")
    assert [m["state"] for m in json.loads(done.stdout)["modules"]] == ["frozen"] * 3
    done = gim_stage("export", runs["file"], "--mode", "random", "--to", "random.safetensors")
    assert done.returncode == 0, done.stderr
    recorded = FrozenWeights.load(Path("cache/tiny-random/m1.safetensors")).pipeline_text
    assert parse_pipeline(recorded, file="recorded").mode == "random"
