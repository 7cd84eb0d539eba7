"""Caches of items of any size: an array for each, written and read tile by tile."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gim_stagewise.cache import (
    CacheWriter,
    Digest,
    Manifest,
    Precision,
    TiledCache,
    TiledLayout,
    find_damage,
    read_manifest,
    stage_block,
)
from gim_stagewise.cache.layout import BlockPart
from gim_stagewise.errors import CorruptCacheError, DataError
from gim_stagewise.progress import Silent
from gim_stagewise.sources import Request
from gim_stagewise.windows import Region, Span, full_region

IDS = ("unlabeled/a b/1.tif", "unlabeled/ü.npy")
DENSE = TiledLayout(IDS, ((21, 13), (4, 30)), (8, 12), (3,), 4, 5, "lz4")
PATCHES = TiledLayout(IDS, ((7, 5), (2, 9)), (3, 4), (2, 3, 3), 1, 4, "zstd")
SEQUENCES = TiledLayout(IDS, ((40,), (7,)), (16,), (3,), 1, 3, "none")
LAYOUTS = {"dense": DENSE, "patches": PATCHES, "sequences": SEQUENCES}


class Items:
    """As much of a source as a cache needs."""

    ids = IDS
    label_names = ()

    def split(self, name: str) -> list[str]:
        return list(IDS) if name == "unlabeled" else []

    def labels(self, name: str) -> NDArray[np.int64]:
        raise AssertionError(name)


def values_of(layout: TiledLayout) -> dict[str, NDArray[np.float32]]:
    """What each array of a cache shall hold."""
    draw = np.random.default_rng(0)
    return {
        name: draw.normal(size=array.shape).astype(np.float32)
        for name, array in layout.arrays.items()
    }


def make_manifest(layout: TiledLayout, **changes: Any) -> Manifest:
    manifest = Manifest(
        pipeline="tiny",
        module=1,
        pipeline_text="",
        recipe=Digest.of({"lr": 1}),
        content=Digest.of({"weights": "a", "input": "b"}),
        numerics={},
        precision=Precision("float32"),
        stored_operation=None,
        encoding="patch" if not layout.dense else "dense",
        layout=layout,
    )
    return replace(manifest, **changes)


def write(writer: CacheWriter, count: int | None = None) -> None:
    layout = writer.manifest.layout
    assert isinstance(layout, TiledLayout)
    values = values_of(layout)
    for block in writer.pending[:count]:
        arrays = {}
        for kind, part in layout.parts(block).items():
            arrays[kind] = values[part.array][place_of(layout, part)]
        writer.commit(stage_block(writer.path, writer.staging, writer.manifest, block, arrays))


def place_of(layout: TiledLayout, part: BlockPart) -> tuple[slice, ...]:
    """Where in its array the only chunk file of a part has the block's values."""
    (file,), (inside,) = part.files, part.inside
    array = layout.arrays[part.array]
    numbers = map(int, file.rpartition("c.")[2].split("."))
    starts = [number * size for number, size in zip(numbers, array.chunks, strict=True)]
    counts = np.empty(array.chunks)[inside].shape
    return tuple(slice(start, start + count) for start, count in zip(starts, counts, strict=True))


def build(path: Path, layout: TiledLayout) -> TiledCache:
    writer = CacheWriter(path, make_manifest(layout), Items())  # type: ignore[arg-type]
    write(writer)
    writer.seal()
    return TiledCache(path)


def part_of(layout: TiledLayout, values: NDArray[Any], region: Region) -> NDArray[Any]:
    lead = (slice(None),) if layout.dense else ()
    return values[(*lead, *(span.slice for span in region))]


def test_it_says_what_it_is_in_a_line(tmp_path: Path) -> None:
    said = {
        "dense": "channel=3 height width",
        "patches": "grid_row grid_col channel=2 height width",
        "sequences": "channel=3 time",
    }
    for kind, axes in said.items():
        path = tmp_path / kind
        expected = f"TiledCache({str(path)!r}, module 1, 2 items of {axes}, float32, sealed)"
        assert repr(build(path, LAYOUTS[kind])) == expected


@pytest.mark.parametrize("kind", LAYOUTS)
def test_any_region_is_what_was_written(kind: str, tmp_path: Path) -> None:
    layout = LAYOUTS[kind]
    cache, values = build(tmp_path / "m1.zarr", layout), values_of(layout)
    assert [item.extent for item in cache.items()] == list(layout.extents)
    assert cache.axes == layout.axes
    draw = np.random.default_rng(0)
    for number, extent in enumerate(layout.extents):
        whole = values[layout.array_name("activations", number)]
        item_id = IDS[number]
        (found,) = cache.read([Request(item_id)])
        np.testing.assert_array_equal(found, whole)
        for _ in range(20):
            ends = [np.sort(draw.integers(0, length + 1, 2)) for length in extent]
            region = tuple(Span(int(start), int(stop)) for start, stop in ends)
            (found,) = cache.read([Request(item_id, region=region)])
            np.testing.assert_array_equal(found, part_of(layout, whole, region))
        pooled = values[layout.array_name("pooled", number)]
        np.testing.assert_array_equal(cache.read_pooled(item_id), pooled)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_plain_zarr_reads_each_items_array(kind: str, tmp_path: Path) -> None:
    layout = LAYOUTS[kind]
    cache, values = build(tmp_path / "m1.zarr", layout), values_of(layout)
    group: Any = zarr.open_group(str(cache.path), mode="r")
    for name, expected in values.items():
        array = group[name]
        np.testing.assert_array_equal(array[...], expected)
        assert array.metadata.dimension_names == layout.arrays[name].axes
    assert set(group["activations"]) == {"unlabeled%2Fa%20b%2F1.tif", "unlabeled%2F%C3%BC.npy"}


