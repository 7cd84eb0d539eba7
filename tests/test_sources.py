"""Datasets as sources: what is read, what is augmented, and what is refused."""

from __future__ import annotations

import contextlib
import shutil
import struct
import tracemalloc
from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from helpers import one_error
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from torchvision import datasets
from warm import gim_stage

from gim_stagewise import Pipeline, open_cache
from gim_stagewise.config import AugmentConfig, SourceConfig
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError, GimStageError
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.sources import (
    PATCH_AXES,
    PatchSource,
    Request,
    Source,
    labels_of,
    open_source,
    parts,
    read_stacked,
)
from gim_stagewise.sources.npy import NpyFile
from gim_stagewise.sources.parts import ArrayPart, PartsSource
from gim_stagewise.windows import PatchGrid, Span

quick = settings(deadline=None, max_examples=50)


def pixels(*shape: int, dtype: str = "uint8", seed: int = 0) -> NDArray[Any]:
    draw = np.random.default_rng(seed)
    if np.issubdtype(np.dtype(dtype), np.integer):
        return draw.integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)
    return draw.random(shape).astype(dtype)


def in_memory(images: NDArray[Any], labels: Sequence[int] | None = None) -> PartsSource:
    """A source of one split, of images [sample, channel, height, width]."""
    numbers = None if labels is None else np.array(labels, np.int64)
    return PartsSource({"train": ArrayPart(images, numbers)})


class UnevenPart:
    """Images of any sizes."""

    def __init__(self, images: Sequence[NDArray[Any]]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def describe(self, index: int) -> tuple[tuple[int, int], int, str]:
        channels, height, width = self._images[index].shape
        return (height, width), channels, self._images[index].dtype.name

    def read(self, index: int) -> NDArray[Any]:
        return self._images[index]

    def names(self) -> Sequence[str] | None:
        return None

    def labels(self) -> NDArray[np.int64] | None:
        return None

    def digest(self, images: Sequence[int]) -> str:
        return "uneven"


def uneven(*images: NDArray[Any]) -> PartsSource:
    return PartsSource({"train": UnevenPart(images)})


def patches_of(
    images: Source, *, size: int = 3, stride: int = 2, seed: int = 0, **augment: Any
) -> PatchSource:
    return PatchSource(images, AugmentConfig(**augment), PatchGrid(size, stride), seed=seed)


def read_one(source: Source, item_id: str = "train/0", view: int = 0) -> NDArray[Any]:
    return source.read([Request(item_id, view)])[0]


# Digits


def test_digits_are_scikit_learns_with_the_last_500_for_testing() -> None:
    from sklearn.datasets import load_digits

    data = load_digits()
    source = open_source(SourceConfig(kind="digits"))
    assert len(source.items()) == 1797
    assert [len(source.split(name)) for name in ("unlabeled", "train", "test")] == [1297, 1297, 500]
    assert source.split("unlabeled") == source.split("train")
    assert list(source.labels("class")) == list(data.target)
    for item_id, index in (("train/0", 0), ("train/1296", 1296), ("test/0", 1297)):
        image = read_one(source, item_id)
        assert image.dtype == np.float32
        assert image.shape == (1, 8, 8)
        np.testing.assert_array_equal(image[0] * 16, data.images[index])


# Parts of a source


def test_items_are_in_order_of_splits_and_unlabeled_ones_have_no_label() -> None:
    image = pixels(1, 1, 4, 4)
    source = PartsSource(
        {
            "test": ArrayPart(image.repeat(2, 0), np.array([7, 8])),
            "train": ArrayPart(image, np.array([5])),
            "unlabeled": ArrayPart(image.repeat(3, 0), None),
        }
    )
    ids = ["unlabeled/0", "unlabeled/1", "unlabeled/2", "train/0", "test/0", "test/1"]
    items = source.items()
    assert [item.id for item in items] == ids
    assert [items[n].id for n in range(-6, 6)] == ids * 2
    assert [item.id for item in items[1:4]] == ids[1:4]
    assert [source.split(name) for name in ("unlabeled", "train", "test")] == [
        ids[:3],
        ids[3:4],
        ids[4:],
    ]
    assert source.label_names == ("class",)
    assert source.labels("class").tolist() == [NO_LABEL] * 3 + [5, 7, 8]
    with pytest.raises(IndexError):
        items[6]


@pytest.mark.parametrize(
    "item_id", ["train/3", "train/-1", "test/0", "train", "other/0", "train/x"]
)
def test_an_unknown_sample_is_named(item_id: str) -> None:
    with pytest.raises(DataError, match=f"no sample '{item_id}'"):
        read_one(in_memory(pixels(3, 1, 4, 4)), item_id)


def test_labels_of_another_name_or_number_are_refused() -> None:
    with pytest.raises(DataError, match="no labels called 'speaker'"):
        in_memory(pixels(2, 1, 4, 4), [1, 2]).labels("speaker")
    with pytest.raises(DataError, match=r"split train has 2 images but labels of shape \(3,\)"):
        in_memory(pixels(2, 1, 4, 4), [1, 2, 3])


@pytest.mark.parametrize("splits", [[], ["test"]])
def test_a_source_needs_something_to_train_on(splits: Sequence[Any]) -> None:
    with pytest.raises(DataError, match="nothing to train"):
        PartsSource({name: ArrayPart(pixels(2, 1, 4, 4), None) for name in splits})


def test_samples_are_read_in_the_order_asked_for_and_stacked() -> None:
    images = pixels(4, 2, 3, 5)
    order = [2, 0, 2, 3]
    stacked = read_stacked(in_memory(images), [Request(f"train/{n}") for n in order])
    np.testing.assert_array_equal(stacked, images[order])


def test_a_region_of_an_image_is_its_slice() -> None:
    images = pixels(1, 2, 6, 7)
    (part,) = in_memory(images).read([Request("train/0", 0, (Span(1, 4), Span(2, 7)))])
    np.testing.assert_array_equal(part, images[0, :, 1:4, 2:7])


def test_item_bytes_are_those_of_a_sample_as_read() -> None:
    source = in_memory(pixels(2, 3, 5, 4, dtype="uint16"))
    assert source.item_bytes == read_one(source).nbytes


def test_item_bytes_are_those_of_the_largest_sample() -> None:
    assert uneven(pixels(1, 4, 4), pixels(1, 9, 9)).item_bytes == 81


# npy files


@quick
@given(
    shape=st.lists(st.integers(1, 5), min_size=1, max_size=4),
    dtype=st.sampled_from(["uint8", ">u2", "int64", "float32", "<f8", "bool"]),
    version=st.sampled_from([(1, 0), (2, 0), (3, 0)]),
    data=st.data(),
)
def test_reading_by_position_is_slicing_what_numpy_loads(
    tmp_path_factory: pytest.TempPathFactory,
    shape: list[int],
    dtype: str,
    version: tuple[int, int],
    data: st.DataObject,
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.npy"
    with path.open("wb") as file:
        array = pixels(*shape).astype(dtype)
        np.lib.format.write_array(file, array, version=version)
    whole, stored = np.load(path), NpyFile(path)
    assert (len(stored), stored.shape, stored.dtype) == (len(whole), whole.shape, whole.dtype)
    index = data.draw(st.integers(-shape[0], shape[0] - 1))
    np.testing.assert_array_equal(stored[index], whole[index])
    bounds = st.none() | st.integers(-7, 7)
    rows = slice(data.draw(bounds), data.draw(bounds))
    np.testing.assert_array_equal(stored[rows], whole[rows])
    assert stored[rows].dtype == whole.dtype
    with pytest.raises(IndexError):
        stored[shape[0]]


@pytest.mark.parametrize("rows", [slice(None, None, 2), slice(None, None, -1)])
def test_a_slice_with_a_step_is_read_right_or_refused(tmp_path: Path, rows: slice) -> None:
    array = pixels(6, 2)
    np.save(tmp_path / "a.npy", array)
    with contextlib.suppress(IndexError, TypeError, NotImplementedError):
        np.testing.assert_array_equal(NpyFile(tmp_path / "a.npy")[rows], array[rows])


def broken_npy(path: Path, kind: str) -> None:
    array = pixels(3, 4, 4)
    if kind == "fortran":
        np.save(path, np.asfortranarray(array))
    elif kind == "objects":
        np.save(path, np.array([[1, None]], dtype=object), allow_pickle=True)
    elif kind == "no axes":
        np.save(path, np.array(3))
    elif kind == "text":
        path.write_text("these are no numbers")
    else:
        np.save(path, array)
        whole = path.read_bytes()
        path.write_bytes(whole[: {"cut off": -1, "header cut off": 20, "empty": 0}[kind]])


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("cut off", "cut off: 175 bytes of 176"),
        ("header cut off", "not a readable npy file"),
        ("empty", "not a readable npy file"),
        ("text", "not a readable npy file"),
        ("fortran", "save numpy.ascontiguousarray"),
        ("objects", "Python objects"),
        ("no axes", "a single value"),
    ],
)
def test_a_broken_npy_file_is_named_with_the_reason(tmp_path: Path, kind: str, reason: str) -> None:
    path = tmp_path / "broken.npy"
    broken_npy(path, kind)
    with pytest.raises(DataError) as caught:
        NpyFile(path)
    assert str(path) in str(caught.value)
    assert reason in str(caught.value)


