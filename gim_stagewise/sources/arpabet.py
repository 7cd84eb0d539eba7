"""The phones of English as espeak-ng calls them, in the classes of the ARPAbet."""

from __future__ import annotations

from gim_stagewise.errors import DataError

# What espeak-ng calls phones, by what they are called in the ARPAbet without stress. Those that
# the ARPAbet has no symbol for are of the class of what they begin with.
_ESPEAK = {
    "AA": "0 A: A@ aa",
    "AE": "a",
    "AH": "@ @- 3 V a#",
    "AO": "O: O@ o@",
    "AW": "aU",
    "AY": "aI aI@",
    "B": "b",
    "CH": "tS",
    "D": "d",
    "DH": "D",
    "EH": "E e@",
    "ER": "3:",
    "EY": "eI",
    "F": "f",
    "G": "g",
    "HH": "h",
    "IH": "I I2 i@ i@3",
    "IY": "i: i",
    "JH": "dZ",
    "K": "k",
    "L": "l @L",
    "M": "m",
    "N": "n",
    "NG": "N",
    "OW": "oU",
    "OY": "OI",
    "P": "p",
    "R": "r r-",
    "S": "s",
    "SH": "S",
    "T": "t",
    "TH": "T",
    "UH": "U U@",
    "UW": "u:",
    "V": "v",
    "W": "w",
    "Y": "j ;",
    "Z": "z",
    "ZH": "Z",
}
# Names of classes by their numbers; pauses are of the first.
PHONES = ("sil", *_ESPEAK)
_CLASSES = {
    called: PHONES.index(phone) for phone, names in _ESPEAK.items() for called in names.split()
}


def phone_class(name: str) -> int:
    """Class of a phone in `PHONES`.

    Parameters
    ----------
    name : str
        What espeak-ng calls it, with marks of stress or without.

    Raises
    ------
    DataError
        If there is no such phone.
    """
    name = name.lstrip("',%=")
    if name.startswith("_"):
        return 0
    if name not in _CLASSES:
        raise DataError(
            f"espeak-ng said a phone {name!r}, which is not known here; install "
            "espeakng-loader==0.2.4, for which the phones are known"
        )
    return _CLASSES[name]
