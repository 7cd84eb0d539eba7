"""The paper's audio experiments: modes, probes, ablations, tables (section 4.2)."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import edit, one_error
from numpy.typing import NDArray
from PIL import Image
from warm import gim_stage

from gim_stagewise.config import ProbeConfig, SourceConfig, load_pipeline
from gim_stagewise.errors import ConfigError, DataError, OverBudgetError
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.memory import Budget, PeakMeter, resident_bytes
from gim_stagewise.memory.allocator import use_allocator
from gim_stagewise.models import CellMean, Stack, embed
from gim_stagewise.models.sequence import conv1d_module, gru_module
from gim_stagewise.objectives import CrossEntropy
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.probe.fit import check_probe_of_recordings
from gim_stagewise.probe.probe import probe_cache
from gim_stagewise.probe.sequences import RecordingProbe
from gim_stagewise.probe.step_classifier import step_accuracies
from gim_stagewise.probe.walks import cached_walk, chain_walk, mfcc_bytes, mfcc_walk
from gim_stagewise.reproduce.audio import figure_4, table_3, table_4
from gim_stagewise.reproduce.figures import save_figure
from gim_stagewise.reproduce.runs import Reproduction
from gim_stagewise.sources import RegionSource, Request, open_source
from gim_stagewise.stage.chain import fresh_chain, windowed_shapes
from gim_stagewise.stage.labels import training_labels
from gim_stagewise.stage.project import count_step, measure_step
from gim_stagewise.stage.spec import step_spec
from gim_stagewise.stage.windowed import WindowSource, training_windows
from gim_stagewise.stage.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
SPEECH = """
name = "speech"
seed = 1
encoding = "dense"

[source]
kind = "speech"
root = "{root}"
options = {{ phones = "phones.txt", test = 0.34 }}

[augment]
mean = [0.0]
std = [0.1]

[windows]
samples = 16
zones = 2
lanes = 3

[objective]
prediction_steps = 2
skip = 0
negatives = 4
window = 12

[train]
batch = 4
max_epochs = 1
validation = 0.25

[probe]
validation = 0.3
step_lr = 1e-2
step_epochs = 3
step_batch = 2

[module.1]
build = "conv1d"
options = {{ channels = 6, kernel = 10, stride = 5, padding = 2 }}
train.window = 3200
cache.pool = 32

[module.2]
build = "conv1d"
options = {{ channels = 7, kernel = 32, stride = 32, padding = 0 }}
train.window = 640

