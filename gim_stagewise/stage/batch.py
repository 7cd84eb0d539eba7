"""A batch of samples, handed out row by row on any device."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

from gim_stagewise.cache import PLAIN, Precision
from gim_stagewise.errors import DataError
from gim_stagewise.sources import Request
from gim_stagewise.windows import Span

CPU = torch.device("cpu")
Fetch = Callable[[Span], list[Tensor]]


class SampleBatch:
    """Samples of a batch, handed out row by row, so that no whole batch is ever stacked.

    Parameters
    ----------
    count : int
        Samples.
    fetch : callable
        Gives a range of the batch's samples, [grid_row, grid_col, channel, height, width] each; or
        windows, [channel, height, width] or [channel, time].
    grid : tuple of int
        Rows and columns of a sample's patches; none of a window.
    precision : Precision
        The form that samples are fetched in.
    requests : sequence of Request
        What the samples are, where somebody asks.
    """

    def __init__(
        self,
        count: int,
        fetch: Fetch,
        grid: tuple[int, ...],
        precision: Precision = PLAIN,
        requests: Sequence[Request] = (),
    ) -> None:
        self._count = count
        self.requests = requests
        self._fetch = fetch
        self._grid = grid
        self._precision = precision

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._count, *self._grid)

    @property
    def rows(self) -> int:
        return math.prod(self.shape)

    def read(
        self, rows: Span, device: torch.device = CPU, *, out: Tensor | None = None
    ) -> Float[Tensor, "row channel *space"]:
        """Patches ``rows``, counted by sample, grid row and column; or windows.

        They are moved to the device in their stored form and decoded there; into ``out`` if it is
        given: float32, or float16 for those who can do with less. Memory that is used again spares
        the system's making new pages, which takes longer than reading does.
        """
        axes, each = len(self._grid), math.prod(self._grid)
        samples = Span(rows.start // each, -(-rows.stop // each))
        fetched = self._fetch(samples)
        parts = []
        for number, sample in enumerate(fetched, start=samples.start):
            if sample.shape[:axes] != self._grid or sample.shape[axes:] != fetched[0].shape[axes:]:
                raise DataError(
                    "samples of one batch differ in shape: "
                    f"{tuple(sample.shape)} and {tuple(fetched[0].shape)}"
                )
            patches = sample.reshape(each, *sample.shape[axes:])
            start = max(rows.start - number * each, 0)
            parts.append(patches[start : min(rows.stop - number * each, each)])
        if out is None:
            out = torch.empty(len(rows), *parts[0].shape[1:], device=device)
        space = out.ndim - 2
        if device.type == "cuda":
            return self._precision.decode(_on_device(parts, device), out=out, space=space)
        done = 0
        for part in parts:
            self._precision.decode(part, out=out[done : done + len(part)], space=space)
            done += len(part)
        return out


def _on_device(parts: list[Tensor], device: torch.device) -> Tensor:
    """Parts of a tensor put together on a GPU."""
    # Copied beside what is being computed. Page-locked memory knows by itself when it is free.
    side, main = _side_stream(device), torch.cuda.current_stream(device)
    with torch.cuda.stream(side):
        moved = torch.cat([part.to(device, non_blocking=True) for part in parts])
    main.wait_stream(side)
    moved.record_stream(main)
    return moved


@cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
