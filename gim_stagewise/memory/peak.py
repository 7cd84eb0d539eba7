"""Measure the most memory that something takes."""

from __future__ import annotations

import gc
import resource
import sys
from pathlib import Path
from types import TracebackType

import torch

from gim_stagewise.memory.allocator import trim_heap

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


class PeakMeter:
    """The high-water mark of a block of code, over what was there before it.

    On the CPU, resident memory of this process: exact to the page in a process that has done
    nothing but import; in one that has worked before, freed memory that the allocator kept is
    handed back first, as far as it goes. On a GPU, what PyTorch's allocator handed out.

    Attributes
    ----------
    baseline : int
        Bytes before.
    peak : int
        The most bytes over the baseline; known after the block.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.baseline = 0
        self.peak = 0

    def __enter__(self) -> PeakMeter:
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self.baseline = torch.cuda.memory_allocated(self.device)
        else:
            trim_heap()
            _reset_high_water_mark()
            self.baseline = resident_bytes()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        on_gpu = self.device.type == "cuda"
        most = torch.cuda.max_memory_allocated(self.device) if on_gpu else high_water_mark()
        self.peak = max(0, most - self.baseline)


def resident_bytes() -> int:
    """Resident memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def high_water_mark() -> int:
    """The most resident memory that this process has had, since it was last reset if it can be."""
    for line in _STATUS.read_text().splitlines() if _STATUS.exists() else []:
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def _reset_high_water_mark() -> None:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:  # not Linux, or not allowed: the mark is then that of the whole process
        return


def warm_up(device: torch.device) -> None:
    """Load what a first training step loads, so that it is not taken for the step's own memory."""
    layer = torch.nn.Conv2d(2, 2, 3, padding=1).to(device)
    optimizer = torch.optim.Adam(layer.parameters(), fused=True)
    layer(torch.zeros(2, 2, 4, 4, device=device)).sum().backward()
    optimizer.step()
