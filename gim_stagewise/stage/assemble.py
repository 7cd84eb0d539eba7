"""What is trained in one step: a module with its objective, or all modules with theirs."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from gim_stagewise.models import PixelCNN, Stack
from gim_stagewise.objectives import (
    CPC,
    CrossEntropy,
    InfoNCE,
    Joint,
    Objective,
    build_objective,
)
from gim_stagewise.seeds import derive_seed, seeded
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.workspace import Workspace


def observed_modules(space: Workspace) -> list[int]:
    """Numbers, from 1, of the modules that have an objective where all are trained in one step."""
    every = list(space.config.module)
    return every if space.config.isolated else every[-1:]


def assemble(
    space: Workspace, indexes: Sequence[int], shapes: Sequence[Shape], *, classes: int = 0
) -> tuple[nn.Module, Objective]:
    """Module and objective with initial weights, on the CPU.

    Parameters
    ----------
    space : Workspace
    indexes : sequence of int
        Numbers of the modules: one, or where the pipeline's mode is not "iterative", all.
    shapes : sequence of Shape
        Of those modules.
    classes : int
        Of the labels, for supervised modes.

    Returns
    -------
    (nn.Module, Objective)
        A module and its InfoNCE; or a `Stack` and a `Joint` objective.
    """
    modules = [space.build(i, s.cell_in[0]) for i, s in zip(indexes, shapes, strict=True)]
    if space.config.iterative:
        return modules[0], _infonce(space, indexes[0], shapes[0])
    observed = [index - 1 for index in observed_modules(space)]
    parts = [_objective(space, number + 1, shapes[number], classes) for number in observed]
    seen = [
        (*shapes[number].cells, shapes[number].embedding + shapes[number].targets)
        for number in observed
    ]
    stack = Stack(modules, isolated=space.config.isolated, observed=observed)
    return stack, Joint(parts, seen)


def _objective(space: Workspace, index: int, shape: Shape, classes: int) -> Objective:
    if space.config.supervised:
        with seeded(derive_seed(space.config.seed, "projections", index)):
            return CrossEntropy(shape.embedding, classes=classes)
    # On sequences the context network is the top module itself (equation 6).
    if space.config.mode != "cpc" or space.config.dense:
        return _infonce(space, index, shape)
    infonce = _infonce(space, index, shape, targets=shape.embedding)
    context = space.config.context
    with seeded(derive_seed(space.config.seed, "context", index)):
        network = PixelCNN(shape.embedding, hidden=context.channels, layers=context.layers)
    return CPC(network, infonce)


def _infonce(space: Workspace, index: int, shape: Shape, *, targets: int = 0) -> InfoNCE:
    return build_objective(
        space.module_config(index).objective,
        channels=shape.embedding,
        targets=targets or shape.targets,
        seed=space.config.seed,
        index=index,
    )
