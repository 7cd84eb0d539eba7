"""Items too large to be read whole, each in a file of its own."""

from __future__ import annotations

import hashlib
import math
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import SourceConfig
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError
from gim_stagewise.sources.base import IMAGE_AXES, SPLITS, Item, Request, Split
from gim_stagewise.sources.files import RegionFile, open_region_file
from gim_stagewise.sources.parts import evenly_spaced
from gim_stagewise.sources.pixels import NOT_FINITE, as_float32, check_brightness
from gim_stagewise.windows import Region, full_region, tiles

# Side of the regions in which data is looked at once, to know it again.
_SIDE = 1024
# Of each file, and files of each split, where digests are sampled.
_SAMPLED_REGIONS = 16
SAMPLED_FILES = 1000
# Characters in the name of a folder, with room for what is put before it.
_LONGEST_NAME = 200
# Files that are held open.
_MOST_OPEN = 32


def open_large(config: SourceConfig) -> LargeSource:
    """Images in files of any size: ``kind = "large"``.

    Each table ``[source.splits.<split>]`` has ``files``, a pattern such as ``"*.tif"`` or a list of
    paths, below ``source.root``; for kinds of files see `gim_stagewise.sources.files`. Options:
    ``axes``, the order of axes where files do not say it, and ``level`` of a pyramid.

    Raises
    ------
    ConfigError
        If the tables are wrong.
    DataNotFoundError
        If a file is not there.
    DataError
        If one cannot be read, and ``source.on_error`` is "stop".
    """
    unknown = set(config.options) - {"axes", "level"}
    if unknown:
        raise ConfigError(
            "unknown key; known: axes, level", key=f"source.options.{sorted(unknown)[0]}"
        )
    axes, level = config.options.get("axes"), config.options.get("level", 0)
    if axes is not None and not isinstance(axes, str):
        raise ConfigError(f"is {axes!r}, expected names of axes", key="source.options.axes")
    if type(level) is not int or level < 0:
        raise ConfigError(f"is {level!r}, expected 0 or more", key="source.options.level")
    return LargeSource(
        find_files(config, 'unlabeled = {files = "*.tif"}', folders=True),
        opener=partial(open_region_file, axes=axes, level=level),
        axes=IMAGE_AXES,
        digest=config.digest,
        on_error=config.on_error,
    )


def find_files(
    config: SourceConfig, example: str, *, folders: bool = False
) -> dict[Split, dict[str, Path]]:
    """Files of each split by their names, as ``source.splits`` asks for them.

    Where an item may be a folder, as Zarr arrays are, patterns find ``folders`` as well.

    Raises
    ------
    ConfigError
        If it is wrong; ``example`` says how it could be.
    DataNotFoundError
        If a pattern matches nothing.
    """
    if config.download:
        raise ConfigError("is true, but files are never fetched", key="source.download")
    if not config.splits:
        raise ConfigError(
            f"missing; say which files each split has, as in {example}", key="source.splits"
        )
    root = Path(config.root or ".")
    if not root.is_dir():
        raise DataNotFoundError(f"no such folder: {root.absolute()}; check source.root")
    return {split: _find(root, split, table, folders) for split, table in config.splits.items()}


def check_name(item_id: str) -> None:
    """Refuse an id that cannot name an array of a cache.

    Raises
    ------
    DataError
    """
    try:
        length = len(quote(item_id, safe=""))
    except UnicodeEncodeError:
        raise DataError(
            f"sample {item_id!r}: its name is not text in UTF-8; rename it", item=item_id
        ) from None
    if length > _LONGEST_NAME:
        raise DataError(
            f"its name takes {length} characters in a cache, where others than letters and digits "
            f"count for three a byte, and {_LONGEST_NAME} is the most; give it a shorter one"
        )


def _find(root: Path, split: Split, table: Mapping[str, Any], folders: bool) -> dict[str, Path]:
    """Files of a split by their names: paths below the root."""
    key = f"source.splits.{split}"
    if unknown := set(table) - {"files"}:
        raise ConfigError("unknown key; known: files", key=f"{key}.{sorted(unknown)[0]}")
    stated = table.get("files")
    if isinstance(stated, str):
        try:
            found = sorted(
                path
                for path in root.glob(stated)
                if not path.name.startswith(".") and (folders or not path.is_dir())
            )
        except (NotImplementedError, ValueError) as error:
            raise ConfigError(
                f"is {stated!r}, which is no pattern below source.root ({error}); use one such as "
                '"*.tif" or "**/*.tif"',
                key=f"{key}.files",
            ) from None
        if not found:
            raise DataNotFoundError(f"no file matches {stated!r} below {root.absolute()}")
        return {path.relative_to(root).as_posix(): path for path in found}
    if not isinstance(stated, list) or not all(isinstance(name, str) for name in stated):
        raise ConfigError(
            f"is {stated!r}, expected a pattern or a list of paths", key=f"{key}.files"
        )
    return {name: root / name for name in stated}


