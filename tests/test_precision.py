"""Stored forms: what they lose is bounded, known, and refused where it is too much."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import edit, one_error, weights_of
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import BitRound
from torch import Tensor
from warm import gim_stage

from gim_stagewise.cache import Cache, Precision, PrecisionError, open_cache, read_manifest
from gim_stagewise.errors import (
    CorruptCacheError,
    NonFiniteError,
    PrecisionLossError,
    StaleCacheError,
)
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.sources import Request

ALL = ("float32", "float16", "bfloat16", "float8_e4m3", "uint8", "bitround-7")
# The largest relative error of a value that is not below the smallest normal one.
RELATIVE = {
    "float32": 0.0,
    "float16": 2**-11,
    "bfloat16": 2**-8,
    "float8_e4m3": 2**-4,
    "bitround-7": 2**-8,
}


def calibrated(name: str, values: Tensor) -> Precision:
    extremes = values.transpose(0, 1).flatten(1).aminmax(dim=1)
    return Precision(name).calibrated(*extremes)


def activations(seed: int, *, signed: bool) -> Tensor:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(21, 5, 3, 2, generator=draw) * torch.logspace(-3, 2, 5)[:, None, None]
    return values if signed else values.relu()


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", ALL)
@given(seed=st.integers(0, 2**31))
@settings(max_examples=20)
def test_what_is_read_is_near_what_was_stored(name: str, signed: bool, seed: int) -> None:
    values = activations(seed, signed=signed)
    form = calibrated(name, values)
    stored, _ = form.encode(values)
    assert stored.numpy().dtype == form.stored_dtype
    decoded = form.decode(stored)
    if name == "uint8":
        bound = torch.tensor(form.scale)[:, None, None] * 0.5001
        assert ((decoded - values).abs() <= bound).all()
    else:
        # Below its smallest normal number a float loses digits.
        floor = torch.tensor(form.scale or (1.0,))[:, None, None] * 2**-9
        floor = floor if form.name == "float8_e4m3" else torch.tensor(2.0**-24)
        assert ((decoded - values).abs() <= RELATIVE[name] * values.abs() + floor).all()
    assert (decoded[values == 0] == 0).all()


@pytest.mark.parametrize("bits", [1, 3, 7, 10, 22])
def test_bitround_is_that_of_numcodecs(bits: int) -> None:
    values = activations(0, signed=True)
    stored, _ = Precision(f"bitround-{bits}").encode(values)
    codec = BitRound(keepbits=bits)
    expected = codec.decode(codec.encode(values.numpy().copy())).view("float32")
    np.testing.assert_array_equal(stored.numpy(), expected.reshape(values.shape))


@pytest.mark.parametrize("name", ALL[1:])
def test_the_error_is_the_one_of_a_plain_loop(name: str, tmp_path: Path) -> None:
    values = activations(3, signed=True)
    form = calibrated(name, values[:4])  # so that some values saturate
    stored, found = form.encode(values)
    assert found is not None
    first, second = (form.encode(part)[1] for part in (values[:10], values[10:]))
    assert first is not None
    assert second is not None
    decoded, exact = form.decode(stored).double().numpy(), values.double().numpy()
    beyond = 0
    for channel in range(5):
        error = sum((decoded[:, channel] - exact[:, channel]).ravel() ** 2)
        squares = sum(exact[:, channel].ravel() ** 2)
        for error_sum in (found, first + second):
            assert math.isclose(error_sum.squared_error[channel], error, rel_tol=1e-4)
            assert math.isclose(error_sum.squared_values[channel], squares, rel_tol=1e-5)
        if name == "uint8":
            scale, zero = form.scale[channel], form.zero_point[channel]
            codes = [
                round(float(np.float32(v) / np.float32(scale))) + zero
                for v in values[:, channel].flatten().tolist()
            ]
            beyond += sum(not 0 <= code <= 255 for code in codes)
    if name == "uint8":
        assert found.saturated == (first + second).saturated == beyond > 0
    found.save(tmp_path / "error.npy")
    assert PrecisionError.load(tmp_path / "error.npy").as_json() == found.as_json()
    assert found.as_json()["values"] == values.numel()


def test_what_float16_cannot_hold_is_counted() -> None:
    values = torch.tensor([1.0, 65504.0, 65505.0, -1e30])[:, None, None, None]
    stored, error = Precision("float16").encode(values)
    assert error is not None
    assert error.saturated == 2
    assert stored.isfinite().all()


@pytest.mark.parametrize("name", ALL)
def test_a_precision_says_how_it_is_decoded(name: str) -> None:
    form = calibrated(name, activations(0, signed=True))
    again = Precision.from_json(json.loads(json.dumps(form.as_json())))
    assert again == form


def run(file: Path, folder: Path, **options: Any) -> Pipeline:
    pipeline = Pipeline.from_file(file, folder=folder, device="cpu")
    pipeline.run(**options)
    return pipeline


def with_cache(file: Path, text: str) -> None:
    edit(file, "[cache]\n", f"[cache]\n{text}\n")


def use_net(file: Path, forward: str) -> None:
    """Module 1 is a convolution with these lines for its forward."""
    (file.parent / "nets.py").write_text(
        "from pathlib import Path\n"
        "import torch\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, in_channels):\n"
        "        super().__init__()\n"
        "        self.conv = nn.Conv2d(in_channels, 4, 3)\n"
        f"    def forward(self, x):\n{forward}"
    )
    edit(file, 'build = "residual"\noptions = { stem = 4, channels = 6 }', 'build = "nets:Net"')


@pytest.mark.parametrize("name", ALL)
def test_a_cache_gives_what_its_precision_keeps(tiny: Path, tmp_path: Path, name: str) -> None:
    with_cache(tiny, 'precision = "float32"')
    run(tiny, tmp_path / "plain", until=1)
    edit(tiny, 'precision = "float32"', f'precision = "{name}"')
    run(tiny, tmp_path / "out", until=1)
    exact, cache = Cache(tmp_path / "plain" / "m1.zarr"), open_cache(tmp_path / "out" / "m1.zarr")
    ids = list(cache.ids)
    values = np.stack(exact.read([Request(i) for i in ids]))
    read = np.stack(cache.read([Request(i) for i in ids]))
    assert read.dtype == np.float32
    stored, _ = cache.precision.encode(torch.from_numpy(values).flatten(0, 2))
    expected = cache.precision.decode(stored).reshape(values.shape).numpy()
    np.testing.assert_array_equal(read, expected)
    np.testing.assert_array_equal(exact.read_pooled(ids), cache.read_pooled(ids))
    # As other libraries see it.
    np.testing.assert_array_equal(np.asarray(cache.activations)[0], read)
    np.testing.assert_array_equal(
        cache.activations[0, 3:5, 1, ..., 2:, 0], read[3:5, 1, :, :, 2:, 0]
    )
    np.testing.assert_array_equal(cache.dask()[0].compute(), read)
    batch, _ = cache.dataset("test")[0]
    np.testing.assert_array_equal(batch, read[ids.index(cache.split("test")[0])])
    assert cache.activations.dtype == cache.dask().dtype == batch.numpy().dtype == np.float32
    # What it lost is written down.
    error = read_manifest(cache.path).error
    if name == "float32":
        assert error is None
    else:
        assert error is not None
        relative = np.linalg.norm((read - values).astype(float)) / np.linalg.norm(
            values.astype(float)
        )
        assert math.isclose(error["relative_l2"], relative, rel_tol=1e-4)
        assert error["values"] == values.size


@pytest.mark.parametrize("name", ["float16", "bitround-9"])
def test_plain_zarr_gives_the_values_where_it_can(tiny: Path, tmp_path: Path, name: str) -> None:
    import zarr

    with_cache(tiny, f'precision = "{name}"')
    run(tiny, tmp_path, until=1)
    cache = Cache(tmp_path / "m1.zarr")
    plain: Any = zarr.open_group(str(cache.path), mode="r")["activations"]
    np.testing.assert_array_equal(plain[...].astype(np.float32), cache.activations[...])


def test_what_the_next_module_begins_with_is_done_before_storing(
    tiny: Path, tmp_path: Path
) -> None:
    """Weights trained on either form are the same to the last bit."""
    with_cache(tiny, 'precision = "float32"')
    run(tiny, tmp_path / "op", until=2)
    with_cache(tiny, 'stored_operation = "none"')
    run(tiny, tmp_path / "raw", until=2)
    after, raw = (Cache(tmp_path / name / "m1.zarr") for name in ("op", "raw"))
    assert after.manifest.stored_operation == "relu"
    assert raw.manifest.stored_operation is None
    requests = [Request(item_id) for item_id in raw.ids]
    values = np.stack(raw.read(requests))
    assert (values < 0).any()
    np.testing.assert_array_equal(np.stack(after.read(requests)), np.maximum(values, 0))
    one, other = weights_of(tmp_path / "op"), weights_of(tmp_path / "raw")
    assert all(torch.equal(one[name], other[name]) for name in one)
    # The last module's outputs are nobody's input.
    run(tiny, tmp_path / "raw")
    assert Cache(tmp_path / "raw" / "m3.zarr").manifest.stored_operation is None


def test_a_module_that_begins_with_something_else_refuses_what_was_stored(
    tiny: Path, tmp_path: Path
) -> None:
    run(tiny, tmp_path / "out", until=1)
    # A stem convolution reads negative values too.
    edit(tiny, "channels = 8, stride = 2", "channels = 8, stem = 4")
    stage = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").stage(2)
    with pytest.raises(StaleCacheError, match="after 'relu'"):
        stage.train()
    result = run(tiny, tmp_path / "out", until=2)
    assert Cache(result.workspace.cache_path(1)).manifest.stored_operation is None


def test_a_build_that_was_interrupted_goes_on_with_its_scales(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gim_stagewise.cache import CacheWriter

    with_cache(tiny, 'precision = "uint8"')
    run(tiny, tmp_path / "whole", until=1)
    commit = CacheWriter.commit
    done: list[int] = []

    def interrupted(self: CacheWriter, staged: Any) -> None:
        if len(done) == 2:
            raise KeyboardInterrupt
        commit(self, staged)
        done.append(staged.block.index)

    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "commit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tmp_path / "part", until=1)
    begun = read_manifest(tmp_path / "part" / "m1.zarr")
    assert begun.precision.scale
    run(tiny, tmp_path / "part", until=1)
    for file in (tmp_path / "whole" / "m1.zarr").rglob("*"):
        other = tmp_path / "part" / file.relative_to(tmp_path / "whole")
        assert file.is_dir() or file.read_bytes() == other.read_bytes(), file


def test_a_scale_that_was_altered_is_noticed(tiny: Path, tmp_path: Path) -> None:
    with_cache(tiny, 'precision = "uint8"')
    run(tiny, tmp_path, until=1)
    file = tmp_path / "m1.zarr" / "zarr.json"
    content = json.loads(file.read_text())
    content["attributes"]["gim_stage"]["precision"]["decode"]["scale"][0] *= 2
    file.write_text(json.dumps(content))
    with pytest.raises(CorruptCacheError, match="does not match its checksum"):
        Cache(tmp_path / "m1.zarr")


def test_too_large_an_error_is_refused(tiny: Path, tmp_path: Path) -> None:
    with_cache(tiny, 'precision = "uint8"\nmax_error = 1e-4')
    error = one_error(gim_stage("run", tiny, "--dir", tmp_path, "--device", "cpu"), 2)
    assert "module 1: storing as uint8 changes activations by" in error
    assert "cache.max_error allows 0.0001" in error
    assert not (tmp_path / "m1.zarr").exists()
    edit(tiny, "max_error = 1e-4", "max_error = 0.1")
    run(tiny, tmp_path, until=1)
    found = read_manifest(tmp_path / "m1.zarr").error
    assert found is not None
    edit(tiny, "max_error = 0.1", f"max_error = {found['relative_l2'] / 2}")
    with pytest.raises(PrecisionLossError, match="use a finer cache"):
        run(tiny, tmp_path, until=1)


BRIGHT = """
from torch import nn

