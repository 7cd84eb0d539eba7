"""Figures 2 and 3 of the paper.

Each is written to a PNG file below ``work.target``, whose path is given; a Markdown file beside it
says what it shows and under which conditions it was made.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache import Cache
from gim_stagewise.config import AugmentConfig
from gim_stagewise.durable import write_atomic
from gim_stagewise.errors import ConfigError, DataError
from gim_stagewise.pipeline import StageResult
from gim_stagewise.report.curves import CURVES, matplotlib_figure
from gim_stagewise.reproduce.exciting import Neuron, most_exciting
from gim_stagewise.reproduce.runs import Reproduction, how_iterative, markdown_table
from gim_stagewise.sources import PatchSource
from gim_stagewise.stage.workspace import patch_grid
from gim_stagewise.windows import PatchGrid, Span

PATCHES = 4
NEURONS = 8
_CROSS = (0.3, 0.6, 0.9)  # no colour of a gray patch
_SAMPLES_AT_ONCE = 256


def figure_2(work: Reproduction) -> Path:
    """Groups of patches that excite a neuron most, at every level (figure 2).

    Read from the caches of the iterative run; of each module the most selective neurons are shown.

    Raises
    ------
    ConfigError
        If there are no patches, or matplotlib is not installed.
    DataError
        If no sample is stored without augmentation.
    """
    pipeline = work.pipeline("iterative")
    source, grid = pipeline.source, patch_grid(pipeline.config)
    if not isinstance(source, PatchSource) or grid is None:
        raise ConfigError(
            "has no patches that could be shown: figure 2 takes samples that are read whole",
            key="source.kind",
        )
    count = len(pipeline.config.module)
    figure = matplotlib_figure(1.2 * NEURONS, 1.4 * count)
    panels = figure.subplots(count, NEURONS, squeeze=False)
    for row, stage in zip(panels, work.run("iterative").stages, strict=True):
        assert stage.cache is not None
        cache = Cache(stage.cache)
        ids = list(cache.ids) if cache.views == 0 else _evaluated(cache)
        if not ids:
            raise DataError(
                f"{work.file}: patches are shown of train and test samples, as they are without "
                "augmentation, and there are none"
            )
        with work.progress.task(
            f"figure 2: module {stage.module}", total=len(ids), unit="sample"
        ) as task:
            batches = _embeddings(cache, ids, task.advance)
            neurons = most_exciting(batches, patches=PATCHES, neurons=NEURONS)
        for panel in row:
            panel.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"module {stage.module}")
        for panel, neuron in zip(row, neurons, strict=False):
            panel.set_title(f"channel {neuron.channel}", fontsize=7)
            panel.imshow(_group(neuron, source, pipeline.config.augment, grid))
    return save_figure(
        work,
        figure,
        2,
        f"A row for each module: up to {NEURONS} of its channels, and of each the {PATCHES} "
        f"patches that excite it most, no two of one sample, among {len(ids)} samples without "
        "augmentation. The channels are those whose response to their patches lies furthest above "
        "their mean, in standard deviations.\n",
    )


def _evaluated(cache: Cache) -> list[str]:
    """Samples whose evaluation view is stored, where training has views of its own."""
    return list(dict.fromkeys([*cache.split("train"), *cache.split("test")]))


def _embeddings(
    cache: Cache, ids: list[str], advance: Any
) -> Iterator[tuple[list[str], NDArray[np.float32]]]:
    for start in range(0, len(ids), _SAMPLES_AT_ONCE):
        own = ids[start : start + _SAMPLES_AT_ONCE]
        yield own, cache.read_pooled(own)
        advance(len(own))


def _group(
    neuron: Neuron, source: PatchSource, augment: AugmentConfig, grid: PatchGrid
) -> NDArray[np.float32]:
    """Four patches in a square, [height, width, 3], with a coloured cross between them."""
    gap = max(1, grid.size // 16)
    side = 2 * grid.size + gap
    square = np.full((side, side, 3), _CROSS, np.float32)
    for number, (item_id, row, column) in enumerate(neuron.patches):
        image = source.read_images([item_id])[0]
        down, along = (grid.pixels(Span(at, at + 1)) for at in (row, column))
        top, left = (place * (grid.size + gap) for place in divmod(number, 2))
        square[top : top + grid.size, left : left + grid.size] = _visible(
            image[:, down.slice, along.slice], augment
        )
    return square


def _visible(pixels: NDArray[np.float32], augment: AugmentConfig) -> NDArray[np.float32]:
    """Pixels in [0, 1], [height, width, 3] or 1, as they were before normalising."""
    if augment.mean is not None and augment.std is not None:
        mean, std = (np.array(v, np.float32)[:, None, None] for v in (augment.mean, augment.std))
        pixels = pixels * std + mean
    shown = np.clip(pixels, 0, 1).transpose(1, 2, 0)
    return shown if shown.shape[2] == 3 else shown.mean(2, keepdims=True)


def figure_3(work: Reproduction) -> Path:
    """Training and validation curves of modules, simultaneous against iterative (figure 3).

    Raises
    ------
    ConfigError
        If matplotlib is not installed.
    GimStageError
        If one of the two cannot be trained.
    """
    # Of module 1 both are the same: the wider line can be seen below the other.
    lines = {"simultaneous": ("skyblue", 3.0), "iterative": ("tab:red", 1.5)}
    work.check([*lines])
    count = len(work.pipeline("iterative").config.module)
    figure = matplotlib_figure(4 * count, 3.8)
    panels = figure.subplots(1, count, squeeze=False)[0]
    rows = []
    for mode, (colour, width) in lines.items():
        for result in work.runs(mode):  # none if it does not fit in memory
            for panel, stage in zip(panels, result.stages, strict=True):
                epochs = stage.record.epoch_losses
                rows.append([str(stage.module), mode, *_frozen_losses(stage)])
                for name, style, losses in zip(*CURVES, zip(*epochs, strict=True), strict=True):
                    panel.plot(
                        range(1, 1 + len(losses)),
                        losses,
                        style,
                        color=colour,
                        linewidth=width,
                        marker="." if len(epochs) == 1 else "",
                        label=f"{mode}, {name}",
                    )
    for number, panel in enumerate(panels, start=1):
        panel.set_title(f"module {number}")
        panel.set_xlabel("epoch")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("InfoNCE loss (nats)")
    handles, labels = panels[0].get_legend_handles_labels()
    once = dict(zip(labels, handles, strict=True))  # whatever the number of seeds
    columns = 4 if count > 2 else 2
    figure.legend(once.values(), once.keys(), loc="outside lower center", ncols=columns)
    config = work.pipeline("iterative").config
    return save_figure(
        work,
        figure,
        3,
        "Losses after each epoch (InfoNCE, nats), of weights at rest and inputs as they are: on "
        "held-out samples, and on as many of those that were trained on, in the view that a cache "
        f"stores first. {how_iterative(config)} Of the epoch whose weights were frozen:\n\n"
        + markdown_table(
            ["module", "mode", "epochs", "training", "validation", "difference"],
            sorted(rows, key=lambda row: int(row[0])),
        ),
    )


def _frozen_losses(stage: StageResult) -> list[str]:
    """Epochs made, and losses of the frozen weights."""
    own = stage.record
    assert own.train_loss is not None
    assert own.validation_loss is not None
    losses = (own.train_loss, own.validation_loss, own.validation_loss - own.train_loss)
    return [str(own.epochs), *(f"{loss:.3f}" for loss in losses)]


def save_figure(work: Reproduction, figure: Any, number: int, text: str) -> Path:
    """Write a figure as PNG below the target, and beside it what is to be said of it."""
    path = work.target / f"figure{number}.png"
    name = work.pipeline("iterative").config.name
    work.write(
        f"figure{number}.md",
        f"# Figure {number}: {name}\n\n![figure {number}]({path.name})\n\n"
        f"{text}\n{work.conditions()}\n",
    )
    write_atomic(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    return path
