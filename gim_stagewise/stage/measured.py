"""Training with its memory projected, limited and measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from gim_stagewise.memory import PeakMeter, trim_heap, use_allocator, warm_up
from gim_stagewise.processes import end_fresh_processes
from gim_stagewise.stage.checkpoint import TrainingRecord
from gim_stagewise.stage.fit import TrainingPlan
from gim_stagewise.stage.job import TrainJob
from gim_stagewise.stage.train import train_module
from gim_stagewise.stage.workspace import Workspace


def train_within(
    space: Workspace, plan: TrainingPlan, job: Callable[[], TrainJob]
) -> tuple[dict[str, Tensor], list[TrainingRecord]]:
    """Train as planned.

    Parameters
    ----------
    space : Workspace
    plan : TrainingPlan
    job : callable
        Makes what is trained, which counts as memory of training.

    Returns
    -------
    (dict, list of TrainingRecord)
        As of `gim_stagewise.stage.train.train_module`; records say what memory was expected to be
        taken, and what was.
    """
    if space.budget.lean:
        end_fresh_processes()
    use_allocator(lean=space.budget.lean)
    warm_up(space.device)
    with PeakMeter(space.device) as meter:
        tensors, records = train_module(job(), space.progress)
    trim_heap()
    measured = [
        replace(record, projected_mem=plan.projected, measured_mem=meter.peak) for record in records
    ]
    return tensors, measured
