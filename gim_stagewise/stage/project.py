"""What a stage will take: the real step on fake tensors, and one real micro-batch.

The count follows every tensor of two training steps (the second has the optimizer's state) without
allocating any. What it cannot see, scratch memory inside operations and what the allocator keeps,
is measured on real micro-batches in a fresh process and added as *workspace*.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from gim_stagewise.errors import OverBudgetError
from gim_stagewise.memory import (
    Budget,
    PeakMeter,
    StorageCounter,
    available_host_bytes,
    make_fake,
    use_allocator,
    warm_up,
)
from gim_stagewise.models import pool
from gim_stagewise.objectives import Objective
from gim_stagewise.processes import in_fresh_process
from gim_stagewise.stage.freeze import resolve_device
from gim_stagewise.stage.optimize import WeightAverage, make_optimizer
from gim_stagewise.stage.spec import AnyBatch, StepSpec
from gim_stagewise.stage.step import (
    Corruption,
    MicroBatches,
    accumulate_gradients,
)
from gim_stagewise.units import format_bytes

# A step that counts less than this gets a workspace without a measurement, unless that decides
# whether it fits: a process that measures takes seconds, and what is small has little.
SMALL_BYTES = 64_000_000
# cuDNN takes up to 105 MB where the CPU's convolutions have been seen to take 50.
_SMALL_WORKSPACE = {"cpu": SMALL_BYTES, "cuda": 2 * SMALL_BYTES}
_COUNTED_ONLY = "counted"
_NOT_MEASURED = "counted; workspace not worth measuring"
# By so much measurements of the same step differ between processes.
NOISE_BYTES = 4_000_000


@dataclass(frozen=True)
class StepMemory:
    """Bytes that training steps take beyond the process itself, at the worst moment.

    Parameters
    ----------
    counted : dict
        By category: parameters, gradients, optimizer, input, activations (all others).
    workspace : int
        Measured on real micro-batches, beyond the count.
    basis : str
        How the numbers were found, for people.
    forward_flops, backward_flops : int
        Floating-point operations for one patch; 0 where they could not be counted.
    """

    counted: dict[str, int]
    workspace: int
    basis: str
    forward_flops: int = 0
    backward_flops: int = 0

    @property
    def count(self) -> int:
        return sum(self.counted.values())

    @property
    def total(self) -> int:
        return self.count + self.workspace

    @property
    def at_least(self) -> bool:
        """Whether it takes more, which was not measured: it is over the budget, or the machine."""
        return self.basis == _COUNTED_ONLY


# What was projected before in this process; a plan and the run after it ask for the same.
_known: dict[tuple[Any, ...], StepMemory] = {}


def project_step(spec: StepSpec, *, allowed: int | None = None, exact: bool = False) -> StepMemory:
    """What training with this micro-batch will take.

    Parameters
    ----------
    spec : StepSpec
    allowed : int, optional
        The budget; nothing real is run where the count alone is over it.
    exact : bool
        Measure the workspace also where it hardly matters.

    Raises
    ------
    OverBudgetError
        If a step that cannot be counted takes more than the machine has.
    """
    key = (exact, *spec.key)
    known = _known.get(key)
    # What was not worth a measurement is, once that decides.
    decides = allowed is not None and known is not None and known.total > allowed
    if known is None or (known.basis == _NOT_MEASURED and decides):
        memory = _project_step(spec, allowed, exact=exact)
        if memory.at_least:
            return memory
        _known[key] = memory
    return _known[key]


@cache
def load_counting() -> None:
    """Load what counting needs, so that the process does not grow by it later."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    module = nn.Conv2d(1, 1, 1)
    make_fake(module, mode)
    with mode, StorageCounter(), FlopCounterMode(display=False):
        module(torch.randn(1, 1, 1, 1)).sum().backward()