def test_a_file_that_shrinks_while_open_is_noticed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", pixels(3, 4, 4))
    stored = NpyFile(tmp_path / "a.npy")
    (tmp_path / "a.npy").write_bytes(b"")
    with pytest.raises(DataError, match="16 bytes early"):
        stored[1]


# Arrays as sources


def arrays(root: Path, kind: str = "npy", **tables: Mapping[str, Any]) -> SourceConfig:
    """The settings of an array source; a table's `axes` goes to the options."""
    options = tables.pop("options", {})
    splits: Any = tables or {"train": {"images": f"images.{kind}"}}
    return SourceConfig(kind=kind, root=str(root), options=dict(options), splits=splits)


def save(path: Path, array: NDArray[Any], **options: Any) -> None:
    if path.suffix == ".npy":
        np.save(path, array)
    else:
        zarr.create_array(str(path), data=array, overwrite=True, **options)


@pytest.mark.parametrize("kind", ["npy", "zarr"])
@pytest.mark.parametrize(
    ("axes", "stated"),
    [
        ("sample channel height width", False),
        ("sample height width", False),
        ("sample height width channel", True),
        ("sample channel width height", True),
        ("sample width channel height", True),
        ("sample width height", True),
    ],
)
def test_axes_may_be_stored_in_any_order(
    tmp_path: Path, kind: str, axes: str, stated: bool
) -> None:
    names = axes.split()
    channels = 3 if "channel" in names else 1
    images = pixels(2, channels, 4, 5)
    sizes = dict(zip(("sample", "channel", "height", "width"), images.shape, strict=True))
    order = [list(sizes).index(name) for name in names]
    dropped = images if channels == 3 else images[:, 0]
    kept = [axis - (channels == 1 and axis > 1) for axis in order]
    save(tmp_path / f"images.{kind}", np.ascontiguousarray(dropped.transpose(kept)))
    options = {"axes": axes} if stated else {}
    source = open_source(arrays(tmp_path, kind, options=options))
    first = source.items()[0]
    assert (first.extent, first.channels, first.dtype) == ((4, 5), channels, "uint8")
    for index in range(2):
        np.testing.assert_array_equal(read_one(source, f"train/{index}"), images[index])


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_each_split_has_its_images_and_labels(tmp_path: Path, kind: str) -> None:
    images = {"unlabeled": pixels(3, 4, 4), "train": pixels(2, 4, 4, seed=1)}
    save(tmp_path / f"u.{kind}", images["unlabeled"])
    save(tmp_path / f"t.{kind}", images["train"])
    save(tmp_path / f"l.{kind}", np.array([4, 9], np.uint8))
    source = open_source(
        arrays(
            tmp_path,
            kind,
            train={"images": f"t.{kind}", "labels": f"l.{kind}"},
            unlabeled={"images": f"u.{kind}"},
        )
    )
    assert source.labels("class").tolist() == [-1, -1, -1, 4, 9]
    np.testing.assert_array_equal(read_one(source, "unlabeled/2")[0], images["unlabeled"][2])
    np.testing.assert_array_equal(read_one(source, "train/1")[0], images["train"][1])


def test_arrays_inside_a_zarr_group_are_named_by_path(tmp_path: Path) -> None:
    images = pixels(2, 4, 4)
    group = zarr.create_group(str(tmp_path / "all.zarr"))
    group.create_array("split/images", data=images)
    source = open_source(arrays(tmp_path / "all.zarr", "zarr", train={"images": "split/images"}))
    np.testing.assert_array_equal(read_one(source, "train/1")[0], images[1])


TRAIN = {"images": "images.npy"}


