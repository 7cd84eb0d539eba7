"""Large images are read in regions, whatever file they lie in."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gim_stagewise.config import AugmentConfig, SourceConfig
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError
from gim_stagewise.sources import Request, open_source
from gim_stagewise.sources.files import open_region_file
from gim_stagewise.sources.large import LargeSource
from gim_stagewise.sources.parts import ArrayPart, PartsSource
from gim_stagewise.sources.patches import PatchSource
from gim_stagewise.sources.regions import RegionSource
from gim_stagewise.windows import PatchGrid, Region, Span, full_region, mirrored

Image = NDArray[Any]


def image(channels: int = 3, *, height: int = 75, width: int = 100, dtype: str = "uint8") -> Image:
    draw = np.random.default_rng(0)
    values = draw.random((channels, height, width)) * 200
    return values.astype(dtype)


def save_npy(path: Path, pixels: Image) -> Path:
    np.save(path / "a.npy", pixels.transpose(1, 2, 0))
    return path / "a.npy"


def save_flat_npy(path: Path, pixels: Image) -> Path:
    np.save(path / "a.npy", pixels[0])
    return path / "a.npy"


def save_zarr(path: Path, pixels: Image, **options: Any) -> Path:
    array: Any = zarr.create_array(
        str(path / "a.zarr"), shape=pixels.shape, dtype=pixels.dtype, **options
    )
    array[...] = pixels
    return path / "a.zarr"


def save_ome_zarr(path: Path, pixels: Image) -> Path:
    group = zarr.open_group(str(path / "a.ome.zarr"), mode="w", zarr_format=2)
    axes = [{"name": name} for name in "tczyx"]
    datasets = [{"path": "0"}, {"path": "1"}]
    group.attrs["multiscales"] = [{"axes": axes, "datasets": datasets}]
    for level in range(2):
        small = pixels[None, :, None, :: 2**level, :: 2**level]
        array: Any = group.create_array(
            str(level), shape=small.shape, dtype=small.dtype, chunks=(1, 1, 1, 20, 30)
        )
        array[...] = small
    return path / "a.ome.zarr"


def save_tiff(path: Path, pixels: Image, **options: Any) -> Path:
    tifffile.imwrite(path / "a.tif", pixels.transpose(1, 2, 0), photometric="rgb", **options)
    return path / "a.tif"


def save_ome_tiff(path: Path, pixels: Image) -> Path:
    file = path / "a.ome.tif"
    tifffile.imwrite(file, pixels, photometric="minisblack", metadata={"axes": "CYX"}, ome=True)
    return file


def save_pyramid(path: Path, pixels: Image) -> Path:
    with tifffile.TiffWriter(path / "a.tif", bigtiff=True) as writer:
        whole = pixels.transpose(1, 2, 0)
        options: Any = {"tile": (32, 48), "photometric": "rgb"}
        writer.write(whole, subifds=1, **options)
        writer.write(whole[::2, ::2], subfiletype=1, **options)
    return path / "a.tif"


KINDS: dict[str, tuple[int, Callable[[Path, Image], Path]]] = {
    "npy": (3, save_npy),
    "npy of one channel": (1, save_flat_npy),
    "zarr": (3, lambda path, pixels: save_zarr(path, pixels, chunks=(2, 16, 30))),
    "zarr v2": (3, lambda path, pixels: save_zarr(path, pixels, chunks=(3, 20, 20), zarr_format=2)),
    "zarr in shards": (
        3,
        lambda path, pixels: save_zarr(path, pixels, chunks=(1, 8, 10), shards=(3, 32, 40)),
    ),
    "ome-zarr": (3, save_ome_zarr),
    "tiff in strips": (3, lambda path, pixels: save_tiff(path, pixels, rowsperstrip=7)),
    "tiff in tiles": (
        3,
        lambda path, pixels: save_tiff(
            path, pixels, tile=(16, 32), compression="zlib", bigtiff=True
        ),
    ),
    "ome-tiff": (3, save_ome_tiff),
    "pyramid": (3, save_pyramid),
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_region_of_any_file(kind: str, tmp_path: Path) -> None:
    channels, save = KINDS[kind]
    pixels = image(channels)
    file = open_region_file(save(tmp_path, pixels))
    assert (file.extent, file.channels, file.dtype.name) == ((75, 100), channels, "uint8")
    draw = np.random.default_rng(1)
    regions = [full_region((75, 100)), (Span(74, 75), Span(0, 1)), (Span(0, 75), Span(99, 100))]
    for _ in range(20):
        rows, columns = (sorted(draw.integers(0, n + 1, 2).tolist()) for n in (75, 100))
        regions.append((Span(*rows), Span(*columns)))
    for region in regions:
        expected = pixels[:, region[0].slice, region[1].slice]
        np.testing.assert_array_equal(file.read(region), expected)


@pytest.mark.parametrize("save", [save_ome_zarr, save_pyramid])
def test_a_level_of_a_pyramid(save: Callable[[Path, Image], Path], tmp_path: Path) -> None:
    pixels = image()
    path = save(tmp_path, pixels)
    file = open_region_file(path, level=1)
    assert file.extent == (38, 50)
    np.testing.assert_array_equal(file.read(full_region((38, 50))), pixels[:, ::2, ::2])
    with pytest.raises(ConfigError, match="levels 0 to 1"):
        open_region_file(path, level=2)


def test_axes_can_be_said(tmp_path: Path) -> None:
    pixels = image()
    np.save(tmp_path / "a.npy", pixels.transpose(2, 0, 1))
    file = open_region_file(tmp_path / "a.npy", axes="width channel height")
    region = (Span(3, 20), Span(50, 99))
    np.testing.assert_array_equal(file.read(region), pixels[:, 3:20, 50:99])
    for axes in ("height width", "height width width", "height width depth"):
        with pytest.raises(DataError, match=r"source\.options\.axes"):
            open_region_file(tmp_path / "a.npy", axes=axes)


def test_what_is_far_larger_than_memory_is_read_in_regions(tmp_path: Path) -> None:
    # 4 TB that take no space, since nothing was written to them.
    shape = (2_000_000, 2_000_000)
    with (tmp_path / "huge.npy").open("wb") as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        start = file.tell()
        file.truncate(start + shape[0] * shape[1])
        file.seek(start + 1_500_000 * shape[1] + 7)
        file.write(b"\x05\x06")
    huge = open_region_file(tmp_path / "huge.npy")
    found = huge.read((Span(1_499_999, 1_500_001), Span(6, 10)))
    np.testing.assert_array_equal(found, [[[0, 0, 0, 0], [0, 5, 6, 0]]])


def source(folder: Path, **options: Any) -> Any:
    splits = options.pop("splits", {"unlabeled": {"files": "*.npy"}})
    return open_source(SourceConfig(kind="large", root=str(folder), splits=splits, **options))


def test_files_may_differ_in_size(tmp_path: Path) -> None:
    for name, side in (("b", 40), ("a", 30)):
        np.save(tmp_path / f"{name}.npy", image(1, height=side, width=side + 5)[0])
    found = source(tmp_path)
    assert [(item.id, item.extent) for item in found.items()] == [
        ("unlabeled/a.npy", (30, 35)),
        ("unlabeled/b.npy", (40, 45)),
    ]
    assert list(found.split("unlabeled")) == ["unlabeled/a.npy", "unlabeled/b.npy"]
    region = (Span(5, 9), Span(30, 45))
    (read,) = found.read([Request("unlabeled/b.npy", region=region)])
    np.testing.assert_array_equal(read, image(1, height=40, width=45)[:, 5:9, 30:45])


def test_the_digest_is_of_the_data(tmp_path: Path) -> None:
    pixels = image(1, height=1500, width=1100)[0]
    for folder in ("one", "other", "third"):
        (tmp_path / folder).mkdir()
        np.save(tmp_path / folder / "a.npy", pixels)
    changed = pixels.copy()
    changed[1400, 1050] += 1
    np.save(tmp_path / "third" / "a.npy", changed)
    digests = [source(tmp_path / n).content_digest() for n in ("one", "other", "third")]
    assert digests[0] == digests[1] != digests[2]
    assert source(tmp_path / "one", digest="sampled").content_digest() != digests[0]


def test_a_sampled_digest_looks_into_some_of_many_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short recordings by the thousand take long to read; what can be seen from outside counts."""
    monkeypatch.setattr("gim_stagewise.sources.large.SAMPLED_FILES", 3)
    for number in range(9):
        np.save(tmp_path / f"{number}.npy", np.full((8, 8), number, np.uint8))

    def found(digest: str) -> str:
        content: str = source(tmp_path, digest=digest).content_digest()
        return content

    sampled, full = found("sampled"), found("full")
    np.save(tmp_path / "1.npy", np.zeros((8, 8), np.uint8))  # not among the first, middle and last
    assert found("sampled") == sampled
    assert found("full") != full
    np.save(tmp_path / "1.npy", np.zeros((8, 9), np.uint8))
    assert found("sampled") != sampled
    np.save(tmp_path / "1.npy", np.zeros((8, 8), np.uint8))
    np.save(tmp_path / "4.npy", np.zeros((8, 8), np.uint8))
    assert found("sampled") != sampled