[module.3]
build = "gru"
options = {{ channels = 5 }}
train.window = 20
"""
SPEAKERS, EACH, PHONES = 3, 4, 5


def recording(speaker: int, number: int) -> tuple[NDArray[np.float64], list[int]]:
    """A second or so of tones: their pitch says which phone it is, their octave who speaks."""
    draw = np.random.default_rng(100 * speaker + number)
    phones = np.repeat(draw.integers(0, PHONES, 12), 8 + number)
    pitch = 300 * (1 + phones / PHONES) * 2**speaker
    phase = np.cumsum(np.repeat(pitch, 160)) / 16000
    return 0.3 * np.sin(2 * np.pi * phase) + draw.normal(0, 0.01, len(phase)), phones.tolist()


def write_speech(folder: Path) -> Path:
    """A pipeline file over a small corpus, and that beside it."""
    root, lines = folder / "corpus", []
    for speaker in range(SPEAKERS):
        for number in range(EACH):
            name = f"{speaker}-1-{number:04}"
            wave, phones = recording(speaker, number)
            place = root / str(speaker) / "1"
            place.mkdir(parents=True, exist_ok=True)
            soundfile.write(place / f"{name}.flac", wave, 16000)
            lines.append(" ".join([name, *map(str, phones)]))
    (root / "phones.txt").write_text("\n".join(lines) + "\n")
    file = folder / "speech.toml"
    file.write_text(SPEECH.format(root=root))
    return file


@pytest.fixture
def speech(tmp_path: Path) -> Path:
    return write_speech(tmp_path)


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Reproduction:
    place = tmp_path_factory.mktemp("audio")
    file = write_speech(place)
    return Reproduction(file, place / "runs", place / "results", seeds=1, device="cpu")


# Context networks and objectives


@pytest.mark.parametrize("rows", [1, 3])
def test_without_bptt_no_gradient_goes_back_in_time(rows: int) -> None:
    torch.manual_seed(0)
    module = gru_module(4, channels=3, bptt=False).double()
    x = torch.randn(rows, 4, 7, dtype=torch.float64)
    weight = torch.randn(rows, 3, 7, dtype=torch.float64)
    z = module(x)
    (z * weight).sum().backward()
    found = [parameter.grad for parameter in module.parameters()]
    module.zero_grad()
    state, outputs = torch.zeros(rows, 3, dtype=torch.float64), []
    for step in range(7):  # paper, section 4.2: GradientBlock(h)
        state = torch.gru_cell(x[:, :, step], state.detach(), *module.gru.all_weights[0])
        outputs.append(state)
    expected = torch.stack(outputs, dim=2)
    (expected * weight).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(z, expected, rtol=1e-12, atol=1e-15)
    for own, parameter in zip(found, module.parameters(), strict=True):
        torch.testing.assert_close(own, parameter.grad, rtol=1e-12, atol=1e-15)


def test_blocking_gradients_changes_no_output() -> None:
    torch.manual_seed(0)
    blocked, plain = gru_module(4, channels=3, bptt=False), gru_module(4, channels=3)
    plain.load_state_dict(blocked.state_dict())
    x = torch.randn(2, 4, 9)
    torch.testing.assert_close(blocked(x), plain(x))
    with torch.no_grad():
        assert torch.equal(blocked(x), plain(x))
    outputs, state = blocked(x, blocked.initial_state(2))
    torch.testing.assert_close(state, outputs[:, :, -1])
    with pytest.raises(TypeError, match="bptt"):
        gru_module(4, bptt="no")  # type: ignore[arg-type]


@pytest.mark.parametrize("isolated", [True, False])
def test_gradients_reach_targets_in_cpc_alone(isolated: bool) -> None:
    encoder, context = conv1d_module(1, channels=3, kernel=2, stride=2), gru_module(3, channels=4)
    for module in (encoder, context):
        module.pool = CellMean(1)  # type: ignore[assignment]
    stack = Stack([encoder, context], isolated=isolated, observed=[1])
    seen = stack.embed(torch.randn(2, 1, 8)).reshape(2, 4, 7)
    seen[..., 4:].sum().backward()  # type: ignore[no-untyped-call]
    assert (encoder.conv.weight.grad is None) == isolated
    alone = embed(context, torch.randn(2, 3, 4, requires_grad=True))
    assert alone.shape == (2, 4, 7)


def test_steps_are_classified_one_by_one() -> None:
    torch.manual_seed(0)
    objective = CrossEntropy(3, classes=4).double()
    z = torch.randn(2, 8, 5, dtype=torch.float64)  # two steps a label; targets in the last channels
    labels = torch.tensor([[0, 1, 2, 3], [3, NO_LABEL, 1, 0]])
    loss = objective(z, generator=torch.Generator(), labels=labels)
    terms = []
    for sample in range(2):
        for step in range(4):
            if labels[sample, step] != NO_LABEL:
                mean = z[sample, 2 * step : 2 * step + 2, :3].mean(0)
                terms.append(-objective.classifier(mean).log_softmax(0)[labels[sample, step]])
    torch.testing.assert_close(loss, torch.stack(terms).mean())


# The paper's own network


@pytest.fixture(scope="module")
def paper(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """pipelines/librispeech.toml, at a batch of two."""
    folder = tmp_path_factory.mktemp("paper")
    text = (ROOT / "pipelines" / "librispeech.toml").read_text()
    file = folder / "librispeech.toml"
    file.write_text(
        text.replace("batch = 32", "batch = 2").replace(
            "negatives_group = 8", "negatives_group = 2"
        )
    )
    config, text = load_pipeline(file)
    return Workspace(config, text, folder, None, torch.device("cpu"))


def test_the_papers_network_has_the_shapes_of_table_5(paper: Workspace) -> None:
    shapes = windowed_shapes(paper, 1)
    assert [shape.cell_in for shape in shapes] == [
        (1, 20480),
        (512, 4095),
        (512, 1023),
        (512, 512),
        (512, 257),
        (512, 128),
    ]
    assert shapes[-1].cell_out == (256, 128)


@pytest.mark.parametrize("index", range(1, 7))
def test_the_papers_network_runs_a_step(paper: Workspace, index: int) -> None:
    """Within what is counted and the scratch memory inside operations."""
    shape = windowed_shapes(paper, 1)[index - 1]
    spec = replace(step_spec(paper, index, shape), micro_batch=1)
    measured = measure_step(spec, steps=1)
    assert measured > 0
    if index < 6:  # a GRU is counted step by step, which takes long
        assert measured <= 1.3 * count_step(spec).count + 40_000_000


def test_module_1_fits_in_the_memory_that_is_promised(tmp_path: Path) -> None:
    """A batch of 8, for which the reference code takes 2868 MB."""
    config, text = load_pipeline(ROOT / "pipelines" / "librispeech.toml", {"train.batch": 8})
    space = Workspace(config, text, tmp_path, None, torch.device("cpu"))
    spec = replace(step_spec(space, 1, windowed_shapes(space, 1)[0]), lean=True)
    assert count_step(spec).count <= 330e6
    assert count_step(replace(spec, micro_batch=1)).count <= 100e6


# Labels of windows


def windows_of(file: Path, labels: str) -> tuple[RegionSource, WindowSource, Pipeline]:
    pipeline = Pipeline.from_file(file, mode="supervised", changes={"labels": labels})
    assert isinstance(pipeline.source, RegionSource)
    return pipeline.source, training_windows(pipeline.config, 1, pipeline.source, "train"), pipeline


def test_a_window_has_the_speaker_of_its_recording(speech: Path) -> None:
    _, windows, pipeline = windows_of(speech, "speaker")
    labels = training_labels(pipeline.config, windows)
    assert (labels.classes, labels.steps, labels.ids) == (3, 0, {*windows.ids})
    requests = [Request(item_id, view) for item_id in windows.ids for view in (1, 2, 77)]
    for request, label in zip(requests, labels.of(requests).tolist(), strict=True):
        name = windows.place(request).id
        assert name.startswith(f"train/{label}-")


def test_a_step_of_a_window_has_the_phone_at_its_middle(speech: Path) -> None:
    source, windows, pipeline = windows_of(speech, "phone")
    labels = training_labels(pipeline.config, windows)
    assert (labels.classes, labels.steps) == (PHONES, 20)
    requests = [Request(item_id, view) for item_id in windows.ids for view in (1, 2, 77)]
    for request, found in zip(requests, labels.of(requests).tolist(), strict=True):
        place = windows.place(request)
        assert place.region is not None
        phones = source.step_labels(place.id)
        middles = [place.region[0].start + 160 * step + 80 for step in range(20)]
        known = [m // 160 < len(phones) for m in middles]
        assert [
            phones[m // 160] if k else NO_LABEL for m, k in zip(middles, known, strict=True)
        ] == found


def test_windows_that_were_drawn_again_keep_their_own_label(speech: Path) -> None:
    edit(speech, "zones = 2", "zones = 2\nmin_variance = 0.9")
    source, windows, _ = windows_of(speech, "speaker")
    for item_id in windows.ids:
        request = Request(item_id, 3)
        (read,) = windows.read([request])
        (there,) = source.read([windows.place(request)])
        assert np.array_equal(read, there)


# Probes


def separable(
    count: int, draw: np.random.Generator, shift: float
) -> tuple[dict[str, NDArray[np.float32]], dict[str, NDArray[np.int64]]]:
    """Recordings whose features tell their labels."""
    features, labels = {}, {}
    for number in range(count):
        own = draw.integers(0, 3, 50)
        means = np.eye(3)[own] * 4 + shift
        features[f"{count}-{number}"] = (means + draw.normal(0, 0.5, (50, 3))).astype(np.float32)
        labels[f"{count}-{number}"] = own
    return features, labels


def test_classifiers_of_steps_find_what_features_tell() -> None:
    draw = np.random.default_rng(0)
    features, train = separable(12, draw, 100)
    unseen, test = separable(5, draw, 100)
    features |= unseen
    noise = {name: draw.normal(size=(50, 2)).astype(np.float32) for name in features}
    config = ProbeConfig(step_lr=0.05, step_epochs=15, step_batch=2)

    def walk(ids: object) -> list[list[NDArray[np.float32]]]:
        assert isinstance(ids, list)
        # One of them has a feature more than labels, another one less.
        return [[features[name], noise[name][:-1]] for name in ids]

    good, bad = step_accuracies(walk, train, test, config, seed=0)
    assert good.test > 0.97
    assert good.validation > 0.97
    assert 0.15 < bad.test < 0.55
    again = step_accuracies(walk, train, test, config, seed=0)
    assert again == [good, bad]
    last = config.model_copy(update={"validation_part": "last", "validation": 0.5})
    for name in list(train)[6:]:
        features[name] = draw.normal(size=(50, 3)).astype(np.float32)
    held, _ = step_accuracies(walk, train, test, last, seed=0)
    assert held.validation < 0.6
    (alone,) = step_accuracies(
        lambda ids: ([features[name]] for name in ids), train, test, config, seed=0
    )
    assert alone.test > 0.6


def test_steps_without_a_label_are_left_out() -> None:
    draw = np.random.default_rng(0)
    features, train = separable(12, draw, 0)
    unseen, test = separable(5, draw, 0)
    features |= unseen
    for labels in (*train.values(), *test.values()):
        labels[draw.random(50) < 0.5] = NO_LABEL
    config = ProbeConfig(step_lr=0.05, step_epochs=15, step_batch=2)
    (found,) = step_accuracies(
        lambda ids: ([features[name]] for name in ids), train, test, config, seed=0
    )
    assert found.test > 0.97


@pytest.mark.parametrize("step", [0, 1, 47, 99])
def test_mfcc_of_a_step_are_of_its_middle(tmp_path: Path, step: int) -> None:
    samples = np.random.default_rng(0).normal(0, 1e-4, 16_000)
    samples[step * 160 + 80] = 0.5  # in the middle of its 160 samples
    (tmp_path / "speaker").mkdir()
    soundfile.write(tmp_path / "speaker" / "a.flac", samples, 16_000)
    source = open_source(SourceConfig(kind="speech", root=str(tmp_path)))
    ((features,),) = mfcc_walk(source, 16_000)(list(source.ids))
    assert len(features) == 100
    assert features[:, 0].argmax() == step
    if 0 < step < 99:
        assert features[step - 1, 0] == pytest.approx(features[step + 1, 0], rel=1e-2)


def test_a_recording_shorter_than_a_frame_has_mfcc(tmp_path: Path) -> None:
    (tmp_path / "speaker").mkdir()
    soundfile.write(tmp_path / "speaker" / "a.flac", np.full(60, 0.1), 16_000)
    source = open_source(SourceConfig(kind="speech", root=str(tmp_path)))
    ((features,),) = mfcc_walk(source, 16_000)(list(source.ids))
    assert features.shape == (1, 39)
    assert np.isfinite(features).all()


def test_one_recording_is_too_few() -> None:
    features, labels = separable(1, np.random.default_rng(0), 0)
    with pytest.raises(DataError, match="1 labelled recordings are too few"):
        step_accuracies(
            lambda ids: ([features[i]] for i in ids), labels, labels, ProbeConfig(), seed=0
        )


def test_a_run_says_who_speaks_and_what(work: Reproduction) -> None:
    result = work.run("iterative")
    record = json.loads((result.folder / "run.json").read_text())
    speaker, phone = record["probes"]
    assert (speaker["labels"], phone["labels"]) == ("speaker", "phone")
    assert set(speaker["baselines"]) == {"MFCC", "MFCC statistics"}
    assert set(phone["baselines"]) == {"MFCC"}
    for scores in (speaker, phone):
        for name in ("accuracies", "random_accuracies"):
            assert len(scores[name]) == 3
            assert all(0 <= own <= 1 for own in scores[name])
    assert record["modules"][2]["probe_accuracy"] == speaker["accuracies"][2]
    assert phone["baselines"]["MFCC"] > 0.35  # tones are what they tell
    before = (result.folder / "probe.json").stat().st_mtime_ns
    assert work.run("iterative").probes == result.probes
    assert (result.folder / "probe.json").stat().st_mtime_ns == before
    # What a cache knows by itself.
    assert result.stages[2].cache is not None
    module, pooling, accuracy, left_out = probe_cache(result.stages[2].cache)
    assert (module, pooling, left_out) == (3, "mean", "")
    assert accuracy == result.accuracy(3, labels="speaker")
    with pytest.raises(DataError, match="features are means"):
        probe_cache(result.stages[2].cache, pooling="all")


def test_embeddings_in_caches_are_those_of_the_whole_recording(speech: Path) -> None:
    edit(speech, "[module.1]", '[cache]\nprecision = "float32"\n\n[module.1]')
    pipeline = Pipeline.from_file(speech, folder=speech.parent / "out", device="cpu")
    result = pipeline.run()
    paths = [stage.cache for stage in result.stages if stage.cache is not None]
    chain = [pipeline.stage(index).load_weights() for index in (1, 2, 3)]
    joint = Pipeline.from_file(speech, device="cpu", mode="simultaneous").joint_stage()
    frozen = joint.frozen(chain)
    ids = [*pipeline.source.split("train"), *pipeline.source.split("test")]
    walks = cached_walk(paths), chain_walk(frozen, pipeline.source, pipeline.workspace)
    for stored, computed in zip(*(walk(ids) for walk in walks), strict=True):
        for own, other in zip(stored, computed, strict=True):
            np.testing.assert_allclose(own, other, rtol=1e-4, atol=1e-5)
            assert 0 <= len(own) - len(stored[-1]) <= 1  # one for each label


def test_features_that_are_not_kept_give_the_same_scores(
    work: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = work.run("iterative")
    pipeline = work.pipeline("iterative")
    walk = cached_walk([stage.cache for stage in result.stages if stage.cache is not None])
    monkeypatch.setattr("gim_stagewise.probe.sequences.MOST_KEPT", 1)
    probe = RecordingProbe.of(pipeline.workspace, pipeline.source)
    assert probe is not None
    assert probe(walk, [0, 1, 2]) == [scores.trained for scores in result.probes]


def test_modules_between_labels_are_left_out(speech: Path) -> None:
    edit(speech, "cache.pool = 32", "cache.pool = 16")
    out = speech.parent / "out"
    done = gim_stage("run", speech, "--dir", out, "--device", "cpu", "--workers", "0", "--json")
    assert done.returncode == 0, done.stderr
    assert "set module.1.cache.pool" in done.stderr
    _, phone = json.loads(done.stdout)["probes"]
    assert phone["accuracies"][0] is None
    assert phone["random_accuracies"][0] is None
    assert None not in phone["accuracies"][1:]


def test_without_phones_speakers_alone_are_probed(speech: Path) -> None:
    edit(speech, 'phones = "phones.txt", ', "")
    result = Pipeline.from_file(speech, folder=speech.parent / "out", device="cpu").run()
    assert [scores.labels for scores in result.probes] == ["speaker"]
    assert set(result.probes[0].baselines) == {"MFCC", "MFCC statistics"}


# Modes


@pytest.mark.parametrize("mode", ["simultaneous", "cpc", "random"])
def test_all_modules_can_be_trained_in_one_step(work: Reproduction, mode: str) -> None:
    result = work.run(mode)
    losses = [stage.record.validation_loss is not None for stage in result.stages]
    assert (
        losses
        == {
            "simultaneous": [True, True, True],
            "cpc": [False, False, True],
            "random": [False, False, False],
        }[mode]
    )
    iterative = work.run("iterative")
    for own, other in zip(result.probes, iterative.probes, strict=True):
        assert own.baselines == other.baselines
        assert own.random == other.random
        assert mode != "random" or own.trained == own.random


@pytest.mark.parametrize("labels", ["speaker", "phone"])
@pytest.mark.parametrize("mode", ["supervised", "greedy_supervised"])
def test_supervised_modes_take_either_labels(work: Reproduction, mode: str, labels: str) -> None:
    result = work.run(mode, labels=labels)
    assert result.folder.name.endswith(labels)
    loss = result.stages[-1].record.validation_loss
    assert loss is not None
    assert 0 < loss < 3
    again = work.pipeline(mode, changes={"labels": labels}, suffix=f"-{labels}").joint_stage()
    assert again.current_weights()[0] is not None
    other = "phone" if labels == "speaker" else "speaker"
    stale = work.pipeline(mode, changes={"labels": other}, suffix=f"-{labels}").joint_stage()
    assert "labels" in stale.current_weights()[1]


def test_micro_batches_of_labelled_windows_are_exact(speech: Path) -> None:
    losses = []
    for size in (1, 4):
        pipeline = Pipeline.from_file(
            speech,
            folder=speech.parent / f"out{size}",
            device="cpu",
            mode="supervised",
            changes={"labels": "phone", "train.micro_batch": size},
        )
        weights, _ = pipeline.joint_stage().train()
        losses.append(weights[-1].record.validation_loss)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_features_of_another_pooling_are_probed_anew(speech: Path) -> None:
    found = []
    for pool in (2, 1):
        changes = {"module.3.cache.pool": pool}
        pipeline = Pipeline.from_file(
            speech, folder=speech.parent / "out", device="cpu", mode="random", changes=changes
        )
        found.append(pipeline.run().accuracy(3, labels="phone"))
    assert found[0] is None
    assert found[1] is not None


def test_windows_without_a_whole_label_are_refused(speech: Path) -> None:
    edit(speech, "train.window = 3200", "train.window = 150")
    speech.write_text(speech.read_text().partition("[module.2]")[0])
    _, windows, pipeline = windows_of(speech, "phone")
    with pytest.raises(ConfigError, match="is 150, less than the 160 samples"):
        training_labels(pipeline.config, windows)


def test_cpc_wants_a_context_network(speech: Path) -> None:
    text = speech.read_text()
    speech.write_text(text.partition("[module.3]")[0])
    done = gim_stage("run", speech, "--mode", "cpc", "--dir", speech.parent / "out")
    assert "needs a context network as the last module" in one_error(done, 2)


@pytest.mark.parametrize(("labels", "mode"), [("word", "supervised"), ("class", "iterative")])
def test_labels_that_are_not_there_are_refused(speech: Path, labels: str, mode: str) -> None:
    edit(speech, "seed = 1", f'seed = 1\nlabels = "{labels}"')
    done = gim_stage("run", speech, "--mode", mode, "--dir", speech.parent / "out")
    assert f"labels: is '{labels}', but the dataset's labels are: 'speaker', 'phone'" in one_error(
        done, 2
    )


# Tables and figures


def test_table_3_has_both_labels_beside_the_paper(work: Reproduction) -> None:
    text = table_3(work).read_text()
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    assert rows[0] == ["method", "paper, phone", "paper, speaker", "phone", "speaker"]
    by_name = {row[0]: row for row in rows[2:10]}
    assert by_name["MFCC features"][1:3] == ["39.7", "17.6"]
    gim = work.run("iterative")
    cells = by_name["Greedy InfoMax (GIM), iterative"][3:]
    for labels, cell in zip(("phone", "speaker"), cells, strict=True):
        accuracy = gim.accuracy(3, labels=labels)
        assert accuracy is not None
        assert cell == f"{100 * accuracy:.1f}"
    supervised = work.run("supervised", labels="phone").accuracy(3, labels="phone")
    assert supervised is not None
    assert by_name["Supervised"][3] == f"{100 * supervised:.1f}"
    modules = [row for row in rows if row[:2] == ["CPC", "speaker"]]
    assert len(modules) == 1
    assert len(modules[0]) == 5


def test_table_4_stands_on_the_same_modules(work: Reproduction) -> None:
    text = table_4(work).read_text()
    gim = work.run("iterative")
    without = [line for line in text.splitlines() if line.startswith("| GIM without g_ar")]
    accuracies = [gim.accuracy(2, labels=labels) for labels in ("phone", "speaker")]
    assert all(f"{100 * (own or 0):.1f}" in without[0] for own in accuracies)
    folder = work.base / "speech-without-bptt"
    assert {path.name for path in folder.glob("m*")} == {"m3.safetensors", "m3.zarr"}
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    table_4(work)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    changed = [path.name for path in after if after[path] != before.get(path)]
    assert set(changed) <= {".lock"}


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("seed = 1", 'seed = 1\nkeep = "last"', "keep: is 'last'"),
        ("{ channels = 5 }", "{ channels = 5, bptt = false }", "options.bptt: is false"),
    ],
)
def test_table_4_is_refused_before_anything_is_trained(
    speech: Path, old: str, new: str, problem: str
) -> None:
    edit(speech, old, new)
    with pytest.raises(ConfigError, match=problem):
        table_4(Reproduction(speech, speech.parent / "runs", speech.parent, device="cpu"))
    assert not (speech.parent / "runs").exists()


def test_table_4_wants_a_context_network(speech: Path) -> None:
    speech.write_text(speech.read_text().partition("[module.3]")[0])
    with pytest.raises(ConfigError, match="table 4 takes a context network"):
        table_4(Reproduction(speech, speech.parent / "runs", speech.parent, device="cpu"))


def test_figure_4_has_the_errors_of_all_modules(
    work: Reproduction, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []

    def kept(work: Reproduction, figure: Any, number: int, text: str) -> Path:
        drawn.append(figure)
        return save_figure(work, figure, number, text)

    monkeypatch.setattr("gim_stagewise.reproduce.audio.save_figure", kept)
    with Image.open(figure_4(work)) as picture:
        assert picture.size == (900, 600)
    lines = {line.get_label(): line for line in drawn[0].axes[0].get_lines()}
    assert set(lines) == {"Greedy InfoMax, iterative", "CPC", "Supervised", "Greedy Supervised"}
    run = work.run("iterative")
    shown = lines["Greedy InfoMax, iterative"].get_xydata().tolist()
    for module, (x, y) in enumerate(shown, start=1):
        accuracy = run.accuracy(module, labels="speaker")
        assert accuracy is not None
        assert x == module
        assert y == pytest.approx(100 * (1 - accuracy)) or (accuracy == 1 and 0 < y < 100 / 6)
    assert len(shown) == 3


@pytest.mark.parametrize("what", ["table3", "table4", "figure4"])
def test_without_a_test_split_nothing_is_trained(speech: Path, what: str) -> None:
    names = [path.stem for path in sorted((speech.parent / "corpus").rglob("*.flac"))]
    (speech.parent / "corpus" / "all.txt").write_text("\n".join(names) + "\n")
    edit(speech, ", test = 0.34 }", ' }\nsplits.train = { list = "all.txt" }')
    runs = speech.parent / "runs"
    done = gim_stage("reproduce", what, "--pipeline", speech, "--dir", runs)
    assert "no labelled recordings for both training and test" in one_error(done, 2)
    assert not list(runs.rglob("*.safetensors"))


# One speaker


@pytest.fixture
def alone(speech: Path) -> Path:
    """A corpus of one speaker."""
    for speaker in range(1, SPEAKERS):
        shutil.rmtree(speech.parent / "corpus" / str(speaker))
    edit(speech, "zones = 2", "zones = 1")
    return speech


def test_one_speakers_phones_are_probed(alone: Path) -> None:
    done = gim_stage("run", alone, "--dir", alone.parent / "run")
    assert done.returncode == 0, done.stderr
    assert "all training samples have the same 'speaker'" in " ".join(done.stderr.split())
    probes = json.loads((alone.parent / "run" / "run.json").read_text())["probes"]
    by_labels = {own["labels"]: own for own in probes}
    assert by_labels["phone"]["accuracies"][0] is not None
    assert by_labels["speaker"]["accuracies"] == [None] * 3


def with_lists(speech: Path, **recordings: list[str]) -> None:
    """Splits with the recordings that patterns find."""
    corpus = speech.parent / "corpus"
    lists = ""
    for split, patterns in recordings.items():
        found = [own.stem for pattern in patterns for own in corpus.rglob(f"{pattern}.flac")]
        (corpus / f"{split}.txt").write_text("\n".join(found) + "\n")
        lists += f'splits.{split} = {{ list = "{split}.txt" }}\n'
    edit(speech, ", test = 0.34 }", f" }}\n{lists}")
    edit(speech, "zones = 2", "zones = 1")


def test_speakers_of_test_that_training_has_none_of_are_not_probed(speech: Path) -> None:
    with_lists(speech, train=["0-*", "1-*"], test=["2-*"])
    base = speech.parent / "runs"
    done = gim_stage("run", speech, "--dir", base / "speech")
    assert done.returncode == 0, done.stderr
    assert "no test sample has a 'speaker' that" in " ".join(done.stderr.split())
    speakers, phones = json.loads((base / "speech" / "run.json").read_text())["probes"]
    assert speakers["accuracies"] == [None] * 3
    assert None not in phones["accuracies"]
    found = gim_stage("probe", "--input", base / "speech" / "m1.zarr")
    assert "no test sample has a 'speaker' that" in one_error(found, 2)
    found = gim_stage("reproduce", "table3", "--pipeline", speech, "--dir", base)
    assert found.returncode == 0, found.stderr
    lines = (base / "speech-reproduced" / "table3.md").read_text().splitlines()
    (row,) = (own for own in lines if own.startswith("| Supervised | 77"))
    *_, phone, speaker, _ = (cell.strip() for cell in row.split("|"))
    assert phone
    assert not speaker
    # Nothing is trained on what nobody could know.
    assert list(base.glob("*supervised-phone"))
    assert not list(base.glob("*supervised-speaker"))


def test_accuracy_is_of_speakers_that_training_has(speech: Path) -> None:
    with_lists(speech, train=["0-*", "1-1-000[012]"], test=["1-1-0003", "2-*"])
    done = gim_stage("run", speech, "--dir", speech.parent / "run")
    assert done.returncode == 0, done.stderr
    said = "4 of 5 test samples have a 'speaker' that no training sample has, and are left out"
    assert said in " ".join(done.stderr.split())
    speakers, phones = json.loads((speech.parent / "run" / "run.json").read_text())["probes"]
    # Of a single recording, which MFCC, of its pitch, suffice for.
    assert {*speakers["accuracies"], *speakers["random_accuracies"]} <= {0.0, 1.0}
    assert speakers["baselines"]["MFCC"] == 1.0
    assert None not in phones["accuracies"]
    found = gim_stage("probe", "--input", speech.parent / "run" / "m2.zarr", "--json")
    assert said in found.stderr
    assert json.loads(found.stdout)["probe_accuracy"] == speakers["accuracies"][1]


@pytest.mark.parametrize("command", [["run", "--mode", "supervised"], ["reproduce", "figure4"]])
def test_one_speaker_is_nothing_to_learn(alone: Path, command: list[str]) -> None:
    file = ["--pipeline", alone] if command[0] == "reproduce" else [alone]
    done = gim_stage(*command, *file, "--dir", alone.parent / "run")
    assert "all training samples have the same 'speaker'" in one_error(done, 2)
    assert not list((alone.parent / "run").rglob("*.safetensors"))


def test_recordings_too_long_for_the_probe_are_refused_before_any_work(speech: Path) -> None:
    file = next(speech.parent.rglob("2-1-0003.flac"))
    wave = np.tile(soundfile.read(file)[0], 20)
    soundfile.write(file, wave, 16_000)
    labels = speech.parent / "corpus" / "phones.txt"
    lines = labels.read_text().splitlines()
    name, *phones = lines[-1].split()
    labels.write_text("\n".join([*lines[:-1], " ".join([name, *phones * 20])]))
    edit(speech, "channels = 6, kernel", "channels = 64, kernel")
    pipeline = Pipeline.from_file(speech, device="cpu")
    space, source, shapes = pipeline.workspace, pipeline.source, pipeline.check()
    longest = max(source.items(), key=lambda item: item.extent)
    assert longest.extent == (len(wave),)
    chain = fresh_chain(space, [shape.cell_in[0] for shape in shapes])
    walk = chain_walk(chain, source, space)
    for _ in walk([source.ids[0]]):  # what a first one loads
        pass
    with PeakMeter(space.device) as meter:
        for _ in walk([longest.id]):
            pass
    few = replace(space, budget=Budget(host=resident_bytes() + meter.peak // 2))
    with pytest.raises(OverBudgetError, match=f"for the longest, {longest.id}; allowed") as caught:
        check_probe_of_recordings(few, source, shapes)
    assert meter.peak < 1.1 * (caught.value.needed - resident_bytes())
    check_probe_of_recordings(space, source, shapes)
    small: list[str | Path] = ["--allowed-host-mem", "10MB", "--dir", speech.parent / "out"]
    for mode in ("iterative", "random"):
        found = gim_stage("run", speech, "--mode", mode, *small)
        assert f"for the longest, {longest.id}" in one_error(found, 3)


@pytest.fixture
def lean() -> Iterator[None]:
    """As in a process that has been given a budget."""
    use_allocator(lean=True)
    yield
    use_allocator(lean=False)


@pytest.mark.usefixtures("lean")
def test_batches_of_long_recordings_are_counted(speech: Path) -> None:
    """What classifiers of steps hold at once, and MFCC, as that of modules above."""
    for file in speech.parent.rglob("*.flac"):
        soundfile.write(file, np.tile(soundfile.read(file)[0], 40), 16_000)
    labels = speech.parent / "corpus" / "phones.txt"
    lines = [line.split() for line in labels.read_text().splitlines()]
    labels.write_text("\n".join(" ".join([name, *phones * 40]) for name, *phones in lines))
    edit(speech, "channels = 5", "channels = 300")
    edit(speech, "step_batch = 2", "step_batch = 6")
    edit(speech, "step_epochs = 3", "step_epochs = 1")
    pipeline = Pipeline.from_file(speech, device="cpu")
    space, source, shapes = pipeline.workspace, pipeline.source, pipeline.check()
    chain = fresh_chain(space, [shape.cell_in[0] for shape in shapes])
    features = dict(zip(source.ids, chain_walk(chain, source, space)(source.ids), strict=True))
    probe = RecordingProbe.of(space, source)
    assert probe is not None

    def walk(ids: Sequence[str]) -> Iterator[list[NDArray[np.float32]]]:
        return ([own.copy() for own in features[item_id]] for item_id in ids)

    probe(walk, [1, 2])  # what a first time loads
    with PeakMeter(space.device) as of_steps:
        replace(probe, most_kept=0)(walk, [1, 2])
    few = replace(space, budget=Budget(host=resident_bytes() + of_steps.peak // 2))
    with pytest.raises(OverBudgetError, match=r"lower probe\.step_batch from 6") as caught:
        check_probe_of_recordings(few, source, shapes)
    assert of_steps.peak < caught.value.needed - resident_bytes()

    longest = max(source.items(), key=lambda item: item.extent)
    for _ in mfcc_walk(source, 16_000)([longest.id]):
        pass
    with PeakMeter(space.device) as of_mfcc:
        for _ in mfcc_walk(source, 16_000)([longest.id]):
            pass
    assert 0.3 * mfcc_bytes(longest, 16_000) < of_mfcc.peak < mfcc_bytes(longest, 16_000)


def test_what_mfcc_need_is_wanted_from_the_start(
    speech: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torchaudio", None)
    with pytest.raises(ConfigError, match=r"need torchaudio.*gim-stagewise\[audio\]"):
        Pipeline.from_file(speech, device="cpu").check()


def test_speech_without_labels_has_no_tables(speech: Path) -> None:
    edit(speech, 'phones = "phones.txt", ', "")
    for what in ("table3", "table4"):
        done = gim_stage("reproduce", what, "--pipeline", speech, "--dir", speech.parent / "out")
        assert "has no labels of recordings and of their steps" in one_error(done, 2)
