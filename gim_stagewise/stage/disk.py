"""What caches take on disk, before they are built."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from gim_stagewise.cache import CacheLayout, Layout, Precision, TiledLayout, encode
from gim_stagewise.errors import OverBudgetError, StorageError
from gim_stagewise.models import INPUT_OPERATIONS
from gim_stagewise.sources import PatchSource, RegionSource, Request, Source, read_stacked
from gim_stagewise.stage.choose import Choice
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward
from gim_stagewise.stage.needs import cache_layout, chain_needs
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.storing import refuse_untrained
from gim_stagewise.stage.workspace import Workspace
from gim_stagewise.units import format_bytes
from gim_stagewise.windows import Geometry, Span

# Samples that an estimate of a cache's size looks at, within so many bytes.
SAMPLES_SEEN = 16
SAMPLE_BYTES_SEEN = 32_000_000
# Of items that are read in windows so many regions, with so many patches or positions a side, by
# the number of axes.
REGIONS_SEEN = 4
PATCHES_SEEN = 7
POSITIONS_SEEN = {1: 65_536, 2: 256}
# Estimates are off by a few tens of percent: a disk with less than this share of one is refused.
SURELY = 0.75
KEEPS = ("all", "last-two", "last")


@dataclass(frozen=True)
class CacheSize:
    """What one cache takes.

    Parameters
    ----------
    bytes : int
    basis : str
        How that was found.
    pooled : int
        Of it, what stays when activations may go.
    """

    bytes: int
    basis: str
    pooled: int


@dataclass(frozen=True)
class DiskPlan:
    """What the caches of a pipeline take, module by module from the first."""

    caches: list[CacheSize]

    def needed(self, keep: str) -> int:
        """The most bytes of caches on disk at once.

        Parameters
        ----------
        keep : "all", "last-two" or "last"
            Which activations stay: a stage needs those of the one below, and none before them.
            Embeddings always stay.
        """
        sizes = [cache.bytes for cache in self.caches]
        if keep == "all":
            return sum(sizes)
        pooled = [cache.pooled for cache in self.caches]
        return max(
            sum(sizes[max(0, top - 1) : top + 1]) + sum(pooled[: max(0, top - 1)])
            for top in range(len(sizes))
        )

    def check(self, space: Workspace) -> None:
        """Compare with the budget, and with what the disk has left.

        Raises
        ------
        OverBudgetError
            If the caches take more than is allowed.
        StorageError
            If the disk surely has too little space.
        """
        keep, allowed = space.config.keep, space.budget.disk
        needed = self.needed(keep)
        if allowed is not None and needed > allowed:
            others = [
                f'keep = "{name}" needs {format_bytes(self.needed(name))}'
                for name in KEEPS
                if name != keep and self.needed(name) <= allowed
            ]
            advice = others or ['store less, with cache.codec = "zstd" or materialize = "never"']
            raise OverBudgetError(
                f"the caches project {format_bytes(needed)} on disk, allowed "
                f"{format_bytes(allowed)}: {advice[0]}, or allow --allowed-disk "
                f"{-(-needed // 1_000_000)}MB",
                needed=needed,
            )
        require_free(space.folder, needed - bytes_of_caches(space), f"caches of {space.folder}")


def require_free(folder: Path, needed: int, what: str) -> None:
    """Refuse to begin what a disk surely has no room for.

    Raises
    ------
    StorageError
        With both numbers.
    """
    place = next(path for path in (folder, *folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(place).free
    if free < SURELY * needed:
        raise StorageError(
            f"{what}: about {format_bytes(needed)} are to be written, and {format_bytes(free)} are "
            'free there. Make space, choose another --dir, or store less (keep = "last-two", '
            'cache.codec = "zstd", materialize = "never"); none of it was written'
        )


def bytes_of_caches(space: Workspace) -> int:
    """Bytes of all caches in a run's folder, those begun included."""
    places = [*space.folder.glob("m*.zarr"), *space.folder.glob(".m*.zarr.build")]
    return sum(folder_bytes(path) for path in places)


def plan_disk(
    space: Workspace,
    source: PatchSource | RegionSource,
    shapes: list[Shape],
    *,
    last: int,
    there: Mapping[int, Path],
    choices: Mapping[int, Choice] | None = None,
) -> DiskPlan:
    """Estimate the caches of a pipeline.

    Parameters
    ----------
    space : Workspace
    source : PatchSource or RegionSource
    shapes : list of Shape
        Of all modules.
    last : int
        The last one that is asked for.
    there : mapping
        Paths of caches that are there already and stay, by module.
    choices : mapping, optional
        What was measured where that decides whether outputs are stored; where it is not known yet,
        they count as not stored.
    """
    caches: list[CacheSize] = []
    layouts = _layouts(space, source, shapes)
    few = islice(_few_outputs(space, source, shapes), last)
    for index, (layout, (activations, seen)) in enumerate(zip(layouts, few, strict=False), start=1):
        pooled = pooled_bytes(layout, source)
        choice = (choices or {}).get(index)
        undecided = space.module_config(index).cache.materialize == "auto"
        if index in there:
            caches.append(CacheSize(folder_bytes(there[index]), "the cache that is there", pooled))
        elif not layout.materialized or (
            index < len(space.config.module) and undecided and (choice is None or not choice.store)
        ):
            caches.append(CacheSize(pooled, "embeddings alone", pooled))
        else:
            basis = f"{seen} through untrained modules, encoded"
            projected = projected_bytes(layout, source, activations)
            caches.append(CacheSize(projected, basis, pooled))
    return DiskPlan(caches)


