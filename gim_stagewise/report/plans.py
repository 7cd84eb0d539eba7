"""A plan as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.table import Table

from gim_stagewise.plan import PipelinePlan, StagePlan
from gim_stagewise.units import format_bytes

KEEPS = ("all", "last-two", "last")


def plan_record(plan: PipelinePlan) -> dict[str, Any]:
    """A plan as plain JSON: bytes, and floating-point operations per sample."""
    return {
        "pipeline": plan.pipeline,
        "device": plan.device,
        "modules": [_stage_record(stage) for stage in plan.stages],
        "disk": {keep: plan.disk(keep) for keep in KEEPS},
    }


def _stage_record(stage: StagePlan) -> dict[str, Any]:
    training, extraction = stage.training, stage.extraction
    return {
        "module": stage.module,
        "micro_batch": training.micro_batch,
        "device_mem": stage.device_mem,
        "host_mem": stage.host_mem,
        "training": {
            "projected_mem": training.projected,
            "counted": training.step.counted,
            "workspace": training.step.workspace,
            "basis": training.step.basis,
            "loader": training.loader,
            "best_weights": training.weights,
            "process": training.base,
        },
        "extraction": {
            "forward": extraction.forward,
            "block": extraction.block,
            "workers": extraction.workers,
            "process": extraction.base,
            "host_mem": extraction.host,
        },
        "cache_bytes": stage.cache_bytes,
        "cache_basis": stage.cache_basis,
        "forward_flops": stage.patches * training.step.forward_flops,
        "backward_flops": stage.patches * training.step.backward_flops,
    }


def plan_report(plan: PipelinePlan) -> Iterator[Table | str]:
    """A plan for people."""
    yield _table(plan)
    on_gpu = plan.stages[0].training.on_gpu
    if not on_gpu:
        yield "On a CPU the device's memory is part of the host's."
    for stage in plan.stages:
        step = stage.training.step
        parts = ", ".join(f"{name} {format_bytes(size)}" for name, size in step.counted.items())
        workspace = f"workspace {format_bytes(step.workspace)}"
        yield f"module {stage.module}, a step: {', '.join(filter(None, [parts, workspace]))}"
        yield f"    {step.basis}; cache: {stage.cache_basis}"
    sizes = ", ".join(f'{format_bytes(plan.disk(keep))} with keep = "{keep}"' for keep in KEEPS)
    yield f"most disk space at once: {sizes}"


def _table(plan: PipelinePlan) -> Table:
    table = Table(title=f"{plan.pipeline} on {plan.device}", title_justify="left")
    names = ("module", "micro-batch", "device", "host", "workers", "cache", "forward", "backward")
    for name in names:
        table.add_column(name, justify="right")
    for stage in plan.stages:
        step = stage.training.step
        table.add_row(
            str(stage.module),
            str(stage.training.micro_batch),
            format_bytes(stage.device_mem),
            format_bytes(stage.host_mem),
            str(stage.extraction.workers),
            format_bytes(stage.cache_bytes),
            _flops(stage.patches * step.forward_flops),
            _flops(stage.patches * step.backward_flops),
        )
    return table


def _flops(count: int) -> str:
    if not count:
        return "?"
    return f"{count / 1e9:.2f} GFLOP" if count >= 1e7 else f"{count / 1e6:.2f} MFLOP"
