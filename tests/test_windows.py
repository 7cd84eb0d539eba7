"""Integer geometry against enumerations that are slow and obvious."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gim_stagewise.windows import (
    Geometry,
    PatchGrid,
    Region,
    Span,
    Window,
    centre,
    common,
    even_ranges,
    full_region,
    halo_overhead,
    placed,
    tiles,
    tiles_over,
    within,
)

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
@given(st.integers(0, 200), st.integers(1, 250))
def test_even_ranges_tile_without_gap_or_overlap(count: int, size: int) -> None:
    spans = even_ranges(count, size)
    assert [n for span in spans for n in range(span.start, span.stop)] == list(range(count))
    assert all(len(span) == size for span in spans[:-1])
    assert all(1 <= len(span) <= size for span in spans)


def test_the_papers_grid_is_seven_by_seven() -> None:
    assert PatchGrid(size=16, stride=8).extent(64, 64) == (7, 7)


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


Chain = list[tuple[int, int, int]]


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Up to four layers: kernel, stride, padding."""
    layers = []
    for _ in range(draw(st.integers(1, 4))):
        kernel = draw(st.integers(1, 5))
        layers.append((kernel, draw(st.integers(1, 3)), draw(st.integers(0, kernel - 1))))
    return layers


def run_chain(values: Sequence[Any], layers: Chain) -> list[Any]:
    """What layers make of values: each output is the tuple of what it sees, None for padding."""
    for kernel, stride, padding in layers:
        padded = [None] * padding + list(values) + [None] * padding
        if not values or len(padded) < kernel:
            return []
        starts = range(0, len(padded) - kernel + 1, stride)
        values = [tuple(padded[start : start + kernel]) for start in starts]
    return list(values)


def seen(value: Any) -> set[int]:
    """The inputs in an output of `run_chain`."""
    if value is None:
        return set()
    return {value} if isinstance(value, int) else set().union(*map(seen, value))


@quick
@given(chains(), st.integers(1, 40))
def test_a_chain_is_as_one_layer(layers: Chain, length: int) -> None:
    geometry = Geometry.of_chain(layers)
    outputs = run_chain(range(length), layers)
    assume(outputs)
    assert geometry.count(length) == len(outputs)
    for number, output in enumerate(outputs):
        receptive = geometry.receptive(Span(number, number + 1), length)
        found = seen(output)
        if found:
            assert receptive.start <= min(found)
            assert max(found) < receptive.stop
    # The bound is tight where no stride leaves inputs out.
    if all(stride <= kernel for kernel, stride, _ in layers):
        inner = [output for output in outputs if "None" not in repr(output)]
        for output in inner:
            assert max(seen(output)) - min(seen(output)) + 1 == geometry.kernel


@quick
@given(chains(), st.integers(1, 60), st.data())
def test_a_window_gives_what_the_whole_gives(layers: Chain, length: int, data: Any) -> None:
    geometry = Geometry.of_chain(layers)
    whole = run_chain(range(length), layers)
    assume(whole)
    start = data.draw(st.integers(0, len(whole) - 1))
    outputs = Span(start, data.draw(st.integers(start + 1, len(whole))))
    inputs, trim = geometry.window(outputs, length)
    assert inputs.start % geometry.stride == 0
    computed = run_chain(range(inputs.start, inputs.stop), layers)
    assert computed[trim : trim + len(outputs)] == whole[outputs.slice]


def test_a_smaller_halo_or_another_trim_gives_something_else() -> None:
    layers = [(3, 1, 1), (3, 2, 1), (3, 1, 1)]
    geometry, length = Geometry.of_chain(layers), 60
    whole, outputs = run_chain(range(length), layers), Span(12, 16)
    inputs, trim = geometry.window(outputs, length)

    def given(start: int, stop: int, trim: int) -> list[Any]:
        return run_chain(range(start, stop), layers)[trim : trim + len(outputs)]

    assert given(inputs.start, inputs.stop, trim) == whole[outputs.slice]
    assert given(inputs.start + geometry.stride, inputs.stop, trim - 1) != whole[outputs.slice]
    assert given(inputs.start, inputs.stop - 1, trim) != whole[outputs.slice]
    assert given(inputs.start, inputs.stop, trim + 1) != whole[outputs.slice]


