"""Train a module, or all modules in one step, to convergence on what a source gives.

"Convergence" is early stopping on held-out samples: training ends after ``patience`` epochs without
a better validation loss (the sum, where there are several), or after ``max_epochs``, and the best
weights are kept.

Nothing random is stateful (see `gim_stagewise.seeds`), so a checkpoint is the weights, the
optimizer's state and a few counters, and training goes on from the middle of an epoch exactly
as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from gim_stagewise.errors import NonFiniteError
from gim_stagewise.models import Stack
from gim_stagewise.objectives import Objective
from gim_stagewise.progress import Progress, Task
from gim_stagewise.seeds import derive_seed
from gim_stagewise.stage.batch import SampleBatch
from gim_stagewise.stage.checkpoint import (
    TrainingRecord,
    load_checkpoint,
    module_tensors,
    peek_checkpoint,
    save_checkpoint,
)
from gim_stagewise.stage.feed import SampleReader
from gim_stagewise.stage.freeze import training_numerics
from gim_stagewise.stage.job import TrainJob
from gim_stagewise.stage.loader import Loader, validation_batches
from gim_stagewise.stage.metrics import MetricsLog
from gim_stagewise.stage.optimize import WeightAverage, make_optimizer
from gim_stagewise.stage.order import held_out
from gim_stagewise.stage.step import (
    Corruption,
    MicroBatches,
    accumulate_gradients,
    evaluate_batch,
)


@dataclass
class _Counters:
    """Where training is, and the best it has seen."""

    epoch: int = 0
    step_in_epoch: int = 0
    # Of the best epoch: on samples that are trained on, and on those that are held out.
    best_train_losses: list[float] = field(default_factory=list)
    best_losses: list[float] = field(default_factory=list)
    best_epoch: int = 0
    # Of each epoch: those on samples that are trained on, and on those that are held out.
    epoch_losses: list[list[list[float]]] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False
    micro_batch: int = 0
    # Under which training went on, one after the other.
    numerics: list[dict[str, Any]] = field(default_factory=list)


def train_module(
    job: TrainJob, progress: Progress
) -> tuple[dict[str, Tensor], list[TrainingRecord]]:
    """Train until convergence.

    Returns
    -------
    (dict, list of TrainingRecord)
        The best epoch's weights (on the CPU), and how training went: a record for each loss.

    Raises
    ------
    ConfigError
        If there are too few samples for a batch, or for a validation set.
    NonFiniteError
        If the loss becomes NaN or infinite.
    """
    return _Trainer(job, progress).run()


class _Trainer:
    def __init__(self, job: TrainJob, progress: Progress) -> None:
        self.job = job
        self.progress = progress
        self.module = job.module.to(job.device)
        self.objective = job.objective.to(job.device)
        self.optimizer = make_optimizer(self.module, self.objective, job.trains)
        self.average: WeightAverage | None = None
        if job.config.average:
            self.average = WeightAverage(self.module, self.objective, job.config.average)
        ids = job.ids
        self.train_ids, self.validation_ids = held_out(
            ids, seed=job.seed, fraction=job.config.validation
        )
        # As many of the samples that are trained on as are held out, to compare losses on both.
        share = min(1.0, len(self.validation_ids) / len(self.train_ids))
        _, self.seen_ids = held_out(
            self.train_ids, seed=derive_seed(job.seed, "seen"), fraction=share
        )
        self.reader = SampleReader(
            job.source,
            samples=len(ids),
            window=job.config.shuffle_window,
            pin=job.device.type == "cuda",
        )
        self.loader = Loader(
            job.source,
            self.train_ids,
            reader=self.reader,
            batch=job.config.batch,
            window=job.config.shuffle_window,
            seed=job.seed,
            stage=job.stage,
            grid=job.grid,
        )
        self.at = _Counters(micro_batch=job.micro_batch, numerics=[training_numerics(job.device)])
        self.best = module_tensors(self.module)
        self.logs = [MetricsLog(folder) for folder in job.logs]

    def run(self) -> tuple[dict[str, Tensor], list[TrainingRecord]]:
        self._resume()
        self.started = time.monotonic() - self.at.seconds
        batch = self.job.config.batch
        total = self.job.config.max_epochs * self.loader.steps * batch
        for log in self.logs:
            log.open(steps_done=self.steps_done)
        try:
            done = self.steps_done * batch
            label = f"{self.job.label}: train"
            with self.progress.task(label, total=total, done=done, unit="sample") as task:
                while not self.at.finished:
                    self._train_epoch(task)
                    self._end_epoch(task)
                    self._save()
        finally:
            for log in self.logs:
                log.close()
        return self.best, self._records()

    def _records(self) -> list[TrainingRecord]:
        losses = zip(self.at.best_train_losses, self.at.best_losses, strict=True)
        return [  # of each objective
            TrainingRecord(
                epochs=self.at.epoch,
                best_epoch=self.at.best_epoch,
                train_loss=train_loss,
                validation_loss=validation_loss,
                seconds=self.at.seconds,
                numerics=_all_of(self.at.numerics),
                micro_batch=self.job.micro_batch,
                shuffle_quality=self.loader.shuffle_quality,
                epoch_losses=[[own[number] for own in pair] for pair in self.at.epoch_losses],
            )
            for number, (train_loss, validation_loss) in enumerate(losses)
        ]

    @property
    def steps_done(self) -> int:
        return self.at.epoch * self.loader.steps + self.at.step_in_epoch

    def _train_epoch(self, task: Task) -> None:
        at, config = self.at, self.job.config
        self.module.train()
        for batch in self.loader.batches(at.epoch, start=at.step_in_epoch):
            losses = self._step(batch, self.steps_done)
            at.step_in_epoch += 1
            done = self.steps_done
            for log, loss in zip(self.logs, losses, strict=True):
                log.write(done, at.epoch + 1, loss=loss)
            task.advance(config.batch, loss=sum(losses), epoch=at.epoch + 1)
            if done % config.checkpoint_every == 0:
                self._save()
            if self.job.on_step is not None:
                self.job.on_step(done)

    def _step(self, batch: SampleBatch, step: int) -> list[float]:
        losses = accumulate_gradients(
            self.module,
            self.objective,
            batch,
            self._micro_batches("forward", step),
            generator=self._generator("negatives", step),
            labels=self._labels(batch),
        )
        values = self._finite(losses, "the loss", step)
        own_pace = isinstance(self.module, Stack) and self.module.isolated
        for group, train in zip(self.optimizer.param_groups, self.job.trains, strict=True):
            if own_pace and step % train.update_every:
                for parameter in group["params"]:
                    parameter.grad = None
        self.optimizer.step()
        # Now rather than before the next backward: nothing holds gradients during pass 1.
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.module, self.objective, steps=step + 1)
        return values

    def _labels(self, batch: SampleBatch) -> Tensor | None:
        labels = self.job.labels
        return None if labels is None else labels.of(batch.requests).to(self.job.device)

    def _micro_batches(self, purpose: str, number: int) -> MicroBatches:
        """Micro-batches in which what is drawn is a function of step and micro-batch."""
        job = self.job
        return MicroBatches(
            job.micro_batch,
            lambda index: derive_seed(job.seed, purpose, job.stage, number, index),
            job.device,
            [Corruption.of(train) for train in job.trains],
        )

    def _end_epoch(self, task: Task) -> None:
        at, config = self.at, self.job.config
        # In the same way on both: weights at rest, and nothing corrupted.
        train_losses = self._evaluate(self.seen_ids)
        validation_losses = self._evaluate(self.validation_ids)
        at.epoch += 1
        at.step_in_epoch = 0
        at.epoch_losses.append([train_losses, validation_losses])
        if not at.best_losses or sum(validation_losses) < sum(at.best_losses):
            at.best_train_losses, at.best_losses = train_losses, validation_losses
            at.best_epoch = at.epoch
            self.best = module_tensors(self._judged[0])
        stalled = at.epoch - at.best_epoch >= config.patience
        at.finished = stalled or at.epoch >= config.max_epochs
        seconds = time.monotonic() - self.started
        for log, *losses in zip(self.logs, train_losses, validation_losses, strict=True):
            log.write(
                self.steps_done,
                at.epoch,
                train_loss=losses[0],
                validation_loss=losses[1],
                seconds=seconds,
                samples_per_second=self.steps_done * config.batch / seconds,
            )
        task.report(
            epoch=at.epoch, train_loss=sum(train_losses), validation_loss=sum(validation_losses)
        )

    @property
    def _judged(self) -> tuple[nn.Module, Objective]:
        """Module and objective that are validated, and frozen in the end."""
        if self.average is not None:
            return self.average.module, self.average.objective
        return self.module, self.objective

    @torch.no_grad()
    def _evaluate(self, ids: Sequence[str]) -> list[float]:
        """Losses on samples; always the same views and negatives for them."""
        module, objective = self._judged
        module.eval()
        totals: list[float] = []
        config = self.job.config
        batches = validation_batches(
            self.job.source,
            ids,
            batch=config.batch,
            window=config.shuffle_window,
            reader=self.reader,
            grid=self.job.grid,
        )
        for number, batch in enumerate(batches):
            generator = self._generator("validation negatives", number)
            losses = evaluate_batch(
                module,
                objective,
                batch,
                self._micro_batches("validation forward", number),
                generator=generator,
                labels=self._labels(batch),
            )
            values = self._finite(losses, "the validation loss", self.steps_done)
            totals = totals or [0.0] * len(values)
            totals = [t + loss * batch.shape[0] for t, loss in zip(totals, values, strict=True)]
        return [total / len(ids) for total in totals]

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        seed = derive_seed(self.job.seed, purpose, self.job.stage, number)
        return torch.Generator().manual_seed(seed)

    def _finite(self, losses: Tensor, what: str, step: int) -> list[float]:
        values: list[float] = losses.reshape(-1).tolist()
        wrong = [value for value in values if not math.isfinite(value)]
        if wrong:
            raise self._diverged(f"{what} became {wrong[0]}", step)
        return values

    def _diverged(self, what: str, step: int) -> NonFiniteError:
        job = self.job
        own = peek_checkpoint(job.checkpoint, run=job.run) is not None
        kept = f"is {job.checkpoint}" if own else "is none: it was before one"
        # Before any step the learning rate has done nothing.
        advice = (
            f"Lower {job.key}.lr"
            if step
            else "Its input may be too large: look at it, or normalise it (augment.mean and std)"
        )
        return NonFiniteError(
            f"{job.label}: {what} at step {step} (epoch {self.at.epoch + 1}, lr "
            f"{job.config.lr}); the last good checkpoint {kept}. {advice}"
        )

    def _save(self) -> None:
        # The step before it may have ruined the weights, without any loss having shown it yet.
        if not all(parameter.isfinite().all() for parameter in self.module.parameters()):
            raise self._diverged("weights became NaN or infinite", self.steps_done)
        self.at.seconds = time.monotonic() - self.started
        for log in self.logs:
            log.flush()
        state: dict[str, Any] = {
            "run": self.job.run,
            "counters": dict(vars(self.at)),
            "module": self.module.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }
        if self.average is not None:
            state["average"] = {
                "module": self.average.module.state_dict(),
                "objective": self.average.objective.state_dict(),
            }
        save_checkpoint(self.job.checkpoint, state)

    def _resume(self) -> None:
        state = load_checkpoint(self.job.checkpoint, run=self.job.run)
        if state is None:
            if self.job.checkpoint.exists():
                self.progress.note(
                    f"{self.job.label}: trained from the start; its checkpoint is damaged, "
                    "or of other settings, data or code"
                )
            return
        (now,) = self.at.numerics
        self.at = _Counters(**state["counters"])
        self.module.load_state_dict(state["module"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = state["best"]
        if self.average is not None:
            self.average.module.load_state_dict(state["average"]["module"])
            self.average.objective.load_state_dict(state["average"]["objective"])
        self.progress.note(
            f"{self.job.label}: going on from epoch {self.at.epoch + 1}, "
            f"step {self.at.step_in_epoch} of {self.loader.steps}"
        )
        before = self.at.numerics[-1]
        if before == now:
            return
        self.at.numerics.append(now)
        changes = (f"{key} {before[key]} → {now[key]}" for key in now if now[key] != before[key])
        self.progress.note(
            f"{self.job.label}: with other numerics than before ({'; '.join(changes)}), so weights "
            "will differ in their last bits from those of a training that was not stopped"
        )


def _all_of(numerics: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Numerics of a training; what changed on the way as a list."""
    found = {key: [own.get(key) for own in numerics] for key in numerics[-1]}
    return {
        key: values[0] if all(own == values[0] for own in values) else values
        for key, values in found.items()
    }
