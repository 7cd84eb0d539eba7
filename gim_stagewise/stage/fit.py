"""Whether training a module fits the budget, and which micro-batch would."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NoReturn

import torch

from gim_stagewise.errors import OverBudgetError
from gim_stagewise.memory import Budget, resident_bytes
from gim_stagewise.stage.needs import TrainingNeeds
from gim_stagewise.stage.project import (
    NOISE_BYTES,
    StepMemory,
    free_bytes,
    load_counting,
    project_step,
    round_up,
)
from gim_stagewise.stage.spec import StepSpec
from gim_stagewise.units import format_bytes

# Measurements that the search for a micro-batch may take.
MOST_TRIES = 6


@dataclass(frozen=True)
class TrainingPlan:
    """What training a module will take.

    Parameters
    ----------
    micro_batch : int
        Patches in memory at a time.
    step : StepMemory
        On the device.
    loader : int
        Bytes of samples held on the host.
    chain : int
        Bytes that modules below take to compute inputs that are not stored, on the device.
    weights : int
        Bytes of the best weights, held on the host while others are tried.
    base : int
        Bytes of the process before it begins.
    on_gpu : bool
    """

    micro_batch: int
    step: StepMemory
    loader: int
    chain: int
    weights: int
    base: int
    on_gpu: bool

    @property
    def device(self) -> int:
        """Bytes on the device."""
        return self.step.total + self.chain

    @property
    def host(self) -> int:
        """Bytes on the host, the process included; on a CPU that is all there is."""
        return self.base + self.loader + self.weights + (0 if self.on_gpu else self.device)

    @property
    def projected(self) -> int:
        """What a measurement is compared with: a GPU's bytes, or all beyond the process itself."""
        return self.device if self.on_gpu else self.host - self.base


@dataclass(frozen=True)
class _Room:
    """Bytes that a step may take, and where that comes from."""

    bytes: int
    beside: int
    option: str
    chain: int
    loader: int

    @property
    def allowed(self) -> int:
        return self.bytes + self.beside


def plan_training(needs: TrainingNeeds, *, recorded: int | None, budget: Budget) -> TrainingPlan:
    """Choose the micro-batch, and check it against the budget.

    Parameters
    ----------
    needs : TrainingNeeds
    recorded : int or None
        What "auto" came to when a training that is unfinished began; it is not changed.
    budget : Budget

    Raises
    ------
    OverBudgetError
        If it does not fit; the message names both numbers and the micro-batch that would.
    """
    spec = needs.spec
    asked = spec.train.micro_batch
    size = recorded or (asked if isinstance(asked, int) else spec.rows)
    spec = replace(spec, micro_batch=size)
    plan = _plan(needs, size, StepMemory({}, 0, ""))
    room = _room(plan, budget)
    step = project_step(spec, allowed=room.bytes)
    if step.total > room.bytes:
        fitting = _largest_micro_batch(spec, step, room)
        if asked != "auto" or recorded is not None:
            _refuse(spec, step, room, fitting, recorded=recorded is not None)
        size, step = fitting
    plan = replace(plan, micro_batch=size, step=step)
    allowed_host = budget.host_bytes()
    if plan.host > allowed_host:
        raise OverBudgetError(
            f"{spec.label}: training projects {format_bytes(plan.host)} of host memory "
            f"({format_bytes(plan.base)} the process, {format_bytes(plan.loader)} samples to be "
            f"mixed), allowed {format_bytes(allowed_host)}: lower "
            f"{spec.train_key}.shuffle_window, or allow --allowed-host-mem "
            f"{round_up(plan.host)}",
            needed=plan.host,
        )
    return plan


def smallest_training(needs: TrainingNeeds) -> Budget:
    """The smallest budgets that a training works with, the micro-batch as the file asks for it."""
    spec = needs.spec
    asked = spec.train.micro_batch
    size = 1 if asked == "auto" else asked or spec.rows
    plan = _plan(needs, size, project_step(replace(spec, micro_batch=size), exact=True))
    return Budget(plan.device, plan.host)


def _plan(needs: TrainingNeeds, size: int, step: StepMemory) -> TrainingPlan:
    load_counting()  # what it loads stays, and is part of the process from now on
    # The best weights so far, and those that are about to replace them.
    parts = needs.spec.parts()
    weights = 2 * sum(parameter.nbytes for part in parts for parameter in part.parameters())
    on_gpu = needs.spec.device == "cuda"
    return TrainingPlan(size, step, needs.loader, needs.chain, weights, resident_bytes(), on_gpu)