def broken(folder: Path, how: str) -> tuple[str, str]:
    """A folder of two files of which one is broken; returns its name, and what is said of it."""
    tifffile.imwrite(folder / "good.tif", image(1)[0], tile=(16, 32), compression="zlib")
    file = folder / "bad.tif"
    tifffile.imwrite(file, image(1)[0], tile=(16, 32), compression="zlib")
    content = bytearray(file.read_bytes())
    with tifffile.TiffFile(file) as opened:
        page: Any = opened.pages[0]
        start, size = page.dataoffsets[7], page.databytecounts[7]
    if how == "a corrupt tile":
        content[start + 5 : start + size] = bytes(size - 5)
        file.write_bytes(content)
        return "bad.tif", "cannot be read"
    if how == "cut off":
        file.write_bytes(content[: start + size // 2])
        return "bad.tif", "cannot be read"
    if how == "cut off in its header":
        file.write_bytes(content[:60])
        return "bad.tif", "cannot be read as a TIFF file"
    if how == "mixed channels":
        file.unlink()
        tifffile.imwrite(folder / "more.tif", image(3).transpose(1, 2, 0), photometric="rgb")
        return "more.tif", "has 3 channels"
    if how == "empty":
        file.unlink()
        np.save(folder / "none.npy", np.zeros((0, 5), np.uint8))
        return "none.npy", "is empty"
    if how == "too many axes":
        file.unlink()
        tifffile.imwrite(folder / "pages.tif", np.zeros((5, 64, 64), np.uint8))
        return "pages.tif", "which is no image"
    if how == "pixels without a range":
        file.unlink()
        np.save(folder / "int.npy", np.zeros((64, 64), np.int32))
        return "int.npy", "says nothing about brightness"
    if how == "a file that nobody may read":
        file.unlink()
        (folder / "loop.npy").symlink_to(folder / "loop.npy")
        return "loop.npy", "no such file|cannot be read"
    if how == "one large chunk":
        file.unlink()
        zarr.create_array(
            str(folder / "one.zarr"), shape=(9000, 9000), chunks=(9000, 9000), dtype="uint8"
        )
        return "one.zarr", "store it in tiles"
    file.unlink()
    pixels = image(1, dtype="float32")[0]
    pixels[70, 90] = np.nan
    tifffile.imwrite(file, pixels)
    return "bad.tif", "NaN"


@pytest.mark.parametrize(
    "how",
    [
        "a corrupt tile",
        "cut off",
        "cut off in its header",
        "mixed channels",
        "NaN",
        "empty",
        "too many axes",
        "pixels without a range",
        "a file that nobody may read",
        "one large chunk",
    ],
)
def test_a_file_that_cannot_be_used_is_named_or_left_out(how: str, tmp_path: Path) -> None:
    name, said = broken(tmp_path, how)
    splits = {"unlabeled": {"files": "*.*"}}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises((DataError, DataNotFoundError), match=said) as caught:
            source(tmp_path, splits=splits).content_digest()
        assert name in str(caught.value)
        found = source(tmp_path, splits=splits, on_error="skip")
    assert list(found.ids) == ["unlabeled/good.tif"]
    assert list(found.skipped) == [f"unlabeled/{name}"]
    assert re.search(said, found.skipped[f"unlabeled/{name}"])


def test_most_images_decide_the_channels(tmp_path: Path) -> None:
    """And not the first, which is left out."""
    for name in "bc":
        np.save(tmp_path / f"{name}.npy", image(1)[0])
    np.save(tmp_path / "a.npy", image(3).transpose(1, 2, 0))
    splits = {"unlabeled": {"files": "*.npy"}}
    with pytest.raises(DataError, match=r"a\.npy has 3 channels, unlabeled/b\.npy has 1"):
        source(tmp_path, splits=splits)
    found = source(tmp_path, splits=splits, on_error="skip")
    assert list(found.ids) == ["unlabeled/b.npy", "unlabeled/c.npy"]


def test_the_order_of_bytes_is_none_of_the_content(tmp_path: Path) -> None:
    values = (image(1)[0].astype(np.uint16)) * 200
    digests = []
    for order, pixels in (("<u2", values), (">u2", values), (">u2", values.byteswap())):
        np.save(tmp_path / "a.npy", pixels.astype(order))
        digests.append(source(tmp_path).content_digest())
    assert digests[0] == digests[1] != digests[2]


@pytest.mark.parametrize("name", [b"\xff.npy", "字".encode() * 40 + b".npy"])
def test_names_that_no_cache_can_have(tmp_path: Path, name: bytes) -> None:
    np.save(tmp_path / "a.npy", image(1)[0])
    (tmp_path / "a.npy").rename(tmp_path / os.fsdecode(name))
    with pytest.raises(DataError, match=r"rename it|shorter one"):
        source(tmp_path, splits={"unlabeled": {"files": "*.npy"}})


@pytest.mark.parametrize("names", [("row", "column"), ("y", "x"), ("Height", "Width")])
def test_axes_are_known_by_their_whole_names(tmp_path: Path, names: tuple[str, ...]) -> None:
    for name, axes in (("a", names), ("b", ("slice", "y", "x"))):
        shape = (40, 50) if len(axes) == 2 else (5, 40, 50)
        zarr.create_array(
            str(tmp_path / f"{name}.zarr"), shape=shape, dtype="uint8", dimension_names=axes
        )
    opened = open_region_file(tmp_path / "a.zarr")
    assert (opened.channels, opened.extent) == (1, (40, 50))
    with pytest.raises(DataError, match="called slice height width"):
        open_region_file(tmp_path / "b.zarr")


def test_a_file_that_disappears_is_named(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", image(1)[0])
    found = source(tmp_path)
    (tmp_path / "a.npy").unlink()
    with pytest.raises(
        DataNotFoundError,
        match=r"unlabeled/a\.npy cannot be read any more|unlabeled/a\.npy: no such file",
    ):
        found.read([Request("unlabeled/a.npy")])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"splits": {}}, "source.splits: missing"),
        ({"splits": {"train": {"images": "*"}}}, "unknown key; known: files"),
        ({"splits": {"train": {"files": 3}}}, "expected a pattern or a list"),
        ({"splits": {"train": {"files": "*.xyz"}}}, "no file matches"),
        ({"splits": {"train": {"files": ""}}}, "is no pattern"),
        ({"splits": {"train": {"files": "/tmp/*.npy"}}}, "is no pattern"),
        ({"splits": {"train": {"files": ["b.npy"]}}}, "no such file"),
        ({"splits": {"train": {"files": ["a.jpg"]}}}, "cannot be read in regions"),
        ({"splits": {"train": {"files": ["folder"]}}}, "no Zarr array"),
        ({"options": {"level": -1}}, "expected 0 or more"),
        ({"options": {"level": 1}}, "is an array without levels"),
        ({"options": {"axis": "y x"}}, "unknown key; known: axes, level"),
        ({"download": True}, "never fetched"),
    ],
)
def test_bad_settings(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", image(1)[0])
    (tmp_path / "a.jpg").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    with pytest.raises((ConfigError, DataError, DataNotFoundError), match=said):
        source(tmp_path, **options)


def test_a_group_without_an_image(tmp_path: Path) -> None:
    zarr.open_group(str(tmp_path / "a.zarr"), mode="w")
    with pytest.raises(DataError, match="without an OME-Zarr image"):
        open_region_file(tmp_path / "a.zarr")
    (tmp_path / "a.zarr" / "zarr.json").write_text("{")
    with pytest.raises(DataError, match="metadata cannot be read"):
        open_region_file(tmp_path / "a.zarr")


# What modules see of them.


def large(tmp_path: Path, pixels: Image) -> LargeSource:
    np.save(tmp_path / "a.npy", pixels.transpose(1, 2, 0))
    return LargeSource({"unlabeled": {"a.npy": tmp_path / "a.npy"}})


AUGMENT = AugmentConfig(grayscale=True, mean=(0.4,), std=(0.2,))


def test_patches_are_those_of_a_small_image(tmp_path: Path) -> None:
    pixels, grid = image(), PatchGrid(16, 8)
    whole = PatchSource(
        PartsSource({"unlabeled": ArrayPart(pixels[None], None)}), AUGMENT, grid, seed=0
    )
    (expected,) = whole.read([Request("unlabeled/0")])
    regions = RegionSource(large(tmp_path, pixels), AUGMENT, grid)
    (item,) = regions.items()
    assert item.extent == expected.shape[:2]
    for rows, columns in [(Span(0, 8), Span(0, 11)), (Span(2, 3), Span(10, 11))]:
        (found,) = regions.read([Request(item.id, region=(rows, columns))])
        np.testing.assert_array_equal(found, expected[rows.slice, columns.slice])


@settings(deadline=None, max_examples=60)
@given(st.integers(16, 40), st.integers(1, 20), st.integers(0, 30))
def test_filled_patches_have_every_pixel(length: int, stride: int, shift: int) -> None:
    grid = PatchGrid(16, stride, fill=True)
    count = grid.count(length)
    covered = {p for n in range(count) for p in range(n * stride, n * stride + 16)}
    between = {p for p in range(length) if p % stride < 16}
    assert between <= covered
    assert PatchGrid(16, stride).count(length) <= count <= PatchGrid(16, stride).count(length) + 1
    # The last one alone, as the whole with a mirrored border has it.
    signal = np.arange(length) + shift
    wanted = grid.pixels(Span(count - 1, count))
    read, places = mirrored(wanted, length)
    expected = np.pad(signal, (0, 16), "symmetric")[wanted.slice]
    np.testing.assert_array_equal(signal[read.slice][places], expected)


def test_patches_beyond_the_border_are_mirrored(tmp_path: Path) -> None:
    pixels = image(1)
    regions = RegionSource(large(tmp_path, pixels), AugmentConfig(), PatchGrid(16, 8, fill=True))
    (item,) = regions.items()
    assert item.extent == (9, 12)
    (found,) = regions.read([Request(item.id)])
    padded = np.pad(pixels, ((0, 0), (0, 16), (0, 16)), "symmetric")
    for row, column in np.ndindex(9, 12):
        expected = padded[:, row * 8 : row * 8 + 16, column * 8 : column * 8 + 16]
        np.testing.assert_array_equal(found[row, column], expected.astype(np.float32) / 255)
        alone: Region = (Span(row, row + 1), Span(column, column + 1))
        (one,) = regions.read([Request(item.id, region=alone)])
        np.testing.assert_array_equal(one[0, 0], found[row, column])


def test_regions_of_pixels(tmp_path: Path) -> None:
    pixels = image()
    regions = RegionSource(
        large(tmp_path, pixels), AugmentConfig(mean=(0.5,) * 3, std=(0.25,) * 3), None
    )
    (item,) = regions.items()
    assert item.extent == (75, 100)
    (found,) = regions.read([Request(item.id, region=(Span(3, 9), Span(90, 100)))])
    expected = (pixels[:, 3:9, 90:100].astype(np.float32) / np.float32(255) - 0.5) / 0.25
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_an_image_smaller_than_a_patch_is_refused(tmp_path: Path) -> None:
    images = large(tmp_path, image())
    with pytest.raises(DataError, match="smaller than one patch"):
        RegionSource(images, AugmentConfig(), PatchGrid(80, 8))


def test_colours_of_a_palette_are_refused(tmp_path: Path) -> None:
    """Their numbers are no brightness."""
    palette = np.zeros((3, 256), np.uint16)
    file = tmp_path / "a.tif"
    tifffile.imwrite(file, image(1)[0], photometric="palette", colormap=palette)
    with pytest.raises(DataError, match="colours in a palette"):
        open_region_file(file)
