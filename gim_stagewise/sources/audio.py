"""Recordings of any length, each in a file of its own, read in parts."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import SourceConfig
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError
from gim_stagewise.sources.base import SEQUENCE_AXES
from gim_stagewise.sources.files import RegionFile
from gim_stagewise.sources.large import LargeSource, find_files
from gim_stagewise.sources.resampled import Mono, Resampled
from gim_stagewise.windows import Region

# Frames that libsndfile gives where a header does not say how many there are.
_UNKNOWN_FRAMES = 2**62
_LOSSY = re.compile("VORBIS|OPUS|MPEG")
# What libsndfile says of samples that are not there; sizes of all ones, as programs write that do
# not know them yet, are left alone.
_CUT_OFF = re.compile(
    r"(data|SSND|riff) *: (?!4294967295 )[1-9]\d* \(should be \d+\)"
    r"|does not match value from 'ds64'"
)


def open_audio(config: SourceConfig) -> LargeSource:
    """Recordings in WAV, FLAC or AIFF files of any length: ``kind = "audio"``.

    What is compressed with loss (OGG, MP3) is refused: its parts cannot be read exactly.

    Each table ``[source.splits.<split>]`` has ``files``, a pattern such as ``"**/*.flac"`` or a
    list of paths, below ``source.root``. All of them need the same sample rate, that of
    ``source.options.rate`` if it is given (in Hz).

    Raises
    ------
    ConfigError
        If the tables are wrong, or soundfile is not installed.
    DataNotFoundError
        If a file is not there.
    DataError
        If one cannot be read, and ``source.on_error`` is "stop".
    """
    if unknown := set(config.options) - {"rate"}:
        raise ConfigError("unknown key; known: rate", key=f"source.options.{sorted(unknown)[0]}")
    rate = config.options.get("rate")
    if rate is not None and (type(rate) is not int or rate < 1):
        raise ConfigError(f"is {rate!r}, expected samples per second", key="source.options.rate")
    return LargeSource(
        find_files(config, 'unlabeled = {files = "**/*.flac"}'),
        opener=Recording,
        axes=SEQUENCE_AXES,
        digest=config.digest,
        on_error=config.on_error,
        rate=rate,
    )


class Recording:
    """A recording whose parts can be read.

    Attributes
    ----------
    rate : int
        Samples a second.

    Raises
    ------
    ConfigError
        If soundfile is not installed.
    DataNotFoundError
        If the file is not there.
    DataError
        If it cannot be read as a recording, is compressed with loss or cut off.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise DataNotFoundError(f"no such file: {path.absolute()}; check source.root and files")
        try:
            import soundfile
        except ImportError:
            raise ConfigError(
                f"{path} is a recording, and soundfile is not installed; "
                'install it with `pip install "gim-stagewise[audio]"`',
                key="source.kind",
            ) from None
        self._path = path
        self._errors: tuple[type[Exception], ...] = (soundfile.SoundFileError, RuntimeError)
        try:
            # As bytes, since folders need not be named in UTF-8.
            self._file = soundfile.SoundFile(os.fsencode(path) if os.name == "posix" else path)
        except self._errors as error:
            raise DataError(f"{path} cannot be read as a recording ({error})") from None
        if _LOSSY.search(self._file.subtype):
            raise DataError(
                f"{path} is compressed with loss ({self._file.subtype}), and parts of such files "
                "cannot be read exactly; convert it to FLAC"
            )
        if cut := _CUT_OFF.search(self._file.extra_info):
            raise DataError(f"{path} is cut off ({cut[0].strip()})")
        if self._file.frames >= _UNKNOWN_FRAMES:
            raise DataError(
                f"{path} does not say how long it is, as what is written to a pipe; write it again "
                "to a file"
            )
        self.rate = int(self._file.samplerate)
        self.extent: tuple[int, ...] = (int(self._file.frames),)
        self.channels = int(self._file.channels)
        self.dtype: np.dtype[Any] = np.dtype("float32")
        self.chunk_bytes = 0

    def read(self, region: Region) -> NDArray[np.float32]:
        """Some steps, float32 [channel, time]; what is stored as integers lies in [-1, 1]."""
        (span,) = region
        try:
            self._file.seek(span.start)
            values = self._file.read(len(span), dtype="float32", always_2d=True)
        except self._errors as error:
            raise DataError(
                f"{self._path}: steps {span.start} to {span.stop} cannot be read ({error})"
            ) from None
        if len(values) != len(span):
            raise DataError(
                f"{self._path} says that it has {self.extent[0]} steps, and ends at step "
                f"{span.start + len(values)}: it is cut off"
            )
        return np.ascontiguousarray(values.T)


@dataclass(frozen=True)
class RecordingForm:
    """What recordings are made into when they are read.

    Parameters
    ----------
    rate : int
        Samples a second.
    resample : bool
        Whether recordings of another rate are resampled, and not refused.
    mono : bool
        Whether the channels of a recording are averaged, and more than one not refused.
    """

    rate: int = 16_000
    resample: bool = True
    mono: bool = False

    def open(self, path: Path) -> RegionFile:
        """Open a recording in this form.

        Raises
        ------
        DataNotFoundError
            If it is not there.
        DataError
            If it cannot be read, or is of another form and not to be converted.
        """
        recording = Recording(path)
        file: RegionFile = recording
        if recording.channels > 1:
            if not self.mono:
                raise DataError(
                    f"{path} has {recording.channels} channels; set source.options.mono = true to "
                    "have them averaged"
                )
            file = Mono(recording)
        if recording.rate != self.rate:
            if not self.resample:
                raise DataError(
                    f"{path} has {recording.rate} Hz, and source.options.rate is {self.rate} Hz; "
                    "set source.options.resample = true, or resample it"
                )
            file = Resampled(file, old=recording.rate, new=self.rate)
        return file