def round_up(count: int) -> str:
    """A size for a command line that is enough, also if it is measured again."""
    # Processes that do the same differ by two or three percent.
    margin = max(2 * NOISE_BYTES, count // 32)
    return f"{-(-(count + margin) // 1_000_000)}MB"


def _project_step(spec: StepSpec, allowed: int | None, *, exact: bool) -> StepMemory:
    try:
        counted = count_step(spec)
    except Exception as error:
        # Fake tensors carry no values: a module that looks at them, with .item() say, has to run.
        measured = _measured_step(spec, 2)
        reason = (str(error).splitlines() or [""])[0][:80]
        basis = f"measured only: cannot be counted ({type(error).__name__}: {reason})"
        return StepMemory({}, measured, basis)
    # Neither is a step tried out that the machine has no room for.
    free = free_bytes(spec.device)
    if counted.count > (free if allowed is None else min(allowed, free)):
        return counted
    small = counted.count <= SMALL_BYTES and not exact
    assumed = _SMALL_WORKSPACE[spec.device]
    if small and (allowed is None or counted.count + assumed <= allowed):
        return replace(counted, workspace=assumed, basis=_NOT_MEASURED)
    # What the default allocator keeps back grows over the first steps.
    steps = 1 if spec.lean else 3
    measured = _measured_step(spec, steps)
    same = count_step(spec, steps=steps, few=True).count
    return replace(
        counted,
        workspace=max(0, measured - same) + NOISE_BYTES,
        basis="counted, with the workspace of real micro-batches",
    )


def free_bytes(device: str) -> int:
    """What a device has free: for the CPU, the machine or the container."""
    on_device = Budget().device_bytes(resolve_device(device))
    return available_host_bytes() if on_device is None else on_device


def measured_bytes(
    measure: Callable[..., int], spec: StepSpec, *, lower: str, **options: Any
) -> int:
    """What ``measure(spec, **options)`` finds in a fresh process.

    Parameters
    ----------
    measure : callable
    spec : StepSpec
    lower : str
        The key to lower where there is no room for it.

    Raises
    ------
    OverBudgetError
        If the process does not live to the end.
    """
    free = free_bytes(spec.device)
    try:
        return in_fresh_process(measure, spec, **options)
    except (BrokenProcessPool, torch.OutOfMemoryError):
        # The system ends the process that takes the last of its memory.
        raise OverBudgetError(
            f"{spec.label}: the process that measures what it takes was ended, with "
            f"{format_bytes(free)} free at its start: lower {lower}",
            needed=free,
        ) from None


def _measured_step(spec: StepSpec, steps: int) -> int:
    lower = f"{spec.train_key}.micro_batch from {spec.micro_batch}, or train.batch"
    return measured_bytes(measure_step, spec, lower=lower, steps=steps)


def count_step(spec: StepSpec, *, steps: int = 2, few: bool = False) -> StepMemory:
    """Count the tensors of training steps without allocating them.

    Parameters
    ----------
    spec : StepSpec
    steps : int
        The last one counts.
    few : bool
        Count just the micro-batches that `measure_step` runs.
    """
    # Fake tensors on CUDA need a GPU in backward, and take as many bytes there as here.
    module, objective = spec.parts()
    average = _average(spec, module, objective)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    copies = [] if average is None else [average.module, average.objective]
    for part in (module, objective, *copies):
        make_fake(part, mode)
    module.train()
    counter = StorageCounter()
    with mode, counter:
        parameters = [*module.parameters(), *objective.parameters()]
        counter.label("parameters", parameters)
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                lambda p: counter.label("gradients", [p.grad])
            )
        optimizer = make_optimizer(module, objective, spec.trains)
        counter.label("averages", (p for part in copies for p in part.parameters()))
        batch = spec.batch(lambda t: counter.label("input", [t]))
        if steps > 1:  # all that is left of earlier ones is the optimizer's state
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            for state in optimizer.state.values():
                counter.label("optimizer", (v for v in state.values() if isinstance(v, Tensor)))
        counter.restart()
        _step(spec, module, objective, optimizer, batch, torch.device("cpu"), few=few)
        if average is not None:
            average.update(module, objective, steps=1)
        for state in optimizer.state.values():
            counter.label("optimizer", (v for v in state.values() if isinstance(v, Tensor)))
        at_peak = {name: size for name, size in counter.at_peak.items() if size}
    forward, backward = (0, 0) if few else _flops(spec, module, mode)
    return StepMemory(at_peak, 0, _COUNTED_ONLY, forward, backward)


def _step(
    spec: StepSpec,
    module: nn.Module,
    objective: Objective,
    optimizer: torch.optim.Optimizer,
    batch: AnyBatch,
    device: torch.device,
    *,
    few: bool,
) -> None:
    micro_batches = MicroBatches(
        spec.micro_batch,
        lambda number: number,
        device,
        [Corruption.of(train) for train in spec.trains],
    )
    count = len(micro_batches.of(batch))
    # No micro-batch is larger than the first, and gradients are there from the second on.
    numbers = range(min(3 if few else 2, count))
    accumulate_gradients(
        module,
        objective,
        batch,
        micro_batches,
        generator=torch.Generator().manual_seed(0),
        labels=spec.labels(device),
        only=numbers,
    )
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _average(spec: StepSpec, module: nn.Module, objective: Objective) -> WeightAverage | None:
    return WeightAverage(module, objective, spec.train.average) if spec.train.average else None


def _flops(spec: StepSpec, module: nn.Module, mode: FakeTensorMode) -> tuple[int, int]:
    """Floating-point operations of one patch, forward and backward."""
    with mode, FlopCounterMode(display=False) as counter:
        pooled = pool(module, module(torch.randn(1, *spec.cell)))
        forward = counter.get_total_flops()
        pooled.sum().backward()  # type: ignore[no-untyped-call]
        backward = counter.get_total_flops() - forward
    return forward, backward


def measure_step(spec: StepSpec, *, steps: int) -> int:
    """Run real micro-batches; for a fresh process.

    Returns
    -------
    int
        The most bytes they took beyond what the process had before.
    """
    device = resolve_device(spec.device)
    torch.set_num_threads(spec.threads)
    use_allocator(lean=spec.lean)
    warm_up(device)
    with PeakMeter(device) as meter:
        module, objective = spec.parts()
        module, objective = module.to(device), objective.to(device)
        module.train()
        optimizer = make_optimizer(module, objective, spec.trains)
        average = _average(spec, module, objective)
        batch = spec.batch()
        for _ in range(steps):
            _step(spec, module, objective, optimizer, batch, device, few=True)
            if average is not None:
                average.update(module, objective, steps=1)
    return meter.peak
