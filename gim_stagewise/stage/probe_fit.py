"""Whether the probe of all modules, one on top of another, fits the budget."""

from __future__ import annotations

import math
from collections.abc import Sequence

from gim_stagewise.errors import OverBudgetError
from gim_stagewise.memory import resident_bytes
from gim_stagewise.sources import PatchSource, Source
from gim_stagewise.stage.forward import project_forward
from gim_stagewise.stage.probe import probe_splits, samples_at_once
from gim_stagewise.stage.project import round_up
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.spec import step_spec
from gim_stagewise.stage.workspace import Workspace
from gim_stagewise.units import format_bytes


def check_probe_of_recordings(space: Workspace, source: Source, shapes: Sequence[Shape]) -> None:
    """Refuse recordings too long for the probe of modules, which takes each as a whole.

    Parameters
    ----------
    space : Workspace
    source : Source
        The dataset.
    shapes : sequence of Shape
        Of the modules, from module 1 on.

    Raises
    ------
    OverBudgetError
        That names the longest recording.
    """
    splits = probe_splits(source)
    if splits is None or not space.config.sequences:
        return
    probed = {*splits[0].ids, *splits[1].ids}
    longest = max((own for own in source.items() if own.id in probed), key=lambda own: own.extent)
    _check(
        space,
        _recording_bytes(longest.extent, longest.channels, shapes, space),
        "the probe takes recordings as a whole, and",
        f" for the longest, {longest.id}",
        "cut it into several",
    )


def check_probe_of_patches(space: Workspace, source: Source, shapes: Sequence[Shape]) -> None:
    """Refuse pieces of the frozen forward too large for all modules, one on top of another.

    Parameters are those of `check_probe_of_recordings`.

    Raises
    ------
    OverBudgetError
    """
    if probe_splits(source) is None or not isinstance(source, PatchSource):
        return
    _check(
        space,
        _patches_bytes(source, shapes, space),
        "the probe of all modules, one on top of another,",
        "",
        f"lower extract.batch from {space.config.extract.batch}",
    )


def _check(space: Workspace, count: int, what: str, where: str, remedy: str) -> None:
    needed, allowed = resident_bytes() + count, space.budget.host_bytes()
    if needed > allowed:
        raise OverBudgetError(
            f"{what} projects {format_bytes(needed)} of host memory{where}; allowed "
            f"{format_bytes(allowed)}: {remedy}, or allow --allowed-host-mem {round_up(needed)}",
            needed=needed,
        )


def _patches_bytes(source: PatchSource, shapes: Sequence[Shape], space: Workspace) -> int:
    """What `chain_features` holds at once on the host: weights, a piece, its inputs and outputs."""
    rows = samples_at_once(source, space.config) * math.prod(source.extent)
    weights = most = 0
    for index, shape in enumerate(shapes, start=1):
        held = 4 * rows * (math.prod(shape.cell_in) + math.prod(shape.cell_out))
        if space.device.type == "cpu":
            module = space.build(index, shape.cell_in[0])
            weights += sum(parameter.nbytes for parameter in module.parameters())
            held += project_forward(step_spec(space, index, shape), measure=False)
        most = max(most, held)
    return weights + most


def _recording_bytes(
    extent: tuple[int, ...], channels: int, shapes: Sequence[Shape], space: Workspace
) -> int:
    """What `chain_walk` holds at once of a recording: float32 throughout."""
    most = embeddings = 0
    inputs = 4 * channels * math.prod(extent)
    for index, shape in enumerate(shapes, start=1):
        extent = shape.extent_out(extent)
        steps = math.prod(extent)
        outputs = 4 * shape.cell_out[0] * steps
        # Outputs before and after an activation, those that are kept, and what a convolution makes
        # of its own in another order.
        most = max(most, inputs + 5 * outputs + embeddings)
        embeddings += 4 * shape.embedding * -(-steps // space.config.stored_pool(index))
        inputs = outputs
    return max(most, embeddings)
