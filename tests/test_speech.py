"""Speech in LibriSpeech's layout, with phone labels in the format of Oord et al., made here."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
import torch
from helpers import Heard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torchaudio import functional as reference
from torchaudio.datasets import LIBRISPEECH
from warm import gim_stage

from gim_stagewise.config import AugmentConfig, SourceConfig
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.report.record import run_record
from gim_stagewise.sources import RegionSource, Request, StepLabelled, Subset, open_source
from gim_stagewise.sources.audio import Recording
from gim_stagewise.sources.corpus import Corpus
from gim_stagewise.sources.resampled import Resampled, resample
from gim_stagewise.sources.speech import SpeechSource
from gim_stagewise.windows import Span

RATE = 16_000
# Steps of each utterance, of three speakers: 5 of one, 2 of one, 1 of one.
STEPS = {
    "84-121-0000": 8000,
    "84-121-0001": 6400,
    "84-121-0002": 4801,
    "84-77-0000": 7000,
    "84-77-0003": 5100,
    "103-1240-0000": 5000,
    "103-1240-0001": 4000,
    "2007-5-0009": 4500,
}


def sound(steps: int, seed: int = 0) -> NDArray[np.float64]:
    return np.random.default_rng(seed).normal(0, 0.1, steps)


def place(name: str) -> str:
    speaker, chapter, _ = name.split("-")
    return f"{speaker}/{chapter}/{name}.flac"


def write(path: Path, steps: int, *, rate: int = RATE, channels: int = 1, seed: int = 0) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = sound(steps * channels, seed).reshape(steps, channels)
    soundfile.write(path, values, rate, subtype="PCM_16")


def write_phones(file: Path, steps: dict[str, int]) -> None:
    draw = np.random.default_rng(3)
    rows = [
        " ".join([name, *map(str, draw.integers(0, 41, -(-count // 160)))])
        for name, count in steps.items()
    ]
    file.write_text("\n".join(rows) + "\n")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The root of a corpus: recordings, lists and phone labels."""
    for seed, (name, steps) in enumerate(STEPS.items()):
        write(tmp_path / "recordings" / place(name), steps, seed=seed)
    labels = tmp_path / "labels"
    labels.mkdir()
    names = list(STEPS)
    (labels / "train.txt").write_text("\n".join(names[:3] + names[5:6]) + "\n")
    (labels / "test.txt").write_text(f"{names[3]}\n\n{names[6]}\n")
    write_phones(labels / "phones.txt", STEPS)
    return tmp_path


LISTS = {"train": {"list": "labels/train.txt"}, "test": {"list": "labels/test.txt"}}


def opened(
    root: Path,
    *,
    splits: dict[str, Any] | None = None,
    on_error: str = "stop",
    digest: str = "full",
    **options: Any,
) -> SpeechSource:
    config = SourceConfig.model_validate(
        {
            "kind": "speech",
            "root": str(root),
            "options": {"recordings": "recordings", **options},
            "splits": splits or {},
            "on_error": on_error,
            "digest": digest,
        }
    )
    source = open_source(config)
    assert isinstance(source, SpeechSource)
    return source


# Recordings, speakers and splits


def test_recordings_and_speakers_are_those_that_torchaudio_reads(root: Path) -> None:
    archive = root / "LibriSpeech" / "train-clean-100"
    shutil.copytree(root / "recordings", archive)
    for chapter in archive.glob("*/*"):
        names = sorted(path.stem for path in chapter.glob("*.flac"))
        file = chapter / f"{chapter.parent.name}-{chapter.name}.trans.txt"
        file.write_text("".join(f"{name} SOME WORDS\n" for name in names))
    found = LIBRISPEECH(str(root), "train-clean-100")
    own = opened(root, recordings="LibriSpeech/train-clean-100")
    speakers = dict(zip(own.ids, own.labels("speaker").tolist(), strict=True))
    by_name = {item_id.partition("/")[2]: item_id for item_id in own.ids}
    assert len(found) == len(by_name) == len(STEPS)
    for number in range(len(found)):
        path, rate, _, speaker, _, _ = found.get_metadata(number)
        item_id = by_name[Path(path).stem]
        assert own.speakers[speakers[item_id]] == str(speaker)
        whole, stored = soundfile.read(root / "LibriSpeech" / path, dtype="float32")
        assert rate == stored == RATE
        np.testing.assert_array_equal(own.read([Request(item_id)])[0], whole[None])


