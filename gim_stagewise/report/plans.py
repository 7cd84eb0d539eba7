"""A plan, and a proof, as tables and as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

from rich.table import Table

from gim_stagewise.plan import JointPlan, PipelinePlan, StagePlan
from gim_stagewise.prove import Proof
from gim_stagewise.stage.disk import KEEPS
from gim_stagewise.stage.fit import TrainingPlan
from gim_stagewise.units import format_bytes

# From here on it is said: negatives come from the batch, and are too alike.
POOR_SHUFFLE = 1.5


def plan_record(plan: PipelinePlan) -> dict[str, Any]:
    """A plan as plain JSON: bytes, and floating-point operations per sample."""
    return {
        "pipeline": plan.pipeline,
        "device": plan.device,
        "modules": [_stage_record(stage) for stage in plan.stages],
        "disk": {keep: plan.disk.needed(keep) for keep in KEEPS},
        "skipped": plan.skipped,
    }


def _stage_record(stage: StagePlan) -> dict[str, Any]:
    training, extraction = stage.training, stage.extraction
    return {
        "module": stage.module,
        "micro_batch": training.micro_batch,
        "device_mem": stage.device_mem,
        "host_mem": stage.host_mem,
        "training": _training_record(training),
        "extraction": {
            "forward": extraction.forward,
            "block": extraction.block,
            "workers": extraction.workers,
            "process": extraction.base,
            "host_mem": extraction.host,
        },
        "shuffle_quality": stage.shuffle_quality,
        "choice": stage.choice.as_json() if stage.choice else None,
        "windows": asdict(stage.windows) if stage.windows else None,
        "cache_bytes": stage.cache_bytes,
        "cache_basis": stage.cache_basis,
        "forward_flops": stage.forward_flops,
        "backward_flops": stage.backward_flops,
    }


def _training_record(training: TrainingPlan) -> dict[str, Any]:
    return {
        "projected_mem": training.projected,
        "counted": training.step.counted,
        "workspace": training.step.workspace,
        "basis": training.step.basis,
        "loader": training.loader,
        "chain": training.chain,
        "best_weights": training.weights,
        "process": training.base,
    }


def joint_plan_record(plan: JointPlan) -> dict[str, Any]:
    """A plan of training all modules in one step, as `plan_record`."""
    return {
        "pipeline": plan.pipeline,
        "mode": plan.mode,
        "device": plan.device,
        "modules": plan.modules,
        "micro_batch": plan.training.micro_batch,
        "device_mem": plan.training.device,
        "host_mem": plan.training.host,
        "training": _training_record(plan.training),
        "forward_flops": plan.forward_flops,
        "backward_flops": plan.backward_flops,
        "skipped": plan.skipped,
    }


def joint_plan_report(plan: JointPlan) -> Iterator[Table | str]:
    """The same for people."""
    table = Table(title=f"{plan.pipeline}, {plan.mode}, on {plan.device}", title_justify="left")
    for name in ("modules", "micro-batch", "device", "host", "work"):
        table.add_column(name, justify="right")
    training = plan.training
    table.add_row(
        str(plan.modules),
        str(training.micro_batch),
        format_bytes(training.device),
        format_bytes(training.host),
        _work(plan.forward_flops, plan.backward_flops),
    )
    yield table
    if not training.on_gpu:
        yield _ON_CPU
    yield f"all modules, a step: {_step(training)}"
    yield f"    {training.step.basis}; no caches"
    for why in plan.skipped.values():
        yield f"left out: {why}"


_ON_CPU = "On a CPU the device's memory is part of the host's."


def _step(training: TrainingPlan) -> str:
    """What a step takes, by category."""
    step = training.step
    parts = [f"{name} {format_bytes(size)}" for name, size in step.counted.items()]
    return ", ".join([*parts, f"workspace {format_bytes(step.workspace)}"])


def plan_report(plan: PipelinePlan) -> Iterator[Table | str]:
    """A plan for people."""
    yield _table(plan)
    on_gpu = plan.stages[0].training.on_gpu
    if not on_gpu:
        yield _ON_CPU
    for stage in plan.stages:
        yield f"module {stage.module}, a step: {_step(stage.training)}"
        yield f"    {stage.training.step.basis}; cache: {stage.cache_basis}"
        if stage.windows is not None:
            window, pixels, tile = (
                "×".join(map(str, sizes))
                for sizes in (stage.windows.window, stage.windows.pixels, stage.windows.tile)
            )
            yield (
                f"    trained on windows of {window}, which show {pixels} of an item; tiles of "
                f"{tile} outputs, halo overhead {stage.windows.halo:.3f}"
            )
        if stage.choice is not None:
            yield f"    {stage.choice}"
        if stage.shuffle_quality > POOR_SHUFFLE:
            yield (
                f"    batches repeat a chunk {stage.shuffle_quality:.1f} times as often as a "
                "perfect shuffle: give train.shuffle_window more, or store fewer samples a chunk"
            )
    sizes = ", ".join(
        f'{format_bytes(plan.disk.needed(keep))} with keep = "{keep}"' for keep in KEEPS
    )
    yield f"most disk space at once: {sizes}"
    for why in plan.skipped.values():
        yield f"left out: {why}"
    yield from _not_larger(plan)


def _not_larger(plan: PipelinePlan) -> Iterator[str]:
    """What is said of windows of images that do not show more than those of the module below.

    The paper trains on as much sound in all modules.
    """
    for below, stage in pairwise(plan.stages):
        if not below.windows or not stage.windows or len(stage.windows.pixels) == 1:
            continue
        if stage.windows.pixels <= below.windows.pixels:
            yield (
                f"windows of module {stage.module} show no more of an item than those of module "
                f"{below.module}: give it a larger train.window"
            )


def _table(plan: PipelinePlan) -> Table:
    table = Table(title=f"{plan.pipeline} on {plan.device}", title_justify="left")
    names = ("module", "micro-batch", "device", "host", "workers", "cache", "work")
    for name in names:
        table.add_column(name, justify="right")
    for stage in plan.stages:
        table.add_row(
            str(stage.module),
            str(stage.training.micro_batch),
            format_bytes(stage.device_mem),
            format_bytes(stage.host_mem),
            str(stage.extraction.workers),
            format_bytes(stage.cache_bytes),
            _work(stage.forward_flops, stage.backward_flops),
        )
    return table


def _work(forward: int, backward: int) -> str:
    """Operations for one sample, forward and backward."""
    if not forward:
        return "?"
    unit, name = (1e9, "G") if forward >= 1e8 else (1e6, "M")
    return f"{forward / unit:.1f} + {backward / unit:.1f} {name}FLOP"


def proof_record(proofs: Sequence[Proof]) -> dict[str, Any]:
    """Proofs as plain JSON; digests of weights, and seconds."""
    modules = [asdict(proof) | {"equal": proof.equal} for proof in proofs]
    return {"equal": all(proof.equal for proof in proofs), "modules": modules}


def proof_table(proofs: Sequence[Proof]) -> Table:
    """Weights trained both ways, one row a module."""
    table = Table(
        title="the same slice, from stored and from computed inputs", title_justify="left"
    )
    for name in ("module", "weights, stored", "weights, computed", "equal", "seconds"):
        table.add_column(name)
    for proof in proofs:
        table.add_row(
            str(proof.module),
            f"{proof.stored[:16]}…",
            f"{proof.computed[:16]}…",
            "to the last bit" if proof.equal else "[red]no[/]",
            f"{proof.stored_seconds:.1f} and {proof.computed_seconds:.1f}",
        )
    return table
