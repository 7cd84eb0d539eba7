"""Recordings of speech in a folder for each speaker, and how they are split."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from gim_stagewise.errors import DataError, DataNotFoundError
from gim_stagewise.sources.base import Split

LAYOUT = "<speaker>/<chapter>/<speaker>-<chapter>-<number>.flac, or <speaker>/**/*.flac (wav, aiff)"
# The last ones cannot be read in parts exactly: whoever opens such a file says so.
_SUFFIXES = {".flac", ".wav", ".aiff", ".aif", ".mp3", ".ogg", ".oga", ".opus"}
# Folders of LibriSpeech above those of its speakers.
_ABOVE_SPEAKERS = re.compile(r"LibriSpeech|(train|dev|test)-(clean|other)(-\d+)?")


class Corpus:
    """The recordings below a folder, by name: the name of the file where all differ, else the path.

    Parameters
    ----------
    folder : Path
        Of which the first folders below are the speakers.

    Attributes
    ----------
    paths : dict of Path
        Of each recording, by name; in the order of names.
    speakers : dict of str
        Of each recording, by name.

    Raises
    ------
    DataNotFoundError
        If there is no such folder, or no recording in it.
    DataError
        If it is not laid out so, or two recordings have the same name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        found = _relative_paths(folder)
        self._stems: dict[str, list[str]] = defaultdict(list)
        for long_name, path in found.items():
            self._stems[path.stem].append(long_name)
        self._short = all(len(same) == 1 for same in self._stems.values())
        named = {self._name(long_name): path for long_name, path in found.items()}
        self.paths = {name: folder / named[name] for name in sorted(named)}
        self.speakers = {name: named[name].parts[0] for name in self.paths}

    def _name(self, long_name: str) -> str:
        return long_name.rpartition("/")[2] if self._short else long_name

    def find(self, written: str, *, where: str) -> str | None:
        """Name of the recording that a file means, by its name or its path; None if there is none.

        Parameters
        ----------
        written : str
        where : str
            File and line, for errors.

        Raises
        ------
        DataError
            If two recordings have that name.
        """
        same = self._stems.get(written, [])
        if len(same) > 1:
            raise DataError(
                f"{where}: {written!r} can mean {same[0]} or {same[1]}; give the path below "
                f"{self.folder}, without the suffix"
            )
        if same:
            return self._name(same[0])
        name = self._name(written)
        known = self.paths.get(name)
        return name if known and _long_name(known.relative_to(self.folder)) == written else None


def _long_name(relative: Path) -> str:
    """Path below the folder of recordings, without the suffix."""
    return relative.with_suffix("").as_posix()


def _relative_paths(folder: Path) -> dict[str, Path]:
    """Paths of all recordings below a folder, by themselves without suffix."""
    layout = f"expected is {LAYOUT} below the folder that source.options.recordings names"
    if not folder.is_dir():
        raise DataNotFoundError(f"no folder of recordings at {folder.absolute()}; {layout}")
    found: dict[str, Path] = {}
    for path in sorted(_files(folder)):
        if path.suffix.lower() not in _SUFFIXES:
            continue
        relative = path.relative_to(folder)
        if len(relative.parts) == 1:
            raise DataError(f"{path} lies in no speaker's folder; {layout}")
        other = found.setdefault(_long_name(relative), relative)
        if other != relative:
            raise DataError(f"{path} and {other.name} have the same name; remove one of them")
    if not found:
        raise DataNotFoundError(f"no recordings below {folder.absolute()}; {layout}")
    speakers = sorted({path.parts[0] for path in found.values()})
    if all(_ABOVE_SPEAKERS.fullmatch(speaker) for speaker in speakers):
        raise DataError(
            f"{folder.absolute()} has {', '.join(speakers)} where speakers should be; {layout}, "
            'such as "LibriSpeech/train-clean-100"'
        )
    return found


def _files(folder: Path, above: frozenset[Path] = frozenset()) -> Iterator[Path]:
    """All files below a folder but hidden ones, also where links lead, but not round in circles."""
    place = folder.resolve()
    if place in above:
        return
    try:
        inside = list(folder.iterdir())
    except OSError as error:
        raise DataError(f"{folder} cannot be read ({error})") from None
    for path in inside:
        if path.name.startswith("."):
            continue
        if path.is_dir():
            yield from _files(path, above | {place})
        else:
            yield path


def read_list(path: Path, corpus: Corpus) -> tuple[list[str], dict[str, str]]:
    """Names of the recordings that a list names, in the order of names, and what it lacks.

    Parameters
    ----------
    path : Path
        One name or path without suffix a line, as Oord et al. published for LibriSpeech.
    corpus : Corpus

    Returns
    -------
    (list of str, dict of str)
        The second one says of names without a recording which line they are in.

    Raises
    ------
    DataNotFoundError
        If there is no such list.
    DataError
        If it names nothing, or is not text.
    """
    found: set[str] = set()
    missing: dict[str, str] = {}
    for number, line in _lines(path):
        where = f"{path}, line {number}"
        name = corpus.find(line, where=where)
        if name is None:
            missing.setdefault(line, f"{where}: no recording {line!r} below {corpus.folder}")
        else:
            found.add(name)
    if not found:
        first = next(iter(missing.values()), "it is empty")
        raise DataError(f"{path} names no recording that is there, one a line; {first}")
    return sorted(found), missing


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines that are not empty, with their numbers from 1."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise DataNotFoundError(
            f"no list of recordings at {path.absolute()}: one name a line, as in train_split.txt "
            "and test_split.txt, which Oord et al. (2018) published for LibriSpeech; put it there, "
            "or leave source.splits out to have every speaker's recordings split"
        ) from None
    except (UnicodeDecodeError, OSError) as error:
        raise DataError(f"{path} cannot be read as a list of recordings ({error})") from None
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            yield number, line.strip()


def split_speakers(corpus: Corpus, *, test: float) -> dict[Split, list[str]]:
    """Some of every speaker's recordings for test, the others for training.

    Which ones a hash of their names decides. A speaker with two or more has some in either split,
    one with a single recording has it in training.

    Parameters
    ----------
    corpus : Corpus
    test : float
        The part of each speaker's recordings, rounded.
    """
    own: dict[str, list[str]] = defaultdict(list)
    for name, speaker in corpus.speakers.items():
        own[speaker].append(name)
    chosen: set[str] = set()
    for names in own.values():
        count = min(max(round(len(names) * test), 1), len(names) - 1)
        chosen.update(sorted(names, key=_hash)[:count])
    return {
        "train": [name for name in corpus.paths if name not in chosen],
        "test": [name for name in corpus.paths if name in chosen],
    }


def _hash(name: str) -> str:
    return hashlib.sha256(name.encode("utf-8", "surrogateescape")).hexdigest()


def refuse_missing(missing: Sequence[str]) -> None:
    """Refuse lists that name recordings that are not there.

    Raises
    ------
    DataError
        With the first of them, and how many more there are.
    """
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DataError(
            f"{missing[0]}{more}; add what is missing, take it out of the list, or set "
            'source.on_error = "skip"'
        )
