"""Recordings of any length: chunks with a halo, and a state that is carried from chunk to chunk."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import assert_same_files, edit, one_error, run_and_record
from killing import run_warm
from numpy.typing import NDArray
from torch import nn
from warm import gim_stage

from gim_stagewise.cache import BuildFolder, TiledCache, TiledLayout, find_damage
from gim_stagewise.errors import CorruptCacheError, DataNotFoundError, ModuleRefusedError
from gim_stagewise.models import CellMean, embed, state_size
from gim_stagewise.models.sequence import conv1d_module, gru_module
from gim_stagewise.objectives import InfoNCE
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.plan import plan_pipeline
from gim_stagewise.progress import Silent
from gim_stagewise.sources import Request
from gim_stagewise.stage.encoder import load_encoder
from gim_stagewise.stage.extraction_plan import Workers
from gim_stagewise.verify import mend
from gim_stagewise.windows import Span

AUDIO = """
name = "audio"
seed = 2
encoding = "dense"

[source]
kind = "audio"
root = "{root}"
splits.unlabeled = {{ files = "*.*" }}

[windows]
tile = 60
samples = 16
zones = 3
lanes = 3

[objective]
prediction_steps = 3
skip = 0
negatives = 4

[train]
batch = 4
max_epochs = 2
validation = 0.25
checkpoint_every = 1

[cache]
precision = "float32"

[module.1]
build = "conv1d"
options = {{ channels = 6, kernel = 10, stride = 5, padding = 2 }}
train.window = 200
cache.pool = 4

[module.2]
build = "conv1d"
options = {{ channels = 5, kernel = 4, stride = 2, padding = 2 }}
train.window = 60
cache.pool = 2

[module.3]
build = "gru"
options = {{ channels = 7 }}
train.window = 40
"""
# More than lanes, of very different lengths, one of them shorter than a tile of the top module.
STEPS = {"a.wav": 5003, "b.flac": 2999, "c.wav": 4200, "d.flac": 1201, "e.wav": 560}


def sound(steps: int, seed: int) -> NDArray[np.float64]:
    draw = np.random.default_rng(seed)
    times = np.arange(steps)
    return 0.4 * np.sin(times / (3 + seed)) * np.sin(times / 90) + draw.normal(0, 0.05, steps)


def write_audio(folder: Path) -> Path:
    """A pipeline file over a few recordings, and these beside it."""
    data = folder / "recordings"
    data.mkdir(parents=True)
    for seed, (name, steps) in enumerate(STEPS.items()):
        soundfile.write(data / name, sound(steps, seed), 16000)
    file = folder / "audio.toml"
    file.write_text(AUDIO.format(root=data))
    return file


@pytest.fixture
def audio(tmp_path: Path) -> Path:
    return write_audio(tmp_path)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a finished run; its folder is ``out`` beside it."""
    file = write_audio(tmp_path_factory.mktemp("audio"))
    run_and_record(file, file.parent / "out")
    return file


def test_chunks_together_are_the_outputs_of_the_whole_recording(done: Path) -> None:
    """The convolutions' with their halos, and the context network's with its state."""
    encoder = load_encoder(done.parent / "out")
    source = Pipeline.from_file(done).source
    for name in STEPS:
        item = f"unlabeled/{name}"
        z = torch.from_numpy(source.read([Request(item)])[0])[None]
        for index, module in enumerate(encoder, start=1):
            with torch.no_grad():
                z = module(z)
            cache = TiledCache(done.parent / "out" / f"m{index}.zarr")
            (stored,) = cache.read([Request(item)])
            tolerance = 1e-6 if index == 3 else 1e-5 * float(z.abs().max())
            np.testing.assert_allclose(stored, z[0].numpy(), atol=tolerance)
            pool = (4, 2, 1)[index - 1]
            means = [z[0, :, at : at + pool].mean(1).numpy() for at in range(0, z.shape[2], pool)]
            np.testing.assert_allclose(cache.read_pooled(item), means, atol=1e-5)
            if name == "a.wav":
                assert cache.layout.region(cache.layout.blocks(cache)[-1])
                assert z.shape[2] > 5 * cache.layout.tile[0]