@settings(deadline=None, max_examples=80)
@given(
    st.lists(st.tuples(st.integers(1, 20), st.integers(1, 20)), min_size=1, max_size=3),
    st.tuples(st.integers(1, 5), st.integers(1, 5)),
    st.integers(1, 3),
)
def test_blocks_have_every_place_of_every_array_once(
    extents: list[tuple[int, int]], tile: tuple[int, int], pool: int
) -> None:
    ids = tuple(map(str, range(len(extents))))
    layout = TiledLayout(
        ids, tuple(extents), (tile[0] * pool, tile[1] * pool), (2,), pool, 3, "none"
    )
    seen = {name: np.zeros(array.shape, int) for name, array in layout.arrays.items()}
    files: list[str] = []
    blocks = layout.blocks(Items())
    assert len(blocks) == layout.block_count
    for number, block in enumerate(blocks):
        assert block.index == number == layout.index(block.samples.start, block.tile)
        for part in layout.parts(block).values():
            seen[part.array][place_of(layout, part)] += 1
            files += part.files
    assert all((count == 1).all() for count in seen.values())
    assert len(files) == len(set(files))


@pytest.mark.parametrize("change", [lambda own: own[:, :-1], lambda own: own.astype(np.float64)])
def test_a_block_of_another_form_is_refused(
    change: Callable[[NDArray[Any]], NDArray[Any]], tmp_path: Path
) -> None:
    layout = LAYOUTS["sequences"]
    writer = CacheWriter(tmp_path / "m1.zarr", make_manifest(layout), Items())  # type: ignore[arg-type]
    block, values = writer.pending[0], values_of(layout)
    arrays = {
        kind: values[part.array][place_of(layout, part)]
        for kind, part in layout.parts(block).items()
    }
    arrays["activations"] = change(arrays["activations"])
    with pytest.raises(ValueError, match="takes float32"):
        stage_block(writer.path, writer.staging, writer.manifest, block, arrays)
    assert not list(writer.staging.glob("block-*"))


def test_a_build_goes_on_where_it_stopped(tmp_path: Path) -> None:
    path = tmp_path / "m1.zarr"
    write(CacheWriter(path, make_manifest(DENSE), Items()), 3)  # type: ignore[arg-type]
    writer = CacheWriter(path, make_manifest(DENSE), Items())  # type: ignore[arg-type]
    assert len(writer.pending) == len(writer.blocks) - 3
    write(writer)
    writer.seal()
    whole = build(tmp_path / "whole.zarr", DENSE).path
    files = sorted(f.relative_to(whole) for f in whole.rglob("*") if f.is_file())
    assert sorted(f.relative_to(path) for f in path.rglob("*") if f.is_file()) == files
    assert all((path / file).read_bytes() == (whole / file).read_bytes() for file in files)


def read_all(path: Path) -> None:
    cache = TiledCache(path)
    for item_id in cache.ids:
        cache.read([Request(item_id)])
        cache.read_pooled(item_id)


@pytest.mark.parametrize("kind", LAYOUTS)
def test_no_flipped_bit_goes_unnoticed(kind: str, tmp_path: Path) -> None:
    cache = build(tmp_path / "m1.zarr", LAYOUTS[kind])
    assert find_damage(cache.path, Silent()) == []
    draw = np.random.default_rng(0)
    for file in sorted(f for f in cache.path.rglob("*") if f.is_file()):
        content = file.read_bytes()
        bit = int(draw.integers(8 * len(content)))
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        file.write_bytes(flipped)
        try:
            damage = [one.file for one in find_damage(cache.path, Silent())]
            assert damage == [file.relative_to(cache.path).as_posix()]
        except CorruptCacheError:
            assert file.name == "zarr.json"
        if file.name.startswith("c.") and "checksums" not in file.parts:
            with pytest.raises(CorruptCacheError):
                read_all(cache.path)
        file.write_bytes(content)


def test_a_missing_tile_is_named(tmp_path: Path) -> None:
    cache = build(tmp_path / "m1.zarr", DENSE)
    (cache.path / DENSE.array_name("activations", 0) / "c.0.1.1").unlink()
    (found,) = cache.read([Request(IDS[0], region=(Span(0, 8), Span(0, 13)))])
    assert found.shape == (3, 8, 13)
    with pytest.raises(CorruptCacheError, match=r"1\.tif/c\.0\.1\.1 is missing.*verify"):
        cache.read([Request(IDS[0])])


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    cache = build(tmp_path / "m1.zarr", DENSE)
    with pytest.raises(DataError, match="no sample 'x'"):
        cache.read([Request("x")])
    with pytest.raises(DataError, match="no view 1"):
        cache.read([Request(IDS[0], 1)])
    with pytest.raises(DataError, match="has extent"):
        cache.read([Request(IDS[0], region=full_region((22, 13)))])


@pytest.mark.parametrize(
    "change",
    [
        {"tile": (8,)},
        {"tile": (8, 0)},
        {"tile": (8, 13)},
        {"extents": ((21, 13),)},
        {"extents": ((21, 13), (4, 2.5))},
        {"ids": (1, 2)},
        {"ids": ("a", "a")},
        {"ids": ("a", "..")},
        {"cell": (3, 3)},
        {"pool": -1},
        {"tile": (40_000, 40_000)},
    ],
)
def test_layouts_that_cannot_be_are_refused(change: dict[str, Any], tmp_path: Path) -> None:
    from gim_stagewise.cache import write_manifest

    tmp_path.joinpath("m1.zarr").mkdir()
    layout = replace(DENSE, **change)
    write_manifest(tmp_path / "m1.zarr", make_manifest(layout, sealed=True))
    with pytest.raises(CorruptCacheError, match="damaged"):
        read_manifest(tmp_path / "m1.zarr")