def test_lists_split_recordings(root: Path) -> None:
    names = list(STEPS)
    source = opened(root, splits=LISTS)
    assert source.split("train") == [f"train/{n}" for n in sorted(names[:3] + names[5:6])]
    assert source.split("test") == [f"test/{names[6]}", f"test/{names[3]}"]
    assert source.split("unlabeled") == source.split("train")
    # The third one has no recording in a list.
    assert source.speakers == ["103", "84"]
    assert source.label_names == ("speaker",)
    assert source.labels("speaker").tolist() == [0, 1, 1, 1, 0, 1]


def test_paths_name_recordings_as_well(root: Path) -> None:
    by_path = "\n".join(place(name).removesuffix(".flac") for name in list(STEPS)[:3])
    (root / "labels" / "paths.txt").write_text(by_path)
    source = opened(root, splits={"train": {"list": "labels/paths.txt"}})
    assert source.ids == [f"train/{name}" for name in list(STEPS)[:3]]


def test_without_lists_every_speaker_is_split(root: Path) -> None:
    source = opened(root)
    train, test = source.split("train"), source.split("test")
    assert sorted(i.partition("/")[2] for i in [*train, *test]) == sorted(STEPS)

    def own(ids: Any, speaker: str) -> int:
        return sum(f"/{speaker}-" in item_id for item_id in ids)

    assert [(own(train, s), own(test, s)) for s in ("84", "103", "2007")] == [
        (4, 1),
        (1, 1),
        (1, 0),
    ]
    assert opened(root).ids == source.ids
    more = opened(root, test=0.5)
    assert own(more.split("test"), "84") == 2


def test_speakers_may_have_recordings_anywhere_below_their_folder(tmp_path: Path) -> None:
    for name in ("ann/x.wav", "ann/deep/down/y.FLAC", "bob/z.aiff", "bob/w.wav"):
        write(tmp_path / "recordings" / name, 3000)
    (tmp_path / "recordings" / "ann" / "._x.wav").write_text("left by macOS")
    source = opened(tmp_path)
    assert sorted(i.partition("/")[2] for i in source.ids) == ["w", "x", "y", "z"]
    assert source.speakers == ["ann", "bob"]


def test_speakers_may_be_links(root: Path) -> None:
    root, links = root / "recordings", root / "links"
    (links / "84").mkdir(parents=True)
    for speaker in ("103", "2007"):
        (links / speaker).symlink_to(root / speaker)
    for chapter in ("121", "77"):
        (links / "84" / chapter).symlink_to(root / "84" / chapter)
    (links / "84" / "round").symlink_to(links)  # leads into itself
    corpus = Corpus(root)
    assert len(corpus.paths) == len(STEPS)
    linked = Corpus(links)
    assert {*linked.speakers.values()} == {*corpus.speakers.values()} == {"84", "103", "2007"}
    assert {path.resolve() for path in linked.paths.values()} == set(corpus.paths.values())


def test_paths_are_the_names_where_two_speakers_have_equal_ones(tmp_path: Path) -> None:
    for speaker in ("ann", "bob"):
        for seed, name in enumerate(("hello", "bye", f"only-{speaker}")):
            write(tmp_path / "recordings" / speaker / f"{name}.wav", 3000, seed=seed)
    source = opened(tmp_path)
    assert {i.partition("/")[2] for i in source.ids} == {
        f"{speaker}/{name}"
        for speaker in ("ann", "bob")
        for name in ("hello", "bye", f"only-{speaker}")
    }
    (tmp_path / "list.txt").write_text("ann/hello\nbob/hello\nonly-bob\n")
    source = opened(tmp_path, splits={"train": {"list": "list.txt"}})
    assert source.ids == ["train/ann/hello", "train/bob/hello", "train/bob/only-bob"]
    (tmp_path / "list.txt").write_text("only-bob\nhello\n")
    with pytest.raises(DataError, match=r"list.txt, line 2: 'hello' can mean ann/hello or bob/he"):
        opened(tmp_path, splits={"train": {"list": "list.txt"}})


# Phones