def test_the_state_after_each_chunk_is_kept(done: Path) -> None:
    cache = TiledCache(done.parent / "out" / "m3.zarr")
    layout = cache.layout
    assert layout.state == 7
    (z,) = cache.read([Request("unlabeled/a.wav")])
    (array,) = [layout.arrays[name] for name in layout.arrays if name == "states/unlabeled%2Fa.wav"]
    assert array.shape == (-(-z.shape[1] // 60), 7)
    # A GRU's output is its state: after a whole chunk it is the last one.
    for block in layout.blocks(cache)[: array.shape[0] - 1]:
        (span,) = layout.region(block)
        (file,) = layout.parts(block)["states"].files
        state = cache._read_file("states", block.index, 0, file)[0]
        np.testing.assert_array_equal(state, z[:, span.stop - 1])


@pytest.mark.parametrize(
    "share", [*(pytest.param(share, marks=pytest.mark.slow) for share in (0.72, 0.9)), 0.97]
)
def test_a_killed_run_goes_on_to_the_same_bytes(done: Path, tmp_path: Path, share: float) -> None:
    log = done.parent / "log"
    if not log.exists():
        assert run_warm(done, done.parent / "logged", log=str(log)) == 0
    points = len(log.read_text().splitlines())
    assert run_warm(done, tmp_path / "out", kill_at=int(share * points)) == -9
    assert run_warm(done, tmp_path / "out") == 0
    assert_same_files(tmp_path / "out", done.parent / "out")


@pytest.mark.parametrize("kind", ["activations", "states", "both"])
def test_repair_starts_from_the_state_before(done: Path, tmp_path: Path, kind: str) -> None:
    folder = tmp_path / "out"
    run_and_record(done, folder)
    for name in ("activations", "states") if kind == "both" else (kind,):
        # Two in a row: the second starts from what the first is mended to.
        for tile in (3, 4):
            (chunk,) = folder.glob(
                f"m3.zarr/{name}/*a.wav/c.{'0.' * (name == 'activations')}{tile}*"
            )
            chunk.unlink()
    damage = find_damage(folder / "m3.zarr", Silent())
    assert len(damage) == (4 if kind == "both" else 2)
    mend(Pipeline.from_file(done, folder=folder), folder / "m3.zarr", damage)
    assert_same_files(folder, done.parent / "out")


@pytest.mark.parametrize(
    ("index", "old", "new", "said"),
    [
        (3, "lanes = 3", "lanes = 2", "geometry.lanes 3 → 2"),
        (2, "cache.pool = 2", "cache.pool = 4", "geometry.pool 2 → 4"),
    ],
)
def test_lanes_and_means_are_part_of_what_a_cache_is(
    done: Path, tmp_path: Path, index: int, old: str, new: str, said: str
) -> None:
    file = tmp_path / "other.toml"
    file.write_text(done.read_text())
    edit(file, old, new)
    stage = Pipeline.from_file(file, folder=done.parent / "out").stage(index)
    weights, why = stage.current_weights()
    assert not why
    assert weights is not None
    assert said in stage.outputs.current(stage.outputs.manifest(weights)).reason


def test_workers_leave_the_state_to_this_process(done: Path, tmp_path: Path) -> None:
    found = gim_stage("run", done, "--dir", tmp_path / "out", "--workers", "1")
    assert found.returncode == 0, found.stderr
    assert "module 3: computed in this process" in found.stderr
    assert_same_files(tmp_path / "out", done.parent / "out")


def test_tiles_before_one_that_fails_are_kept(done: Path, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    shutil.copytree(done.parent / "out", folder)
    shutil.rmtree(folder / "m3.zarr")
    stage = Pipeline.from_file(done, folder=folder, device="cpu").stage(3)
    weights, _ = stage.current_weights()
    assert weights is not None
    cache = TiledCache(folder / "m2.zarr")
    (chunk,) = folder.glob("m2.zarr/activations/*c.wav/c.0.5")
    content = bytearray(chunk.read_bytes())
    content[-1] ^= 1
    chunk.write_bytes(content)
    with pytest.raises(CorruptCacheError, match=r"c\.wav"):
        stage.extract(weights, workers=Workers(0))
    # Lanes go on together: what lies before that chunk in the first three recordings.
    start = 5 * cache.layout.tile[0]
    before = [min(extent[0], start) for extent in cache.layout.extents[:3]]
    manifest = stage.outputs.manifest(weights)
    assert isinstance(manifest.layout, TiledLayout)
    (tile,) = manifest.layout.tile
    tiles = sum(-(-length // tile) for length in before)
    kept, _ = BuildFolder(folder / "m3.zarr").done_blocks(manifest.content)
    assert kept == tiles > 10


# Recordings


def test_parts_of_recordings_are_read_as_slices(audio: Path) -> None:
    source = Pipeline.from_file(audio).source
    assert source.axes == ("channel", "time")
    for name, steps in STEPS.items():
        whole, _ = soundfile.read(audio.parent / "recordings" / name, dtype="float32")
        for span in (Span(0, 10), Span(steps // 2, steps // 2 + 77), Span(steps - 3, steps)):
            (part,) = source.read([Request(f"unlabeled/{name}", region=(span,))])
            np.testing.assert_array_equal(part[0], whole[span.slice])


def cut_off(path: Path) -> None:
    soundfile.write(path, sound(20_000, 0), 16000)
    path.write_bytes(path.read_bytes()[:7000])


def stereo(path: Path) -> None:
    soundfile.write(path, np.stack([sound(3000, 0)] * 2, axis=1), 16000)


def no_sound(path: Path) -> None:
    path.write_text("no sound")


def no_number(path: Path) -> None:
    values = sound(3000, 1)
    values[1234] = np.nan
    soundfile.write(path, values, 16000, subtype="FLOAT")


def endless(path: Path) -> None:
    """As encoders write that send FLAC down a pipe: the header has no number of samples."""
    soundfile.write(path, sound(3000, 1), 16000)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = bytes(4)
    path.write_bytes(content)


BROKEN: dict[str, Callable[[Path], None]] = {
    "cut.flac": cut_off,
    "cut.wav": cut_off,
    "endless.flac": endless,
    "lossy.ogg": lambda path: soundfile.write(path, sound(20_000, 0), 16000),
    "empty.wav": lambda path: soundfile.write(path, np.zeros(0), 16000),
    "text.wav": no_sound,
    "slow.wav": lambda path: soundfile.write(path, sound(3000, 1), 8000),
    "stereo.wav": stereo,
    "nan.wav": no_number,
    "short.wav": lambda path: soundfile.write(path, sound(150, 1), 16000),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_recording_that_cannot_be_used_is_named(audio: Path, tmp_path: Path, name: str) -> None:
    BROKEN[name](tmp_path / "recordings" / f"x{name}")
    found = gim_stage("run", audio, "--dir", tmp_path / "out")
    assert f"x{name}" in one_error(found, 2)
    edit(audio, 'kind = "audio"', 'kind = "audio"\non_error = "skip"')
    assert list(Pipeline.from_file(audio).skipped) == [f"unlabeled/x{name}"]


def test_a_recording_whose_header_does_not_know_its_length_is_read(audio: Path) -> None:
    """As programs write that send WAV down a pipe."""
    path = audio.parent / "recordings" / "a.wav"
    content = bytearray(path.read_bytes())
    content[4:8] = content[40:44] = b"\xff" * 4
    path.write_bytes(content)
    items = {item.id: item.extent for item in Pipeline.from_file(audio).source.items()}
    assert items["unlabeled/a.wav"] == (STEPS["a.wav"],)


def test_a_wrong_size_of_the_whole_file_does_not_matter(audio: Path) -> None:
    path = audio.parent / "recordings" / "a.wav"
    content = bytearray(path.read_bytes())
    content[4:8] = (len(content) + 100).to_bytes(4, "little")
    path.write_bytes(content)
    items = {item.id: item.extent for item in Pipeline.from_file(audio).source.items()}
    assert items["unlabeled/a.wav"] == (STEPS["a.wav"],)


def test_most_recordings_decide_the_sample_rate(audio: Path) -> None:
    """And not the first, which is left out."""
    edit(audio, 'kind = "audio"', 'kind = "audio"\non_error = "skip"')
    soundfile.write(audio.parent / "recordings" / "0.wav", sound(4000, 1), 8000)
    source = Pipeline.from_file(audio).source
    assert list(source.skipped) == ["unlabeled/0.wav"]
    assert len(source.ids) == len(STEPS)


@pytest.mark.parametrize("name", ["b.flac", "a.wav", "alaw.wav", "aiff.aiff"])
def test_parts_are_exact_in_any_order(audio: Path, name: str) -> None:
    path = audio.parent / "recordings" / name
    if not path.exists():
        subtype = "ALAW" if name.startswith("alaw") else None
        soundfile.write(path, sound(3000, 8), 16000, subtype=subtype)
    whole, _ = soundfile.read(path, dtype="float32")
    source = Pipeline.from_file(audio).source
    draw = np.random.default_rng(0)
    for _ in range(60):
        start, length = int(draw.integers(len(whole) - 300)), int(draw.integers(1, 300))
        span = Span(start, start + length)
        (part,) = source.read([Request(f"unlabeled/{name}", region=(span,))])
        np.testing.assert_array_equal(part[0], whole[span.slice])


def test_a_plan_with_a_stateful_module_needs_no_workers(audio: Path) -> None:
    stages = plan_pipeline(Pipeline.from_file(audio)).stages
    assert stages[2].extraction.workers == 0


def test_a_sample_rate_that_is_asked_for_is_compared(audio: Path, tmp_path: Path) -> None:
    edit(audio, 'kind = "audio"', 'kind = "audio"\noptions = { rate = 8000 }')
    message = one_error(gim_stage("run", audio, "--dir", tmp_path / "out"), 2)
    assert "16000 samples a second" in message
    assert "8000" in message


# Modules and objective


def test_a_sequence_in_parts_is_the_whole() -> None:
    torch.manual_seed(0)
    module = gru_module(4, channels=6)
    x = torch.randn(2, 4, 50)
    state = module.initial_state(2)
    parts = []
    for start in range(0, 50, 7):
        z, state = module(x[:, :, start : start + 7], state)
        parts.append(z)
    torch.testing.assert_close(torch.cat(parts, dim=2), module(x), atol=1e-6, rtol=0)


def test_the_papers_convolutions_turn_20480_steps_into_128() -> None:
    length = 20480
    for kernel, stride, padding in ((10, 5, 2), (8, 4, 2), (4, 2, 2), (4, 2, 2), (4, 2, 1)):
        module = conv1d_module(1, channels=1, kernel=kernel, stride=stride, padding=padding)
        with torch.no_grad():
            length = module(torch.zeros(1, 1, length)).shape[2]
    assert length == 128


class Forgetful(nn.Module):
    """Claims to be stateful, and begins anew with every part."""

    stateful = True

    def __init__(self) -> None:
        super().__init__()
        self.gru = gru_module(3, channels=3)

    def initial_state(self, rows: int) -> torch.Tensor:
        return self.gru.initial_state(rows)

    def forward(self, x: torch.Tensor, state: torch.Tensor | None = None) -> Any:
        z = self.gru(x)
        return z if state is None else (z, state)


def test_a_module_that_forgets_its_state_is_refused() -> None:
    assert state_size(gru_module(3, channels=5), (3, 20), key="module.1") == 5
    assert state_size(nn.Identity(), (3, 20), key="module.1") == 0
    with pytest.raises(ModuleRefusedError, match="in two parts than in one"):
        state_size(Forgetful(), (3, 20), key="module.1")
    with pytest.raises(ModuleRefusedError, match="only modules of sequences"):
        state_size(gru_module(3), (3, 8, 8), key="module.1")


def test_what_a_context_network_predicts_is_its_input() -> None:
    """Equation 6, as loops: the score is z_{t+k}^T W_k c_t, negatives are inputs as well."""
    torch.manual_seed(1)
    module = gru_module(4, channels=6)
    module.pool = CellMean(1)  # type: ignore[assignment]
    x = torch.randn(3, 4, 9)
    seen = embed(module, x)
    assert seen.shape == (3, 9, 10)
    objective = InfoNCE(6, targets=4, prediction_steps=2, negatives=5, skip=0)
    assert objective.W.shape == (2, 4, 6)
    loss = objective(seen, generator=torch.Generator().manual_seed(7))
    context, target = module(x).movedim(1, -1), x.movedim(1, -1)
    generator = torch.Generator().manual_seed(7)
    expected = 0.0
    for k in (1, 2):
        rows = [(s, t) for s in range(3) for t in range(9 - k)]
        drawn = torch.randint(27, (len(rows), 5), generator=generator)
        losses = []
        for (s, t), numbers in zip(rows, drawn.tolist(), strict=True):
            prediction = objective.W[k - 1] @ context[s, t]
            scores = [target[s, t + k] @ prediction]
            scores += [target[n // 9, n % 9] @ prediction for n in numbers]
            losses.append(-torch.stack(scores).log_softmax(0)[0])
        expected += float(torch.stack(losses).detach().mean())
    assert abs(float(loss.detach()) - expected) < 1e-5
    gradient = torch.autograd.grad(loss, list(module.parameters()))
    assert all(float(part.abs().sum()) > 0 for part in gradient)


class Listing:
    """Samples by name."""

    ids = ("a",)

    def split(self, name: str) -> tuple[str, ...]:
        return self.ids


def test_a_layout_with_states_names_each_chunk_of_them() -> None:
    layout = TiledLayout(("a",), ((10,),), (4,), (2,), pool=1, embedding=2, codec="lz4", state=3)
    blocks = layout.blocks(Listing())
    assert [layout.parts(block)["states"].files for block in blocks] == [
        ("states/a/c.0.0",),
        ("states/a/c.1.0",),
        ("states/a/c.2.0",),
    ]


def test_folders_are_no_recordings_and_a_missing_one_is_named(audio: Path) -> None:
    items = len(Pipeline.from_file(audio).source.ids)
    (audio.parent / "recordings" / "x.wav").mkdir()
    assert len(Pipeline.from_file(audio).source.ids) == items
    shutil.rmtree(audio.parent / "recordings")
    with pytest.raises(DataNotFoundError, match=r"no such folder: .*recordings; check source.root"):
        Pipeline.from_file(audio).source  # noqa: B018
