"""What a module does to positions: read from the module where it says so, else found by trying."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gim_stagewise.errors import ModuleRefusedError
from gim_stagewise.windows import Geometry

# Lengths that are tried, by the number of axes, until one is long enough to see some outputs with
# all of their inputs.
_LENGTHS = {1: (16, 64, 256, 1024), 2: (16, 32, 64, 128)}
# Copies of the input that go through the module at once.
_ROWS = 16


def module_geometry(
    module: nn.Module, channels: int, axes: int, *, key: str
) -> tuple[Geometry, ...]:
    """Which inputs an output of a module depends on, along each axis.

    Parameters
    ----------
    module : nn.Module
        On the CPU. Where it has ``geometry``, a list of (kernel, stride, padding) of its layers
        from the bottom up, alike along all axes, that is taken; otherwise see `probed_geometry`.
        Stateful modules have an output for each input.
    channels : int
        Of its input.
    axes : int
        1 for sequences, 2 for images.
    key : str
        What errors call the module, such as ``"module.2"``.

    Raises
    ------
    ModuleRefusedError
        If it declares no such list, or an output depends on inputs everywhere.
    """
    if getattr(module, "stateful", False):
        # What goes before comes with the state: an output for each input, and no halo.
        return (Geometry(),) * axes
    declared = getattr(module, "geometry", None)
    if declared is None:
        return probed_geometry(module, channels, axes, key=key)
    try:
        own = Geometry.of_chain([(int(k), int(s), int(p)) for k, s, p in declared])
    except (TypeError, ValueError) as error:
        raise ModuleRefusedError(
            f"its geometry is {declared!r}, expected a (kernel, stride, padding) for each layer "
            f"({error})",
            key=key,
        ) from None
    return (own,) * axes


def probed_geometry(
    module: nn.Module, channels: int, axes: int, *, key: str
) -> tuple[Geometry, ...]:
    """The same, found by trying: NaN is put in one place of the input, and comes out where it may.

    Whatever weights are, NaN goes through sums, products and activations; through what chooses, as
    pooling does, PyTorch passes it on as well.

    Raises
    ------
    ModuleRefusedError
        If an output depends on inputs everywhere, as with a normalisation over positions, or on
        inputs that lie at no regular distance.
    """
    training = module.training
    module.eval()
    try:
        with torch.no_grad():
            return tuple(_probed_axis(module, channels, axes, axis, key) for axis in range(axes))
    finally:
        module.train(training)


def _probed_axis(module: nn.Module, channels: int, axes: int, axis: int, key: str) -> Geometry:
    for length in _LENGTHS[axes]:
        seen = _seen(module, channels, axes, axis, length, key)
        if seen is None:
            continue
        found = _fitting(seen, length)
        if found is None:
            continue
        for other in range(length, length + found.stride):
            count = _outputs(module, channels, axes, axis, other)
            if count != found.count(other):
                # The padding at the end decides how many there are.
                after = (count - 1) * found.stride + found.kernel - found.before - other
                if not 0 <= after < found.kernel:
                    break
                found = Geometry(found.kernel, found.stride, found.before, after)
        else:
            if all(
                _outputs(module, channels, axes, axis, other) == found.count(other)
                for other in range(length, length + found.stride)
            ):
                return found
    raise ModuleRefusedError(
        f"an output depends on inputs at no regular distance, or farther than {_LENGTHS[axes][-1]} "
        "positions away (a normalisation over all of them?); use layers that see a neighbourhood, "
        'or encoding = "patch"',
        key=key,
    )


def _seen(
    module: nn.Module, channels: int, axes: int, axis: int, length: int, key: str
) -> list[tuple[int, int]] | None:
    """First and last input of each output along an axis; None if the input is too short."""
    reached: list[Tensor] = []
    for start in range(0, length, _ROWS):
        places = range(start, min(start + _ROWS, length))
        x = _input(channels, axes, axis, length, rows=len(places))
        for row, place in enumerate(places):
            x[row].select(1 + axis, place).fill_(float("nan"))
        try:
            z = module(x)
        except RuntimeError:
            return None  # too short for the module
        if z.ndim != axes + 2:
            raise ModuleRefusedError(
                f"returned shape {tuple(z.shape)}, which has not the {axes} axes of its input",
                key=key,
            )
        others = [dim for dim in range(1, z.ndim) if dim != 2 + axis]
        reached.append(z.isnan().amax(dim=others))
    by_input = torch.cat(reached)  # [input, output]
    spans = []
    for column in by_input.T:
        reaching = torch.nonzero(column)[:, 0].tolist()
        if not reaching:
            return None
        spans.append((reaching[0], reaching[-1]))
    return spans


def _fitting(seen: list[tuple[int, int]], length: int) -> Geometry | None:
    """The geometry that gives these first and last inputs, with any padding at the end."""
    middle = len(seen) // 2
    if len(seen) < 5:
        return None
    first, last = seen[middle]
    stride = seen[middle + 1][0] - first
    kernel, before = last - first + 1, middle * stride - first
    if stride < 1 or not 0 <= before < kernel or kernel > length // 2:
        return None
    for n, (start, stop) in enumerate(seen):
        wanted = (n * stride - before, n * stride - before + kernel - 1)
        inside = wanted[0] >= 0 and wanted[1] < length
        if inside and (start, stop) != wanted:
            return None
        # At the borders a kernel with gaps may reach beyond with all that would be outermost.
        if start < wanted[0] or stop > wanted[1]:
            return None
    return Geometry(kernel, stride, before, 0)


def _outputs(module: nn.Module, channels: int, axes: int, axis: int, length: int) -> int:
    return int(module(_input(channels, axes, axis, length, rows=1)).shape[2 + axis])


def _input(channels: int, axes: int, axis: int, length: int, *, rows: int) -> Tensor:
    """Zeros, as long along the other axis, for which there may be a least length as well."""
    return torch.zeros(rows, channels, *(length,) * axes)
