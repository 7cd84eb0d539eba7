"""What can be checked of a pipeline before anything runs."""

from __future__ import annotations

from collections.abc import Sequence

from gim_stagewise.config import PipelineConfig
from gim_stagewise.errors import ConfigError
from gim_stagewise.sources import PatchSource, RegionSource
from gim_stagewise.stage.chain import windowed_shapes
from gim_stagewise.stage.loader import check_loading
from gim_stagewise.stage.needs import chain_needs
from gim_stagewise.stage.order import held_out_count
from gim_stagewise.stage.shape import Cell, Shape, check_shape, window_of, windowed_input
from gim_stagewise.stage.windowed import extents_of, training_zones, window_count
from gim_stagewise.stage.workspace import Workspace

# Builders of parts of one network.
RESNETS = ("resnet34", "resnet50")


def first_input(
    space: Workspace, source: PatchSource | RegionSource
) -> tuple[tuple[int, ...], Cell]:
    """Grid and row of what module 1 is trained on."""
    patches, channels = space.config.patches, source.channels
    cell = (channels, patches.size, patches.size) if patches else (channels,)
    if isinstance(source, PatchSource):
        return source.extent, cell
    return windowed_input(space.config, 1, cell)


def check_chain(space: Workspace, source: PatchSource | RegionSource) -> list[Shape]:
    """Check data, geometry and modules, one module in memory at a time.

    Returns
    -------
    list of Shape
        Of all modules.

    Raises
    ------
    GimStageError
        For whatever does not fit.
    """
    if isinstance(source, RegionSource):
        return _check_windowed(space, source)
    source.check_sizes()
    grid, cell = first_input(space, source)
    shapes: list[Shape] = []
    chunk_bytes = 0
    for index, module in space.config.module.items():
        shapes.append(check_shape(space, index, grid, cell))
        _check_blocks(space.config, index)
        cell = shapes[-1].cell_out
        if not space.config.iterative:
            continue
        _check_loading(space, index, len(source.split("unlabeled")), chunk_bytes)
        chunk_bytes = shapes[-1].chunk_bytes(module.cache, len(source.ids))
    return shapes


def _check_blocks(config: PipelineConfig, index: int) -> None:
    """Refuse modules that leave out or repeat blocks of a network that they are cut from.

    The module was built before, so that its options are right.
    """
    build = config.stage(index).build
    if index == 1 or build not in RESNETS or config.stage(index - 1).build != build:
        return
    own, below = (config.stage(n).options["blocks"] for n in (index, index - 1))
    if own[0] != below[1] + 1:
        raise ConfigError(
            f"is {own}, and module {index - 1} has blocks {below}; let it begin with block "
            f"{below[1] + 1}",
            key=f"module.{index}.options.blocks",
        )


def check_joint(space: Workspace, samples: int, shapes: Sequence[Shape]) -> None:
    """Check modules, and that so many samples can be delivered, where all are trained in one step.

    Raises
    ------
    ConfigError
        If there are fewer than a batch holds; or in mode "cpc" if sequences have no context
        network on top.
    """
    if space.config.mode == "cpc" and space.config.dense and not shapes[-1].targets:
        raise ConfigError(
            'is "cpc", which for sequences needs a context network as the last module, such as '
            'build = "gru"; add one, or choose another mode',
            key="mode",
        )
    if space.config.mode != "random":
        _check_loading(space, 1, samples, 0)


def _check_windowed(space: Workspace, source: RegionSource) -> list[Shape]:
    shapes = windowed_shapes(space, source.channels)
    for index in space.config.module:
        _check_blocks(space.config, index)
    if space.config.iterative:
        chain_needs(space, source, shapes)  # windows.tile fits all of them
    extents = extents_of(source)
    if not extents:
        raise ConfigError(
            "has neither unlabeled nor training items: nothing to train on", key="source.splits"
        )
    for index, shape in enumerate(shapes, start=1):
        if not space.config.iterative and index > 1:
            break
        batch, window = space.config.stage(index).train.batch, window_of(space.config, index)
        count = window_count(space.config.windows, list(extents.values()), window, batch)
        _check_loading(space, index, count, 0)
        training_zones(space.config, index, extents)
        extents = {item_id: shape.extent_out(own) for item_id, own in extents.items()}
    return shapes


def _check_loading(space: Workspace, index: int, samples: int, chunk_bytes: int) -> None:
    train = space.config.stage(index).train
    check_loading(
        samples - held_out_count(samples, train.validation),
        batch=train.batch,
        window=train.shuffle_window,
        chunk_bytes=chunk_bytes,
        stage=index,
    )
