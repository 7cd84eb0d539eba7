"""What extracting a cache takes, who does it, and whether that fits the budget."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, replace

import torch

from gim_stagewise.cache import TiledLayout
from gim_stagewise.errors import ConfigError, OverBudgetError
from gim_stagewise.memory import Budget
from gim_stagewise.processes import usable_cores
from gim_stagewise.stage.extract import BLOCKS_AT_ONCE
from gim_stagewise.stage.forward import project_forward
from gim_stagewise.stage.needs import StageNeeds
from gim_stagewise.stage.project import round_up
from gim_stagewise.stage.spec import StepSpec
from gim_stagewise.units import format_bytes

# A process of ours with torch, zarr and Dask imported, before it has a block, measured.
BASE_BYTES = 600_000_000
# A GPU is done with a block before one core has compressed the last.
MOST_WRITERS = 3


@dataclass(frozen=True)
class Workers:
    """Who computes blocks.

    Parameters
    ----------
    count : int or None
        Processes of a local cluster; 0 for this process; None to decide by cores, memory and
        the work there is.
    scheduler : str or None
        Address of a running Dask scheduler, such as "tcp://host:8786".
    """

    count: int | None = None
    scheduler: str | None = None


@dataclass(frozen=True)
class ExtractionPlan:
    """What extracting a cache will take.

    Parameters
    ----------
    forward : int
        Bytes of the frozen module's forward, on the device.
    block : int
        Bytes of the blocks that are on their way from input to disk in one process, on the host.
    workers : int
        Processes besides this one, at most; 0 for this one alone.
    base : int
        Bytes of a process before it begins.
    on_gpu : bool
    writers : int
        Blocks that this process writes at once, without workers.
    lean : bool
        Whether processes keep nothing of freed memory, which costs time; because what they would
        keep does not fit.
    """

    forward: int
    block: int
    workers: int
    base: int
    on_gpu: bool
    writers: int = 1
    lean: bool = False

    @property
    def each(self) -> int:
        """Bytes on the host that a process takes to compute blocks."""
        return self.block + (0 if self.on_gpu else self.forward)

    @property
    def host_alone(self) -> int:
        """Bytes on the host without workers."""
        return self.base + self.each

    @property
    def host(self) -> int:
        """Bytes on the host, all processes together."""
        # Beside workers there is this process, which computes nothing then.
        if not self.workers:
            return self.host_alone
        return self.base + self.workers * (self.base + self.each)


def plan_extraction(
    needs: StageNeeds, *, budget: Budget, workers: Workers | None = None
) -> ExtractionPlan:
    """Choose the workers, and check them against the budget.

    Raises
    ------
    ConfigError
        If more workers are asked for than there are cores for.
    OverBudgetError
        If it does not fit; the message names both numbers and a remedy.
    """
    workers = workers or Workers()
    if isinstance(needs.layout, TiledLayout) and needs.layout.state:
        workers = Workers(0)  # each tile needs the state after the one before
    if not budget.lean:
        return _plan(needs, budget, workers, forward=project_forward(needs.spec, measure=False))
    # What is counted is the least it can take: what does not fit by that is not tried out.
    least = project_forward(needs.spec, measure=False, margin=False)
    _plan(needs, budget, workers, forward=least)
    with suppress(OverBudgetError):
        forward = project_forward(replace(needs.spec, lean=False))
        return _plan(needs, budget, workers, forward=forward)
    plan = _plan(needs, budget, workers, forward=project_forward(needs.spec))
    return replace(plan, lean=True)


def smallest_extraction(needs: StageNeeds) -> Budget:
    """The smallest budgets that extraction in one process works with."""
    forward = project_forward(needs.spec)
    return Budget(forward, _alone(needs, forward).host)


def _alone(needs: StageNeeds, forward: int) -> ExtractionPlan:
    """One process that reads, computes and writes a block each."""
    return ExtractionPlan(
        forward=forward,
        block=BLOCKS_AT_ONCE * needs.block,
        workers=0,
        base=BASE_BYTES,
        on_gpu=needs.spec.device == "cuda",
    )


def _plan(needs: StageNeeds, budget: Budget, workers: Workers, *, forward: int) -> ExtractionPlan:
    spec = needs.spec
    _check_device(spec, budget, forward)
    plan = _alone(needs, forward)
    allowed, threads = budget.host_bytes(), spec.config.extract.threads
    fitting = max(0, allowed - BASE_BYTES) // (BASE_BYTES + plan.each)
    cores = usable_cores() // threads
    count = workers.count
    if count is None:
        usable = min(cores, fitting)
        # One process keeps a GPU busy; several would share it and its memory.
        count = 0 if plan.on_gpu or usable < 2 or workers.scheduler is not None else usable
    elif count > max(cores, 1):
        raise ConfigError(
            f"is {count}, which with extract.threads = {threads} needs {count * threads} cores; "
            f"there are {usable_cores()}: use {cores} or less",
            key="--workers",
        )
    plan = replace(plan, workers=count)
    if plan.on_gpu and not count:
        plan = _with_writers(plan, needs, allowed)
    if plan.host > allowed and workers.scheduler is None:
        _refuse(spec, plan, fitting, allowed)
    return plan


def _with_writers(plan: ExtractionPlan, needs: StageNeeds, allowed: int) -> ExtractionPlan:
    """As many blocks written at once as there are cores and memory for."""
    for writers in range(min(MOST_WRITERS, usable_cores()), 0, -1):
        plan = replace(plan, writers=writers, block=(1 + writers) * needs.block)
        if plan.host <= allowed:
            break
    return plan


def _refuse(spec: StepSpec, plan: ExtractionPlan, fitting: int, allowed: int) -> None:
    if plan.workers:
        remedy = f"use --workers {fitting} or less"
    elif spec.config.windowed and spec.config.dense:
        remedy = "use smaller tiles (windows.tile)"
    elif plan.block > plan.each // 2:
        remedy = (
            "use smaller tiles (windows.tile)"
            if spec.config.windowed
            else "store fewer samples a chunk (cache.chunk)"
        )
    else:
        remedy = f"lower extract.batch from {spec.config.extract.batch}"
    raise OverBudgetError(
        f"module {spec.index}: extraction with {plan.workers} workers projects "
        f"{format_bytes(plan.host)} of host memory ({format_bytes(plan.base)} a process, and "
        f"{format_bytes(plan.each)} at work), allowed {format_bytes(allowed)}: {remedy}, or allow "
        f"--allowed-host-mem {round_up(plan.host)}",
        needed=plan.host,
    )


def _check_device(spec: StepSpec, budget: Budget, forward: int) -> None:
    allowed = budget.device_bytes(torch.device(spec.device))
    if allowed is not None and forward > allowed:
        remedy = f"lower extract.batch from {spec.config.extract.batch}"
        if spec.config.dense:
            remedy = "use smaller tiles (windows.tile)"
        raise OverBudgetError(
            f"module {spec.index} projects {format_bytes(forward)} for extraction, allowed "
            f"{format_bytes(allowed)}: {remedy}, or allow --allowed-mem {round_up(forward)}",
            needed=forward,
        )
