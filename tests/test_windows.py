"""Integer geometry against enumerations that are slow and obvious."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gim_stagewise.windows import PatchGrid, Span, centre, even_ranges, full_region, placed

quick = settings(deadline=None, max_examples=150)
sizes = st.integers(1, 9)
lengths = st.integers(0, 60)


def starts(length: int, size: int, stride: int) -> list[int]:
    """Every pixel at which a whole patch of the grid begins."""
    return [pixel for pixel in range(length) if pixel % stride == 0 and pixel + size <= length]


@quick
@given(lengths, lengths, sizes, sizes)
def test_grid_has_every_whole_patch_and_no_other(
    height: int, width: int, size: int, stride: int
) -> None:
    grid = PatchGrid(size, stride)
    rows, columns = starts(height, size, stride), starts(width, size, stride)
    assert grid.extent(height, width) == (len(rows), len(columns))
    for index, start in enumerate(rows):
        assert grid.pixels(Span(index, index + 1)) == Span(start, start + size)


@quick
@given(sizes, sizes, st.integers(0, 20), st.integers(1, 8))
def test_pixels_of_a_run_are_those_of_its_patches(
    size: int, stride: int, first: int, count: int
) -> None:
    grid = PatchGrid(size, stride)
    run = grid.pixels(Span(first, first + count))
    union = {
        pixel
        for patch in range(first, first + count)
        for pixel in range(patch * stride, patch * stride + size)
    }
    assert (run.start, run.stop) == (min(union), max(union) + 1)
    if stride <= size:
        assert set(range(run.start, run.stop)) == union


@quick
@given(sizes, sizes)
def test_overlapping_steps_counts_the_following_patches_that_share_pixels(
    size: int, stride: int
) -> None:
    first = set(range(size))
    sharing = [n for n in range(1, 20) if first & set(range(n * stride, n * stride + size))]
    assert PatchGrid(size, stride).overlapping_steps == len(sharing)


@quick
@given(st.integers(0, 200), st.integers(1, 250))
def test_even_ranges_tile_without_gap_or_overlap(count: int, size: int) -> None:
    spans = even_ranges(count, size)
    assert [n for span in spans for n in range(span.start, span.stop)] == list(range(count))
    assert all(len(span) == size for span in spans[:-1])
    assert all(1 <= len(span) <= size for span in spans)


def test_the_papers_grid_is_seven_by_seven_with_one_overlapping_row() -> None:
    grid = PatchGrid(size=16, stride=8)
    assert grid.extent(64, 64) == (7, 7)
    assert grid.overlapping_steps == 1


def test_a_full_region_covers_the_extent() -> None:
    assert full_region((3, 5)) == (Span(0, 3), Span(0, 5))


def test_a_span_slices_what_it_says() -> None:
    assert list(range(10))[Span(2, 5).slice] == [2, 3, 4]


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (-3, -1)])
def test_a_span_cannot_run_backwards_or_start_below_zero(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="0 <= start <= stop"):
        Span(start, stop)


@pytest.mark.parametrize(("size", "stride"), [(0, 1), (1, 0), (-1, 1)])
def test_a_grid_needs_a_size_and_a_stride(size: int, stride: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        PatchGrid(size, stride)


def test_an_empty_run_of_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="empty run"):
        PatchGrid(4, 2).pixels(Span(3, 3))


def test_ranges_of_no_size_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        even_ranges(3, 0)


@settings(max_examples=100)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6), data=st.data())
def test_places_are_all_regions_of_a_size_each_once(
    rows: int, columns: int, data: st.DataObject
) -> None:
    size = (data.draw(st.integers(1, rows)), data.draw(st.integers(1, columns)))
    expected = {
        (Span(top, top + size[0]), Span(left, left + size[1]))
        for top in range(rows - size[0] + 1)
        for left in range(columns - size[1] + 1)
    }
    found = [placed((rows, columns), size, number) for number in range(len(expected))]
    assert len(set(found)) == len(found)
    assert set(found) == expected
    assert placed((rows, columns), size, len(expected)) == found[0]
    middle = centre((rows, columns), size)
    assert middle in expected
    for span, length in zip(middle, (rows, columns), strict=True):
        assert 0 <= (length - span.stop) - span.start <= 1
