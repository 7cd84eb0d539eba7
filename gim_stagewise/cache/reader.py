"""A sealed cache as a `Source`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache.features import Pooling, grid_features
from gim_stagewise.cache.frames import announce
from gim_stagewise.cache.layout import Block, CacheLayout
from gim_stagewise.cache.sealed import SealedCache
from gim_stagewise.config import parse_pipeline
from gim_stagewise.errors import DataError
from gim_stagewise.sources import PATCH_AXES, Item, Request, Split, UniformItems
from gim_stagewise.windows import Span, even_ranges, full_region

if TYPE_CHECKING:
    from gim_stagewise.cache.dataset import CacheDataset
    from gim_stagewise.cache.views import DecodedArray


class Cache(SealedCache):
    """Stored activations of one module, read as the input of the next.

    Values come decoded, float32 [grid_row, grid_col, channel, height, width] per sample, unless the
    stored form is asked for.

    Parameters and errors are those of `SealedCache`.
    """

    axes = PATCH_AXES

    @property
    def layout(self) -> CacheLayout:
        return self.manifest.sample_layout

    @property
    def chunk_items(self) -> int:
        return self.layout.chunk

    @property
    def views(self) -> int:
        return self.layout.views - 1

    @property
    def item_bytes(self) -> int:
        return self.layout.sample_bytes

    @property
    def _shape(self) -> str:
        array = self.layout.arrays["activations" if self.materialized else "pooled"]
        return " ".join(f"{axis}={n}" for axis, n in zip(array.axes, array.shape, strict=True))

    @cached_property
    def _position(self) -> dict[str, int]:
        return {item_id: index for index, item_id in enumerate(self.ids)}

    def items(self) -> Sequence[Item]:
        layout = self.layout
        return UniformItems(self.ids, layout.grid, layout.cell[0], "float32")

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        decode = self.precision.decode_array
        return [decode(sample) for sample in self.read_stored(requests)]

    def read_stored(
        self, requests: Sequence[Request], *, empty: Callable[..., NDArray[Any]] = np.empty
    ) -> list[NDArray[Any]]:
        """The samples asked for in their stored form; ``precision.decode`` makes floats of it.

        ``empty``, called with shape and type, gives the memory for each of them.
        """
        self.require_activations()
        return self._read("activations", requests, empty)

    def announce(self, requests: Iterable[Request]) -> None:
        """Say what is going to be read soon, so that the disk is at work before it is."""
        layout = self.layout
        for view, position in {self.place(request) for request in requests}:
            first = position // layout.chunk * layout.chunk
            samples = Span(first, min(first + layout.chunk, layout.samples))
            for file in layout.parts(Block(-1, view, samples))["activations"].files:
                announce(self.path / file)

    def read_pooled(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of view 0: [sample, grid_row, grid_col, channel]."""
        return np.stack(self._read("pooled", [Request(item_id) for item_id in ids]))

    def _features(self, ids: Sequence[str], pooling: Pooling) -> NDArray[np.float32]:
        config = parse_pipeline(
            self.manifest.pipeline_text, file=f"the pipeline recorded in {self.path}"
        )
        return grid_features(self, ids, crop=config.augment.grid_crop, pooling=pooling)

    @property
    def activations(self) -> DecodedArray:
        """The activations as a lazy array; slicing it reads and decodes."""
        from gim_stagewise.cache.views import DecodedArray

        self.require_activations()
        return DecodedArray(self, "activations")

    def dataset(self, split: Split, *, view: int = 0, window: int | str = "256MB") -> CacheDataset:
        """Samples and labels of a split for a ``torch.utils.data.DataLoader``.

        Parameters and errors are those of `gim_stagewise.cache.dataset.CacheDataset`. To shuffle,
        give the loader ``sampler=data.shuffled(seed)`` and not ``shuffle=True``.
        """
        from gim_stagewise.cache.dataset import CacheDataset

        self.require_activations()
        return CacheDataset(self, split, view, window)

    def dask(self, name: str = "activations") -> Any:
        """Values called "activations" or "pooled" as a lazy ``dask.array.Array``, float32.

        Raises
        ------
        DataError
            If there is no such array.
        """
        from gim_stagewise.cache.views import dask_array

        if name not in ("activations", "pooled"):
            raise DataError(f'no array {name!r} of values; there are "activations" and "pooled"')
        if name == "activations":
            self.require_activations()
        return dask_array(self, name)

    def _read(
        self,
        name: str,
        requests: Sequence[Request],
        empty: Callable[..., NDArray[Any]] = np.empty,
    ) -> list[NDArray[Any]]:
        """Samples, or their regions, each in memory of its own; each chunk is read once."""
        grid = self.layout.grid
        wanted: dict[tuple[int, int], list[tuple[int, int, Span, Span]]] = {}
        for number, request in enumerate(requests):
            view, position = self.place(request)
            rows, columns = request.region or full_region(grid)
            chunk, place = divmod(position, self.chunk_items)
            wanted.setdefault((view, chunk), []).append((number, place, rows, columns))
        samples: list[Any] = [None] * len(requests)
        for (view, chunk), members in wanted.items():
            needed = Span(
                min(rows.start for _, _, rows, _ in members),
                max(rows.stop for _, _, rows, _ in members),
            )
            for part, values in self.read_chunk(name, view, chunk, needed):
                for number, place, rows, columns in members:
                    start, stop = max(rows.start, part.start), min(rows.stop, part.stop)
                    if start >= stop:
                        continue
                    there = values[place, start - part.start : stop - part.start, columns.slice]
                    if samples[number] is None:
                        own = (len(rows), *there.shape[1:])
                        samples[number] = empty(own, values.dtype)
                    samples[number][start - rows.start : stop - rows.start] = there
        return samples

    @cached_property
    def _stored(self) -> dict[tuple[int, int], int]:
        """Indexes of blocks, by view and chunk."""
        blocks = self.layout.blocks(self)
        return {(b.view, b.samples.start // self.chunk_items): b.index for b in blocks}

    def _index(self, view: int, chunk: int) -> int:
        return chunk if self.layout.views == 1 else self._stored[view, chunk]

    @cached_property
    def _wanted(self) -> list[frozenset[str]]:
        return [self.layout.wanted(self, view) for view in range(self.layout.views)]

    def is_stored(self, view: int, position: int) -> bool:
        """Whether a view is stored for a sample; only unlabeled ones have several."""
        return self.layout.views == 1 or self.ids[position] in self._wanted[view]

    def place(self, request: Request) -> tuple[int, int]:
        """The view of a request, and where its sample lies in storage order.

        Raises
        ------
        DataError
            If there is no such sample or view, or the view is not stored for it.
        """
        position = self._position.get(request.id)
        if position is None:
            raise DataError(f"no sample {request.id!r} in {self.path}")
        if not 0 <= request.view <= self.views:
            raise DataError(f"no view {request.view} in {self.path}; it has 0 to {self.views}")
        if not self.is_stored(request.view, position):
            raise DataError(f"view {request.view} of {request.id!r} is not stored in {self.path}")
        return request.view, position

    def read_chunk(
        self, name: str, view: int, number: int, needed: Span
    ) -> Iterator[tuple[Span, NDArray[Any]]]:
        """Stored values of a chunk's samples, by grid rows; those needed, and others with them.

        Yields
        ------
        (Span, array)
            Grid rows, and their values [sample, grid_row, ...], until the next are asked for.
        """
        layout = self.layout
        samples = Span(number * layout.chunk, min((number + 1) * layout.chunk, layout.samples))
        part = layout.parts(Block(-1, view, samples))[name]
        rows_of = even_ranges(layout.grid[0], layout.arrays[name].chunks[2])
        index = self._index(view, number)
        for place, (rows, file, inside) in enumerate(
            zip(rows_of, part.files, part.inside, strict=True)
        ):
            if rows.stop <= needed.start or rows.start >= needed.stop:
                continue
            yield rows, self._read_file(name, index, place, file)[inside]
