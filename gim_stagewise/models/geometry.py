"""What a module does to positions: read from the module where it says so, else found by trying."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gim_stagewise.errors import ModuleRefusedError
from gim_stagewise.seeds import seeded
from gim_stagewise.windows import Geometry, Region, Window, tiles

# Lengths that are tried, by the number of axes, until one is long enough to see some outputs with
# all of their inputs.
_LENGTHS = {1: (16, 64, 256, 1024), 2: (16, 32, 64, 128)}
# Along each axis, in windows of a third of them; and how near they have to be, of the largest.
_OUTPUTS_COMPARED = 9
_TOLERANCE = 1e-4
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


@torch.no_grad()
def check_windows(
    module: nn.Module, channels: int, geometry: tuple[Geometry, ...], *, key: str
) -> None:
    """Compare outputs of windows with those of a whole, random input, at borders and inside.

    It finds a geometry that is declared wrong, outputs that depend on where they are or on the
    whole input, and paddings by what is not there in a window.

    Raises
    ------
    ModuleRefusedError
        If they differ.
    """
    training = module.training
    module.eval()
    try:
        with seeded(0):
            extent = tuple(own.inputs(_OUTPUTS_COMPARED) for own in geometry)
            x = torch.randn(1, channels, *extent)
            whole = module(x)
            counts = tuple(own.count(length) for own, length in zip(geometry, extent, strict=True))
            scale = float(whole.abs().max())
            for tile in tiles(counts, tuple(-(-count // 3) for count in counts)):
                window = Window.over(tile, geometry, extent)
                part = module(x[_of(window.inputs)])
                kept = part[_of(window.kept)]
                expected = whole[_of(tile)]
                same = kept.shape == expected.shape and torch.allclose(
                    kept, expected, rtol=0, atol=_TOLERANCE * scale
                )
                if not same:
                    raise ModuleRefusedError(
                        "gives other outputs for a window of an input than for the whole: its "
                        "geometry is declared wrong, or outputs depend on their position or on "
                        'all inputs; correct it, or use encoding = "patch"',
                        key=key,
                    )
    finally:
        module.train(training)


def _of(region: Region) -> tuple[slice, ...]:
    """Of a tensor [row, channel, *space]."""
    return (slice(None), slice(None), *(span.slice for span in region))


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
            count = _outputs(module, channels, axes, axis, other, key)
            if count != found.count(other):
                # The padding at the end decides how many there are.
                after = (count - 1) * found.stride + found.kernel - found.before - other
                if not 0 <= after < found.kernel:
                    break
                found = Geometry(found.kernel, found.stride, found.before, after)
        else:
            if all(
                _outputs(module, channels, axes, axis, other, key) == found.count(other)
                for other in range(length, length + found.stride)
            ):
                return found
    raise ModuleRefusedError(
        "an output depends on inputs at no regular distance, or on more than "
        f"{_LENGTHS[axes][-1] // 2} along an axis (a normalisation over all of them?); use layers "
        "that see a neighbourhood, declare geometry = [(kernel, stride, padding), ...] if they do, "
        'or use encoding = "patch"',
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
        except Exception:  # whatever a module raises for an input that is too short
            return None
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


def _outputs(module: nn.Module, channels: int, axes: int, axis: int, length: int, key: str) -> int:
    try:
        return int(module(_input(channels, axes, axis, length, rows=1)).shape[2 + axis])
    except Exception as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModuleRefusedError(
            f"cannot take an input of {length} positions ({reason}), and windows may have any "
            'number; change it, or use encoding = "patch"',
            key=key,
        ) from error


def _input(channels: int, axes: int, axis: int, length: int, *, rows: int) -> Tensor:
    """Zeros, as long along the other axis, for which there may be a least length as well."""
    return torch.zeros(rows, channels, *(length,) * axes)