def test_phones_are_those_of_the_file(root: Path) -> None:
    source = opened(root, splits=LISTS, phones="labels/phones.txt")
    assert (source.step_label_name, source.step_label_hop) == ("phone", 160)
    lines = (root / "labels" / "phones.txt").read_text().splitlines()
    stated = {line.split()[0]: [int(n) for n in line.split()[1:]] for line in lines}
    for item in source.items():
        labels = source.step_labels(item.id)
        assert labels.dtype == np.int64
        # A last step that is not whole has a label in the file, and none here.
        whole = item.extent[0] // 160
        assert labels.tolist() == stated[item.id.partition("/")[2]][:whole]
        assert len(labels) == whole


def test_phones_can_be_aligned_with_the_end(root: Path) -> None:
    """As the paper's released code does it with labels that are fewer than steps."""
    fewer = dict(zip(STEPS, [-320, 0, 160, 320, -160, 0, 0, 0], strict=True))
    write_phones(root / "labels" / "phones.txt", {n: STEPS[n] + fewer[n] for n in STEPS})
    found = opened(root, splits=LISTS, phones="labels/phones.txt", phones_align="end")
    lines = (root / "labels" / "phones.txt").read_text().splitlines()
    stated = {line.split()[0]: [int(n) for n in line.split()[1:]] for line in lines}
    for item in found.items():
        labels, name = found.step_labels(item.id).tolist(), item.id.partition("/")[2]
        assert len(labels) == item.extent[0] // 160
        for back in range(1, len(labels) + 1):  # from the end, step by step
            known = back <= len(stated[name])
            assert labels[-back] == (stated[name][-back] if known else NO_LABEL)
    start = opened(root, splits=LISTS, phones="labels/phones.txt")
    assert start.content_digest() != found.content_digest()


def test_what_is_made_of_a_source_passes_labels_and_notices_on(root: Path) -> None:
    write(root / "recordings" / place("84-121-0000"), 22050, rate=44100)
    source = opened(root, splits=LISTS, phones="labels/phones.txt")
    some = Subset(source, source.ids[1:])
    regions = RegionSource(some, AugmentConfig(), None)
    for passing in (some, regions):
        assert isinstance(passing, StepLabelled)
        assert passing.notices == tuple(source.notices)
        assert (passing.step_label_name, passing.step_label_hop) == ("phone", 160)
        np.testing.assert_array_equal(
            passing.step_labels(source.ids[1]), source.step_labels(source.ids[1])
        )
    without = Subset(opened(root), source.ids)
    assert without.step_label_name is None
    with pytest.raises(DataError, match="no labels"):
        without.step_labels(source.ids[0])


def test_unlabeled_recordings_need_no_phones(root: Path) -> None:
    names = list(STEPS)
    write_phones(root / "labels" / "phones.txt", {n: STEPS[n] for n in names if n != names[7]})
    (root / "labels" / "unlabeled.txt").write_text(f"{names[7]}\n{names[0]}\n")
    splits = {**LISTS, "unlabeled": {"list": "labels/unlabeled.txt"}}
    source = opened(root, splits=splits, phones="labels/phones.txt")
    assert len(source.step_labels(f"unlabeled/{names[0]}")) == 50
    with pytest.raises(DataError, match=f"has no labels of {names[7]}"):
        source.step_labels(f"unlabeled/{names[7]}")


def without_a_line(root: Path) -> None:
    write_phones(root / "labels" / "phones.txt", dict(list(STEPS.items())[1:]))


def with_too_many(root: Path) -> None:
    write_phones(root / "labels" / "phones.txt", {**STEPS, "84-121-0000": 8640})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_a_line, "no labels of 84-121-0000"),
        (with_too_many, r"line 1 has 54 labels of 10 ms for 84-121-0000, .* 50\.0 times 10 ms"),
    ],
)
def test_a_recording_without_its_phones_is_named_or_left_out(
    root: Path, change: Callable[[Path], None], said: str
) -> None:
    change(root)
    with pytest.raises(DataError, match=said):
        opened(root, splits=LISTS, phones="labels/phones.txt")
    source = opened(root, splits=LISTS, phones="labels/phones.txt", on_error="skip")
    assert list(source.skipped) == ["train/84-121-0000"]
    assert "train/84-121-0000" not in source.ids


