"""The patches that excite a neuron most (figure 2), found by streaming over the dataset."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Neuron:
    """A channel of a module's embeddings, and the patches that excite it most.

    Parameters
    ----------
    channel : int
    selectivity : float
        By how many standard deviations these patches lie above the channel's mean.
    patches : list of (str, int, int)
        Sample, grid row and grid column, the most exciting first; no two of one sample.
    """

    channel: int
    selectivity: float
    patches: list[tuple[str, int, int]]


def most_exciting(
    batches: Iterable[tuple[list[str], NDArray[np.float32]]], *, patches: int, neurons: int
) -> list[Neuron]:
    """The most selective channels, and what excites them most.

    A channel that is excited by what already excites a more selective one is passed over, unless
    there are too few others. What is held is one batch and ``patches`` places for each channel.

    Parameters
    ----------
    batches : iterable
        Ids and embeddings, [sample, grid_row, grid_col, channel].
    patches : int
        For each channel.
    neurons : int
        Channels to give, the most selective first.
    """
    best: NDArray[np.float64] | None = None
    places: NDArray[np.int64] | None = None
    names: dict[int, str] = {}
    seen, count, total, squares = 0, 0, 0.0, 0.0
    for ids, embeddings in batches:
        samples, rows, columns, channels = embeddings.shape
        flat = embeddings.reshape(samples, rows * columns, channels).astype(np.float64)
        count += samples * rows * columns
        total = total + flat.sum((0, 1))
        squares = squares + (flat**2).sum((0, 1))
        at = flat.argmax(1)
        values = np.take_along_axis(flat, at[:, None], 1)[:, 0]
        own = np.stack([np.broadcast_to(np.arange(samples)[:, None] + seen, at.shape), at], 2)
        names |= dict(enumerate(ids, start=seen))
        seen += samples
        if best is None or places is None:
            best, places = np.empty((0, channels)), np.empty((0, channels, 2), np.int64)
        best, places = np.concatenate([best, values]), np.concatenate([places, own])
        order = np.argsort(-best, axis=0, kind="stable")[:patches]
        best = np.take_along_axis(best, order, 0)
        places = np.take_along_axis(places, order[..., None], 0)
        names = {number: names[number] for number in np.unique(places[..., 0]).tolist()}
    if best is None or places is None:
        return []
    mean = total / count
    deviation = np.sqrt(np.maximum(squares / count - mean**2, 0))
    above = np.divide(best.mean(0) - mean, deviation, where=deviation > 0, out=np.zeros_like(mean))
    ranked = [
        Neuron(
            int(channel),
            float(above[channel]),
            [(names[n], at // columns, at % columns) for n, at in places[:, channel].tolist()],
        )
        for channel in np.argsort(-above, kind="stable")
    ]
    return _different(ranked, neurons)


def _different(ranked: Sequence[Neuron], count: int) -> list[Neuron]:
    """The first of them that share less than half of their patches with any before."""
    new: list[Neuron] = []
    repeated: list[Neuron] = []
    for neuron in ranked:
        shared = (len(set(neuron.patches).intersection(other.patches)) for other in new)
        (repeated if 2 * max(shared, default=0) >= len(neuron.patches) else new).append(neuron)
    chosen = [*new, *repeated][:count]
    return sorted(chosen, key=lambda neuron: -neuron.selectivity)
