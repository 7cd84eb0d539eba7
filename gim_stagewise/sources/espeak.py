"""Speech with the times of its phones from espeak-ng, through the package espeakng-loader.

espeak-ng is under the GNU General Public License, version 3. It is loaded where speech is
synthesised and nowhere else, and no part of it is in this package.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.errors import ConfigError, DataError

# Of espeak-ng/speak_lib.h.
_SYNCHRONOUS = 2
_PHONEME_EVENTS = 1
_DONT_EXIT = 0x8000
_CHARS_UTF8 = 1
_RATE, _PITCH = 1, 3
_LIST_ENDS, _PHONEME = 0, 7
_SEED = 1


class _Id(ctypes.Union):
    _fields_ = (
        ("number", ctypes.c_int),
        ("name", ctypes.c_char_p),
        ("string", ctypes.c_char * 8),
    )


class _Event(ctypes.Structure):
    _fields_ = (
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    )


_Callback = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event)
)


@dataclass(frozen=True)
class Utterance:
    """Synthesised speech.

    Parameters
    ----------
    wave : array
        int16 [sample].
    phones : list of (int, str)
        The sample at which each phone begins, and its name in espeak-ng's own alphabet, with marks
        of stress; names of pauses begin with "_".
    """

    wave: NDArray[np.int16]
    phones: list[tuple[int, str]]


class Synthesizer:
    """espeak-ng, of which a process can have one.

    It keeps state from utterance to utterance: the same sequence of calls gives the same samples
    in processes that have not used it before, and in no others.

    Attributes
    ----------
    rate : int
        Samples a second.

    Raises
    ------
    ConfigError
        If espeakng-loader is not installed, or its library cannot be loaded here.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError:
            raise missing() from None
        try:
            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
            data = espeakng_loader.get_data_path().encode()
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"needs espeak-ng, which cannot be loaded here ({error}); install "
                "espeakng-loader again",
                key="source.kind",
            ) from None
        self.rate = int(
            self._library.espeak_Initialize(_SYNCHRONOUS, 0, data, _PHONEME_EVENTS | _DONT_EXIT)
        )
        if self.rate <= 0:
            raise ConfigError(
                "needs espeak-ng, which found no voices of its own; install espeakng-loader again",
                key="source.kind",
            )
        # Otherwise by the time of day; voices with breath draw random numbers (version 1.52).
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(_SEED))
        self._wave: list[bytes] = []
        self._phones: list[tuple[int, str]] = []
        # Kept: the library calls it for as long as the process lives.
        self._callback = _Callback(self._collect)
        self._library.espeak_SetSynthCallback(self._callback)

    def _collect(self, wave: Any, count: int, events: Any) -> int:
        if wave and count:
            self._wave.append(ctypes.string_at(wave, 2 * count))
        number = 0
        while events[number].type != _LIST_ENDS:
            if events[number].type == _PHONEME:
                name = events[number].id.string.decode("utf-8", "replace")
                self._phones.append((events[number].sample, name))
            number += 1
        return 0

    def speak(self, text: str, *, voice: str, speed: int, pitch: int) -> Utterance:
        """Say a text.

        Parameters
        ----------
        text : str
        voice : str
            A language and a variant, such as "en+f3".
        speed : int
            Words a minute.
        pitch : int
            From 0 to 99; 50 is the voice's own.

        Raises
        ------
        DataError
            If espeak-ng refuses.
        """
        self._wave.clear()
        self._phones.clear()
        encoded = text.encode()
        refused = (
            self._library.espeak_SetVoiceByName(voice.encode())
            or self._library.espeak_SetParameter(_RATE, speed, 0)
            or self._library.espeak_SetParameter(_PITCH, pitch, 0)
            or self._library.espeak_Synth(
                encoded, len(encoded) + 1, 0, 0, 0, _CHARS_UTF8, None, None
            )
            or self._library.espeak_Synchronize()
        )
        if refused or not self._wave:
            raise DataError(f"espeak-ng cannot say {text!r} as {voice} (its error {refused})")
        return Utterance(np.frombuffer(b"".join(self._wave), np.int16), list(self._phones))


def missing() -> ConfigError:
    """What is said where espeakng-loader is not installed."""
    return ConfigError(
        "needs espeak-ng, and espeakng-loader is not installed; install it with "
        '`pip install "gim-stagewise[synth]"`',
        key="source.kind",
    )
