"""The photographs inside scikit-image and scikit-learn: crops, and one image of any size."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import SourceConfig
from gim_stagewise.durable import flush_tree, fsync_directory, remove, rename, storage_errors, token
from gim_stagewise.errors import ConfigError, DataError
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources.base import SPLITS, Split
from gim_stagewise.sources.large import LargeSource
from gim_stagewise.sources.parts import ArrayPart, PartsSource
from gim_stagewise.windows import Region, even_ranges, tiles

# By what they are called there; drawings, text and medical images are left out.
SKIMAGE = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "clock",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "moon",
    "rocket",
    "stereo_motorcycle",
)
SKLEARN = ("china.jpg", "flower.jpg")
PHOTOGRAPHS = (*SKIMAGE, *(name.removesuffix(".jpg") for name in SKLEARN))

_SIDE = 20_000
# Side of the squares that a mosaic is made of, each of one photograph.
_SQUARE = 500
_CHUNK = 1000
# ITU-R BT.601 luma, as torchvision's and Pillow's grayscale.
_LUMA = np.array([0.299, 0.587, 0.114])


@cache
def photograph(name: str) -> NDArray[np.uint8]:
    """A photograph of `PHOTOGRAPHS`: uint8 [height, width] in gray.

    Raises
    ------
    ConfigError
        If scikit-image is not installed.
    """
    if f"{name}.jpg" in SKLEARN:
        from sklearn.datasets import load_sample_image

        image: NDArray[Any] = load_sample_image(f"{name}.jpg")
    else:
        try:
            from skimage import data
        except ImportError:
            raise ConfigError(
                'needs the photographs of scikit-image; install it with `pip install "gim-stagewise'
                '[large]"`',
                key="source.kind",
            ) from None
        found: Any = getattr(data, name)()
        image = found[0] if isinstance(found, tuple) else found  # one of a stereo pair
    if image.ndim == 3:
        image = np.rint(image[..., :3] @ _LUMA)
    return image.astype(np.uint8)


def open_photos(config: SourceConfig) -> PartsSource:
    """Crops of the photographs, labelled by which of them they show: ``kind = "photos"``.

    Unlabeled and training crops lie in the left halves, test crops in the right ones, so that these
    share no pixel with those. Of the training crops the last third lies in the lower third of the
    left halves, and shares no pixel with the other two (see ``probe.validation_part``).

    Options: ``size`` of a crop (64), how many there are: ``unlabeled`` (6000), ``train`` (1500) and
    ``test`` (750), as many of each photograph, and ``seed`` (0). Images are uint8 [1, size, size].

    Raises
    ------
    ConfigError
        If the options are wrong, or scikit-image is not installed.
    """
    given = config.model_fields_set - {"kind", "options"}
    if given:
        raise ConfigError(
            "has no meaning for the photographs, which come with scikit-image and scikit-learn; "
            "leave it out",
            key=f"source.{min(given)}",
        )
    known = {"size": 64, "unlabeled": 6000, "train": 1500, "test": 750, "seed": 0}
    if unknown := set(config.options) - set(known):
        raise ConfigError(
            f"unknown key; known: {', '.join(known)}", key=f"source.options.{sorted(unknown)[0]}"
        )
    numbers = {**known, **config.options}
    most = min(min(photograph(n).shape[0] // 3, photograph(n).shape[1] // 2) for n in PHOTOGRAPHS)
    for name, number in numbers.items():
        limit = most if name == "size" else 10**6
        if type(number) is not int or not (name != "seed") <= number <= limit:
            raise ConfigError(
                f"is {number!r}, expected a whole number up to {limit}",
                key=f"source.options.{name}",
            )
    size, seed = numbers["size"], numbers["seed"]
    parts = {split: _crops(split, numbers[split], size=size, seed=seed) for split in SPLITS}
    return PartsSource(parts)


def _crops(split: Split, count: int, *, size: int, seed: int) -> ArrayPart:
    """Crops of one half of the photographs in turn, at random places.

    Of those for training the first two thirds come from the upper two thirds.
    """
    draw = np.random.default_rng(derive_seed(seed, "crops", split))
    images = np.empty((count, 1, size, size), np.uint8)
    labels = np.arange(count) % len(PHOTOGRAPHS)
    upper = count - count // 3
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        photo = photograph(PHOTOGRAPHS[label])
        middle, border = photo.shape[1] // 2, photo.shape[0] - photo.shape[0] // 3
        half = photo[:, middle:] if split == "test" else photo[:, :middle]
        if split == "train":
            half = half[:border] if number < upper else half[border:]
        top, left = (int(draw.integers(length - size + 1)) for length in half.shape)
        image[0] = half[top : top + size, left : left + size]
    return ArrayPart(images, None if split == "unlabeled" else labels)


def open_mosaic(config: SourceConfig) -> LargeSource:
    """One image of any size made of photographs: ``kind = "mosaic"``.

    Options: ``side``, its rows and columns (20000), and ``seed`` (0). It is made once, as a Zarr
    array below ``source.root`` (by default "data"), and takes a byte a pixel there or less.

    Raises
    ------
    ConfigError
        If the options are wrong, or scikit-image is not installed.
    StorageError
        If the disk is full or failing.
    """
    if config.splits or config.download:
        key = f"source.{'splits' if config.splits else 'download'}"
        raise ConfigError("has no meaning for a mosaic, which is made here; leave it out", key=key)
    if unknown := set(config.options) - {"side", "seed"}:
        raise ConfigError(
            "unknown key; known: side, seed", key=f"source.options.{sorted(unknown)[0]}"
        )
    numbers = {"side": config.options.get("side", _SIDE), "seed": config.options.get("seed", 0)}
    for name, number in numbers.items():
        if type(number) is not int or not (name == "side") <= number <= 10**6:
            raise ConfigError(
                f"is {number!r}, expected a whole number up to a million",
                key=f"source.options.{name}",
            )
    root = Path(config.root or "data")
    path = root / f"mosaic-{numbers['side']}-{numbers['seed']}.zarr"
    if not path.exists():
        with storage_errors(f"making {path}"):
            _make(path, **numbers)
    return LargeSource(
        {"unlabeled": {path.name: path}}, digest=config.digest, on_error=config.on_error
    )


def _make(path: Path, *, side: int, seed: int) -> None:
    """Write the array beside its place, and move it there whole."""
    import zarr

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{token()}.tmp")
    try:
        array = zarr.create_array(
            str(aside),
            shape=(side, side),
            chunks=(min(_CHUNK, side),) * 2,
            dtype="uint8",
            dimension_names=["height", "width"],
        )
        for region in tiles((side, side), (_CHUNK, _CHUNK)):
            rows, columns = region
            array[rows.slice, columns.slice] = mosaic_region(region, seed=seed)
        flush_tree(aside)
        try:
            rename(aside, path)
        except OSError:
            if not path.exists():  # otherwise another process made the same meanwhile
                raise
        fsync_directory(path.parent)
    finally:
        remove(aside)


def mosaic_region(region: Region, *, seed: int) -> NDArray[np.uint8]:
    """A region of the mosaic, which has no end: uint8 [height, width].

    Parameters
    ----------
    region : Region
        Whole squares of 500 pixels, but for the last ones.
    seed : int

    Raises
    ------
    DataError
        If it begins within a square.
    """
    if any(span.start % _SQUARE for span in region):
        raise DataError(f"a mosaic is made in squares of {_SQUARE} pixels, not from {region}")
    rows, columns = region
    out = np.empty((len(rows), len(columns)), np.uint8)
    for down in even_ranges(len(rows), _SQUARE):
        for along in even_ranges(len(columns), _SQUARE):
            place = (rows.start + down.start) // _SQUARE, (columns.start + along.start) // _SQUARE
            own = _square(seed, *place)
            out[down.slice, along.slice] = own[: len(down), : len(along)]
    return out


def _square(seed: int, row: int, column: int) -> NDArray[np.uint8]:
    """A square of one photograph, mirrored at its borders as often as it takes."""
    draw = np.random.default_rng(derive_seed(seed, "mosaic", row, column))
    image = photograph(PHOTOGRAPHS[draw.integers(len(PHOTOGRAPHS))])
    if draw.random() < 0.5:
        image = image.T
    places = []
    for length in image.shape:
        start, period = int(draw.integers(2 * length)), 2 * length
        steps = np.arange(start, start + _SQUARE) % period
        places.append(np.where(steps < length, steps, period - 1 - steps))
    return image[np.ix_(*places)]