def _layouts(
    space: Workspace, source: PatchSource | RegionSource, shapes: list[Shape]
) -> list[Layout]:
    if not isinstance(source, RegionSource):
        return [cache_layout(space, n, shape, source) for n, shape in enumerate(shapes, start=1)]
    return [needs.layout for needs in chain_needs(space, source, shapes)]


def stored_samples(source: Source, layout: CacheLayout) -> int:
    """Samples that are written, once for each view."""
    return sum(len(block.samples) for block in layout.blocks(source))


def pooled_bytes(layout: Layout, source: Source) -> int:
    """Bytes of all embeddings."""
    if isinstance(layout, TiledLayout):
        return layout.pooled_bytes
    return stored_samples(source, layout) * layout.embedding_bytes


def projected_bytes(layout: Layout, source: Source, activations: NDArray[Any] | None) -> int:
    """Bytes of a cache, by what a few samples' activations take.

    Parameters
    ----------
    layout : CacheLayout or TiledLayout
    source : Source
        The module's input.
    activations : array or None
        Some of them as they are stored, [sample, ...]; None if they are not.
    """
    pooled = pooled_bytes(layout, source)
    if activations is None:
        return pooled
    encoded = len(encode(activations, layout.codec))
    if isinstance(layout, TiledLayout):
        places = activations.size // math.prod(layout.cell)
        return round(encoded * layout.positions / places) + pooled
    return round(encoded / len(activations) * stored_samples(source, layout)) + pooled


def _few_outputs(
    space: Workspace, source: PatchSource | RegionSource, shapes: list[Shape]
) -> Iterator[tuple[NDArray[Any], str]]:
    """Activations of a few samples as they would be stored, for each module; and of how many."""
    inputs, seen = _few_inputs(source, shapes)
    grid = len(shapes[0].grid)
    count = len(inputs)
    rows = torch.from_numpy(inputs).flatten(0, grid)
    for index, shape in enumerate(shapes, start=1):
        # Smaller pieces than in extraction: their bits decide nothing here, their memory does.
        config = space.config.extract.model_copy(
            update={"batch": min(space.config.extract.batch, len(rows))}
        )
        frozen = FrozenModule(space.build(index, shape.cell_in[0]), torch.device("cpu"))
        cache = space.module_config(index).cache
        rows, _ = frozen_forward(frozen, rows, config)
        refuse_untrained(rows, index)
        op = shapes[index].input_op if index < len(shapes) else None
        if op is not None and cache.stored_operation == "auto":
            rows = INPUT_OPERATIONS[op](rows)
        extremes = rows.transpose(0, 1).flatten(1).aminmax(dim=1)
        stored, _ = Precision(cache.precision).calibrated(*extremes).encode(rows)
        yield stored.numpy().reshape(count, -1, *stored.shape[1:]), seen


def _few_inputs(
    source: PatchSource | RegionSource, shapes: list[Shape]
) -> tuple[NDArray[np.float32], str]:
    """A few samples of one size, or regions of large ones; and how many, in words."""
    if isinstance(source, RegionSource):
        return _few_regions(source, shapes)
    largest = max(source.item_bytes, *(_sample_bytes(shape) for shape in shapes))
    count = max(1, min(SAMPLES_SEEN, SAMPLE_BYTES_SEEN // largest, len(source.ids)))
    ids = [source.ids[int(i)] for i in np.linspace(0, len(source.ids) - 1, count)]
    samples = read_stacked(source, [Request(item_id) for item_id in ids])
    return samples, "1 sample" if count == 1 else f"{count} samples"


def _few_regions(source: RegionSource, shapes: list[Shape]) -> tuple[NDArray[np.float32], str]:
    items = source.items()
    sides = PATCHES_SEEN if shapes[0].grid else POSITIONS_SEEN[len(items[0].extent)]
    chosen = [items[int(n)] for n in np.linspace(0, len(items) - 1, REGIONS_SEEN)]
    # So large that the top module has an output, and not larger than the smallest of them.
    needed = [1] * len(chosen[0].extent)
    for shape in reversed(shapes):
        pairs = zip(shape.geometry or [Geometry()] * len(needed), needed, strict=True)
        needed = [geometry.inputs(outputs) for geometry, outputs in pairs]
    size = tuple(
        min(max(sides, least), *axis)
        for least, axis in zip(needed, zip(*(i.extent for i in chosen), strict=True), strict=True)
    )
    requests = []
    for number, item in enumerate(chosen):
        # Along the diagonal: not all in a corner, which may be blank.
        share = (number + 0.5) / len(chosen)
        starts = (round(share * (n - own)) for n, own in zip(item.extent, size, strict=True))
        region = tuple(Span(start, start + own) for start, own in zip(starts, size, strict=True))
        requests.append(Request(item.id, region=region))
    return read_stacked(source, requests), f"{len(chosen)} regions"


def _sample_bytes(shape: Shape) -> int:
    return 4 * math.prod(shape.grid) * math.prod(shape.cell_out)


def folder_bytes(path: Path) -> int:
    """Bytes of all files below a folder."""
    total = 0
    for folder, _, files in os.walk(path):
        for file in files:
            with suppress(FileNotFoundError):  # a run that is at work moves files
                total += (Path(folder) / file).stat().st_size
    return total
