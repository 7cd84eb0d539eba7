"""Micro-batches give the gradients of the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from gim_stagewise.models import CellMean, embed, pool, target_channels
from gim_stagewise.models.residual import residual_module
from gim_stagewise.models.resnet import resnet34_module, resnet50_module
from gim_stagewise.models.sequence import conv1d_module, gru_module
from gim_stagewise.objectives import InfoNCE
from gim_stagewise.stage.step import (
    MicroBatches,
    accumulate_gradients,
    embed_batch,
    evaluate_batch,
    is_streamed,
)
from gim_stagewise.windows import Span

CPU = torch.device("cpu")
GRID = (3, 4, 2)


@dataclass
class Rows:
    """A batch in memory."""

    values: Tensor
    shape: tuple[int, ...] = GRID

    @property
    def rows(self) -> int:
        return len(self.values)

    def read(self, rows: Span, device: torch.device) -> Tensor:
        return self.values[rows.slice]


class Own(nn.Module):
    """A module of one's own, with dropout before and in its pool."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 6, 3)
        self.norm = nn.GroupNorm(2, 6)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = nn.functional.dropout(self.norm(self.conv(x)).relu(), 0.5, self.training)
        return z

    def pool(self, z: Tensor) -> Tensor:
        pooled: Tensor = nn.functional.dropout(z.amax((2, 3)), 0.2, self.training)
        return pooled