class Bright(nn.Module):
    def __init__(self, in_channels):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3, padding=1)

    def forward(self, x):
        return 1e8 * self.conv(x)

    def pool(self, z):
        return z.mean((2, 3)) / 1e8
"""


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_outputs_that_are_not_finite_name_their_samples(
    tiny: Path, tmp_path: Path, name: str, value: str
) -> None:
    use_net(
        tiny,
        "        z = self.conv(x)\n"
        f"        if not Path('{tmp_path}/trained').exists():\n"
        "            return z\n"
        f"        return torch.where(x.amax((1, 2, 3), True) > 0.95, float('{value}'), z)\n",
    )
    with_cache(tiny, f'precision = "{name}"')
    tiny.write_text(tiny.read_text().partition("[module.2]")[0])
    stage = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").stage(1)
    weights, _ = stage.train()
    (tmp_path / "trained").touch()
    with pytest.raises(NonFiniteError, match=r"NaN or infinity for .* samples: train/"):
        stage.extract(weights)
    assert (
        not (tmp_path / "out" / "m1.zarr" / "zarr.json").exists()
        or not read_manifest(tmp_path / "out" / "m1.zarr").sealed
    )


@pytest.mark.parametrize("materialize", ["always", "auto"])
def test_a_module_that_gives_nan_before_it_is_trained_is_refused(
    tiny: Path, tmp_path: Path, materialize: str
) -> None:
    """As one does that divides by the deviation of a blank patch."""
    use_net(
        tiny,
        "        x = x - x.mean((1, 2, 3), True)\n"
        "        return self.conv(x / x.square().mean((1, 2, 3), True).sqrt())\n",
    )
    with_cache(tiny, f'materialize = "{materialize}"')
    images = np.load(tmp_path / "train.npy")
    images[0] = 7
    np.save(tmp_path / "train.npy", images)
    for command in ("plan", "run"):
        done = gim_stage(command, tiny, "--dir", tmp_path / "out", "--device", "cpu")
        assert "module.1: gives NaN or infinity for some of the data" in one_error(done, 2)


def test_values_beyond_the_precision_are_an_error(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "bright.py").write_text(BRIGHT)
    file = tmp_path / "bright.toml"
    lines = tiny.read_text().split("[module.1]")[0]
    file.write_text(lines + '[module.1]\nbuild = "bright:Bright"\n')
    with_cache(file, 'precision = "float16"')
    error = one_error(gim_stage("run", file, "--dir", tmp_path / "out", "--device", "cpu"), 2)
    assert "beyond what float16 can store" in error
    assert '"bfloat16"' in error
    edit(file, '"float16"', '"bfloat16"')
    assert gim_stage("run", file, "--dir", tmp_path / "out", "--device", "cpu").returncode == 0


@pytest.mark.parametrize("name", ["float64", "bitround-0", "bitround-23", "bitround", "UINT8"])
def test_an_unknown_precision_is_refused_with_those_there_are(tiny: Path, name: str) -> None:
    with_cache(tiny, f'precision = "{name}"')
    error = one_error(gim_stage("plan", tiny), 2)
    assert "cache.precision" in error
    assert "float8_e4m3" in error
    assert "1 to 22" in error


def test_inspect_shows_what_was_lost(tiny: Path, tmp_path: Path) -> None:
    with_cache(tiny, 'precision = "uint8"')
    run(tiny, tmp_path, until=1)
    done = gim_stage("inspect", tmp_path / "m1.zarr")
    assert done.returncode == 0
    assert "uint8" in done.stdout
    assert "relative L2 error" in done.stdout
    assert "after relu" in done.stdout


@pytest.mark.parametrize("magnitude", [1e-37, 1e-25, 1e20, 1e37])
@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3", "uint8", "bitround-7"])
def test_the_error_is_known_at_any_magnitude(name: str, magnitude: float) -> None:
    values = activations(1, signed=True) * (magnitude / 300)
    form = calibrated(name, values)
    stored, found = form.encode(values)
    assert found is not None
    difference = form.decode(stored).double() - values.double()
    expected = difference.norm() / values.double().norm()
    assert found.relative == pytest.approx(float(expected), rel=1e-5)
    if magnitude > 1e-30:
        assert 1e-4 < found.relative < 0.1


@pytest.mark.parametrize("name", ["bfloat16", "bitround-7", "float8_e4m3", "uint8"])
def test_what_would_round_to_infinity_is_counted(name: str) -> None:
    values = torch.tensor([1.0, 3.402e38, -3.402e38])[:, None, None, None]
    form = calibrated(name, values)
    stored, error = form.encode(values)
    assert error is not None
    assert error.saturated == 2
    assert form.decode(stored).isfinite().all()


@pytest.mark.parametrize("name", ["uint8", "float8_e4m3"])
def test_a_channel_that_was_zero_in_calibration_is_not_lost(name: str) -> None:
    draw = torch.Generator().manual_seed(0)
    values = torch.rand(21, 5, 3, 2, generator=draw)
    seen = values.clone()
    seen[:, 2] = 0
    form = calibrated(name, seen)
    stored, _ = form.encode(values)
    kept = form.decode(stored)[:, 2]
    assert (kept - values[:, 2]).norm() < 0.1 * values[:, 2].norm()
    dead = Precision(name).calibrated(torch.zeros(3), torch.zeros(3))
    assert all(0 < scale < math.inf for scale in dead.scale)


@given(
    lowest=st.floats(-(2.0**100), 0, width=32, allow_subnormal=False),
    highest=st.floats(0, 2.0**100, width=32, allow_subnormal=False),
)
def test_the_ends_of_what_was_seen_do_not_saturate(lowest: float, highest: float) -> None:
    ends = torch.tensor([lowest, highest])
    form = Precision("uint8").calibrated(ends[:1], ends[1:])
    _, error = form.encode(ends[:, None, None, None])
    assert error is not None
    assert error.saturated == 0