class LargeSource:
    """A `Source` of items that are read in regions, of any sizes: images, or recordings.

    A sample's id is ``<split>/<path below the root>``. Where no split is called *unlabeled*, the
    training items serve as unlabeled ones as well.

    Parameters
    ----------
    files : mapping
        From split to its files by name.
    opener : callable
        Opens a file as a `RegionFile`.
    axes : tuple of str
        Names of the axes of an item.
    digest : {"full", "sampled"}
        What `content_digest` covers: all values, or extents and names of all files and some
        regions of `SAMPLED_FILES` in each split.
    on_error : {"stop", "skip"}
        What becomes of a file that cannot be used. With "skip" the values that ``digest`` covers
        are looked at first, and such files are left out and listed in ``skipped``; of the others
        those count that are like most in channels and sample rate.
    rate : int, optional
        Sample rate that recordings need; by default that of most.

    Attributes
    ----------
    skipped : dict
        Why files were left out, by id.
    chunk_bytes : int
        The most bytes that are read at once for the smallest region.

    Raises
    ------
    DataError, DataNotFoundError
        If a file cannot be used; with "skip", if none can.
    """

    chunk_items = 1
    views = 0
    label_names: tuple[str, ...] = ()

    def __init__(
        self,
        files: Mapping[Split, Mapping[str, Path]],
        *,
        opener: Callable[[Path], RegionFile] = open_region_file,
        axes: tuple[str, ...] = IMAGE_AXES,
        digest: Literal["full", "sampled"] = "full",
        on_error: Literal["stop", "skip"] = "stop",
        rate: int | None = None,
    ) -> None:
        self.axes = axes
        self._opener = opener
        self._digest = digest
        self._open: OrderedDict[str, RegionFile] = OrderedDict()
        # Of open files, whose positions move: samples are read ahead while their labels are found,
        # for which blank windows are read too.
        self._reading = Lock()
        self._paths = {
            f"{split}/{name}": path
            for split in SPLITS
            for name, path in files.get(split, {}).items()
        }
        self._looked_into = self._sampled_files() if digest == "sampled" else set(self._paths)
        self.skipped: dict[str, str] = {}
        self.chunk_bytes = 0
        self._rates: dict[str, int] = {}
        self._digests: dict[str, str] = {}
        self._items: dict[str, Item] = {}
        for item_id in self._paths:
            try:
                self._items[item_id] = self._describe(item_id)
                if on_error == "skip":
                    self._digests[item_id] = self._digest_of(item_id)
            except (DataError, DataNotFoundError) as error:
                self._leave_out(item_id, error, on_error)
        self._keep_alike("channels", None, on_error)
        self._keep_alike("samples a second", rate, on_error)
        if not self._items:
            first = next(iter(self.skipped.values()), "no files")
            raise DataError(f"not one of {len(self._paths)} files can be used; the first: {first}")

    def _sampled_files(self) -> set[str]:
        """Items whose values are looked at, evenly spaced in each split."""
        found: set[str] = set()
        for split in SPLITS:
            own = [item_id for item_id in self._paths if item_id.startswith(f"{split}/")]
            if own:
                found.update(own[n] for n in evenly_spaced(len(own), SAMPLED_FILES))
        return found

    def _leave_out(
        self,
        item_id: str,
        error: DataError | DataNotFoundError,
        on_error: Literal["stop", "skip"],
    ) -> None:
        if on_error == "stop":
            raise error
        self._items.pop(item_id, None)
        # What is no text can be filed all the same.
        text = item_id.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
        self.skipped[text] = str(error)

    def _keep_alike(self, what: str, wanted: int | None, on_error: Literal["stop", "skip"]) -> None:
        """Refuse or leave out items that are not as wanted, or not as most are."""
        found = {
            item_id: item.channels if what == "channels" else self._rates[item_id]
            for item_id, item in self._items.items()
        }
        if not found:
            return
        most = wanted or Counter(found.values()).most_common(1)[0][0]
        example = next((item_id for item_id, own in found.items() if own == most), "")
        asked = f"{most} are asked for" if wanted else f"{example} has {most}"
        for item_id, own in found.items():
            if own != most:
                problem = f"sample {item_id} has {own} {what}, {asked}; all items need the same"
                self._leave_out(item_id, DataError(problem, item=item_id), on_error)

    @contextmanager
    def _naming(self, item_id: str) -> Iterator[None]:
        """Say of errors which item they are about."""
        try:
            yield
        except (DataError, DataNotFoundError) as error:
            if error.item is not None:
                raise
            raise type(error)(f"sample {item_id}: {error}", item=item_id) from None
        except OSError as error:
            raise DataNotFoundError(
                f"sample {item_id} cannot be read any more ({error.strerror or error}); was "
                f"{self._paths[item_id]} moved, removed or closed to you?",
                item=item_id,
            ) from None

    def _file(self, item_id: str) -> RegionFile:
        if item_id in self._open:
            self._open.move_to_end(item_id)
            return self._open[item_id]
        path = self._paths.get(item_id)
        if path is None:
            raise DataError(f"no sample {item_id!r} in this source")
        opened = self._opener(path)
        self._open[item_id] = opened
        if len(self._open) > _MOST_OPEN:
            self._open.popitem(last=False)
        return opened

    def _describe(self, item_id: str) -> Item:
        with self._naming(item_id):
            check_name(item_id)
            file = self._file(item_id)
            if 0 in (*file.extent, file.channels):
                raise DataError(f"it is empty, of extent {file.extent}")
            check_brightness(file.dtype)
        self._rates[item_id] = getattr(file, "rate", 0)
        self.chunk_bytes = max(self.chunk_bytes, file.chunk_bytes)
        return Item(item_id, file.extent, file.channels, file.dtype.name)

    def stamp(self, item_id: str) -> list[int]:
        """Size and time of change of an item's file; empty if it is gone."""
        try:
            found = self._paths[item_id].stat()
        except OSError:
            return []
        return [found.st_size, found.st_mtime_ns]

    @property
    def item_bytes(self) -> int:
        return max(
            item.channels * math.prod(item.extent) * np.dtype(item.dtype).itemsize
            for item in self._items.values()
        )

    @property
    def ids(self) -> Sequence[str]:
        return list(self._items)

    def items(self) -> Sequence[Item]:
        return list(self._items.values())

    def split(self, name: Split) -> Sequence[str]:
        found = [item_id for item_id in self._items if item_id.startswith(f"{name}/")]
        if name == "unlabeled" and not found:
            return self.split("train")
        return found

    def labels(self, name: str) -> NDArray[np.int64]:
        raise DataError(f"no labels called {name!r}: large items have none")

    def read(self, requests: Sequence[Request]) -> list[NDArray[Any]]:
        return [self._read(request) for request in requests]

    def _read(self, request: Request) -> NDArray[Any]:
        item = self._items.get(request.id)
        if item is None:
            raise DataError(f"no sample {request.id!r} in this source")
        return self._region(request.id, request.region or full_region(item.extent))

    def _region(self, item_id: str, region: Region) -> NDArray[Any]:
        with self._naming(item_id), self._reading:
            return self._file(item_id).read(region)

    def content_digest(self) -> str:
        return self._content

    @cached_property
    def _content(self) -> str:
        digest = hashlib.sha256(f"{self._digest};".encode())
        for item_id in self._items:
            own = self._digests.get(item_id) or self._digest_of(item_id)
            digest.update(f"{item_id}:{own}\n".encode())
        return digest.hexdigest()

    def _digest_of(self, item_id: str) -> str:
        """Hash of an item's values; raises what reading them raises."""
        item = self._items[item_id]
        digest = hashlib.sha256(f"{item.extent}{item.channels}{item.dtype};".encode())
        if item_id not in self._looked_into:
            return digest.hexdigest()
        axes = len(item.extent)
        regions = tiles(item.extent, (_SIDE,) * axes if axes > 1 else (_SIDE * _SIDE,))
        if self._digest == "sampled" and len(regions) > _SAMPLED_REGIONS:
            regions = [regions[number] for number in evenly_spaced(len(regions), _SAMPLED_REGIONS)]
        for region in regions:
            values = self._region(item_id, region)
            if values.dtype.kind == "f" and not np.isfinite(as_float32(values)).all():
                where = ", ".join(
                    f"{name} {span.start} to {span.stop}"
                    for name, span in zip(self.axes[1:], region, strict=True)
                )
                raise DataError(
                    f"sample {item_id} has {NOT_FINITE} at {where}; mend or remove it",
                    item=item_id,
                )
            # The same values, in whatever order of bytes they are stored.
            little = values.astype(values.dtype.newbyteorder("<"), order="C", copy=False)
            digest.update(np.ascontiguousarray(little).data)
        return digest.hexdigest()
