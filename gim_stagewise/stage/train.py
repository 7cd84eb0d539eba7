"""Train one module to convergence on the patches or activations that its source gives.

"Convergence" is early stopping on held-out unlabeled samples: training ends after ``patience``
epochs without a better validation loss, or after ``max_epochs``, and the best weights are kept.

Nothing random is stateful (see `gim_stagewise.seeds`), so a checkpoint is the weights, the
optimizer's state and a few counters, and training goes on from the middle of an epoch exactly
as if it had never stopped.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gim_stagewise.config import TrainConfig
from gim_stagewise.errors import NonFiniteError
from gim_stagewise.objectives import InfoNCE
from gim_stagewise.progress import Progress, Task
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources import Source
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
from gim_stagewise.stage.loader import Loader, validation_batches
from gim_stagewise.stage.metrics import MetricsLog
from gim_stagewise.stage.order import held_out
from gim_stagewise.stage.step import (
    MicroBatches,
    accumulate_gradients,
    embed_batch,
    in_place,
    make_optimizer,
)


@dataclass
class _Counters:
    """Where training is, and the best it has seen."""

    epoch: int = 0
    step_in_epoch: int = 0
    epoch_loss: float = 0.0
    best_loss: float = math.inf
    best_epoch: int = 0
    best_train_loss: float = math.inf
    seconds: float = 0.0
    finished: bool = False
    micro_batch: int = 0


@dataclass
class TrainJob:
    """All that training a module needs.

    Parameters
    ----------
    stage : int
        The module's number, from 1.
    module : nn.Module
        With initial weights; trained in place.
    objective : InfoNCE
    source : Source
        Samples of one size: the stage's input, or windows of it.
    grid : tuple of int
        Rows and columns of its patches to train on.
    config : TrainConfig
    micro_batch : int
        Patches in memory at a time.
    seed : int
        The pipeline's seed.
    device : torch.device
    checkpoint : Path
        Where training state is kept until the module is frozen.
    logs : Path
        Folder of the metrics log.
    run : str
        Digest of what is trained on what; only a checkpoint with the same is taken up.
    on_step : callable, optional
        Called with the number of steps done in all, after each step.
    """

    stage: int
    module: nn.Module
    objective: InfoNCE
    source: Source
    grid: tuple[int, ...]
    config: TrainConfig
    micro_batch: int
    seed: int
    device: torch.device
    checkpoint: Path
    logs: Path
    run: str
    on_step: Callable[[int], None] | None = field(default=None)


def train_module(job: TrainJob, progress: Progress) -> tuple[dict[str, Tensor], TrainingRecord]:
    """Train until convergence.

    Returns
    -------
    (dict, TrainingRecord)
        The best epoch's weights (on the CPU), and how training went.

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
        self.optimizer = make_optimizer(self.module, self.objective, job.config)
        ids = job.source.split("unlabeled")
        train_ids, self.validation_ids = held_out(
            ids, seed=job.seed, fraction=job.config.validation
        )
        self.reader = SampleReader(
            job.source,
            samples=len(ids),
            window=job.config.shuffle_window,
            pin=job.device.type == "cuda",
        )
        self.loader = Loader(
            job.source,
            train_ids,
            reader=self.reader,
            batch=job.config.batch,
            window=job.config.shuffle_window,
            seed=job.seed,
            stage=job.stage,
            grid=job.grid,
        )
        self.at = _Counters(micro_batch=job.micro_batch)
        self.best = module_tensors(self.module)
        self.log = MetricsLog(job.logs)

    def run(self) -> tuple[dict[str, Tensor], TrainingRecord]:
        self._resume()
        self.started = time.monotonic() - self.at.seconds
        batch = self.job.config.batch
        total = self.job.config.max_epochs * self.loader.steps * batch
        label = f"module {self.job.stage}: train"
        self.log.open(steps_done=self.steps_done)
        try:
            done = self.steps_done * batch
            with self.progress.task(label, total=total, done=done, unit="sample") as task:
                while not self.at.finished:
                    self._train_epoch(task)
                    self._end_epoch(task)
                    self._save()
        finally:
            self.log.close()
        record = TrainingRecord(
            epochs=self.at.epoch,
            best_epoch=self.at.best_epoch,
            train_loss=self.at.best_train_loss,
            validation_loss=self.at.best_loss,
            seconds=self.at.seconds,
            numerics=training_numerics(self.job.device),
            micro_batch=self.job.micro_batch,
            shuffle_quality=self.loader.shuffle_quality,
        )
        return self.best, record

    @property
    def steps_done(self) -> int:
        return self.at.epoch * self.loader.steps + self.at.step_in_epoch

    def _train_epoch(self, task: Task) -> None:
        at, config = self.at, self.job.config
        self.module.train()
        for batch in self.loader.batches(at.epoch, start=at.step_in_epoch):
            loss = self._step(batch, self.steps_done)
            at.epoch_loss += loss
            at.step_in_epoch += 1
            done = self.steps_done
            self.log.write(done, at.epoch + 1, loss=loss)
            task.advance(config.batch, loss=loss, epoch=at.epoch + 1)
            if done % config.checkpoint_every == 0:
                self._save()
            if self.job.on_step is not None:
                self.job.on_step(done)

    def _step(self, batch: SampleBatch, step: int) -> float:
        loss = accumulate_gradients(
            self.module,
            self.objective,
            batch,
            self._micro_batches("forward", step),
            generator=self._generator("negatives", step),
        )
        value = float(loss)
        if not math.isfinite(value):
            raise self._diverged(f"the loss became {value}", step)
        self.optimizer.step()
        # Now rather than before the next backward: nothing holds gradients during pass 1.
        self.optimizer.zero_grad(set_to_none=True)
        return value

    def _micro_batches(self, purpose: str, number: int) -> MicroBatches:
        """Micro-batches in which what the module draws is a function of step and micro-batch."""
        job = self.job
        return MicroBatches(
            job.micro_batch,
            lambda index: derive_seed(job.seed, purpose, job.stage, number, index),
            job.device,
        )

    def _end_epoch(self, task: Task) -> None:
        at, config = self.at, self.job.config
        validation_loss = self._validate()
        train_loss = at.epoch_loss / self.loader.steps
        at.epoch += 1
        at.step_in_epoch = 0
        at.epoch_loss = 0.0
        if validation_loss < at.best_loss:
            at.best_loss, at.best_epoch, at.best_train_loss = validation_loss, at.epoch, train_loss
            self.best = module_tensors(self.module)
        stalled = at.epoch - at.best_epoch >= config.patience
        at.finished = stalled or at.epoch >= config.max_epochs
        seconds = time.monotonic() - self.started
        self.log.write(
            self.steps_done,
            at.epoch,
            train_loss=train_loss,
            validation_loss=validation_loss,
            seconds=seconds,
            samples_per_second=self.steps_done * config.batch / seconds,
        )
        task.report(epoch=at.epoch, train_loss=train_loss, validation_loss=validation_loss)

    @torch.no_grad()
    def _validate(self) -> float:
        """Loss on the held-out samples; the same views and negatives in every epoch."""
        self.module.eval()
        total = 0.0
        config = self.job.config
        batches = validation_batches(
            self.job.source,
            self.validation_ids,
            batch=config.batch,
            window=config.shuffle_window,
            reader=self.reader,
            grid=self.job.grid,
        )
        for number, batch in enumerate(batches):
            micro_batches = self._micro_batches("validation forward", number)
            pooled = embed_batch(self.module, batch, micro_batches)
            generator = self._generator("validation negatives", number)
            loss = float(self.objective(in_place(pooled, batch), generator=generator))
            if not math.isfinite(loss):
                raise self._diverged(f"the validation loss became {loss}", self.steps_done)
            total += loss * batch.shape[0]
        return total / len(self.validation_ids)

    def _generator(self, purpose: str, number: int) -> torch.Generator:
        seed = derive_seed(self.job.seed, purpose, self.job.stage, number)
        return torch.Generator().manual_seed(seed)

    def _diverged(self, what: str, step: int) -> NonFiniteError:
        job = self.job
        own = peek_checkpoint(job.checkpoint, run=job.run) is not None
        kept = f"is {job.checkpoint}" if own else "is none: it was before one"
        return NonFiniteError(
            f"module {job.stage}: {what} at step {step} (epoch {self.at.epoch + 1}, lr "
            f"{job.config.lr}); the last good checkpoint {kept}. "
            f"Lower module.{job.stage}.train.lr"
        )

    def _save(self) -> None:
        # The step before it may have ruined the weights, without any loss having shown it yet.
        if not all(parameter.isfinite().all() for parameter in self.module.parameters()):
            raise self._diverged("weights became NaN or infinite", self.steps_done)
        self.at.seconds = time.monotonic() - self.started
        self.log.flush()
        state: dict[str, Any] = {
            "run": self.job.run,
            "counters": dict(vars(self.at)),
            "module": self.module.state_dict(),
            "objective": self.objective.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "best": self.best,
        }
        save_checkpoint(self.job.checkpoint, state)

    def _resume(self) -> None:
        state = load_checkpoint(self.job.checkpoint, run=self.job.run)
        if state is None:
            if self.job.checkpoint.exists():
                self.progress.note(
                    f"module {self.job.stage}: trained from the start; its checkpoint is damaged, "
                    "or of other settings, data or code"
                )
            return
        self.at = _Counters(**state["counters"])
        self.module.load_state_dict(state["module"])
        self.objective.load_state_dict(state["objective"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = state["best"]
        self.progress.note(
            f"module {self.job.stage}: going on from epoch {self.at.epoch + 1}, "
            f"step {self.at.step_in_epoch} of {self.loader.steps}"
        )
