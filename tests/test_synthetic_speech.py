"""Synthetic speech: a corpus with exact phone labels, the same on each making."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from test_speech import pipeline_file, place

from gim_stagewise.config import SourceConfig
from gim_stagewise.errors import ConfigError, DataError
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.sources import StepLabelled, open_source
from gim_stagewise.sources.arpabet import PHONES
from gim_stagewise.sources.espeak import Synthesizer, Utterance
from gim_stagewise.sources.resampled import resample
from gim_stagewise.sources.sentences import draw_sentences
from gim_stagewise.sources.speech import SpeechSource
from gim_stagewise.sources.synthetic_speech import HOP, RATE, phone_classes

# The fourth voice, f2, has breath, which is random.
SMALL = {"speakers": 4, "train": 2, "test": 1}


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with a small corpus in it."""
    pytest.importorskip("espeakng_loader")
    root = tmp_path_factory.mktemp("synthetic")
    made(root)
    return root


def made(root: Path, **options: Any) -> SpeechSource:
    source = open_source(
        SourceConfig(kind="synthetic_speech", root=str(root), options={**SMALL, **options})
    )
    assert isinstance(source, SpeechSource)
    return source


def files(root: Path) -> dict[str, bytes]:
    return {
        path.relative_to(root).as_posix(): path.read_bytes()
        for path in root.rglob("*")
        if path.is_file()
    }


def test_synthetic_speech_is_a_corpus_with_phones(synthetic: Path) -> None:
    source = made(synthetic)
    assert source.speakers == ["f1", "f2", "m1", "m2"]
    assert source.labels("speaker").tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 0, 1, 2, 3]
    (folder,) = synthetic.iterdir()
    names = (folder / "phones.txt").read_text().split("\n")[:-1]
    assert names[0] == "0 sil"
    assert len(names) == 40
    texts = [
        line.partition(" ")[2]
        for file in folder.glob("*/*/*.trans.txt")
        for line in file.read_text().splitlines()
    ]
    assert len(set(texts)) == len(texts) == 12
    for item in source.items():
        assert soundfile.info(folder / place(item.id.partition("/")[2])).samplerate == RATE
        labels = source.step_labels(item.id)
        assert len(labels) == item.extent[0] // HOP
        assert 0 <= labels.min() <= labels.max() < 40
        assert len(set(labels.tolist())) > 8


def test_phones_of_synthetic_speech_are_where_they_sound(synthetic: Path) -> None:
    """There is noise alone in the pauses, and hiss is where s is, before microphone and noise."""
    synthesizer = Synthesizer()
    said = synthesizer.speak("a silly song, we sing", voice="en+m3", speed=150, pitch=50)
    samples = said.wave[None].astype(np.float32) / np.float32(2**15)
    wave = resample(samples, old=synthesizer.rate, new=RATE)[0]
    labels = phone_classes(said, rate=synthesizer.rate, steps=len(wave) // HOP)
    spectra = np.abs(np.fft.rfft(wave[: len(labels) * HOP].reshape(-1, HOP))) ** 2
    energy, hiss = spectra.sum(1), spectra[:, 40:].sum(1) / (spectra.sum(1) + 1e-9)
    assert np.median(energy[labels == 0]) < 1e-3 * np.median(energy[labels != 0])
    assert (hiss[labels == PHONES.index("S")] > 0.5).mean() > 0.8
    vowels = np.isin(labels, [PHONES.index(phone) for phone in ("IH", "IY", "AA", "AH")])
    assert (hiss[vowels] < 0.1).mean() > 0.9


def test_synthetic_speech_is_the_same_on_each_making(synthetic: Path, tmp_path: Path) -> None:
    made(tmp_path)
    assert files(tmp_path) == files(synthetic)
    assert len(files(tmp_path)) == 12 + 8 + 4


def test_another_seed_makes_other_speech(synthetic: Path) -> None:
    others = made(synthetic, seed=1, speakers=1, test=1)
    assert others.ids == ["train/m1-train-0000", "train/m1-train-0001", "test/m1-test-0000"]
    ids = others.ids
    own = made(synthetic)
    assert [i.extent for i in own.items() if i.id in ids] != [i.extent for i in others.items()]


def test_a_pipeline_fits_synthetic_speech(synthetic: Path, tmp_path: Path) -> None:
    more = "options = { speakers = 4, train = 2, test = 1 }"
    file = pipeline_file(tmp_path, "synthetic_speech", more)
    file.write_text(file.read_text().replace(str(tmp_path), str(synthetic)))
    pipeline = Pipeline.from_file(file, folder=tmp_path / "out", device="cpu")
    assert len(pipeline.check()) == 1
    source = pipeline.source
    assert isinstance(source, StepLabelled)
    assert source.step_label_name == "phone"


@pytest.mark.parametrize("number", [0, 14, 2.0, True])
def test_numbers_of_synthetic_speech_are_checked(tmp_path: Path, number: object) -> None:
    with pytest.raises(ConfigError, match=r"source\.options\.speakers"):
        made(tmp_path, speakers=number)
    with pytest.raises(ConfigError, match=r"source\.options\.voices: unknown key"):
        made(tmp_path, voices=number)


def test_without_espeak_its_package_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r'pip install "gim-stagewise\[synth\]"'):
        made(tmp_path)


def test_the_phone_in_the_middle_of_a_step_is_its_label() -> None:
    """At a rate of 32 kHz a step has 320 samples, and its middle is at 160."""
    said = Utterance(
        np.zeros(1600, np.int16), [(160, "'a"), (481, ",t"), (700, "n"), (700, "@"), (1440, "_:")]
    )
    labels = [PHONES[n] for n in phone_classes(said, rate=32_000, steps=5).tolist()]
    assert labels == ["AE", "AE", "AH", "AH", "sil"]
    late = Utterance(said.wave, [(161, "t")])
    assert phone_classes(late, rate=32_000, steps=2).tolist() == [0, PHONES.index("T")]
    with pytest.raises(DataError, match="a phone '@@'"):
        phone_classes(Utterance(said.wave, [(0, "@@")]), rate=32_000, steps=1)


def test_sentences_differ_and_articles_fit() -> None:
    found = draw_sentences(2000, seed=3)
    assert len(set(found)) == 2000
    assert draw_sentences(50, seed=3) == found[:50]
    assert not any(f" a {vowel}" in f" {text}" for text in found for vowel in "aeiou")