@quick
@given(
    st.tuples(st.integers(1, 30), st.integers(1, 30)),
    st.tuples(st.integers(1, 12), st.integers(1, 12)),
    st.data(),
)
def test_tiles_have_every_place_once(
    extent: tuple[int, int], tile: tuple[int, int], data: Any
) -> None:
    def places(region: Region) -> list[tuple[int, ...]]:
        return list(itertools.product(*(range(span.start, span.stop) for span in region)))

    covered = [place for region in tiles(extent, tile) for place in places(region)]
    assert sorted(covered) == places(full_region(extent))
    region = tuple(
        Span(start, data.draw(st.integers(start, length)))
        for length in extent
        for start in [data.draw(st.integers(0, length))]
    )
    found = list(tiles_over(region, extent, tile))
    parts = [common(region, own) for _, own in found]
    assert sorted(place for part in parts for place in places(part)) == places(region)
    numbered = tiles(extent, tile)
    columns = -(-extent[1] // tile[1])
    for (row, column), own in found:
        assert numbered[row * columns + column] == own
        assert within(own, own) == tuple(slice(0, len(span)) for span in own)


def test_the_overhead_of_a_halo() -> None:
    three = Geometry.of_chain([(3, 1, 1)] * 4)  # four 3×3 convolutions: a halo of 4 on each side
    assert halo_overhead([three], (8,)) == 2.0
    assert halo_overhead([three, three], (8, 8)) == 4.0
    assert halo_overhead([Geometry(4, 4)], (5,)) == 1.0
    # Inputs 2o - 1 to 2o + 1 for four o: 9 of them, from an even one on 10, of which 8 are kept.
    assert halo_overhead([Geometry(3, 2, 1, 1)], (4,)) == 10 / 8


@pytest.mark.parametrize(("kernel", "stride", "before"), [(0, 1, 0), (1, 0, 0), (3, 1, 3)])
def test_a_layer_that_cannot_be_is_refused(kernel: int, stride: int, before: int) -> None:
    with pytest.raises(ValueError, match="at least"):
        Geometry(kernel, stride, before, 0)


def test_too_few_inputs_have_no_outputs() -> None:
    assert Geometry(5, 2, 1, 1).count(2) == 0
    assert Geometry(5, 2, 1, 1).count(3) == 1
    with pytest.raises(ValueError, match="no outputs"):
        Geometry(5, 2).receptive(Span(0, 2), 6)


# The same with real convolutions, assembled from tiles.


@st.composite
def problems(draw: st.DrawFn) -> tuple[Chain, tuple[int, ...], tuple[int, ...]]:
    """Layers, the extent of an array of one or two axes, and the extent of a tile."""
    layers = draw(chains())
    axes = draw(st.integers(1, 2))
    extent = tuple(draw(st.integers(8, 40)) for _ in range(axes))
    return layers, extent, tuple(draw(st.integers(1, 9)) for _ in range(axes))


def build(layers: Chain, axes: int, dtype: torch.dtype) -> nn.Sequential:
    kind = (nn.Conv1d, nn.Conv2d)[axes - 1]
    parts: list[nn.Module] = []
    for number, (kernel, stride, padding) in enumerate(layers):
        parts += [kind(1 if number == 0 else 2, 2, kernel, stride, padding), nn.ReLU()]
    return nn.Sequential(*parts[:-1]).to(dtype)  # a last ReLU may let nothing through


def assembled(module: nn.Module, x: Tensor, layers: Chain, tile: tuple[int, ...]) -> Tensor:
    """Outputs computed tile by tile; NaN where no tile came."""
    extent = tuple(x.shape[1:])
    geometry = [Geometry.of_chain(layers)] * len(extent)
    out = tuple(own.count(length) for own, length in zip(geometry, extent, strict=True))
    whole = torch.full((2, *out), float("nan"), dtype=x.dtype)
    for region in tiles(out, tile):
        window = Window.over(region, geometry, extent)
        read = x[(slice(None), *(span.slice for span in window.inputs))]
        computed = module(read[None])[0]
        kept = computed[(slice(None), *(span.slice for span in window.kept))]
        whole[(slice(None), *(span.slice for span in region))] = kept
    return whole


@quick
@given(problems(), st.integers(0, 1000))
@torch.no_grad()
def test_seams_on_small_integers_are_exact(
    problem: tuple[Chain, tuple[int, ...], tuple[int, ...]], seed: int
) -> None:
    layers, extent, tile = problem
    assume(all(Geometry.of_chain(layers[:n]).count(e) for e in extent for n in (1, 2, 3, 4)))
    draw = torch.Generator().manual_seed(seed)
    module = build(layers, len(extent), torch.float64)
    for parameter in module.parameters():
        parameter.copy_(torch.randint(-2, 3, parameter.shape, generator=draw))
    x = torch.randint(-3, 4, (1, *extent), generator=draw).double()
    assert torch.equal(assembled(module, x, layers, tile), module(x[None])[0])


@quick
@given(problems(), st.sampled_from([(torch.float64, 1e-12), (torch.float32, 1e-5)]))
@torch.no_grad()
def test_seams_on_real_numbers(
    problem: tuple[Chain, tuple[int, ...], tuple[int, ...]], kind: tuple[torch.dtype, float]
) -> None:
    layers, extent, tile = problem
    assume(all(Geometry.of_chain(layers[:n]).count(e) for e in extent for n in (1, 2, 3, 4)))
    dtype, tolerance = kind
    torch.manual_seed(0)
    module = build(layers, len(extent), dtype)
    x = torch.randn(1, *extent, dtype=dtype)
    expected = module(x[None])[0]
    found = assembled(module, x, layers, tile)
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