def test_a_few_labels_more_or_fewer_do_not_matter(root: Path) -> None:
    steps = {**STEPS, "84-121-0000": 8480, "84-121-0001": 5920}
    write_phones(root / "labels" / "phones.txt", steps)
    source = opened(root, splits=LISTS, phones="labels/phones.txt")
    assert len(source.step_labels("train/84-121-0000")) == 50
    assert len(source.step_labels("train/84-121-0001")) == 37


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("84-121-0000 1 2 x3", "line 9: 'x' is no class"),
        ("84-121-0000 1 -2", "line 9: '-' is no class"),
        ("lonely", "line 9: there are no labels"),
        ("two words 1 2", "line 9: 'words' is no class; expected is the name of a recording, w"),
        ("84-121-0000 1 2", "line 9: labels of 84-121-0000 are in line 1 already"),
    ],
)
def test_a_malformed_line_is_named(root: Path, line: str, said: str) -> None:
    file = root / "labels" / "phones.txt"
    file.write_text(file.read_text() + line)
    with pytest.raises(DataError, match=f"phones.txt, {said}"):
        opened(root, phones="labels/phones.txt")


def test_a_mark_of_byte_order_is_no_part_of_a_name(root: Path) -> None:
    for file in (root / "labels").iterdir():
        file.write_text(file.read_text(), encoding="utf-8-sig")
    marked = opened(root, splits=LISTS, phones="labels/phones.txt")
    found = {item_id: marked.step_labels(item_id).tolist() for item_id in marked.ids}
    for file in (root / "labels").iterdir():
        file.write_text(file.read_text(encoding="utf-8-sig"))
    plain = opened(root, splits=LISTS, phones="labels/phones.txt")
    assert found == {item_id: plain.step_labels(item_id).tolist() for item_id in plain.ids}


def test_a_class_beyond_all_is_named(root: Path) -> None:
    file = root / "labels" / "phones.txt"
    file.write_text(file.read_text().replace("84-121-0000 ", "84-121-0000 99999 ", 1))
    source = opened(root, splits=LISTS, phones="labels/phones.txt")
    with pytest.raises(DataError, match="line 1: 99999 is no class; there are 32768"):
        source.step_labels("train/84-121-0000")


def test_classes_can_be_bounded(root: Path) -> None:
    known = opened(root, splits=LISTS, phones="labels/phones.txt")
    most = max(int(known.step_labels(item_id).max()) for item_id in known.ids)
    opened(root, splits=LISTS, phones="labels/phones.txt", phone_classes=most + 1).content_digest()
    few = opened(root, splits=LISTS, phones="labels/phones.txt", phone_classes=most)
    with pytest.raises(DataError, match=f": {most} is no class; there are {most}, counted"):
        few.content_digest()


def test_what_cannot_be_read_in_parts_is_refused(root: Path) -> None:
    lost = root / "recordings" / "84" / "121" / "84-121-0007.ogg"
    soundfile.write(lost, np.zeros(16_000), 16_000)
    with pytest.raises(DataError, match=r"84-121-0007\.ogg is compressed with loss.*FLAC"):
        opened(root)
    (why,) = opened(root, on_error="skip").skipped.values()
    assert "84-121-0007.ogg is compressed with loss" in why


def test_phones_that_were_changed_meanwhile_are_not_mixed_up(root: Path) -> None:
    source = opened(root, splits=LISTS, phones="labels/phones.txt")
    file = root / "labels" / "phones.txt"
    file.write_text("x" * 7 + file.read_text())
    with pytest.raises(DataError, match="changed while it was in use"):
        source.step_labels("test/84-77-0000")


# Rates and channels


@pytest.mark.parametrize("rate", [8000, 22050, 44100, 48000])
def test_resampling_is_torchaudios(rate: int) -> None:
    values = sound(2 * rate + 18).astype(np.float32).reshape(2, -1)
    expected = reference.resample(torch.from_numpy(values), rate, RATE).numpy()
    own = resample(values, old=rate, new=RATE)
    assert own.shape == expected.shape
    np.testing.assert_allclose(own, expected, atol=1e-5)


@pytest.fixture(scope="module")
def resampled(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Resampled]:
    """A recording of two channels at several rates; blocks are of about 4096 steps."""
    folder = tmp_path_factory.mktemp("resampled")
    files = {}
    for rate in (8000, 11025, 44100):
        path = folder / f"{rate}.wav"
        write(path, rate + 301, rate=rate, channels=2)
        files[rate] = Resampled(Recording(path), old=rate, new=RATE)
    return files