@pytest.mark.parametrize(
    ("tables", "key", "reason"),
    [
        ({"train": {**TRAIN, "label": "x"}}, "source.splits.train.label", "known: images, labels"),
        ({"test": {"labels": "x.npy"}}, "source.splits.test.images", "missing"),
        ({"train": {"images": 3}}, "source.splits.train.images", "is 3, expected a path"),
        ({"train": TRAIN, "options": {"axis": "x"}}, "source.options.axis", "known: axes"),
        (
            {"train": TRAIN, "options": {"axes": "sample row width"}},
            "source.options.axes",
            "is 'sample row width'",
        ),
        (
            {"train": TRAIN, "options": {"axes": "height width sample"}},
            "source.options.axes",
            "is 'height width sample'",
        ),
        pytest.param(
            {"train": TRAIN, "options": {"axes": "sample height height width"}},
            "source.options.axes",
            "is 'sample height height width'",
        ),
    ],
)
def test_wrong_tables_of_arrays_are_named_by_key(
    tmp_path: Path, tables: dict[str, Any], key: str, reason: str
) -> None:
    np.save(tmp_path / "images.npy", pixels(2, 3, 4, 4))
    with pytest.raises(ConfigError) as caught:
        open_source(arrays(tmp_path, **tables))
    assert caught.value.key == key
    assert reason in caught.value.problem


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_channels_that_seem_to_come_last_are_asked_about(tmp_path: Path, kind: str) -> None:
    save(tmp_path / f"images.{kind}", pixels(2, 8, 8, 3))
    table = {"images": f"images.{kind}"}
    with pytest.raises(ConfigError, match="channels come last") as caught:
        open_source(arrays(tmp_path, kind, train=table))
    assert caught.value.key == "source.options.axes"
    options = {"axes": "sample channel height width"}
    assert (
        open_source(arrays(tmp_path, kind, train=table, options=options)).items()[0].channels == 8
    )


@pytest.mark.parametrize("kind", ["npy", "zarr"])
def test_arrays_without_splits_are_shown_how_to_give_them(kind: str) -> None:
    with pytest.raises(ConfigError, match="images = ") as caught:
        open_source(SourceConfig(kind=kind, root="x"))
    assert caught.value.key == "source.splits"


@pytest.mark.parametrize("kind", ["npy", "zarr"])
@pytest.mark.parametrize("wrong", ["images", "labels"])
def test_missing_data_is_named_by_its_absolute_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, wrong: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / f"images.{kind}", pixels(2, 4, 4))
    table = {"images": f"images.{kind}", wrong: f"absent.{kind}"}
    with pytest.raises(DataNotFoundError) as caught:
        open_source(arrays(Path(), kind, train=table))
    assert str(tmp_path / f"absent.{kind}") in str(caught.value)
    assert isinstance(caught.value, FileNotFoundError)


