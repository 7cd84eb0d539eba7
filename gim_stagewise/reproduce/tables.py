"""Tables 1 and 2 of the paper.

Each is written to a file below ``work.target``, whose path is given.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import torch

from gim_stagewise.errors import ConfigError, DataError
from gim_stagewise.memory import resident_bytes
from gim_stagewise.probe.probe import PIXEL_STATISTICS
from gim_stagewise.reproduce.paper import TABLE_1, TABLE_2
from gim_stagewise.reproduce.runs import (
    DOES_NOT_FIT,
    Reproduction,
    how_iterative,
    markdown_table,
    over_seeds,
    spread,
)
from gim_stagewise.stage.needs import chain_needs
from gim_stagewise.stage.project import count_step, measure_step, measured_bytes
from gim_stagewise.stage.spec import StepSpec
from gim_stagewise.units import format_bytes

# Of a step that is measured, what it counts has to fit this often into what is free.
_MARGIN = 1.5


def table_1(work: Reproduction) -> Path:
    """Test accuracies of all modes, by the same probe (table 1; section 4.1).

    Raises
    ------
    DataError
        If the dataset has no labels.
    GimStageError
        For whatever a mode cannot have, before any is trained.
    """
    work.check([mode for _, mode, _ in TABLE_1 if mode is not None])
    count = len(work.pipeline("iterative").config.module)
    modules = [f"module {index}" for index in range(1, count + 1)]
    rows = []
    statistics: list[float] = []
    for name, mode, paper in TABLE_1:
        if mode is None:
            rows.append([name, paper, *[""] * count])
            continue
        runs = work.runs(mode)
        if not runs:
            rows.append([name, paper, *[DOES_NOT_FIT] * count])
            continue
        cells = []
        for number in range(count):
            own = [run.accuracy(number + 1) for run in runs]
            if None in own:
                raise DataError(
                    f"{work.file}: its dataset has no labelled train and test samples, by which "
                    "features could be compared"
                )
            cells.append(spread([100 * accuracy for accuracy in own if accuracy is not None]))
        rows.append([name, paper, *cells])
        found = [run.baseline(PIXEL_STATISTICS) for run in runs]
        statistics = [100 * own for own in found if own is not None]
    if statistics:
        rows.append(["Pixel statistics", "", *[""] * (count - 1), spread(statistics)])
    name = work.pipeline("iterative").config.name
    text = (
        f"# Table 1: {name}\n\n"
        "Test accuracy in percent of a linear classifier on frozen features; the paper's column is "
        "STL-10, top module. Every row has the same pooling, probe and splits; all modes have the "
        "file's epochs, which supervised ones take over labelled samples alone. "
        f"{how_iterative(work.pipeline('iterative').config)}"
        f"{over_seeds(work.seeds)}\n\n"
        + markdown_table(["method", "paper", *modules], rows)
        + f"\n{work.conditions()}\n"
    )
    return work.write("table1.md", text)


def table_2(work: Reproduction) -> Path:
    """Memory of training, all modules and one at a time (table 2; section 4.1).

    A step is counted, tensor by tensor, and where it fits measured in a fresh process. Steps take a
    batch in one pass, of ``negatives_group`` samples where that is given: what one of the paper's
    GPUs had. The last rows are what stages take in micro-batches.

    Raises
    ------
    GimStageError
        If the pipeline's data, geometry or modules do not fit together.
    """
    rows = []
    for name, mode, module, paper in TABLE_2:
        try:
            rows.append([name, paper, *_memory(work, _spec(work, mode, module))])
        except ConfigError as error:
            rows.append([name, paper, "", f"none: {error}"])
    whole = [_spec(work, "iterative", index) for index in work.pipeline("iterative").config.module]
    rows += [[f"GIM, module {s.index}", "", *_memory(work, s)] for s in whole[1:]]
    rows += [
        [f"GIM, module {s.index}, micro-batches of {size} patches", "", *_memory(work, own)]
        for s in whole
        for size in (max(1, s.rows // 28),)
        for own in (replace(s, micro_batch=size),)
    ]
    first = whole[0]
    samples = " or ".join(map(str, sorted({own.shape[0] for own in whole})))
    text = (
        f"# Table 2: {work.pipeline('iterative').config.name}\n\n"
        f"Memory of a training step (the second, with Adam's state), {samples} samples of "
        f"{first.rows // first.shape[0]} patches. The paper's column is its ResNet-50 on a GPU "
        "with 16 images.\n\n"
        + markdown_table(["method", "paper (GB)", "counted", "measured"], rows)
        + f"\n{work.conditions()}\n"
    )
    return work.write("table2.md", text)


def _spec(work: Reproduction, mode: str, module: int | None) -> StepSpec:
    """The step of a module, or of all, with a batch in one pass."""
    pipeline = work.pipeline(mode)
    shapes = pipeline.check()
    if module is None:
        spec = pipeline.joint_stage(shapes).needs.spec
    else:
        spec = chain_needs(pipeline.workspace, pipeline.source, shapes)[module - 1].spec
    objective = pipeline.config.stage(spec.index).objective
    samples = objective.negatives_group or spec.shape[0]
    spec = replace(spec, shape=(samples, *spec.shape[1:]), lean=True)
    return replace(spec, micro_batch=spec.rows)


def _memory(work: Reproduction, spec: StepSpec) -> list[str]:
    """What a step is counted to take, and what it takes."""
    try:
        counted = count_step(spec).count
    except Exception:  # the user's module looks at values, which are not there when it is counted
        return ["cannot be counted", format_bytes(_measured(spec))]
    measured = "does not fit here"
    device = torch.device(spec.device)
    room = work.budget.device_bytes(device)
    if device.type == "cpu":
        room = min(work.budget.host_bytes() - resident_bytes(), room or sys.maxsize)
    if room is None or counted * _MARGIN < room:
        measured = format_bytes(_measured(spec))
    return [format_bytes(counted), measured]


def _measured(spec: StepSpec) -> int:
    return measured_bytes(measure_step, spec, lower="train.batch", steps=2)