@settings(max_examples=60, deadline=None)
@given(st.sampled_from([8000, 11025, 44100]), st.integers(0, 10**6), st.integers(0, 10**6))
def test_a_resampled_part_is_that_of_the_whole(
    resampled: dict[int, Resampled], rate: int, one: int, other: int
) -> None:
    """Bit for bit, wherever it begins."""
    file = resampled[rate]
    (steps,) = file.extent
    assert steps == -(-(rate + 301) * RATE // rate)
    start, stop = sorted((one % (steps + 1), other % (steps + 1)))
    whole = file.read((Span(0, steps),))
    part = file.read((Span(start, stop),))
    assert part.dtype == np.float32
    np.testing.assert_array_equal(part, whole[:, start:stop])


def test_resampling_does_not_depend_on_threads() -> None:
    values = sound(30_000).astype(np.float32)[None]
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 4):
            torch.set_num_threads(count)
            found.append(resample(values, old=22050, new=RATE).tobytes())
    finally:
        torch.set_num_threads(threads)
    assert found[0] == found[1]


def test_rates_without_a_common_divisor_are_refused() -> None:
    with pytest.raises(DataError, match="15991 Hz cannot be resampled to 16000 Hz"):
        resample(np.zeros((1, 100), np.float32), old=15991, new=RATE)


def test_other_rates_are_resampled_and_that_is_said(root: Path) -> None:
    path = root / "recordings" / place("84-121-0001")
    write(path, 8820, rate=22050)
    source = opened(root, splits=LISTS, phones="labels/phones.txt")
    assert source.notices == [
        "1 recording was resampled to 16000 Hz, the first: 84/121/84-121-0001.flac, 22050 Hz"
    ]
    whole, _ = soundfile.read(path, dtype="float32", always_2d=True)
    expected = reference.resample(torch.from_numpy(whole.T), 22050, RATE).numpy()
    (own,) = source.read([Request("train/84-121-0001")])
    assert own.shape == (1, 6400)
    np.testing.assert_allclose(own, expected, atol=1e-5)
    with pytest.raises(DataError, match=r"84-121-0001.flac has 22050 Hz, .* 16000 Hz"):
        opened(root, splits=LISTS, resample=False)
    assert opened(root, splits=LISTS, rate=8000).items()[1].extent == (4000,)


def test_channels_are_averaged_if_that_is_asked_for(root: Path) -> None:
    path = root / "recordings" / place("84-121-0001")
    write(path, 6400, channels=2)
    with pytest.raises(DataError, match=r"84-121-0001.flac has 2 channels; set .*mono = true"):
        opened(root, splits=LISTS)
    whole, _ = soundfile.read(path, dtype="float32")
    (own,) = opened(root, splits=LISTS, mono=True).read([Request("train/84-121-0001")])
    np.testing.assert_array_equal(own, whole.mean(1, np.float32)[None])


# What is wrong with files


@pytest.mark.parametrize("content", [b"not at all FLAC", None])
def test_a_recording_that_cannot_be_read_is_named(root: Path, content: bytes | None) -> None:
    """Among them one that is cut off: that shows where it is read."""
    path = root / "recordings" / place("84-121-0001")
    path.write_bytes(content or path.read_bytes()[:3000])
    with pytest.raises(DataError, match="84-121-0001"):
        opened(root, splits=LISTS).content_digest()
    source = opened(root, splits=LISTS, on_error="skip")
    assert list(source.skipped) == ["train/84-121-0001"]


def test_names_that_are_not_text_are_refused_or_left_out(root: Path) -> None:
    found = next((root / "recordings").rglob("84-77-0003.flac"))
    found.rename(found.with_name(os.fsdecode(b"caf\xe9.flac")))
    with pytest.raises(DataError, match=r"sample '(train|test)/caf\\udce9': its name is not text"):
        opened(root)
    left = opened(root, on_error="skip")
    (name,) = left.skipped
    assert name.encode().endswith(b"/caf\\xe9")
    assert len(left.ids) == len(STEPS) - 1


def test_folders_need_not_be_named_in_utf_8(root: Path) -> None:
    folder = root / "recordings" / "2007"
    folder.rename(folder.with_name(os.fsdecode(b"ren\xe9")))
    found = opened(root)
    (values,) = found.read([Request("train/2007-5-0009")])
    assert values.shape == (1, STEPS["2007-5-0009"])


def test_hidden_folders_are_no_speakers(root: Path) -> None:
    write(root / "recordings" / ".trash" / "84-77-0099.flac", 5000)
    assert sorted(Corpus(root / "recordings").paths) == sorted(STEPS)