@pytest.mark.parametrize("kind", ["npy", "zarr"])
@pytest.mark.parametrize(
    ("images", "labels", "options", "reason"),
    [
        (pixels(2, 3), None, {}, r"shape \(2, 3\), expected 3 or 4 axes"),
        (pixels(1, 2, 3, 4, 5), None, {}, "expected 3 or 4 axes"),
        (pixels(2, 4, 4), None, {"axes": "sample height width channel"}, "expected the axes"),
        (pixels(2, 4, 4), np.zeros(2), {}, "float64, expected integer labels"),
        (pixels(2, 4, 4), np.zeros(3, int), {}, r"2 images but labels of shape \(3,\)"),
        (pixels(2, 4, 4), np.zeros((2, 1), int), {}, r"labels of shape \(2, 1\)"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(
    tmp_path: Path,
    kind: str,
    images: NDArray[Any],
    labels: NDArray[Any] | None,
    options: dict[str, str],
    reason: str,
) -> None:
    save(tmp_path / f"images.{kind}", images)
    table = {"images": f"images.{kind}"}
    if labels is not None:
        save(tmp_path / f"labels.{kind}", labels)
        table["labels"] = f"labels.{kind}"
    with pytest.raises(DataError, match=reason):
        open_source(arrays(tmp_path, kind, train=table, options=options))


def test_a_zarr_group_in_place_of_an_array_is_refused(tmp_path: Path) -> None:
    zarr.create_group(str(tmp_path / "images.zarr"))
    with pytest.raises(DataError, match="is a Zarr group"):
        open_source(arrays(tmp_path, "zarr"))


def test_a_zarr_chunk_is_decoded_once_for_images_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = pixels(11, 4, 4)
    save(tmp_path / "images.zarr", values, chunks=(4, 4, 2))
    source: Any = open_source(arrays(tmp_path, "zarr"))
    decoded: list[object] = []
    real = zarr.Array.__getitem__

    def counted(array: Any, key: Any) -> Any:
        decoded.append(key)
        return real(array, key)

    monkeypatch.setattr(zarr.Array, "__getitem__", counted)
    for item_id, expected in zip(source.ids, values, strict=True):
        np.testing.assert_array_equal(source.read([Request(item_id)])[0][0], expected)
    assert len(decoded) == 3
    np.testing.assert_array_equal(source.read([Request(source.ids[-1])])[0][0], values[-1])
    assert len(decoded) == 3
    assert source.chunk_bytes == 4 * 4 * 4 * values.itemsize


def test_images_of_many_zarr_chunks_do_not_keep_these_in_memory(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save(tmp_path / f"{split}.zarr", pixels(320, 64, 64), chunks=(32, 64, 64))
    tables = {split: {"images": f"{split}.zarr"} for split in ("train", "test")}
    source = patches_of(open_source(arrays(tmp_path, "zarr", **tables)), size=64, stride=64)
    scattered = [Request(item_id) for item_id in source.ids[::32]]
    source.read(scattered[:1])
    tracemalloc.start()
    try:
        grids = source.read(scattered)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    images = len(scattered) * 64 * 64
    assert source.chunk_bytes == 32 * 64 * 64
    assert peak < sum(grid.nbytes for grid in grids) + 6 * images + 4 * source.chunk_bytes


def test_a_zarr_chunk_of_too_many_images_is_refused(tmp_path: Path) -> None:
    images = zarr.create_array(
        str(tmp_path / "images.zarr"), shape=(400, 512, 512), chunks=(300, 512, 512), dtype="u1"
    )
    assert images.nbytes > 64_000_000
    with pytest.raises(DataError, match=r"chunks of 300 samples, .* 244 at most"):
        open_source(arrays(tmp_path, "zarr"))


@pytest.mark.parametrize("torn", ["zarr.json", "c/0/0/0"])
def test_a_torn_zarr_array_is_named(tmp_path: Path, torn: str) -> None:
    save(tmp_path / "images.zarr", pixels(2, 4, 4))
    file = tmp_path / "images.zarr" / torn
    file.write_bytes(file.read_bytes()[:5])
    with pytest.raises(GimStageError, match=r"images\.zarr"):
        read_one(open_source(arrays(tmp_path, "zarr")))


@pytest.mark.filterwarnings("ignore::numpy.exceptions.ComplexWarning")
@pytest.mark.parametrize("dtype", ["U3", "complex64"])
def test_pixels_that_are_no_real_numbers_are_refused(tmp_path: Path, dtype: str) -> None:
    np.save(tmp_path / "images.npy", pixels(2, 4, 4).astype(dtype))
    with pytest.raises(DataError):
        read_one(patches_of(open_source(arrays(tmp_path))))


# torchvision


def save_png(path: Path, array: NDArray[Any], mode: str | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(array)
    (image.convert(mode) if mode else image).save(path)


def image_folder(root: Path) -> SourceConfig:
    return SourceConfig(kind="torchvision:ImageFolder", root=str(root))


def test_classes_of_a_name_have_one_number_in_all_splits(tmp_path: Path) -> None:
    """Also where a folder lacks one, and torchvision numbers those that it has."""
    there = {"train": ["ant", "bee", "cat"], "test": ["bee", "cat"], "unlabeled": ["all"]}
    for split, classes in there.items():
        for name in classes:
            save_png(tmp_path / split / name / "0.png", pixels(6, 5, 3))
    splits: Any = {split: {"root": str(tmp_path / split)} for split in there}
    source = open_source(SourceConfig(kind="torchvision:ImageFolder", splits=splits))
    train, test = labels_of(source, "train"), labels_of(source, "test")
    assert len({*train.values()}) == 3
    for name in there["test"]:
        assert test[f"test/{name}/0.png"] == train[f"train/{name}/0.png"]
    shutil.copytree(tmp_path / "train", tmp_path / "whole")
    alike: Any = {"train": splits["train"], "test": {"root": str(tmp_path / "whole")}}
    same = open_source(SourceConfig(kind="torchvision:ImageFolder", splits=alike))
    assert same.labels("class").tolist() == [0, 1, 2, 0, 1, 2]


def test_images_of_16_bits_in_a_folder_are_refused(tmp_path: Path) -> None:
    """Pillow cuts them off at 255 when they are made RGB."""
    save_png(tmp_path / "ant" / "0.png", pixels(6, 5, 3))
    deep = tmp_path / "ant" / "1.png"
    Image.fromarray(np.full((6, 5), 40_000, np.uint16)).save(deep)
    with pytest.raises(DataError, match=r"1\.png has pixels of more than 8 bits"):
        patches_of(open_source(image_folder(tmp_path)))


def test_images_marked_as_unlabeled_are_told_of(tmp_path: Path) -> None:
    save(tmp_path / "images.npy", pixels(5, 4, 4))
    save(tmp_path / "labels.npy", np.array([-1, 1, -1, 0, 1]))
    table = {"images": "images.npy", "labels": "labels.npy"}
    source = patches_of(open_source(arrays(tmp_path, train=table)))
    assert source.notices == ("2 images of split train have the label -1, which stands for none",)
    assert len(labels_of(source, "train")) == 3


@pytest.mark.parametrize(
    ("options", "said"), [({"size": "60"}, "integer"), ({"transform": "x"}, "unknown argument")]
)
def test_wrong_options_of_torchvision_are_the_users(options: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        open_source(SourceConfig(kind="torchvision:FakeData", options=options))


def test_an_image_folder_gives_rgb_images_and_their_classes(tmp_path: Path) -> None:
    colour, gray = pixels(6, 5, 3), pixels(6, 5)
    save_png(tmp_path / "ant" / "a.png", colour)
    save_png(tmp_path / "bee" / "b.png", gray)
    save_png(tmp_path / "bee" / "c.png", gray // 128 * 255, mode="1")
    source = open_source(image_folder(tmp_path))
    names = ["train/ant/a.png", "train/bee/b.png", "train/bee/c.png"]
    assert source.split("train") == names
    assert source.labels("class").tolist() == [0, 1, 1]
    np.testing.assert_array_equal(read_one(source, names[0]), colour.transpose(2, 0, 1))
    np.testing.assert_array_equal(read_one(source, names[1]), np.stack([gray] * 3))
    np.testing.assert_array_equal(read_one(source, names[2]), np.stack([gray // 128 * 255] * 3))


def test_images_of_a_folder_may_differ_in_size_if_cropped(tmp_path: Path) -> None:
    save_png(tmp_path / "x" / "a.png", pixels(6, 9, 3))
    save_png(tmp_path / "x" / "b.png", pixels(8, 5, 3))
    source = open_source(image_folder(tmp_path))
    assert [item.extent for item in source.items()] == [(6, 9), (8, 5)]
    assert read_stacked(
        patches_of(source, crop=5), [Request("train/x/a.png"), Request("train/x/b.png")]
    ).shape == (2, 2, 2, 3, 3, 3)


def test_classes_keep_their_names_on_the_way_through_caches(tiny: Path, tmp_path: Path) -> None:
    """Also where folders of one split lack a class, so that its numbers are others."""
    for split, names in {"train": ("cat", "dog"), "test": ("ant", "dog", "a cat")}.items():
        for number in range(8):
            name = names[number % len(names)]
            image = pixels(12, 12, 3, seed=number)
            save_png(tmp_path / split / name / f"{number}.png", image)
    text = tiny.read_text()
    start, end = text.index("[source]"), text.index("[patches]")
    tables = "".join(f'splits.{s} = {{ root = "{tmp_path / s}" }}\n' for s in ("train", "test"))
    source = f'[source]\nkind = "torchvision:ImageFolder"\n{tables}\n'
    text = text[:start] + source + text[end:]
    tiny.write_text(text.replace("batch = 8", "batch = 4").partition("[module.3]")[0])
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run()
    for module in (1, 2):
        cache = open_cache(tmp_path / "out" / f"m{module}.zarr")
        values = cache.label_values("class")
        assert values == ("a cat", "ant", "cat", "dog")
        for item_id, label in zip(cache.ids, cache.labels("class").tolist(), strict=True):
            assert item_id.split("/")[1] == values[label]
        plain: Any = zarr.open(str(cache.path))
        assert plain["labels/class"].attrs["values"] == list(values)
        assert cache.label_values("speaker") == ()


def test_images_without_a_folder_for_their_class_are_told_where_to_go(tmp_path: Path) -> None:
    save_png(tmp_path / "a.png", pixels(4, 4, 3))
    with pytest.raises(DataNotFoundError, match="put images without classes into one of them"):
        open_source(image_folder(tmp_path))


def test_other_splits_may_lie_in_other_folders(tmp_path: Path) -> None:
    save_png(tmp_path / "one" / "x" / "a.png", pixels(4, 4, 3))
    save_png(tmp_path / "two" / "x" / "a.png", pixels(4, 4, 3, seed=1))
    config = SourceConfig(
        kind="torchvision:ImageFolder",
        splits={
            "train": {"root": str(tmp_path / "one")},
            "test": {"root": str(tmp_path / "two")},
        },
    )
    source = open_source(config)
    assert (source.split("train"), source.split("test")) == (["train/x/a.png"], ["test/x/a.png"])
    assert not np.array_equal(read_one(source, "train/x/a.png"), read_one(source, "test/x/a.png"))


def save_idx(path: Path, array: NDArray[np.uint8]) -> None:
    """The format of MNIST and its like."""
    path.parent.mkdir(parents=True, exist_ok=True)
    header = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


def test_a_class_with_an_argument_train_gives_train_and_test(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    images = {"train": pixels(4, 28, 28), "t10k": pixels(3, 28, 28, seed=1)}
    for name, array in images.items():
        save_idx(raw / f"{name}-images-idx3-ubyte", array)
        save_idx(raw / f"{name}-labels-idx1-ubyte", np.arange(len(array), dtype=np.uint8))
    source = open_source(SourceConfig(kind="torchvision:FashionMNIST", root=str(tmp_path)))
    assert len(source.split("train")) == len(source.split("unlabeled")) == 4
    assert len(source.split("test")) == 3
    assert source.labels("class").tolist() == [0, 1, 2, 3, 0, 1, 2]
    np.testing.assert_array_equal(read_one(source, "train/3")[0], images["train"][3])
    np.testing.assert_array_equal(read_one(source, "test/2")[0], images["t10k"][2])


class ByName:
    """A dataset with an argument `split`, as STL10 has."""

    def __init__(self, root: str, split: str = "train") -> None:
        sizes = {"train": 2, "test": 1, "unlabeled": 3}
        if split not in sizes:
            raise ValueError(f"no split {split}")
        self.labels = [-1 if split == "unlabeled" else 4] * sizes[split]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(pixels(4, 4, 3, seed=index)), self.labels[index]


@pytest.mark.parametrize(
    ("name", "size"),
    [
        ("train", 2),
        ("test", 1),
        pytest.param(
            "unlabeled",
            3,
        ),
    ],
)
def test_a_class_with_an_argument_split_is_opened_by_the_names_it_has(
    monkeypatch: pytest.MonkeyPatch, name: Any, size: int
) -> None:
    monkeypatch.setattr(datasets, "ByName", ByName, raising=False)
    source = open_source(SourceConfig(kind="torchvision:ByName"))
    assert len(source.split(name)) == size


def test_a_class_without_a_root_can_be_opened() -> None:
    options = {"size": 3, "image_size": [3, 6, 5]}
    source = open_source(SourceConfig(kind="torchvision:FakeData", options=options))
    assert len(source.split("train")) == 3
    assert read_one(source).shape == (3, 6, 5)


def test_a_missing_dataset_says_where_it_was_looked_for_and_how_to_fetch_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataNotFoundError) as caught:
        open_source(SourceConfig(kind="torchvision:CIFAR10", root="somewhere"))
    message = str(caught.value)
    assert str(tmp_path / "somewhere") in message
    assert "source.download = true" in message
    assert "source.root" in message
    assert "CIFAR10, split train" in message
    assert "\n" not in message


@pytest.mark.parametrize("made", [False, True])
def test_an_image_folder_without_images_says_where_it_was_looked_for(
    tmp_path: Path, made: bool
) -> None:
    root = tmp_path / "photos"
    if made:
        (root / "empty_class").mkdir(parents=True)
    with pytest.raises(DataNotFoundError) as caught:
        open_source(image_folder(root))
    assert str(root) in str(caught.value)
    assert "source.download" not in str(caught.value)


def test_an_image_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    save_png(tmp_path / "x" / "a.png", pixels(4, 4, 3))
    (tmp_path / "x" / "b.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"b\.png|train/1"):
        list(open_source(image_folder(tmp_path)).items())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("digit", "'digits'|\"digits\""),
        ("digits:8", "expected"),
        ("npy:x", "expected"),
        ("torchvision", "torchvision:<Class>"),
        ("torchvision:", "torchvision:<Class>"),
        ("torchvision:Cifar", "no class 'Cifar'"),
        ("torchvision:folder", "no class 'folder'"),
        pytest.param(
            "torchvision:VisionDataset",
            "VisionDataset",
        ),
    ],
)
def test_an_unknown_kind_is_told_what_there_is(kind: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        open_source(SourceConfig(kind=kind, root="."))
    assert caught.value.key == "source.kind"
    assert kind in caught.value.problem


@pytest.mark.parametrize(
    ("settings_of_source", "key"),
    [
        ({"splits": {"test": {"foldr": 3}}}, "source.splits.test.foldr"),
        pytest.param(
            {"options": {"foldr": 3}},
            "source.options.foldr",
        ),
    ],
)
def test_an_argument_that_torchvision_does_not_take_is_named_where_it_stands(
    tmp_path: Path, settings_of_source: dict[str, Any], key: str
) -> None:
    save_png(tmp_path / "x" / "a.png", pixels(4, 4, 3))
    config = SourceConfig(kind="torchvision:ImageFolder", root=str(tmp_path), **settings_of_source)
    with pytest.raises(ConfigError, match="allow_empty") as caught:
        open_source(config)
    assert caught.value.key == key


# Patches


def patches_by_loops(image: NDArray[Any], size: int, stride: int) -> NDArray[Any]:
    """[row, column, channel, height, width], one pixel after the other."""
    channels, height, width = image.shape
    tops = range(0, height - size + 1, stride)
    lefts = range(0, width - size + 1, stride)
    patches = np.empty((len(tops), len(lefts), channels, size, size), np.float32)
    for row, top in enumerate(tops):
        for column, left in enumerate(lefts):
            for channel in range(channels):
                for y in range(size):
                    for x in range(size):
                        patches[row, column, channel, y, x] = image[channel, top + y, left + x]
    return patches


def padded(image: NDArray[Any], pad: int) -> NDArray[Any]:
    channels, height, width = image.shape
    larger = np.zeros((channels, height + 2 * pad, width + 2 * pad), image.dtype)
    larger[:, pad : pad + height, pad : pad + width] = image
    return larger


@quick
@given(
    channels=st.integers(1, 3),
    height=st.integers(3, 9),
    width=st.integers(3, 9),
    size=st.integers(1, 3),
    stride=st.integers(1, 4),
    pad=st.integers(0, 2),
    data=st.data(),
)
def test_view_0_is_the_centre_crop_of_the_padded_image_in_patches(
    channels: int, height: int, width: int, size: int, stride: int, pad: int, data: st.DataObject
) -> None:
    largest = min(height, width) + 2 * pad
    crop = data.draw(st.none() | st.integers(size, largest))
    image = pixels(channels, height, width, dtype="float32")
    larger = padded(image, pad)
    if crop is not None:
        top, left = (larger.shape[1] - crop) // 2, (larger.shape[2] - crop) // 2
        larger = larger[:, top : top + crop, left : left + crop]
    source = patches_of(
        in_memory(image[None]), size=size, stride=stride, pad=pad, crop=crop, flip=1
    )
    expected = patches_by_loops(larger, size, stride)
    patches = read_one(source)
    np.testing.assert_array_equal(patches, expected)
    assert patches.dtype == np.float32
    assert source.items()[0].extent == source.extent == expected.shape[:2]
    assert source.items()[0].channels == source.channels == channels
    assert source.item_bytes == patches.nbytes
    assert source.axes == PATCH_AXES
    np.testing.assert_array_equal(source.read_images(["train/0"])[0], larger)


def test_every_other_view_is_some_crop_perhaps_flipped_and_all_are_reached() -> None:
    image = pixels(1, 5, 6, dtype="float32")
    source = patches_of(in_memory(image[None]), size=4, stride=4, crop=4, flip=0.5)
    possible = {}
    for top in range(2):
        for left in range(3):
            for step in (1, -1):
                cut = image[:, top : top + 4, left : left + 4][:, :, ::step]
                possible[cut.tobytes()] = (top, left, step)
    assert len(possible) == 12
    seen = {possible[read_one(source, view=view).tobytes()] for view in range(1, 150)}
    assert len(seen) == 12


@pytest.mark.parametrize(("flip", "flipped"), [(0.0, [False]), (1.0, [True]), (0.5, [False, True])])
def test_flip_is_the_share_of_mirrored_views(flip: float, flipped: list[bool]) -> None:
    image = pixels(2, 4, 4, dtype="float32")
    source = patches_of(in_memory(image[None]), size=4, stride=4, flip=flip, crop=4)
    mirrored = [
        np.array_equal(read_one(source, view=view)[0, 0], image[:, :, ::-1])
        for view in range(1, 60)
    ]
    assert sorted(set(mirrored)) == flipped
    assert np.array_equal(read_one(source)[0, 0], image)


def test_a_view_is_a_function_of_seed_id_and_number() -> None:
    images = np.repeat(pixels(1, 1, 60, 60), 3, axis=0)

    def source(seed: int = 0) -> PatchSource:
        return patches_of(in_memory(images), size=8, stride=8, seed=seed, crop=16, flip=0.5)

    requests = [Request(f"train/{n}", view) for n in range(3) for view in range(4)]
    first = source().read(requests)
    again = source().read(requests[::-1])[::-1]
    for one, other in zip(first, again, strict=True):
        np.testing.assert_array_equal(one, other)
    # Three times the same image: the evaluation views are equal, all others differ.
    assert len({patches.tobytes() for patches in first}) == 1 + 3 * 3
    other_seed = source(seed=1).read(requests)
    assert [np.array_equal(a, b) for a, b in zip(first, other_seed, strict=True)] == [
        request.view == 0 for request in requests
    ]


@pytest.mark.parametrize(
    ("augment", "views"), [({}, 0), ({"pad": 2}, 0), ({"crop": 4}, None), ({"flip": 0.1}, None)]
)
def test_there_are_training_views_where_something_is_drawn(
    augment: dict[str, Any], views: int | None
) -> None:
    assert patches_of(in_memory(pixels(1, 1, 6, 6)), **augment).views == views


@quick
@given(data=st.data(), view=st.integers(0, 3), stride=st.integers(1, 4))
def test_a_region_is_a_slice_of_the_whole(data: st.DataObject, view: int, stride: int) -> None:
    images = pixels(1, 2, 11, 13)
    source = patches_of(in_memory(images), stride=stride, crop=10, flip=0.5, pad=1)

    def span(length: int) -> Span:
        start = data.draw(st.integers(0, length))
        return Span(start, data.draw(st.integers(start, length)))

    rows, columns = map(span, source.extent)
    (part,) = source.read([Request("train/0", view, (rows, columns))])
    whole = read_one(source, view=view)
    np.testing.assert_array_equal(part, whole[rows.slice, columns.slice])


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32", "float64", "bool"])
def test_integer_pixels_are_scaled_to_one_and_others_left(dtype: str) -> None:
    image = pixels(1, 1, 3, 3, dtype="uint8").astype(dtype)
    top = np.iinfo(dtype).max if np.issubdtype(image.dtype, np.integer) else 1
    patches = read_one(patches_of(in_memory(image)))
    np.testing.assert_allclose(patches[0, 0], image[0].astype(np.float64) / top, rtol=1e-6)
    assert patches.dtype == np.float32


def test_grayscale_is_that_of_pillow() -> None:
    image = pixels(3, 9, 9)
    source = patches_of(in_memory(image[None]), size=9, stride=1, grayscale=True)
    expected = np.asarray(Image.fromarray(image.transpose(1, 2, 0)).convert("L"))
    assert source.channels == 1
    np.testing.assert_allclose(read_one(source)[0, 0, 0] * 255, expected, atol=0.51)


@pytest.mark.parametrize(
    ("colour", "gray"), [((255, 0, 0), 0.299), ((0, 255, 0), 0.587), ((0, 0, 255), 0.114)]
)
def test_grayscale_weighs_colours_as_television_does(colour: tuple[int, ...], gray: float) -> None:
    image = np.broadcast_to(np.array(colour, np.uint8)[:, None, None], (3, 3, 3))
    assert read_one(patches_of(in_memory(image[None]), grayscale=True)) == pytest.approx(gray)


def test_one_channel_is_gray_already() -> None:
    images = in_memory(pixels(1, 1, 5, 5))
    np.testing.assert_array_equal(
        read_one(patches_of(images, grayscale=True)), read_one(patches_of(images))
    )


def test_channels_are_normalised_after_padding_and_gray() -> None:
    image = pixels(2, 3, 3, dtype="float32")
    source = patches_of(
        in_memory(image[None]), size=5, stride=1, pad=1, mean=(0.5, 0.25), std=(2.0, 0.5)
    )
    expected = (padded(image, 1) - [[[0.5]], [[0.25]]]) / [[[2.0]], [[0.5]]]
    np.testing.assert_allclose(read_one(source)[0, 0], expected, rtol=1e-6)
    gray = patches_of(in_memory(pixels(1, 3, 3, 3)), grayscale=True, mean=(0.5,), std=(0.25,))
    plain = patches_of(in_memory(pixels(1, 3, 3, 3)), grayscale=True)
    np.testing.assert_allclose(read_one(gray), (read_one(plain) - 0.5) / 0.25, rtol=1e-5)


def test_splits_and_labels_are_those_of_the_images() -> None:
    images = in_memory(pixels(3, 1, 4, 4), [4, 5, 6])
    source = patches_of(images)
    assert [item.id for item in source.items()] == [item.id for item in images.items()]
    assert [item.id for item in source.items()[1:]] == ["train/1", "train/2"]
    assert source.split("train") == images.split("train")
    assert source.label_names == ("class",)
    assert source.labels("class").tolist() == [4, 5, 6]


@pytest.mark.parametrize("mode", ["iterative", "simultaneous"])
def test_one_image_smaller_than_the_crop_is_found_before_training(
    tmp_path: Path, mode: str
) -> None:
    draw = np.random.default_rng(0)
    for number in range(40):
        split, side = ("test", 5) if number == 37 else ("train", 12)
        place = tmp_path / "images" / split / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        shape = (side, side, 3)
        Image.fromarray(draw.integers(0, 255, shape).astype(np.uint8)).save(place / f"{number}.png")
    file = tmp_path / "p.toml"
    file.write_text(
        f"""
name = "p"
mode = "{mode}"
[source]
kind = "torchvision:ImageFolder"
root = "{tmp_path}/images"
splits.train.root = "{tmp_path}/images/train"
splits.test.root = "{tmp_path}/images/test"
[augment]
crop = 8
[patches]
size = 4
stride = 2
[module.1]
build = "residual"
"""
    )
    message = one_error(gim_stage("run", file, "--dir", tmp_path / "out"), 2)
    assert "augment.crop" in message
    assert "image of 5×5 pixels (sample test/b/37.png" in message
    assert not list((tmp_path / "out").glob("*.safetensors"))


@pytest.mark.parametrize(
    ("shape", "size", "augment", "key", "reason"),
    [
        ((1, 6, 8), 3, {"crop": 7}, "augment.crop", "is 7, larger than the image of 6×8"),
        ((1, 6, 8), 3, {"crop": 11, "pad": 2}, "augment.crop", "is 11.*10×12"),
        ((1, 6, 8), 7, {}, "patches.size", "is 7, but the image is 6×8"),
        ((1, 6, 8), 5, {"crop": 4}, "patches.size", "is 5, but the image is 4×4"),
        ((3, 6, 8), 3, {"mean": (0.5,), "std": (1.0,)}, "augment.mean", "1 numbers.* 3 channels"),
        (
            (3, 6, 8),
            3,
            {"mean": (0.5,) * 3, "std": (1.0,) * 3, "grayscale": True},
            "augment.mean",
            "3 numbers.* 1 channels",
        ),
        pytest.param(
            (4, 6, 8),
            3,
            {"grayscale": True},
            "augment.grayscale",
            "4 channels",
        ),
    ],
)
def test_settings_that_do_not_fit_the_images_are_refused_at_once(
    shape: tuple[int, ...], size: int, augment: dict[str, Any], key: str, reason: str
) -> None:
    with pytest.raises(ConfigError, match=reason) as caught:
        patches_of(in_memory(pixels(1, *shape)), size=size, **augment)
    assert caught.value.key == key


def test_images_of_different_sizes_need_a_crop() -> None:
    images = uneven(pixels(1, 6, 6), pixels(1, 6, 6), pixels(1, 7, 6))
    with pytest.raises(DataError, match=r"sample train/2 is \(7, 6\).*augment\.crop"):
        patches_of(images)
    assert patches_of(images, crop=6).extent == (2, 2)


def test_an_image_smaller_than_the_crop_is_named_when_it_is_read() -> None:
    source = patches_of(uneven(pixels(1, 6, 6), pixels(1, 6, 4)), crop=5)
    with pytest.raises(DataError, match=r"train/1 is 6×4 pixels, smaller than augment\.crop = 5"):
        read_one(source, "train/1")


def test_an_image_with_other_channels_is_named() -> None:
    images = uneven(pixels(1, 6, 6), pixels(3, 6, 6))
    with pytest.raises(DataError, match="train/1"):
        patches_of(images)
    with pytest.raises(DataError, match="train/1 has 3 channels, expected 1"):
        read_one(patches_of(images, crop=5), "train/1")


@pytest.mark.parametrize(
    ("value", "dtype"),
    [*product([np.nan, np.inf, -np.inf], ["float32", "float64"]), (1e39, "float64")],
)
def test_a_pixel_that_is_not_finite_names_its_sample(value: float, dtype: str) -> None:
    images = pixels(3, 1, 4, 4, dtype=dtype)
    images[1, 0, 2, 2] = value
    source = patches_of(in_memory(images))
    read_one(source, "train/0")
    with pytest.raises(DataError, match="train/1 has values that are NaN, infinite or too"):
        read_one(source, "train/1")


@pytest.mark.parametrize("kind", ["npy", "zarr"])
@pytest.mark.parametrize("how", ["full", "sampled"])
def test_values_that_are_not_finite_are_found_with_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, how: str
) -> None:
    """Before anything is trained, in whatever split."""
    monkeypatch.setattr(parts, "SAMPLED_IMAGES", 3)
    images = pixels(5, 1, 4, 4, dtype="float64")
    images[4, 0, 1, 1] = np.nan
    make_dataset(tmp_path / "data", kind, images, range(5))
    with pytest.raises(DataError, match=rf"images.{kind}: image 4 has values that are NaN"):
        digest_of(tmp_path / "data", kind, how)


# Digests of content


def make_dataset(root: Path, kind: str, images: NDArray[Any], labels: Sequence[int]) -> None:
    root.mkdir(parents=True)
    if kind == "folder":
        for index, (image, label) in enumerate(zip(images, labels, strict=True)):
            save_png(root / f"class{label}" / f"{index}.png", image)
    else:
        save(root / f"images.{kind}", images)
        save(root / f"labels.{kind}", np.array(labels))


def digest_of(root: Path, kind: str, how: str = "full") -> str:
    table = {"images": f"images.{kind}", "labels": f"labels.{kind}"}
    config = image_folder(root) if kind == "folder" else arrays(root, kind, train=table)
    return open_source(config.model_copy(update={"digest": how})).content_digest()


@pytest.mark.parametrize("kind", ["npy", "zarr", "folder"])
def test_content_is_what_is_in_the_data_and_not_where_it_lies(tmp_path: Path, kind: str) -> None:
    images, labels = pixels(3, 4, 4), [0, 1, 1]
    make_dataset(tmp_path / "first", kind, images, labels)
    digest = digest_of(tmp_path / "first", kind)

    shutil.copytree(tmp_path / "first", tmp_path / "deep" / "moved")
    assert digest_of(tmp_path / "deep" / "moved", kind) == digest

    other = images.copy()
    other[2, 3, 3] ^= 1
    make_dataset(tmp_path / "pixel", kind, other, labels)
    make_dataset(tmp_path / "label", kind, images, [0, 0, 1])
    make_dataset(tmp_path / "fewer", kind, images[:2], labels[:2])
    digests = {digest_of(tmp_path / name, kind) for name in ("first", "pixel", "label", "fewer")}
    assert len(digests) == 4


@pytest.mark.parametrize("kind", ["npy", "zarr", "folder"])
def test_a_sampled_digest_covers_what_it_says(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "SAMPLED_IMAGES", 3)  # of 6: the first, the third and the last
    images, labels = pixels(6, 4, 4), [0, 0, 0, 0, 1, 1]

    def changed(image: int) -> Path:
        root = tmp_path / f"changed{image}"
        make_dataset(root, kind, images, labels)
        if kind == "folder":  # a byte of the file, which keeps its size
            file = root / f"class{labels[image]}" / f"{image}.png"
            file.write_bytes(file.read_bytes()[:-1] + b"!")
        else:
            other = images.copy()
            other[image, 0, 0] ^= 1
            save(root / f"images.{kind}", other)
        return root

    make_dataset(tmp_path / "same", kind, images, labels)
    make_dataset(tmp_path / "labels", kind, images, [0, 0, 0, 1, 1, 1])
    make_dataset(tmp_path / "fewer", kind, images[:5], labels[:5])
    for how in ("full", "sampled"):
        same = digest_of(tmp_path / "same", kind, how)
        assert digest_of(tmp_path / "labels", kind, how) != same
        assert digest_of(tmp_path / "fewer", kind, how) != same
        for image in (0, 2, 5):
            assert digest_of(changed(image), kind, how) != same
            shutil.rmtree(tmp_path / f"changed{image}")
        # What lies between is not looked at where only a sample is.
        assert (digest_of(changed(1), kind, how) == same) == (how == "sampled")
        shutil.rmtree(tmp_path / "changed1")
    assert digest_of(tmp_path / "same", kind) != digest_of(tmp_path / "same", kind, "sampled")


@pytest.mark.parametrize("kind", ["npy", "zarr"])
@pytest.mark.parametrize("how", ["full", "sampled"])
def test_axes_in_another_order_are_other_images(tmp_path: Path, kind: str, how: str) -> None:
    make_dataset(tmp_path / "data", kind, pixels(3, 4, 4), [0, 1, 1])
    config = arrays(tmp_path / "data", kind).model_copy(update={"digest": how})
    digests = {
        open_source(
            config.model_copy(update={"options": {"axes": f"sample {axes}"}})
        ).content_digest()
        for axes in ("height width", "width height")
    }
    assert len(digests) == 2


def test_a_file_with_another_name_is_another_image(tmp_path: Path) -> None:
    """Ids are names, and what is drawn for a sample follows from its id."""
    make_dataset(tmp_path / "data", "folder", pixels(2, 4, 4), [0, 1])
    digest = digest_of(tmp_path / "data", "folder")
    (tmp_path / "data" / "class0" / "0.png").rename(tmp_path / "data" / "class0" / "00.png")
    assert digest_of(tmp_path / "data", "folder") != digest


def test_how_an_array_is_chunked_and_packed_is_not_content(tmp_path: Path) -> None:
    images = pixels(4, 4, 4)
    save(tmp_path / "images.zarr", images)
    digest = open_source(arrays(tmp_path, "zarr")).content_digest()
    save(tmp_path / "images.zarr", images, chunks=(1, 2, 4), compressors=None)
    assert open_source(arrays(tmp_path, "zarr")).content_digest() == digest


def test_which_split_a_sample_is_in_is_content() -> None:
    part = ArrayPart(pixels(2, 1, 4, 4), None)
    one = PartsSource({"train": part})
    assert one.content_digest() == PartsSource({"train": part}).content_digest()
    assert one.content_digest() != PartsSource({"unlabeled": part}).content_digest()


def test_the_content_of_patches_has_all_that_decides_them_and_no_more() -> None:
    images = in_memory(pixels(2, 1, 8, 8))

    def digest(source: Source = images, **settings_of_patches: Any) -> str:
        return patches_of(source, **settings_of_patches).content_digest()

    assert digest() == digest()
    assert digest(seed=0) == digest(seed=1)
    variants = [
        digest(),
        digest(size=4),
        digest(stride=3),
        digest(pad=1),
        digest(flip=0.5),
        digest(crop=7),
        digest(crop=7, seed=1),
        digest(mean=(0.5,), std=(1.0,)),
        digest(in_memory(pixels(2, 1, 8, 8, seed=1))),
    ]
    assert len(set(variants)) == len(variants)


@pytest.mark.parametrize("dtype", ["int64", "int32", "uint32", "int8"])
def test_integers_whose_range_is_no_brightness_are_refused(dtype: str) -> None:
    images = np.ones((2, 1, 4, 4), dtype=dtype)
    with pytest.raises(DataError, match=f"train/0 has pixels of type {dtype}.*uint8"):
        read_one(patches_of(in_memory(images)))


@pytest.mark.parametrize(
    "settings",
    [{"root": "x"}, {"download": True}, {"options": {"a": 1}}, {"splits": {"train": {"a": 1}}}],
)
def test_the_digits_take_no_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="no meaning for the digits") as caught:
        open_source(SourceConfig(kind="digits", **settings))
    assert caught.value.key == f"source.{next(iter(settings))}"


def test_looking_at_ids_opens_no_image(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / "x").mkdir(exist_ok=True)
        (tmp_path / "x" / f"{name}.png").write_bytes(b"no picture at all")
    source = open_source(image_folder(tmp_path))
    assert list(source.ids) == ["train/x/a.png", "train/x/b.png"]