def _room(plan: TrainingPlan, budget: Budget) -> _Room:
    device = budget.device_bytes(torch.device("cuda" if plan.on_gpu else "cpu"))
    by_device = None
    if device is not None:
        by_device = _Room(device - plan.chain, plan.chain, "--allowed-mem", plan.chain, 0)
    if plan.on_gpu and by_device is not None:
        return by_device
    by_host = _Room(
        budget.host_bytes() - plan.host,
        plan.host,
        "--allowed-host-mem",
        0 if plan.on_gpu else plan.chain,
        plan.loader,
    )
    if by_device is None or by_host.bytes < by_device.bytes:
        return by_host
    return by_device


def _largest_micro_batch(spec: StepSpec, step: StepMemory, room: _Room) -> tuple[int, StepMemory]:
    """The largest micro-batch that fits, below the one whose step does not.

    Raises
    ------
    OverBudgetError
        If not even a micro-batch of one patch fits.
    """
    one = project_step(replace(spec, micro_batch=1), exact=True)
    if one.total > room.bytes:
        _refuse_even_one(spec, one, room)
    # Bytes grow about evenly with the micro-batch: one that fits and one that does not say where
    # the room ends. Workspaces come and go with the size, so that what is between has to be tried.
    fits, fitting, over, too_much = 1, one, spec.micro_batch, step.total
    for _ in range(MOST_TRIES):
        slope = max(1.0, (too_much - fitting.total) / (over - fits))
        size = min(over - 1, fits + int((room.bytes - NOISE_BYTES - fitting.total) / slope))
        if size <= fits + fits // 8:  # hardly more than what is known to fit
            if over <= 2 * fits:
                break
            size = (fits + over) // 2
        memory = project_step(replace(spec, micro_batch=size), allowed=room.bytes, exact=True)
        if memory.total <= room.bytes:
            fits, fitting = size, memory
        else:
            over, too_much = size, memory.total
    return fits, fitting


def _refuse_even_one(spec: StepSpec, one: StepMemory, room: _Room) -> NoReturn:
    """Say what a micro-batch of one patch takes, and what would make it fit."""
    needed = one.total + room.beside
    fixed = sum(one.counted.get(k, 0) for k in ("parameters", "gradients", "optimizer"))
    if one.at_least:
        least = "at least "
        remedy = (
            f"the machine has {format_bytes(free_bytes(spec.device))} free, too little to try it: "
            "lower train.batch or objective.negatives"
        )
    else:
        least = ""
        remedy = (
            f"the smallest workable value with it is {room.option} {round_up(needed)}"
            f"{_beside_remedy(spec, room)}"
        )
    raise OverBudgetError(
        f"{spec.label}: training needs {least}{format_bytes(needed)} even with micro_batch = 1 "
        f"({format_bytes(room.beside)} beside the step, {format_bytes(fixed)} parameters, "
        f"gradients and optimizer), allowed {format_bytes(room.allowed)}: {remedy}",
        needed=needed,
    )


def _refuse(
    spec: StepSpec,
    step: StepMemory,
    room: _Room,
    fitting: tuple[int, StepMemory],
    *,
    recorded: bool,
) -> NoReturn:
    size, _ = fitting
    if step.at_least:  # what is to be allowed is what it really takes, if that can be tried
        step = project_step(spec)
    least = "at least " if step.at_least else ""
    total = step.total + room.beside
    if recorded:
        remedy = (
            f"its training was begun with micro_batch = {spec.micro_batch}, which is not changed; "
            f"allow {room.option} {round_up(total)}, or begin again: "
            + (f"--from {spec.index}" if spec.config.iterative else "remove checkpoints/joint.pt")
        )
    else:
        remedy = (
            f"set {spec.train_key}.micro_batch to {size} or less, "
            f"or allow {room.option} {round_up(total)}"
        )
    raise OverBudgetError(
        f"{spec.label}: training projects {least}{format_bytes(total)}, "
        f"allowed {format_bytes(room.allowed)}: {remedy}",
        needed=total,
    )


def _beside_remedy(spec: StepSpec, room: _Room) -> str:
    """What else could be lowered, where most of it is not the step's."""
    if room.chain > room.beside // 2:
        below = spec.index - 1
        return f', or store its input (module.{below}.cache.materialize = "always")'
    if room.loader > room.beside // 2:
        return f", or lower {spec.train_key}.shuffle_window"
    return ""
