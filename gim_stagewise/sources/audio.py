"""Recordings of any length, each in a file of its own, read in parts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.config import SourceConfig
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError
from gim_stagewise.sources.base import SEQUENCE_AXES
from gim_stagewise.sources.large import LargeSource, find_files
from gim_stagewise.windows import Region

# What libsndfile says of a file that is shorter than its header; sizes of all ones, as programs
# write that do not know them yet, are left alone.
_CUT_OFF = re.compile(
    r"(?!.*: 4294967295 )\w+ *: [1-9]\d* \(should be \d+\)|Junk after the last page"
)


def open_audio(config: SourceConfig) -> LargeSource:
    """Recordings in WAV, FLAC or OGG files of any length: ``kind = "audio"``.

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
    if config.download:
        raise ConfigError("is true, but files are never fetched", key="source.download")
    if unknown := set(config.options) - {"rate"}:
        raise ConfigError("unknown key; known: rate", key=f"source.options.{sorted(unknown)[0]}")
    rate = config.options.get("rate")
    if rate is not None and (type(rate) is not int or rate < 1):
        raise ConfigError(f"is {rate!r}, expected samples per second", key="source.options.rate")
    rates = _Rates(rate)
    return LargeSource(
        find_files(config, 'unlabeled = {files = "**/*.flac"}'),
        opener=rates.open,
        axes=SEQUENCE_AXES,
        digest=config.digest,
        on_error=config.on_error,
    )


class _Rates:
    """Opens recordings, all of which need one sample rate."""

    def __init__(self, rate: int | None) -> None:
        self._rate = rate
        self._first = "source.options.rate"

    def open(self, path: Path) -> _Recording:
        recording = _Recording(path)
        if self._rate is None:
            self._rate, self._first = recording.rate, str(path)
        if recording.rate != self._rate:
            raise DataError(
                f"{path} has {recording.rate} samples a second, {self._first} {self._rate}; "
                "resample it, or leave it out"
            )
        return recording


class _Recording:
    """A recording whose parts can be read."""

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
            self._file = soundfile.SoundFile(path)
        except self._errors as error:
            raise DataError(f"{path} cannot be read as a recording ({error})") from None
        if cut := _CUT_OFF.search(self._file.extra_info):
            raise DataError(f"{path} is cut off or damaged ({cut[0].strip()})")
        self.rate = int(self._file.samplerate)
        self.extent: tuple[int, ...] = (int(self._file.frames),)
        self.channels = int(self._file.channels)
        self.dtype: np.dtype[Any] = np.dtype("float32")

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
