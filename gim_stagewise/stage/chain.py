"""The modules of a pipeline one on top of another, before any of them is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise

from gim_stagewise.config import PipelineConfig
from gim_stagewise.errors import DataError
from gim_stagewise.sources import RegionSource, Source, Subset, open_source
from gim_stagewise.stage.freeze import FrozenModule
from gim_stagewise.stage.left_out import left_out
from gim_stagewise.stage.shape import Shape, check_shape, window_of, windowed_input
from gim_stagewise.stage.workspace import Workspace, patch_grid


def windowed_shapes(space: Workspace, channels: int) -> list[Shape]:
    """What goes into each module and comes out, where items are read in windows.

    Parameters
    ----------
    space : Workspace
    channels : int
        Of the dataset.

    Raises
    ------
    ConfigError, ModuleRefusedError
        If modules do not fit one another, or their objectives not their windows.
    """
    config = space.config
    cell: tuple[int, ...] = (channels,)
    if config.patches is not None:
        cell = (channels, config.patches.size, config.patches.size)
    shapes: list[Shape] = []
    grid: tuple[int, ...] = ()
    for index in config.module:
        if config.iterative or index == 1:
            grid, cell = windowed_input(config, index, cell)
        shapes.append(check_shape(space, index, grid, cell))
        cell = shapes[-1].cell_out
        if config.dense and config.iterative:
            cell = cell[:1]
    return shapes


def item_extents(shapes: Sequence[Shape], extent: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Extents of an item as the input of each module, and as the output of the last."""
    found = [extent]
    for shape in shapes:
        found.append(shape.extent_out(found[-1]))
    return found


def open_windowed(space: Workspace, *, again: Collection[str] = ()) -> RegionSource:
    """The dataset of a pipeline whose items are read in windows, without those that are unusable.

    Items that are too small for a module are refused, or left out where ``source.on_error`` is
    "skip"; ``skipped`` of the source lists them, and those that could not be read, now or by
    earlier runs in the folder, except those that are to be tried ``again``.

    Raises
    ------
    DataError
        If an item is too small, or none can be used.
    GimStageError
        For whatever else is wrong with data or modules.
    """
    config = space.config
    images = open_source(config.source)
    unusable: dict[str, str] = {}
    if config.source.on_error == "skip":
        known = left_out(space.folder, images)
        unusable = {item_id: why for item_id, why in known.items() if item_id not in again}
    grid = patch_grid(config)
    skipped: dict[str, str] = dict(getattr(images, "skipped", {}))
    extents = {
        item.id: item.extent if grid is None else grid.extent(item.extent[0], item.extent[1])
        for item in images.items()
        if item.id not in unusable
    }
    problems = _too_small(space, images, extents)
    if problems and config.source.on_error == "stop":
        first = next(iter(problems.values()))
        others = f" ({len(problems) - 1} more like it)" if len(problems) > 1 else ""
        raise DataError(
            f"{first}{others}; use a smaller train.window, remove it, or set "
            'source.on_error = "skip"'
        )
    kept = [item_id for item_id in extents if item_id not in problems]
    problems |= unusable
    if not kept:
        first = next(iter(problems.values()))
        raise DataError(f"not one sample can be used; the first: {first}")
    data = Subset(images, kept) if problems else images
    return RegionSource(data, config.augment, grid, skipped=skipped | problems)


def _too_small(
    space: Workspace, images: Source, extents: Mapping[str, tuple[int, ...]]
) -> dict[str, str]:
    """Why items are too small for the modules, by id; of those that are not, nothing.

    Extents are those of the first module's input.
    """
    # Windows beyond all that there is are not tried out on modules.
    shapes: list[Shape] = []
    if any(not _window_problem(space, extent) for extent in extents.values()):
        channels = RegionSource.channels_of(images, space.config.augment)
        shapes = windowed_shapes(space, channels)
    problems = {}
    for item in images.items():
        extent = extents.get(item.id)
        if extent is None:
            continue
        if problem := _window_problem(space, extent) or _size_problem(space, shapes, extent):
            size = "×".join(map(str, item.extent))
            problems[item.id] = f"sample {item.id} is {size}: {problem}"
    return problems


def _window_problem(space: Workspace, extent: tuple[int, ...]) -> str:
    """Why an item is too small for any window; empty if it may not be.

    What is above has no more positions than the item itself, but for a few of padding.
    """
    for index in _with_windows(space.config):
        window = window_of(space.config, index)
        if any(2 * length < side for length, side in zip(extent, window, strict=True)):
            sides = "×".join(map(str, window))
            return f"smaller than a window of module {index}, which has {sides}"
    return ""


def _with_windows(config: PipelineConfig) -> list[int]:
    """Modules whose input is read in windows: all, or where they are trained in one step, one."""
    return list(config.module) if config.iterative else [1]


def _size_problem(space: Workspace, shapes: Sequence[Shape], extent: tuple[int, ...]) -> str:
    """Why an item is too small for the modules; empty if it is not."""
    extents = item_extents(shapes, extent)
    for index, (own, outputs) in enumerate(pairwise(extents), start=1):
        window = window_of(space.config, index) if index in _with_windows(space.config) else ()
        if any(length < side for length, side in zip(own, window, strict=False)):
            there, wanted = ("×".join(map(str, sizes)) for sizes in (own, window))
            what = "positions" if space.config.dense else "patches"
            return (
                f"smaller than a window of module {index} ({there} {what}, windows have {wanted})"
            )
        if 0 in outputs:
            return f"too small to give module {index} a single output"
    return ""


def fresh_chain(space: Workspace, in_channels: Sequence[int]) -> list[FrozenModule]:
    """Modules before training, from module 1 on, with embeddings as they are stored.

    ``in_channels`` are those of each module's input.
    """
    return [
        FrozenModule(space.build(index, channels, storing=True), space.device)
        for index, channels in enumerate(in_channels, start=1)
    ]
