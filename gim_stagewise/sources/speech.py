"""Speech: recordings by speaker, with labels of their phones."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import SourceConfig
from gim_stagewise.errors import ConfigError, DataError
from gim_stagewise.labels import NO_LABEL
from gim_stagewise.sources.audio import RecordingForm
from gim_stagewise.sources.base import SEQUENCE_AXES, Item, Split
from gim_stagewise.sources.corpus import Corpus, read_list, refuse_missing, split_speakers
from gim_stagewise.sources.large import LargeSource
from gim_stagewise.sources.phones import LABELS_A_SECOND, PhoneLabels


def open_speech(config: SourceConfig) -> SpeechSource:
    """Recordings in a folder for each speaker, as LibriSpeech has them: ``kind = "speech"``.

    Each table ``[source.splits.<split>]`` has ``list``, a file below ``source.root`` with one name
    of a recording a line: that of its file, or its path below the folder of recordings, in either
    case without suffix. Without lists, every speaker's recordings are split by a hash of their
    names. Options: ``recordings``, the folder of recordings below ``source.root`` ("."); ``test``,
    the part of them for test where there are no lists (0.2); ``phones``, a file of phone labels
    below ``source.root`` (see `gim_stagewise.sources.phones.PhoneLabels`), ``phone_classes``, how
    many classes there are, if others are to be refused, and ``phones_align``, the end of a
    recording at which its labels are aligned with it ("start"); ``rate`` in Hz (16000),
    ``resample`` (true) and ``mono`` (false), see `RecordingForm`.

    Raises
    ------
    ConfigError
        If the tables are wrong, or soundfile is not installed.
    DataNotFoundError
        If recordings, a list or labels are not there.
    DataError
        If a recording, a list or labels cannot be used; of recordings, if ``source.on_error`` is
        "stop".
    """
    if config.download:
        raise ConfigError(
            "is true, but speech is never fetched; LibriSpeech is at openslr.org/12",
            key="source.download",
        )
    options = _options(config)
    root = Path(config.root or ".")
    corpus = Corpus(root / options["recordings"])
    splits, missing = _splits(config, root, corpus, options["test"])
    if config.on_error == "stop":
        refuse_missing(list(missing.values()))
    phones, classes = options["phones"], options["phone_classes"]
    return SpeechSource(
        corpus,
        splits,
        form=RecordingForm(options["rate"], options["resample"], options["mono"]),
        phones=None if phones is None else PhoneLabels(root / phones, corpus, classes),
        phones_align=options["phones_align"],
        digest=config.digest,
        on_error=config.on_error,
        missing=missing,
    )


_DEFAULTS: dict[str, Any] = {
    "recordings": ".",
    "phones": None,
    "phone_classes": None,
    "phones_align": "start",
    "rate": 16_000,
    "resample": True,
    "mono": False,
    "test": 0.2,
}


def _options(config: SourceConfig) -> dict[str, Any]:
    """All options, checked."""
    if unknown := set(config.options) - set(_DEFAULTS):
        raise ConfigError(
            f"unknown key; known: {', '.join(_DEFAULTS)}",
            key=f"source.options.{sorted(unknown)[0]}",
        )
    options = {**_DEFAULTS, **config.options}
    classes = options["phone_classes"]
    expected = {
        "recordings": (isinstance(options["recordings"], str), "a folder below source.root"),
        "phones": (isinstance(options["phones"], str | None), "a file below source.root"),
        "phone_classes": (
            classes is None or (type(classes) is int and classes > 0),
            "how many there are",
        ),
        "phones_align": (options["phones_align"] in ("start", "end"), '"start" or "end"'),
        "resample": (type(options["resample"]) is bool, "true or false"),
        "mono": (type(options["mono"]) is bool, "true or false"),
        "rate": (
            type(options["rate"]) is int and options["rate"] >= LABELS_A_SECOND,
            f"samples per second, {LABELS_A_SECOND} or more",
        ),
        "test": (
            type(options["test"]) is float and 0 < options["test"] < 1,
            "a part between 0 and 1",
        ),
    }
    for name, (right, what) in expected.items():
        if not right:
            raise ConfigError(
                f"is {options[name]!r}, expected {what}", key=f"source.options.{name}"
            )
    if options["phones"] is not None and options["rate"] % LABELS_A_SECOND:
        raise ConfigError(
            f"is {options['rate']}, but phone labels are for 10 ms each; use a multiple of "
            f"{LABELS_A_SECOND}",
            key="source.options.rate",
        )
    if config.splits and "test" in config.options:
        raise ConfigError(
            "has no meaning where source.splits has lists; leave one of the two out",
            key="source.options.test",
        )
    return options


def _splits(
    config: SourceConfig, root: Path, corpus: Corpus, test: float
) -> tuple[dict[Split, list[str]], dict[str, str]]:
    """Names of the recordings of each split; and, by id, what lists name that is not there."""
    if not config.splits:
        return split_speakers(corpus, test=test), {}
    splits: dict[Split, list[str]] = {}
    missing: dict[str, str] = {}
    for split, table in config.splits.items():
        key = f"source.splits.{split}"
        if unknown := set(table) - {"list"}:
            raise ConfigError("unknown key; known: list", key=f"{key}.{sorted(unknown)[0]}")
        stated = table.get("list")
        if not isinstance(stated, str):
            raise ConfigError(
                f'is {stated!r}, expected a file below source.root, as in train = {{list = "'
                'labels/train_split.txt"}',
                key=f"{key}.list",
            )
        splits[split], lacking = read_list(root / stated, corpus)
        missing |= {f"{split}/{name}": why for name, why in lacking.items()}
    for name in ("train", "unlabeled"):
        if both := sorted(set(splits.get(name, [])) & set(splits.get("test", []))):
            raise DataError(
                f"{both[0]} is in the lists of source.splits.{name} and of source.splits.test, and "
                f"so are {len(both) - 1} more; a recording for test must not be in training"
            )
    return splits, missing


class SpeechSource(LargeSource):
    """A `Source` of recordings labelled by speaker, and by phones if there are labels of them.

    Ids are ``<split>/<name>``, with names as `Corpus` has them. The label "speaker" of an item is
    its speaker's place in ``speakers``.

    Parameters
    ----------
    corpus : Corpus
    splits : mapping
        From split to names of its recordings.
    form : RecordingForm
    phones : PhoneLabels, optional
        Of which all training and test recordings need some.
    phones_align : {"start", "end"}
        Whether a recording's first label is that of its first step, or its last that of its last
        whole step.
    digest, on_error
        As in `LargeSource`.
    missing : mapping, optional
        Why items are not there from the start, by id; added to ``skipped``.

    Attributes
    ----------
    speakers : list of str
        All that have recordings here, sorted.
    rate : int
        Samples a second.
    step_label_name : str or None
        "phone", or None without phone labels.
    step_label_hop : int
        Samples that share a phone label.
    notices : list of str
        Recordings that are resampled.

    Raises
    ------
    DataError, DataNotFoundError
        If a recording or its labels cannot be used; with "skip", if none can.
    """

    label_names: tuple[str, ...] = ("speaker",)

    def __init__(
        self,
        corpus: Corpus,
        splits: Mapping[Split, list[str]],
        *,
        form: RecordingForm,
        phones: PhoneLabels | None = None,
        phones_align: Literal["start", "end"] = "start",
        digest: Literal["full", "sampled"] = "full",
        on_error: Literal["stop", "skip"] = "stop",
        missing: Mapping[str, str] | None = None,
    ) -> None:
        # What describing an item needs, which is done on the way.
        self._corpus = corpus
        self._form = form
        self._phones = phones
        self._phones_align = phones_align
        self._stored_rates: dict[str, int] = {}
        super().__init__(
            {split: {name: corpus.paths[name] for name in own} for split, own in splits.items()},
            opener=form.open,
            axes=SEQUENCE_AXES,
            digest=digest,
            on_error=on_error,
        )
        self.skipped.update(missing or {})
        self.rate = form.rate
        self.step_label_name = None if phones is None else "phone"
        self.step_label_hop = 0 if phones is None else form.rate // LABELS_A_SECOND
        self._speaker_of = {item_id: corpus.speakers[_name(item_id)] for item_id in self._items}
        self.speakers = sorted(set(self._speaker_of.values()))
        self.notices = self._resampled()

    def _describe(self, item_id: str) -> Item:
        item = super()._describe(item_id)
        name = _name(item_id)
        with self._naming(item_id):
            if stored := getattr(self._file(item_id), "stored_rate", None):
                self._stored_rates[item_id] = stored
            if self._phones is not None and self._needs_phones(item_id):
                self._phones.check(name, item.extent[0], self._form.rate)
        return item

    def _needs_phones(self, item_id: str) -> bool:
        return not item_id.startswith("unlabeled/") or (
            self._phones is not None and _name(item_id) in self._phones
        )

    def _resampled(self) -> list[str]:
        """What is said of recordings that are resampled."""
        found = {
            _name(item_id): rate
            for item_id, rate in self._stored_rates.items()
            if item_id in self._items
        }
        if not found:
            return []
        name, rate = next(iter(found.items()))
        path = self._corpus.paths[name].relative_to(self._corpus.folder).as_posix()
        count = "1 recording was" if len(found) == 1 else f"{len(found)} recordings were"
        return [f"{count} resampled to {self._form.rate} Hz, the first: {path}, {rate} Hz"]

    def label_values(self, name: str) -> tuple[str, ...]:
        """Names of speakers, from 0 on."""
        return tuple(self.speakers) if name == "speaker" else ()

    def labels(self, name: str) -> NDArray[np.int64]:
        if name != "speaker":
            raise DataError(f"no labels called {name!r}; there are: speaker")
        number = {speaker: index for index, speaker in enumerate(self.speakers)}
        return np.array([number[self._speaker_of[item_id]] for item_id in self._items], np.int64)

    def step_labels(self, item_id: str) -> NDArray[np.int64]:
        """Phones of a recording, [step] of ``step_label_hop`` samples each.

        There are at most as many as the recording has whole steps, and up to three fewer; aligned
        at its end there are as many, and the first of them may be `NO_LABEL`.

        Raises
        ------
        DataError
            If there are none, or no such recording.
        """
        item = self._items.get(item_id)
        if item is None:
            raise DataError(f"no sample {item_id!r} in this source")
        if self._phones is None:
            raise DataError(
                f"the steps of sample {item_id} have no labels; source.options.phones names a file "
                "of them",
                item=item_id,
            )
        with self._naming(item_id):
            labels = self._phones.read(_name(item_id))
        steps = item.extent[0] // self.step_label_hop
        if self._phones_align == "start":
            return labels[:steps]
        lacking = max(0, steps - len(labels))
        return np.pad(labels[max(0, len(labels) - steps) :], (lacking, 0), constant_values=NO_LABEL)

    def content_digest(self) -> str:
        return self._labelled_content

    @cached_property
    def _labelled_content(self) -> str:
        """Hash of the recordings as they are read, and of their labels."""
        form = f"{self._form.rate} {self._form.resample} {self._form.mono}"
        digest = hashlib.sha256(f"{super().content_digest()};{form}\n".encode())
        for item_id, speaker in self._speaker_of.items():
            digest.update(f"{item_id}:{speaker}\n".encode("utf-8", "surrogateescape"))
            if self._phones is not None and _name(item_id) in self._phones:
                digest.update(self.step_labels(item_id).astype("<i8").tobytes())
        return digest.hexdigest()


def _name(item_id: str) -> str:
    """Name of the recording of an item."""
    return item_id.partition("/")[2]