def test_a_missing_folder_is_named_with_the_layout(root: Path) -> None:
    with pytest.raises(DataNotFoundError, match=r"recordings at .*/nothing; .*<speaker>/<chapter>"):
        opened(root, recordings="nothing")
    (root / "empty").mkdir()
    with pytest.raises(DataNotFoundError, match=r"no recordings below .*empty; .*<speaker>"):
        opened(root, recordings="empty")


@pytest.mark.parametrize("above", ["train-clean-100", "LibriSpeech/dev-other"])
def test_a_folder_above_the_speakers_is_no_speaker(root: Path, above: str) -> None:
    (root / "all" / above).parent.mkdir(parents=True)
    (root / "recordings").rename(root / "all" / above)
    with pytest.raises(DataError, match=r"/all has (train-clean-100|LibriSpeech) where speakers"):
        opened(root, recordings="all")


def test_a_recording_of_no_speaker_is_refused(root: Path) -> None:
    write(root / "recordings" / "x.wav", 4000)
    with pytest.raises(DataError, match=r"x\.wav lies in no speaker's folder"):
        opened(root)


def test_two_recordings_of_one_name_are_refused(root: Path) -> None:
    write((root / "recordings" / place("84-121-0001")).with_suffix(".wav"), 4000)
    with pytest.raises(DataError, match=r"84-121-0001.wav and 84-121-0001.flac have the same"):
        opened(root)


@pytest.mark.parametrize("which", ["train", "phones"])
def test_missing_files_are_named_with_where_they_come_from(root: Path, which: str) -> None:
    file = root / "labels" / f"{which}.txt"
    file.unlink()
    with pytest.raises(DataNotFoundError, match=rf"{file}: .*Oord et al\."):
        opened(root, splits=LISTS, phones="labels/phones.txt")


def test_names_without_a_recording_are_refused_or_left_out(root: Path) -> None:
    file = root / "labels" / "train.txt"
    file.write_text(file.read_text() + "1-2-3\n4-5-6\n")
    with pytest.raises(
        DataError, match=r"train.txt, line 5: no recording '1-2-3' .* \(and 1 more\)"
    ):
        opened(root, splits=LISTS)
    source = opened(root, splits=LISTS, on_error="skip")
    assert list(source.skipped) == ["train/1-2-3", "train/4-5-6"]
    file.write_text("\n")
    with pytest.raises(DataError, match=r"names no recording that is there, .*; it is empty"):
        opened(root, splits=LISTS)


def test_a_recording_in_training_and_test_is_refused(root: Path) -> None:
    (root / "labels" / "test.txt").write_text("84-121-0001\n")
    with pytest.raises(
        DataError, match=r"84-121-0001 is in the lists of source\.splits\.train and"
    ):
        opened(root, splits=LISTS)


