"""Training stops when the validation loss does, and freezes the best epoch, stopped or not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from helpers import StopError
from torch import Tensor, nn

from gim_stagewise.config import AugmentConfig, TrainConfig
from gim_stagewise.objectives import Objective
from gim_stagewise.progress import Silent
from gim_stagewise.sources import PatchSource
from gim_stagewise.sources.parts import ArrayPart, PartsSource
from gim_stagewise.stage.checkpoint import TrainingRecord
from gim_stagewise.stage.job import TrainJob
from gim_stagewise.stage.metrics import read_metrics
from gim_stagewise.stage.order import held_out
from gim_stagewise.stage.train import train_module
from gim_stagewise.windows import PatchGrid

SEED = 3
# Of 35 samples 11 are held out, a batch of 8 and one of 3; the others make 3 steps an epoch.
SAMPLES, HELD_OUT, BATCH, STEPS = 35, 11, 8, 3
# Each sample is its own number, squared so that no two batches of different ones are alike.
NUMBERS = np.arange(SAMPLES, dtype=np.float32) ** 2


class Counts(nn.Module):
    """Embeddings of two channels: the sample, and a weight, whatever the sample."""

    def __init__(self) -> None:
        super().__init__()
        self.count = nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.count.expand_as(x)], 1)


class Course(Objective):
    """A course of losses that depends on weights and samples alone, so that it can be resumed.

    Adam at a rate of 1 adds 1 to the weight in every step. On samples that are judged the loss is
    their mean, and what the course says of the epoch that the weight has come to.
    """

    def __init__(self, losses: tuple[float, ...]) -> None:
        super().__init__()
        self.losses = losses

    def forward(
        self, z: Tensor, *, generator: torch.Generator, labels: Tensor | None = None
    ) -> Tensor:
        numbers, counts = z[..., 0], z[..., 1]
        if torch.is_grad_enabled():
            return -counts.mean()
        epoch = round(float(counts.mean())) // STEPS
        return numbers.mean() + self.losses[epoch - 1]


def job(
    folder: Path, losses: tuple[float, ...], config: TrainConfig, stop_at: int | None = None
) -> TrainJob:
    images = NUMBERS.repeat(8).reshape(SAMPLES, 1, 2, 4)
    data = PartsSource({"unlabeled": ArrayPart(images, None)})

    def on_step(step: int) -> None:
        if step == stop_at:
            raise StopError

    return TrainJob(
        label="module 1",
        stage=1,
        module=Counts(),
        objective=Course(losses),
        source=PatchSource(data, AugmentConfig(), PatchGrid(2, 2), seed=SEED),
        grid=(1, 2),
        trains=[config],
        micro_batch=2 * BATCH,
        seed=SEED,
        device=torch.device("cpu"),
        checkpoint=folder / "m1.pt",
        logs=[folder / "logs"],
        run="a run",
        on_step=on_step,
    )


class Case(NamedTuple):
    losses: tuple[float, ...]
    epochs: int
    best: int


CONFIG = TrainConfig(
    batch=BATCH,
    lr=1.0,
    max_epochs=9,
    patience=3,
    validation=HELD_OUT / SAMPLES,
    checkpoint_every=2,
)
COURSES = {
    "better once": Case((3, 1, 2, 2, 2, 0), epochs=5, best=2),
    "equal is not better": Case((3, 1, 1, 1, 1, 0), epochs=5, best=2),
    "better in time": Case((5, 3, 4, 4, 2, 3, 3, 3, 0), epochs=8, best=5),
    "never better": Case((1, 2, 3, 4, 0), epochs=4, best=1),
    "better to the end": Case((9, 8, 7, 6, 5, 4, 3, 2, 1, 0), epochs=9, best=9),
}


def trained(
    folder: Path, case: Case, stop_at: int | None = None
) -> tuple[dict[str, Tensor], TrainingRecord]:
    tensors, (record,) = train_module(job(folder, case.losses, CONFIG, stop_at), Silent())
    return tensors, record


@pytest.mark.parametrize("case", COURSES.values(), ids=COURSES.keys())
def test_training_stops_in_time_and_gives_the_best_epochs_weights(
    tmp_path: Path, case: Case
) -> None:
    tensors, record = trained(tmp_path, case)
    assert (record.epochs, record.best_epoch) == (case.epochs, case.best)
    # A step adds 1 to the weight: it says which epoch it is of.
    assert float(tensors["count"]) == pytest.approx(case.best * STEPS)
    assert record.validation_loss == min(own for _, own in record.epoch_losses)
    assert record.epoch_losses[case.best - 1] == [record.train_loss, record.validation_loss]
    logged = read_metrics(tmp_path / "logs" / "metrics.jsonl")
    assert sum("validation_loss" in line for line in logged) == case.epochs


def test_training_that_is_stopped_anywhere_gives_the_same(tmp_path: Path) -> None:
    """In the middle of any epoch, and after its end; before the best one, in it and past it."""
    case = COURSES["better once"]
    tensors, expected = trained(tmp_path / "whole", case)
    for step in range(1, case.epochs * STEPS + 1):
        folder = tmp_path / str(step)
        with pytest.raises(StopError):
            trained(folder, case, stop_at=step)
        again, record = trained(folder, case)
        assert torch.equal(again["count"], tensors["count"]), step
        assert replace(record, seconds=0) == replace(expected, seconds=0), step


def test_training_that_is_stopped_in_every_epoch_gives_the_same(tmp_path: Path) -> None:
    case = COURSES["better in time"]
    tensors, expected = trained(tmp_path / "whole", case)
    for epoch in range(case.epochs):
        with pytest.raises(StopError):
            trained(tmp_path / "parts", case, stop_at=epoch * STEPS + 2)
    again, record = trained(tmp_path / "parts", case)
    assert torch.equal(again["count"], tensors["count"])
    assert replace(record, seconds=0) == replace(expected, seconds=0)


def test_the_validation_loss_is_the_mean_over_held_out_samples(tmp_path: Path) -> None:
    """Not over batches, of which the last one is smaller."""
    case = COURSES["better once"]
    ids = [f"unlabeled/{number}" for number in range(SAMPLES)]
    _, held = held_out(ids, seed=SEED, fraction=CONFIG.validation)
    numbers = [NUMBERS[ids.index(item_id)] for item_id in held]
    assert len(numbers) == HELD_OUT
    batches = [np.mean(numbers[:BATCH]), np.mean(numbers[BATCH:])]
    assert abs(np.mean(batches) - np.mean(numbers)) > 1
    _, record = trained(tmp_path, case)
    found = [own for _, own in record.epoch_losses]
    assert found == pytest.approx([np.mean(numbers) + own for own in case.losses[: case.epochs]])
