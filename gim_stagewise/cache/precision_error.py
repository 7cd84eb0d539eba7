"""What storing did to values, added up per channel."""

from __future__ import annotations

import hashlib
import io
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_DIGEST_BYTES = hashlib.sha256().digest_size


@dataclass(frozen=True)
class PrecisionError:
    """What storing did to values, summed up per channel.

    Parameters
    ----------
    squared_error, squared_values : array of float64 [channel]
    beyond : array of float64 [channel]
        Values that saturated.
    values : array of float64 [channel]
        Values.
    """

    squared_error: NDArray[np.float64]
    squared_values: NDArray[np.float64]
    beyond: NDArray[np.float64]
    values: NDArray[np.float64]

    @classmethod
    def load(cls, path: Path) -> PrecisionError:
        """Read what `save` wrote.

        Raises
        ------
        ValueError
            If the file is damaged.
        """
        content = path.read_bytes()
        values, digest = content[:-_DIGEST_BYTES], content[-_DIGEST_BYTES:]
        if hashlib.sha256(values).digest() != digest:
            raise ValueError(f"{path} is damaged")
        return cls(*np.load(io.BytesIO(values), allow_pickle=False))

    def save(self, path: Path) -> None:
        """Write a NumPy file, with its hash after it."""
        parts = (self.squared_error, self.squared_values, self.beyond, self.values)
        buffer = io.BytesIO()
        np.save(buffer, np.stack(parts), allow_pickle=False)
        path.write_bytes(buffer.getvalue() + hashlib.sha256(buffer.getvalue()).digest())

    def __add__(self, other: PrecisionError) -> PrecisionError:
        return PrecisionError(
            self.squared_error + other.squared_error,
            self.squared_values + other.squared_values,
            self.beyond + other.beyond,
            self.values + other.values,
        )

    @property
    def relative(self) -> float:
        """Relative L2 error over all values."""
        return _ratio(float(self.squared_error.sum()), float(self.squared_values.sum()))

    @property
    def worst_channel(self) -> tuple[int, float]:
        """The channel with the largest relative L2 error, and that error."""
        errors = [
            _ratio(e, v) for e, v in zip(self.squared_error, self.squared_values, strict=True)
        ]
        worst = int(np.argmax(errors))
        return worst, errors[worst]

    @property
    def saturated(self) -> int:
        """Values that were beyond the range that can be stored."""
        return int(self.beyond.sum())

    def as_json(self) -> dict[str, Any]:
        channel, error = self.worst_channel
        return {
            "relative_l2": self.relative,
            "worst_channel": channel,
            "worst_channel_relative_l2": error,
            "saturated": self.saturated,
            "values": int(self.values.sum()),
        }


class Account:
    """Adds up what storing does, a few rows at a time."""

    def __init__(self, values: Tensor) -> None:
        channels, each = values.shape[1], values.numel() // values.shape[1]
        self._error, self._squares, self._beyond = torch.zeros(
            3, channels, dtype=torch.float64, device=values.device
        )
        self._values = torch.full_like(self._error, each)

    def clamped(self, values: Tensor, lowest: float, highest: float) -> Tensor:
        """Values within a range, and those that were not counted."""
        smallest, largest = values.aminmax()
        if smallest < lowest or largest > highest:
            beyond = (values < lowest) | (values > highest)
            self._beyond += beyond.sum((0, *_space(values)))
            return values.clamp(lowest, highest)
        return values

    def add_steps(self, steps: Tensor, codes: Tensor, scale: Tensor) -> None:
        """Values and what is stored of them, both in units of a scale per channel."""
        unit, space = scale.flatten().double().square(), _space(steps)
        self._squares += unit * steps.square().sum(space).sum(0, dtype=torch.float64)
        self._error += unit * steps.sub_(codes).square_().sum(space).sum(0, dtype=torch.float64)

    def add(self, values: Tensor, decoded: Tensor) -> None:
        # In float64: squares of float32 values leave the range of float32 at both ends.
        self._error += _squares(decoded - values)
        self._squares += _squares(values)

    def total(self) -> PrecisionError:
        parts = (self._error, self._squares, self._beyond, self._values)
        return PrecisionError(*(part.cpu().numpy() for part in parts))


def _space(values: Tensor) -> tuple[int, ...]:
    """Axes after row and channel."""
    return tuple(range(2, values.ndim))


def _squares(values: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(values, dim=_space(values), dtype=torch.float64)
    return norms.square_().sum(0)


def _ratio(error: float, values: float) -> float:
    return math.sqrt(error / values) if values > 0 else 0.0