def test_what_is_for_test_is_not_trained_on_unlabeled_either(root: Path) -> None:
    splits = {**LISTS, "unlabeled": {"list": "labels/test.txt"}}
    with pytest.raises(DataError, match=r"in the lists of source\.splits\.unlabeled and of "):
        opened(root, splits=splits)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"rat": 8000}, "rat"),
        ({"rate": "fast"}, "rate"),
        ({"rate": 80}, "rate"),
        ({"rate": 11025, "phones": "labels/phones.txt"}, "rate"),
        ({"mono": 1}, "mono"),
        ({"test": 1.5}, "test"),
        ({"phones": 3}, "phones"),
        ({"phones_align": "middle"}, "phones_align"),
    ],
)
def test_options_are_checked(root: Path, options: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        opened(root, **options)
    assert caught.value.key == f"source.options.{key}"


def test_tables_are_checked(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"source\.splits\.train\.files: unknown"):
        opened(root, splits={"train": {"files": "*"}})
    with pytest.raises(ConfigError, match=r"source\.splits\.train\.list: is None"):
        opened(root, splits={"train": {}})
    with pytest.raises(ConfigError, match=r"source\.options\.test"):
        opened(root, splits=LISTS, test=0.5)
    with pytest.raises(ConfigError, match=r"openslr"):
        open_source(SourceConfig(kind="speech", root=str(root), download=True))


def test_several_threads_may_read(root: Path) -> None:
    """One reads samples ahead while another looks whether windows are blank."""
    source = opened(root)
    requests = [
        Request(item.id, region=(Span(start, start + 100),))
        for item in source.items()
        for start in range(0, 3900, 50)
    ]
    expected = source.read(requests)
    orders = [np.random.default_rng(n).permutation(len(requests)) for n in range(4)]

    def in_order(order: NDArray[np.int64]) -> list[NDArray[Any]]:
        return [source.read([requests[number]])[0] for number in order]

    with ThreadPoolExecutor(4) as threads:
        for order, found in zip(orders, threads.map(in_order, orders), strict=True):
            for number, values in zip(order, found, strict=True):
                np.testing.assert_array_equal(values, expected[number])


# Identity


def change_speaker(root: Path) -> None:
    (root / "recordings" / "103").rename(root / "recordings" / "104")


def change_split(root: Path) -> None:
    file = root / "labels" / "train.txt"
    first, _, *others = file.read_text().splitlines(keepends=True)
    file.write_text("".join([first, *others]))


def change_phone(root: Path) -> None:
    file = root / "labels" / "phones.txt"
    file.write_text(file.read_text().replace("84-121-0000 ", "84-121-0000 40 ", 1))


def change_sound(root: Path) -> None:
    write(root / "recordings" / place("84-121-0000"), 8000, seed=99)


@pytest.mark.parametrize("digest", ["full", "sampled"])
def test_the_digest_is_that_of_recordings_and_labels(root: Path, digest: str) -> None:
    def found(**options: Any) -> str:
        options = {"phones": "labels/phones.txt", **options}
        return opened(root, splits=LISTS, digest=digest, **options).content_digest()

    digests = [found(), found(phones=None), found(rate=8000)]
    for change in (change_speaker, change_split, change_phone, change_sound):
        change(root)
        digests.append(found())
    assert len(set(digests)) == len(digests)


def test_the_digest_is_not_that_of_places_or_orders(root: Path, tmp_path: Path) -> None:
    before = opened(root, splits=LISTS, phones="labels/phones.txt").content_digest()
    for name in ("train", "phones"):
        file = root / "labels" / f"{name}.txt"
        lines = file.read_text().splitlines()
        random.Random(1).shuffle(lines)
        file.write_text("\n".join([*lines, ""]))
    (root / "recordings").rename(root / "moved")
    source = opened(root, splits=LISTS, phones="labels/phones.txt", recordings="moved")
    assert source.content_digest() == before


# Pipelines

TINY = """
name = "speech"
encoding = "dense"

[source]
kind = "speech"

[windows]
samples = 8

[objective]
prediction_steps = 2
negatives = 4

[train]
batch = 4
max_epochs = 1
validation = 0.25

[module.1]
build = "conv1d"
options = { channels = 4, kernel = 10, stride = 5, padding = 2 }
train.window = 400
cache.pool = 8
"""


def pipeline_file(root: Path, kind: str, more: str = "") -> Path:
    file = root / "speech.toml"
    file.write_text(TINY.replace('"speech"\n\n[w', f'"{kind}"\nroot = "{root}"\n{more}\n\n[w'))
    return file


def test_a_pipeline_runs_on_it_and_says_what_was_resampled(root: Path, tmp_path: Path) -> None:
    write(root / "recordings" / place("84-121-0000"), 11025, rate=22050)
    more = 'options = { recordings = "recordings", phones = "labels/phones.txt" }'
    notes = Heard()
    pipeline = Pipeline.from_file(
        pipeline_file(root, "speech", more), folder=tmp_path / "out", device="cpu", progress=notes
    )
    assert len(pipeline.check()) == 1
    result = pipeline.run()
    said = "1 recording was resampled to 16000 Hz"
    assert any(said in note for note in notes.notes)
    assert said in run_record(result)["notices"][0]


@pytest.mark.parametrize("command", [["plan"], ["train", "--module", "1", "--pipeline"]])
def test_every_command_that_reads_says_what_is_resampled(root: Path, command: list[str]) -> None:
    write(root / "recordings" / place("84-121-0000"), 11025, rate=22050)
    more = 'options = { recordings = "recordings", phones = "labels/phones.txt" }'
    file = pipeline_file(root, "speech", more)
    done = gim_stage(*command, file, "--dir", root / "out")
    assert done.returncode == 0, done.stderr
    assert "1 recording was resampled to 16000 Hz" in done.stderr


def test_patches_are_refused(root: Path) -> None:
    file = pipeline_file(root, "speech")
    file.write_text(file.read_text().replace('"dense"', '"patch"'))
    with pytest.raises(ConfigError, match='set encoding = "dense"'):
        Pipeline.from_file(file)
