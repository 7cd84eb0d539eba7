"""Whether the probe of all modules, one on top of another, fits the budget."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from heapq import nlargest
from itertools import compress

from gim_stagewise.errors import OverBudgetError
from gim_stagewise.memory import resident_bytes
from gim_stagewise.probe.probe import samples_at_once
from gim_stagewise.probe.sequences import KEPT_PART, stored_spacings
from gim_stagewise.probe.splits import probe_splits
from gim_stagewise.probe.walks import mfcc_bytes, sample_rate
from gim_stagewise.sources import Item, PatchSource, Source, step_labelled
from gim_stagewise.stage.forward import project_forward
from gim_stagewise.stage.project import round_up
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.spec import step_spec
from gim_stagewise.stage.workspace import Workspace
from gim_stagewise.units import format_bytes

# What scikit-learn takes when it is loaded.
_CLASSIFIER_BYTES = 90_000_000


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
    items = [own for own in source.items() if own.id in probed]
    longest = max(items, key=lambda own: own.extent)
    whole = _recording_bytes(longest, shapes, space)
    steps = _steps_bytes(items, shapes, space, source)
    rate, remedy = sample_rate(source), "cut it into several"
    if steps > whole and space.config.probe.step_batch > 1:
        remedy = f"lower probe.step_batch from {space.config.probe.step_batch}"
    count = max(whole + steps, mfcc_bytes(longest, rate) if rate else 0)
    # Of the room that there is a part is for features that are kept.
    count = count * KEPT_PART // (KEPT_PART - 1)
    _check(
        space,
        count + (0 if "sklearn.linear_model" in sys.modules else _CLASSIFIER_BYTES),
        "the probe takes recordings as a whole, and",
        f" for the longest, {longest.id}",
        remedy,
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


def _recording_bytes(item: Item, shapes: Sequence[Shape], space: Workspace) -> int:
    """What `chain_walk` holds at once of a recording, and what is made of its embeddings."""
    most = embeddings = largest = 0
    extent, inputs = item.extent, 4 * item.channels * math.prod(item.extent)
    for shape, stored in zip(shapes, _embedding_bytes(item, shapes, space), strict=True):
        extent = shape.extent_out(extent)
        outputs = 4 * shape.cell_out[0] * math.prod(extent)
        # Outputs before and after an activation, those that are kept, and what a convolution makes
        # of its own in another order.
        most = max(most, inputs + 5 * outputs + embeddings)
        embeddings += stored
        largest = max(largest, stored)
        inputs = outputs
    # Values and their squares as float64.
    return max(most, embeddings + 4 * largest)


def _embedding_bytes(item: Item, shapes: Sequence[Shape], space: Workspace) -> list[int]:
    """What the stored embeddings of each module take of an item: float32."""
    found, extent = [], item.extent
    for index, shape in enumerate(shapes, start=1):
        extent = shape.extent_out(extent)
        steps = -(-math.prod(extent) // space.config.stored_pool(index))
        found.append(4 * shape.embedding * steps)
    return found


def _steps_bytes(
    items: Sequence[Item], shapes: Sequence[Shape], space: Workspace, source: Source
) -> int:
    """What classifiers of steps hold at once: a batch, and of one module a second time."""
    stepped = step_labelled(source)
    if stepped is None:
        return 0
    fitting = [own == stepped.step_label_hop for own in stored_spacings(space.config, shapes)]
    longest = nlargest(space.config.probe.step_batch, items, key=lambda own: own.extent)
    found = [list(compress(_embedding_bytes(own, shapes, space), fitting)) for own in longest]
    by_module: list[int] = [sum(own) for own in zip(*found, strict=True)]
    return sum(by_module) + max(by_module, default=0)
