"""A corpus of synthetic speech whose phones are known exactly."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from multiprocessing import current_process
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import SourceConfig
from gim_stagewise.durable import flush_tree, fsync_directory, remove, rename, storage_errors, token
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError
from gim_stagewise.processes import in_fresh_process
from gim_stagewise.seeds import derive_seed
from gim_stagewise.sources.arpabet import PHONES, phone_class
from gim_stagewise.sources.espeak import Synthesizer, Utterance, missing
from gim_stagewise.sources.resampled import resample
from gim_stagewise.sources.sentences import draw_sentences
from gim_stagewise.sources.speech import SpeechSource, open_speech

RATE = 16_000
# Samples that share a phone label: 10 ms.
HOP = 160
# Variants of espeak-ng's English voice that differ clearly; men and women by turns.
SPEAKERS = ("m1", "f1", "m2", "f2", "m3", "f3", "m4", "f4", "m5", "f5", "m6", "m7", "m8")
# To be raised when the same options give other speech.
_VERSION = 1
# An equaliser's curve is a sum of so many cosines over the mel scale, of this standard deviation.
# They are what the mean of cepstral coefficients says of a recording: strong enough to hide much of
# what it says of the speaker.
_CURVES, _CURVE_DECIBELS = 8, 2.0
# Signal-to-noise ratios, and levels below full scale.
_NOISE_DECIBELS, _LEVEL_DECIBELS = (10, 30), (-26, -20)
_DEFAULTS = {"speakers": len(SPEAKERS), "train": 40, "test": 12, "seed": 0}
_MOST_SENTENCES = 1000


def open_synthetic_speech(config: SourceConfig) -> SpeechSource:
    """Synthetic speech of several voices, with labels of phones: ``kind = "synthetic_speech"``.

    Options: ``speakers`` (13, which is the most), how many sentences each of them says for training
    (``train``, 40) and for test (``test``, 12), and ``seed`` (0). No sentence is said twice. It is
    made once, below ``source.root`` (by default "data"), as LibriSpeech is laid out, and read as
    sources of kind "speech" are: 16 kHz, labels of phones for every 10 ms.

    Speakers differ in voice; speed, pitch, level, microphone (a random equaliser) and noise differ
    from utterance to utterance.

    It is made with espeak-ng, which is under the GNU General Public License, version 3, and comes
    with the package espeakng-loader (extra ``synth``).

    Raises
    ------
    ConfigError
        If the options are wrong, or espeakng-loader or soundfile is not installed.
    DataError
        If what was made is no longer as it was.
    StorageError
        If the disk is full or failing.
    """
    numbers = _numbers(config)
    path = Path(config.root or "data") / (
        f"synthetic-speech-v{_VERSION}-" + "-".join(map(str, numbers.values()))
    )
    if not path.exists():
        if importlib.util.find_spec("espeakng_loader") is None:
            raise missing()
        if current_process().daemon:  # a worker on another machine, which cannot start any other
            raise DataNotFoundError(
                f"no synthetic speech at {path.absolute()}; run `gim-stage plan` here first, which "
                "makes it, or share the folder"
            )
        with storage_errors(f"making {path}"):
            in_fresh_process(make_corpus, path.absolute(), **numbers)
    made = SourceConfig(
        kind="speech",
        root=str(path),
        options={"phones": "converted_aligned_phones.txt"},
        splits={name: {"list": f"{name}_split.txt"} for name in ("train", "test")},
        digest=config.digest,
        on_error=config.on_error,
    )
    try:
        return open_speech(made)
    except (DataError, DataNotFoundError) as error:
        raise DataError(
            f"{path.absolute()} is not as it was made: remove it, and it is made again ({error})"
        ) from None


def _numbers(config: SourceConfig) -> dict[str, int]:
    """All options, checked."""
    if config.splits or config.download:
        key = f"source.{'splits' if config.splits else 'download'}"
        raise ConfigError(
            "has no meaning for synthetic speech, which is made here; leave it out", key=key
        )
    if unknown := set(config.options) - set(_DEFAULTS):
        raise ConfigError(
            f"unknown key; known: {', '.join(_DEFAULTS)}",
            key=f"source.options.{sorted(unknown)[0]}",
        )
    numbers = {name: config.options.get(name, default) for name, default in _DEFAULTS.items()}
    limits = {"speakers": len(SPEAKERS), "seed": 10**6}
    for name, number in numbers.items():
        limit = limits.get(name, _MOST_SENTENCES)
        if type(number) is not int or not (name != "seed") <= number <= limit:
            raise ConfigError(
                f"is {number!r}, expected a whole number up to {limit}",
                key=f"source.options.{name}",
            )
    return numbers


def make_corpus(path: Path, *, speakers: int, train: int, test: int, seed: int) -> None:
    """Write the corpus beside its place, and move it there whole.

    The process must not have used espeak-ng before (see `Synthesizer`).

    Raises
    ------
    ConfigError
        If espeak-ng or soundfile cannot be used here.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{token()}.tmp")
    try:
        aside.mkdir()
        _write(aside, SPEAKERS[:speakers], {"train": train, "test": test}, seed=seed)
        flush_tree(aside)
        try:
            rename(aside, path)
        except OSError:
            if not path.exists():  # otherwise another process made the same meanwhile
                raise
        fsync_directory(path.parent)
    finally:
        remove(aside)


