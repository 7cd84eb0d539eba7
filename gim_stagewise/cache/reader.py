"""A sealed cache as a `Source`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache.columns import metadata_problem, read_numbers, read_strings
from gim_stagewise.cache.digests import Digest, files_digest
from gim_stagewise.cache.frames import FrameError, announce, read_chunk_file
from gim_stagewise.cache.layout import Block
from gim_stagewise.cache.manifest import Manifest, read_manifest
from gim_stagewise.cache.precision import Precision
from gim_stagewise.errors import CorruptCacheError, DataError, PartialCacheError
from gim_stagewise.sources import PATCH_AXES, SPLITS, Item, Request, Split, UniformItems
from gim_stagewise.windows import Span, even_ranges, full_region

if TYPE_CHECKING:
    from gim_stagewise.cache.views import CacheDataset, DecodedArray


class Cache:
    """Stored activations of one module, read as the input of the next.

    Values come decoded, float32 [grid_row, grid_col, channel, height, width] per sample, unless the
    stored form is asked for.

    Parameters
    ----------
    path : Path
        A sealed cache.
    verify : bool
        Whether every chunk is compared with its checksum before it is used.

    Raises
    ------
    CacheNotFoundError
        If there is none.
    PartialCacheError
        If it was never sealed.
    CorruptCacheError
        If its metadata is damaged.
    """

    axes = PATCH_AXES

    def __init__(self, path: str | Path, *, verify: bool = True) -> None:
        self.path = Path(path)
        self._verify = verify
        self.manifest: Manifest = read_manifest(self.path)
        if not self.manifest.sealed:
            raise PartialCacheError(
                f"{self.path} was begun but never finished; `gim-stage run` or `gim-stage extract` "
                "goes on where it stopped"
            )
        self._check_files()
        if problem := metadata_problem(self.path, self.manifest):
            raise CorruptCacheError(self._damage(*problem.split(" ", 1)))

    def _check_files(self) -> None:
        """Compare all files but the chunks, which are small, with what was sealed."""
        for name, digest in self.manifest.files.items():
            try:
                found = files_digest(self.path, [name])
            except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
                raise CorruptCacheError(self._damage(name, "is missing")) from None
            if found != digest:
                raise CorruptCacheError(self._damage(name, "was altered or damaged"))

    @property
    def chunk_items(self) -> int:
        return self.manifest.layout.chunk

    @property
    def views(self) -> int:
        return self.manifest.layout.views - 1

    @property
    def item_bytes(self) -> int:
        return self.manifest.layout.sample_bytes

    @cached_property
    def ids(self) -> Sequence[str]:
        """Ids of all samples, in storage order."""
        with self._naming("ids"):
            return read_strings(self.path / "ids", self.manifest.layout.samples)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {item_id: index for index, item_id in enumerate(self.ids)}

    def items(self) -> Sequence[Item]:
        layout = self.manifest.layout
        return UniformItems(self.ids, layout.grid, layout.cell[0], "float32")

    def split(self, name: Split) -> Sequence[str]:
        if name not in SPLITS:
            raise DataError(f"no split {name!r}; there are: {', '.join(SPLITS)}")
        mask = self._small_array("splits", "uint8")
        return list(compress(self.ids, mask & (1 << SPLITS.index(name))))

    @property
    def label_names(self) -> tuple[str, ...]:
        folder = self.path / "labels"
        return tuple(sorted(p.parent.name for p in folder.glob("*/zarr.json")))

    def labels(self, name: str) -> NDArray[np.int64]:
        if name not in self.label_names:
            raise DataError(
                f"no labels called {name!r} in {self.path}; there are: {self.label_names}"
            )
        return self._small_array(f"labels/{name}", "int64")

    @property
    def materialized(self) -> bool:
        """Whether activations are stored, and not embeddings alone."""
        return self.manifest.layout.materialized

    @property
    def precision(self) -> Precision:
        """The form in which activations are stored."""
        return self.manifest.precision

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        decode = self.precision.decode_array
        return [decode(sample) for sample in self.read_stored(requests)]

    def read_stored(
        self, requests: Sequence[Request], *, empty: Callable[..., NDArray[Any]] = np.empty
    ) -> list[NDArray[Any]]:
        """The samples asked for in their stored form; ``precision.decode`` makes floats of it.

        ``empty``, called with shape and type, gives the memory for each of them.
        """
        self._require_activations()
        return self._read("activations", requests, empty)

    def announce(self, requests: Iterable[Request]) -> None:
        """Say what is going to be read soon, so that the disk is at work before it is."""
        layout = self.manifest.layout
        for view, position in {self._place(request) for request in requests}:
            first = position // layout.chunk * layout.chunk
            samples = Span(first, min(first + layout.chunk, layout.samples))
            for file in layout.parts(Block(-1, view, samples))["activations"].files:
                announce(self.path / file)

    def _require_activations(self) -> None:
        if not self.materialized:
            raise DataError(
                f'{self.path} stores embeddings alone (cache.materialize = "never", or keep); '
                "`gim-stage run` of its pipeline computes activations where they are needed"
            )

    def read_pooled(self, ids: Sequence[str]) -> NDArray[np.float32]:
        """Embeddings of view 0: [sample, grid_row, grid_col, channel]."""
        return np.stack(self._read("pooled", [Request(item_id) for item_id in ids]))

    @property
    def activations(self) -> DecodedArray:
        """The activations as a lazy array; slicing it reads and decodes."""
        from gim_stagewise.cache.views import DecodedArray

        self._require_activations()
        return DecodedArray(self, "activations")

    def dataset(self, split: Split, *, view: int = 0) -> CacheDataset:
        """Samples and labels of a split for a ``torch.utils.data.DataLoader``."""
        from gim_stagewise.cache.views import CacheDataset

        self._require_activations()
        return CacheDataset(self, split, view)

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
            self._require_activations()
        return dask_array(self, name)

    def content_digest(self) -> str:
        # What is read is the same whatever lossless codec it went through.
        parts = self.manifest.content.parts
        return Digest({k: v for k, v in parts.items() if k != "numerics.codec"}).value

    def _read(
        self,
        name: str,
        requests: Sequence[Request],
        empty: Callable[..., NDArray[Any]] = np.empty,
    ) -> list[NDArray[Any]]:
        """Samples, or their regions, each in memory of its own; each chunk is read once."""
        grid = self.manifest.layout.grid
        wanted: dict[tuple[int, int], list[tuple[int, int, Span, Span]]] = {}
        for number, request in enumerate(requests):
            view, position = self._place(request)
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
    def _stored(self) -> set[tuple[int, int]]:
        blocks = self.manifest.layout.blocks(self)
        return {(block.view, block.samples.start // self.chunk_items) for block in blocks}

    def is_stored(self, view: int, chunk: int) -> bool:
        """Whether a view is stored for a chunk of samples; only unlabeled ones have several."""
        return self.manifest.layout.views == 1 or (view, chunk) in self._stored

    def _place(self, request: Request) -> tuple[int, int]:
        position = self._position.get(request.id)
        if position is None:
            raise DataError(f"no sample {request.id!r} in {self.path}")
        if not 0 <= request.view <= self.views:
            raise DataError(f"no view {request.view} in {self.path}; it has 0 to {self.views}")
        if not self.is_stored(request.view, position // self.chunk_items):
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
        layout = self.manifest.layout
        samples = Span(number * layout.chunk, min((number + 1) * layout.chunk, layout.samples))
        part = layout.parts(Block(-1, view, samples))[name]
        rows_of = even_ranges(layout.grid[0], layout.arrays[name].chunks[2])
        for rows, file, inside in zip(rows_of, part.files, part.inside, strict=True):
            if rows.stop <= needed.start or rows.start >= needed.stop:
                continue
            try:
                values = read_chunk_file(self.path, layout, file, verify=self._verify)
            except FileNotFoundError:
                # Zarr reads an absent chunk as the fill value; here it is a loss.
                raise CorruptCacheError(self._damage(file, "is missing")) from None
            except (FrameError, RuntimeError) as error:
                raise CorruptCacheError(self._damage(file, str(error))) from None
            yield rows, values[inside]

    def _small_array(self, name: str, dtype: str) -> NDArray[Any]:
        """An array with an entry per sample."""
        _ = self.ids  # they confirm how many samples there are
        with self._naming(name):
            return read_numbers(self.path / name, (self.manifest.layout.samples,), dtype)

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise CorruptCacheError(self._damage(name, "is missing")) from None
        except ValueError as error:
            raise CorruptCacheError(self._damage(name, str(error))) from None

    def _damage(self, where: str, what: str) -> str:
        return (
            f"cache {self.path}: {where} {what}; `gim-stage verify {self.path} --repair` looks for "
            "more of that and computes it again"
        )


def open_cache(path: str | Path, *, verify: bool = True) -> Cache:
    """Open a sealed cache (see `Cache`).

    Raises
    ------
    CacheNotFoundError, PartialCacheError, CorruptCacheError
        If it cannot be used.
    """
    return Cache(path, verify=verify)
