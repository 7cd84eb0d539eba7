"""Phone labels in a text file, one line for each recording."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.errors import DataError, DataNotFoundError
from gim_stagewise.sources.corpus import Corpus

LABELS_A_SECOND = 100
# Labels come of frames that reach beyond the ends of a recording, or not as far.
_TOLERANCE = 3
_MOST_CLASSES = 2**15


@dataclass(frozen=True, slots=True)
class _Line:
    """Where a recording's labels are: line from 1, first byte, bytes, and how many labels."""

    number: int
    start: int
    length: int
    count: int


class PhoneLabels:
    """A file of phone labels, of which it is known where each recording's are.

    The format is that of ``converted_aligned_phones.txt``, which Oord et al. (2018) published for
    LibriSpeech: a line for each recording, its name and then a class for every 10 ms, from 0 on,
    with spaces between them. Labels are read when they are asked for.

    Parameters
    ----------
    path : Path
    corpus : Corpus
        Lines of other recordings are left alone.
    classes : int, optional
        How many there are; labels are below it.

    Raises
    ------
    DataNotFoundError
        If there is no such file.
    DataError
        If a line is not of that format, or there are two of a recording.
    """

    def __init__(self, path: Path, corpus: Corpus, classes: int | None = None) -> None:
        self._path = path
        self._classes = classes or _MOST_CLASSES
        self._lines: dict[str, _Line] = {}
        try:
            for name, line in _indexed(path, corpus):
                other = self._lines.setdefault(name, line)
                if other is not line:
                    raise DataError(
                        f"{path}, line {line.number}: labels of {name} are in line "
                        f"{other.number} already; remove one of the two"
                    )
        except FileNotFoundError:
            raise DataNotFoundError(
                f"no phone labels at {path.absolute()}: a line for each recording, as in "
                "converted_aligned_phones.txt, which Oord et al. (2018) published for LibriSpeech; "
                "put it there, or leave source.options.phones out"
            ) from None
        except OSError as error:
            raise DataError(f"{path} cannot be read as phone labels ({error})") from None

    def __contains__(self, name: str) -> bool:
        return name in self._lines

    def check(self, name: str, samples: int, rate: int) -> None:
        """Refuse labels that are not as many as a recording of so many samples has.

        Raises
        ------
        DataError
            If there are none, or their number differs by more than three.
        """
        line = self._lines.get(name)
        if line is None:
            raise DataError(f"{self._path} has no labels of {name}")
        expected = samples * LABELS_A_SECOND / rate
        if abs(line.count - expected) > _TOLERANCE:
            raise DataError(
                f"{self._path}, line {line.number} has {line.count} labels of 10 ms for {name}, "
                f"and the recording has {expected:.1f} times 10 ms ({samples} samples at {rate} "
                f"Hz); at most {_TOLERANCE} more or fewer are expected"
            )

    def read(self, name: str) -> NDArray[np.int64]:
        """Labels of a recording, [step] of 10 ms.

        Raises
        ------
        DataError
            If there are none, or the file was changed since.
        """
        line = self._lines.get(name)
        if line is None:
            raise DataError(f"{self._path} has no labels of {name}")
        try:
            with self._path.open("rb") as file:
                file.seek(line.start)
                raw = file.read(line.length)
        except OSError as error:
            raise DataError(f"{self._path} cannot be read any more ({error})") from None
        if _problem(raw) or len(raw.split()) != line.count:
            raise DataError(f"{self._path} was changed while it was in use; start again")
        labels = np.fromstring(raw.decode("ascii"), dtype=np.int64, sep=" ")
        if labels.max() >= self._classes:
            raise DataError(
                f"{self._path}, line {line.number}: {labels.max()} is no class; there are "
                f"{self._classes}, counted from 0"
            )
        return labels


def _indexed(path: Path, corpus: Corpus) -> Iterator[tuple[str, _Line]]:
    """Names of recordings, and where their labels are."""
    start = 0
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            start += len(raw)
            written, *rest = raw.split(None, 1) or [b""]
            if number == 1:  # as some editors begin a file
                written = written.removeprefix(codecs.BOM_UTF8)
            if not written:
                continue
            labels = rest[0].rstrip() if rest else b""
            where = f"{path}, line {number}"
            try:
                name = corpus.find(written.decode("utf-8"), where=where)
            except UnicodeDecodeError:
                raise DataError(f"{where}: {written[:80]!r} is no name in UTF-8") from None
            if problem := _problem(labels):
                raise DataError(
                    f"{where}: {problem}; expected is the name of a recording, without spaces in "
                    "it, and a class for every 10 ms, with spaces between them"
                )
            if name is not None:
                yield name, _Line(number, start - len(rest[0]), len(labels), len(labels.split()))


def _problem(labels: bytes) -> str:
    """What is wrong with labels; empty if nothing is."""
    if not labels:
        return "there are no labels"
    if odd := labels.translate(None, b"0123456789 \t"):
        return f"{odd[:20].decode('ascii', 'backslashreplace')!r} is no class"
    return ""