class Recurrent(nn.Module):
    """A context network: rows are whole sequences, its embeddings one per step."""

    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(2, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.gru(x)[0]
        return outputs

    def pool(self, z: Tensor) -> Tensor:
        return z


def images() -> Rows:
    return Rows(torch.randn(24, 2, 8, 8, dtype=torch.float64))


MODULES = {
    "residual": lambda: residual_module(2, channels=5, blocks=2, stem=3),
    "resnet50": lambda: resnet50_module(2, blocks=[1, 4], width=4),
    "resnet34": lambda: resnet34_module(2, blocks=[1, 4], width=4, init="delta_orthogonal"),
    "own, with dropout": Own,
}


def gradients(*modules: nn.Module) -> list[Tensor]:
    found = []
    for module in modules:
        for parameter in module.parameters():
            assert parameter.grad is not None
            found.append(parameter.grad.clone())
            parameter.grad = None
    return found


def recorded_pass(module: nn.Module, objective: InfoNCE, batch: Rows, how: MicroBatches) -> Tensor:
    """The reference: one graph over the whole batch, drawing what each micro-batch draws."""
    parts = []
    for number, rows in enumerate(how.of(batch)):
        torch.manual_seed(how.seed(number))
        parts.append(embed(module, batch.values[rows.slice]))
    embeddings = torch.cat(parts)
    generator = torch.Generator().manual_seed(5)
    loss: Tensor = objective(
        embeddings.reshape(*batch.shape, *embeddings.shape[1:]), generator=generator
    )
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.detach()


def assert_equal_gradients(module: nn.Module, objective: InfoNCE, batch: Rows, size: int) -> None:
    how = MicroBatches(size, lambda number: 100 + number, CPU)
    module.double().train()
    objective.double()
    expected_loss = recorded_pass(module, objective, batch, how)
    expected = gradients(module, objective)
    loss = accumulate_gradients(
        module, objective, batch, how, generator=torch.Generator().manual_seed(5)
    )
    torch.testing.assert_close(loss, expected_loss, rtol=1e-13, atol=0)
    for own, reference in zip(gradients(module, objective), expected, strict=True):
        assert (own - reference).norm() <= 1e-12 * reference.norm()


@pytest.mark.parametrize("size", [1, 5, 8, 23, 24])
@pytest.mark.parametrize("kind", MODULES)
def test_gradients_are_those_of_one_pass_over_the_batch(kind: str, size: int) -> None:
    torch.manual_seed(0)
    module = MODULES[kind]()
    batch = images()
    channels = pool(module, module(batch.values[:1].float())).shape[1]
    objective = InfoNCE(channels, prediction_steps=2, negatives=7)
    assert_equal_gradients(module, objective, batch, size)


@pytest.mark.parametrize("bptt", [True, False])
@pytest.mark.parametrize("size", [1, 2, 3])
def test_what_recurrent_networks_predict_is_split_by_sample(size: int, bptt: bool) -> None:
    torch.manual_seed(0)
    batch = Rows(torch.randn(3, 4, 9, dtype=torch.float64), shape=(3,))
    objective = InfoNCE(3, targets=4, prediction_steps=3, negatives=4, skip=0)
    module = dense(gru_module(4, channels=3, bptt=bptt))
    assert not is_streamed(module, objective)
    assert_equal_gradients(module, objective, batch, size)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_context_networks_are_split_by_sample(size: int) -> None:
    torch.manual_seed(0)
    batch = Rows(torch.randn(3, 9, 2, dtype=torch.float64), shape=(3,))
    objective = InfoNCE(5, prediction_steps=3, negatives=4, skip=0)
    assert_equal_gradients(Recurrent(), objective, batch, size)


class Shifted(nn.Module):
    """A context network of some steps, which predicts its input."""

    predicts = "input"

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        z: Tensor = self.conv(x).tanh()
        return z


def dense(module: nn.Module) -> nn.Module:
    """Every output of it is an embedding."""
    module.pool = CellMean(1)  # type: ignore[assignment]
    return module


DENSE: dict[str, Callable[[], tuple[nn.Module, tuple[int, ...]]]] = {
    "sequences": lambda: (dense(conv1d_module(2, channels=3, kernel=4, stride=2)), (6, 2, 41)),
    "targets": lambda: (dense(Shifted()), (6, 3, 20)),
    "images": lambda: (dense(residual_module(2, channels=3, stem=4)), (6, 2, 9, 5)),
}


@pytest.mark.parametrize("piece", [1, 10**6])
@pytest.mark.parametrize("size", [1, 2, 4, 5])
@pytest.mark.parametrize(("window", "group"), [(None, None), (8, None), (8, 2), (None, 4)])
@pytest.mark.parametrize("kind", DENSE)
def test_embeddings_that_are_streamed_have_the_same_gradients(
    kind: str,
    window: int | None,
    group: int | None,
    size: int,
    piece: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("gim_stagewise.objectives.rows.SUMMED_BYTES", piece)
    monkeypatch.setattr("gim_stagewise.objectives.rows.SUMMED_CHANNELS", 1)
    torch.manual_seed(0)
    module, shape = DENSE[kind]()
    batch = Rows(torch.randn(shape, dtype=torch.float64), shape=shape[:1])
    objective = InfoNCE(
        3,
        targets=target_channels(module, shape[1]),
        prediction_steps=2,
        negatives=4,
        skip=0,
        window=window,
        group=group,
    )
    assert is_streamed(module, objective)
    assert_equal_gradients(module, objective, batch, size)
    losses = [
        evaluate_batch(
            module.eval(),
            objective,
            batch,
            MicroBatches(own, lambda number: number, CPU),
            generator=torch.Generator().manual_seed(3),
        )
        for own in (size, len(batch.values))
    ]
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-13, atol=0)


def test_negatives_come_from_the_whole_batch() -> None:
    """A row of one micro-batch has a gradient from the contexts of another."""
    batch = images()
    objective = InfoNCE(6, prediction_steps=1, negatives=50).double()
    module = Own().double().eval()
    embeddings = embed_batch(module, batch, MicroBatches(5, lambda _: 0, CPU)).requires_grad_()
    last = embeddings.reshape(*GRID, -1)
    loss: Tensor = objective(last, generator=torch.Generator().manual_seed(0))
    loss.backward()  # type: ignore[no-untyped-call]
    assert embeddings.grad is not None
    assert (embeddings.grad.abs().sum(1) > 0).all()


def test_the_global_random_state_is_left_alone() -> None:
    module, objective = Own(), InfoNCE(6, prediction_steps=1, negatives=3)
    batch = Rows(torch.randn(24, 2, 8, 8))
    how = MicroBatches(7, lambda number: number, CPU)
    before = torch.get_rng_state()
    accumulate_gradients(module, objective, batch, how, generator=torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