def _write(folder: Path, speakers: Sequence[str], counts: Mapping[str, int], *, seed: int) -> None:
    """All utterances and what is said of them, always in the same order."""
    try:
        import soundfile
    except ImportError:
        raise ConfigError(
            "writes recordings, and soundfile is not installed; install it with "
            '`pip install "gim-stagewise[audio]"`',
            key="source.kind",
        ) from None
    synthesizer = Synthesizer()
    total = len(speakers) * sum(counts.values())
    sentences = iter(draw_sentences(total, seed=derive_seed(seed, "sentences")))
    lists: dict[str, list[str]] = {split: [] for split in counts}
    labels: list[str] = []
    for speaker in speakers:
        for split, count in counts.items():
            chapter = folder / speaker / split
            chapter.mkdir(parents=True)
            texts = []
            for number in range(count):
                name, text = f"{speaker}-{split}-{number:04}", next(sentences)
                draw = np.random.default_rng(derive_seed(seed, "utterance", name))
                voice = np.random.default_rng(derive_seed(seed, "voice", speaker))
                utterance = _say(synthesizer, text, speaker, voice=voice, draw=draw)
                wave, phones = recorded(utterance, rate=synthesizer.rate, draw=draw)
                soundfile.write(chapter / f"{name}.flac", wave, RATE, subtype="PCM_16")
                lists[split].append(name)
                labels.append(" ".join([name, *map(str, phones.tolist())]))
                texts.append(f"{name} {text.upper()}")
            _write_lines(chapter / f"{speaker}-{split}.trans.txt", texts)
    for split, names in lists.items():
        _write_lines(folder / f"{split}_split.txt", names)
    _write_lines(folder / "converted_aligned_phones.txt", labels)
    _write_lines(folder / "phones.txt", [f"{n} {phone}" for n, phone in enumerate(PHONES)])


def _write_lines(path: Path, lines: Sequence[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8", newline="\n")


def _say(
    synthesizer: Synthesizer,
    text: str,
    speaker: str,
    *,
    voice: np.random.Generator,
    draw: np.random.Generator,
) -> Utterance:
    """A text at a speed and pitch around the speaker's own."""
    speed = voice.uniform(140, 180) * np.exp(draw.normal(0, 0.1))
    pitch = voice.uniform(38, 62) + draw.normal(0, 4)
    return synthesizer.speak(
        text,
        voice=f"en+{speaker}",
        speed=round(float(np.clip(speed, 100, 260))),
        pitch=round(float(np.clip(pitch, 0, 99))),
    )


def recorded(
    utterance: Utterance, *, rate: int, draw: np.random.Generator
) -> tuple[NDArray[np.int16], NDArray[np.int64]]:
    """An utterance as a random microphone in a noisy place has it, and its phones.

    Parameters
    ----------
    utterance : Utterance
    rate : int
        Its samples a second.
    draw : numpy.random.Generator

    Returns
    -------
    (array, array)
        int16 [sample] at `RATE`, and the class in `PHONES` that sounds in the middle of each whole
        step of `HOP` samples: int64 [step].
    """
    wave = resample(
        utterance.wave[None].astype(np.float32) / np.float32(2**15), old=rate, new=RATE
    )[0]
    labels = phone_classes(utterance, rate=rate, steps=len(wave) // HOP)
    values = _equalised(wave.astype(np.float64), draw)
    power = np.mean(values**2)
    noise = _noise(len(values), draw)
    values = values + noise * np.sqrt(power / 10 ** (draw.uniform(*_NOISE_DECIBELS) / 10))
    values *= 10 ** (draw.uniform(*_LEVEL_DECIBELS) / 20) / np.sqrt(np.mean(values**2))
    values *= min(1.0, 0.99 / np.abs(values).max())
    return np.rint(values * (2**15 - 1)).astype(np.int16), labels


def phone_classes(utterance: Utterance, *, rate: int, steps: int) -> NDArray[np.int64]:
    """Class of the phone in the middle of each step of 10 ms: int64 [step].

    Raises
    ------
    DataError
        If a phone is none of those known here.
    """
    starts = np.array([start for start, _ in utterance.phones])
    # Before the first phone there is silence.
    classes = np.array([0, *(phone_class(name) for _, name in utterance.phones)])
    middles = (np.arange(steps) * HOP + HOP / 2) * rate / RATE
    found: NDArray[np.int64] = classes[np.searchsorted(starts, middles, side="right")]
    return found


def _equalised(values: NDArray[np.float64], draw: np.random.Generator) -> NDArray[np.float64]:
    """Filtered without delay by a smooth random curve over frequency, as a microphone does."""
    spectrum = np.fft.rfft(values)
    # From 0 to 1, even to the ear: the mel scale.
    place = np.log1p(np.linspace(0, RATE / 2, len(spectrum)) / 700) / np.log1p(RATE / 2 / 700)
    decibels = np.zeros(len(spectrum))
    for order in range(1, _CURVES + 1):
        decibels += draw.normal(0, _CURVE_DECIBELS) * np.cos(np.pi * order * place)
    return np.fft.irfft(spectrum * 10 ** (decibels / 20), len(values))


def _noise(count: int, draw: np.random.Generator) -> NDArray[np.float64]:
    """White or pink noise, of variance 1."""
    spectrum = np.fft.rfft(draw.normal(size=count))
    if draw.random() < 0.5:
        spectrum /= np.sqrt(np.maximum(np.arange(len(spectrum)), 1))
    spectrum[0] = 0
    noise = np.fft.irfft(spectrum, count)
    scaled: NDArray[np.float64] = noise / noise.std()
    return scaled
