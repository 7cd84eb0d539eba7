"""STL-10 (Coates et al. 2011) in its binary format, read image by image."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import SourceConfig
from gim_stagewise.durable import storage_errors
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError, StorageError
from gim_stagewise.sources.base import Split
from gim_stagewise.sources.npy import ArrayFile
from gim_stagewise.sources.parts import PartsSource, array_digest

# Images in each split.
COUNTS: dict[Split, int] = {"unlabeled": 100_000, "train": 5000, "test": 8000}
FOLDER = "stl10_binary"
_SIDE = 96
_IMAGE_BYTES = 3 * _SIDE * _SIDE


def open_stl10(config: SourceConfig) -> PartsSource:
    """STL-10's 100 000 unlabeled, 5000 training and 8000 test images: ``kind = "stl10"``.

    Images are uint8 [3, 96, 96], labels 0 to 9. They lie in ``stl10_binary`` below ``source.root``
    (by default "data"), where torchvision puts them too; ``source.download = true`` has it fetch
    them, 2.6 GB. No more than is asked for is ever in memory.

    Raises
    ------
    ConfigError
        If settings are given that have no meaning here.
    DataNotFoundError
        If files are missing, or the download failed.
    StorageError
        If there is no room for it.
    DataError
        If one is not as large as it should be.
    """
    for name in ("options", "splits"):
        if name in config.model_fields_set:
            raise ConfigError("has no meaning for STL-10; leave it out", key=f"source.{name}")
    root = Path(config.root or "data")
    folder = root / FOLDER
    if config.download and _missing(folder):
        _download(root)
    if missing := _missing(folder):
        raise DataNotFoundError(
            f"STL-10: {folder.absolute()} has no {', '.join(missing)}; set source.root to the "
            f"folder that holds {FOLDER}, or source.download = true to fetch it (2.6 GB)"
        )
    return PartsSource({split: _Part(folder, split) for split in COUNTS}, config.digest)


def _names(split: Split) -> list[str]:
    return [f"{split}_X.bin"] + [f"{split}_y.bin"] * (split != "unlabeled")


def _missing(folder: Path) -> list[str]:
    every = [name for split in COUNTS for name in _names(split)]
    return [name for name in every if not (folder / name).is_file()]


def _download(root: Path) -> None:
    from torchvision.datasets import STL10

    try:
        with storage_errors(f"fetching STL-10 into {root.absolute()}"):
            STL10(str(root), split="test", download=True)
    except StorageError:
        raise
    except (RuntimeError, OSError, URLError) as error:
        raise DataNotFoundError(
            f"STL-10 could not be fetched into {root.absolute()} ({' '.join(str(error).split())})"
        ) from None


class _Part:
    """One split."""

    def __init__(self, folder: Path, split: Split) -> None:
        images, *labels = (folder / name for name in _names(split))
        count = COUNTS[split]
        _check_size(images, count * _IMAGE_BYTES)
        self._images = ArrayFile(images, (count, 3, _SIDE, _SIDE), np.dtype(np.uint8))
        self._labels: NDArray[np.int64] | None = None
        if labels:
            _check_size(labels[0], count)
            # They count from 1.
            self._labels = np.fromfile(labels[0], np.uint8).astype(np.int64) - 1
            if not 0 <= self._labels.min() <= self._labels.max() <= 9:
                raise DataError(f"{labels[0]} has other labels than 1 to 10; fetch STL-10 again")

    def __len__(self) -> int:
        return len(self._images)

    def describe(self, index: int) -> tuple[tuple[int, int], int, str]:
        return (_SIDE, _SIDE), 3, "uint8"

    def read(self, index: int) -> NDArray[Any]:
        # Column by column in the file.
        return self._images[index].transpose(0, 2, 1)

    def names(self) -> Sequence[str] | None:
        return None

    def labels(self) -> NDArray[np.int64] | None:
        return self._labels

    def digest(self, images: Sequence[int]) -> str:
        return array_digest(self._images, images, self._labels)


def _check_size(file: Path, expected: int) -> None:
    size = file.stat().st_size
    if size != expected:
        raise DataError(
            f"{file} has {size} bytes and should have {expected}: a download that was not "
            "finished? Remove it, and set source.download = true to fetch STL-10 again"
        )
