"""The form in which activations are stored, and how exact it is.

================  ==========  =============================================================
name              stored as   a value
================  ==========  =============================================================
``float32``       float32     itself
``bitround-N``    float32     with N bits of mantissa, rounded to nearest even; any reader
                              gets it, and the zeros that are left compress
``float16``       float16     rounded; above 65504 it cannot be stored
``bfloat16``      uint16      the upper half of its float32, rounded to nearest even
``float8_e4m3``   uint8       a float8 (4 bits of exponent, 3 of mantissa) times its
                              channel's scale, a power of two
``uint8``         uint8       (code - zero point) times its channel's scale
================  ==========  =============================================================

Scales are calibrated on samples of the dataset; values beyond the calibrated range saturate, and
are counted. Zero is always stored exactly: after a ReLU most values are zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor

from gim_stagewise.cache.precision_error import Account, PrecisionError
from gim_stagewise.config import BITROUND, PRECISIONS

_STORED = {"float16": "float16", "bfloat16": "uint16", "float8_e4m3": "uint8", "uint8": "uint8"}
_LARGEST_FLOAT8 = 448.0
_LARGEST_FLOAT16 = 65504.0
_LARGEST_BFLOAT16 = (2 - 2.0**-7) * 2.0**127
# How far beyond what was seen in calibration values may go before they saturate. A float8 has range
# to spare; each code of a uint8 counts.
_FLOAT8_MARGIN = 4.0
_UINT8_MARGIN = 1.1
# So that no code decodes to infinity: 448 times a scale, and the ends of a uint8 with its margin
# and rounding, are float32 numbers.
_LARGEST_FLOAT8_SCALE_POWER = 119
_LARGEST_UINT8_END = 2.0**127
# Values that are encoded together: as many as stay in a processor's cache, or keep a GPU busy.
_TOGETHER = {"cpu": 2**16, "cuda": 2**22}


def _few_rows(*tensors: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    """Tensors of as many rows, in parts of `_TOGETHER` values."""
    first = tensors[0]
    together = _TOGETHER.get(first.device.type, 2**16)
    rows = max(1, together * len(first) // max(1, first.numel()))
    return tuple(torch.split(tensor, rows) for tensor in tensors)


def is_precision(name: str) -> bool:
    """Whether there is a precision of that name."""
    return name in PRECISIONS or _mantissa_bits(name) is not None


def _mantissa_bits(name: str) -> int | None:
    """N of ``bitround-N``; None for any other name."""
    found = re.fullmatch(BITROUND, name)
    return int(found[1]) if found else None


@dataclass(frozen=True)
class Precision:
    """How values become stored ones, and back.

    Parameters
    ----------
    name : str
        See the module's table.
    scale : tuple of float
        For each channel, where the precision has scales and they are known.
    zero_point : tuple of int
        Code of 0 for each channel, for "uint8".
    """

    name: str
    scale: tuple[float, ...] = ()
    zero_point: tuple[int, ...] = ()

    @property
    def stored_dtype(self) -> str:
        """NumPy name of the type of stored values."""
        return _STORED.get(self.name, "float32")

    @property
    def stored_torch(self) -> torch.dtype:
        """The same type in PyTorch."""
        found: torch.dtype = getattr(torch, self.stored_dtype)
        return found

    @property
    def itemsize(self) -> int:
        """Bytes of a stored value before compression."""
        return np.dtype(self.stored_dtype).itemsize

    @property
    def lossless(self) -> bool:
        return self.name == "float32"

    @property
    def has_scales(self) -> bool:
        return self.name in {"uint8", "float8_e4m3"}

    @property
    def plain(self) -> bool:
        """Whether any Zarr reader gets the values, without our decoding."""
        return self.stored_dtype in {"float32", "float16"}

    def calibrated(self, lowest: Tensor, highest: Tensor) -> Precision:
        """With scales for values between these, per channel.

        Parameters
        ----------
        lowest, highest : Tensor
            float32 [channel], as seen on a sample.
        """
        if not self.has_scales:
            return self
        lowest, highest = lowest.double().clamp(max=0), highest.double().clamp(min=0)
        if self.name == "float8_e4m3":
            reach = _some_reach(torch.maximum(-lowest, highest))
            powers = torch.log2(reach * _FLOAT8_MARGIN / _LARGEST_FLOAT8).ceil()
            powers = powers.clamp(max=_LARGEST_FLOAT8_SCALE_POWER)
            return replace(self, scale=tuple(torch.exp2(powers).tolist()))
        lowest = lowest.clamp(min=-_LARGEST_UINT8_END)
        highest = highest.clamp(max=_LARGEST_UINT8_END)
        reach = _some_reach(highest - lowest) * _UINT8_MARGIN
        step = (reach / 255).float()
        # Rounded to a whole code, so that 0 is a code of its own, and both ends have one.
        zero = torch.ceil(-lowest * _UINT8_MARGIN / step.double())
        zero = zero.minimum(255 - torch.round(highest / step.double())).clamp(0, 255)
        return replace(
            self, scale=tuple(step.tolist()), zero_point=tuple(int(z) for z in zero.tolist())
        )

    def with_any_scales(self, channels: int) -> Precision:
        """With scales that stand for those that are not known yet, for counting memory."""
        if not self.has_scales:
            return self
        return replace(self, scale=(1.0,) * channels, zero_point=(1,) * channels)

    def encode(
        self, values: Float[Tensor, "row channel *space"]
    ) -> tuple[Tensor, PrecisionError | None]:
        """Values as they are stored.

        Parameters
        ----------
        values : Tensor
            float32, finite.

        Returns
        -------
        (Tensor, PrecisionError or None)
            Of the stored type, in the same shape; and what that does to the values, None if
            nothing. What is beyond the range that can be stored becomes its end.
        """
        if self.lossless:
            return values, None
        stored = torch.empty_like(values, dtype=self.stored_torch)
        error = Account(values)
        space = values.ndim - 2
        scale, zero = (
            self._per_channel(self.scale, values, space),
            self._per_channel(self.zero_point, values, space),
        )
        for some, kept in zip(*_few_rows(values, stored), strict=True):
            if self.name == "uint8":
                self._encode_codes(some, kept, scale, zero, error)
            else:
                kept.copy_(self._encoded(some, scale, error))
                error.add(some, self._decode_into(torch.empty_like(some), kept, scale, zero))
        return stored, error.total()

    def _encode_codes(
        self, values: Tensor, stored: Tensor, scale: Tensor, zero: Tensor, error: Account
    ) -> None:
        """Encode as uint8, in few passes: what is lost is counted in steps of a code."""
        steps = values / scale
        codes = steps.round()
        shifted = codes + zero if any(self.zero_point) else codes
        within = error.clamped(shifted, 0, 255)
        stored.copy_(within)
        if within is shifted:
            error.add_steps(steps, codes, scale)
        else:
            error.add(values, self._decode_into(torch.empty_like(values), stored, scale, zero))

    def _encoded(self, values: Tensor, scale: Tensor, error: Account) -> Tensor:
        if self.name == "float8_e4m3":
            scaled = error.clamped(values / scale, -_LARGEST_FLOAT8, _LARGEST_FLOAT8)
            return scaled.to(torch.float8_e4m3fn).view(torch.uint8)
        if self.name == "float16":
            return error.clamped(values, -_LARGEST_FLOAT16, _LARGEST_FLOAT16).half()
        if self.name == "bfloat16":
            return (
                error.clamped(values, -_LARGEST_BFLOAT16, _LARGEST_BFLOAT16)
                .bfloat16()
                .view(torch.uint16)
            )
        bits = _mantissa_bits(self.name)
        assert bits is not None
        largest = (2 - 2.0**-bits) * 2.0**127
        return _rounded(error.clamped(values, -largest, largest), bits)

    def decode(
        self, stored: Tensor, *, out: Tensor | None = None, space: int = 2
    ) -> Float[Tensor, "... channel *space"]:
        """Stored values as floats, on the device they are on.

        Parameters
        ----------
        stored : Tensor
            [..., channel, height, width], or [..., channel, time], of the stored type.
        out : Tensor, optional
            Where they go, in the same shape: float32, or float16 for those who can do with less.
        space : int
            Axes after the channel.
        """
        if out is None:
            out = torch.empty(stored.shape, device=stored.device)
        scale = self._per_channel(self.scale, stored, space)
        zero = self._per_channel(self.zero_point, stored, space)
        if out.dtype == torch.float32 or not self.has_scales:
            return self._decode_into(out, stored, scale, zero)
        # Scales are float32, and so is what they are applied to; only then it is rounded.
        for some, part in zip(*_few_rows(stored, out), strict=True):
            values = torch.empty(some.shape, device=some.device)
            part.copy_(self._decode_into(values, some, scale, zero))
        return out

    def _decode_into(self, out: Tensor, stored: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        if self.name == "uint8":
            out.copy_(stored)
            if any(self.zero_point):
                out -= zero
            return out.mul_(scale)
        if self.name == "float8_e4m3":
            return out.copy_(stored.view(torch.float8_e4m3fn)).mul_(scale)
        if self.name == "bfloat16":
            return out.copy_(stored.view(torch.bfloat16))
        return out.copy_(stored)

    def _per_channel(self, numbers: Sequence[float], like: Tensor, space: int) -> Tensor:
        return torch.from_numpy(_array(tuple(numbers))).to(like.device).reshape(-1, *(1,) * space)

    def as_json(self) -> dict[str, Any]:
        """What a manifest says: the name, and how to decode where plain readers cannot."""
        if self.plain:
            return {"name": self.name, "decode": None}
        if self.name == "bfloat16":
            return {"name": self.name, "decode": {"bits": "upper half of a float32"}}
        decode: dict[str, Any] = {"scale": list(self.scale), "axis": "channel"}
        if self.name == "uint8":
            decode = {"formula": "(code - zero_point) * scale", **decode}
            decode["zero_point"] = list(self.zero_point)
        else:
            decode = {"formula": "float8_e4m3fn(code) * scale", **decode}
        return {"name": self.name, "decode": decode}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Precision:
        """The reverse of `as_json`.

        Raises
        ------
        ValueError
            If that is no precision.
        """
        name, decode = str(content["name"]), content["decode"] or {}
        if not is_precision(name):
            raise ValueError(f"unknown precision {name!r}")
        scale = tuple(float(s) for s in decode.get("scale", ()))
        zero = tuple(int(z) for z in decode.get("zero_point", ()))
        if not all(math.isfinite(s) and s > 0 for s in scale):
            raise ValueError("a scale is not a positive number")
        return cls(name, scale, zero)

    def decode_array(self, stored: NDArray[Any], *, space: int = 2) -> NDArray[np.float32]:
        """`decode` for arrays [..., channel, *space]."""
        if self.stored_dtype == "float32":
            return stored
        decoded: NDArray[np.float32] = self.decode(torch.from_numpy(stored), space=space).numpy()
        return decoded


PLAIN = Precision("float32")


def _some_reach(reach: Tensor) -> Tensor:
    """Of each channel; one that is 0 on the sample, and may not be elsewhere, is like the others.

    None is so small that its scale could not be told from 0 in float32.
    """
    alive = reach[reach > 0]
    typical = alive.median() if len(alive) else torch.ones((), dtype=reach.dtype)
    return torch.where(reach > 0, reach, typical).clamp(min=2.0**-100)


# An array and not a tensor, which might be a fake one that counts memory.
@lru_cache(maxsize=64)
def _array(numbers: tuple[float, ...]) -> NDArray[np.float32]:
    return np.array(numbers, np.float32)


def _rounded(values: Tensor, bits: int) -> Tensor:
    """Floats with ``bits`` bits of mantissa, rounded to nearest, ties to even."""
    drop = 23 - bits
    whole = values.contiguous().view(torch.int32)
    odd = (whole >> drop) & 1
    whole = (whole + ((1 << (drop - 1)) - 1) + odd) & -(1 << drop)
    return whole.view(torch.float32)
