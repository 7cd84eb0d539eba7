"""The course of a training as lines of JSON, and as TensorBoard events where that is installed.

Lines are flushed whenever training state is saved. When training goes on from a checkpoint, lines
beyond it are dropped, so that every step and epoch stands there once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TextIO

from gim_stagewise.durable import storage_errors, write_atomic


class MetricsLog:
    """Append-only log of one stage.

    Each line has ``step`` (steps done) and ``epoch`` (from 1); a step's line has ``loss``, an
    epoch's ``train_loss``, ``validation_loss`` (nats; of its last weights, on as many training
    samples as are held out, and on these), ``seconds`` and ``samples_per_second``.

    Parameters
    ----------
    folder : Path
        Gets ``metrics.jsonl`` and, with TensorBoard, event files.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "metrics.jsonl"
        self._file: TextIO | None = None
        self._events: Any = None

    def open(self, *, steps_done: int) -> None:
        """Start, or go on after ``steps_done`` steps."""
        kept = [line for line in read_metrics(self._path) if line["step"] <= steps_done]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        write_atomic(self._path, lambda path: path.write_text(text, encoding="utf-8"))
        self._file = self._path.open("a", encoding="utf-8")
        self._events = _event_writer(self._path.parent, steps_done)

    def write(self, step: int, epoch: int, **figures: float) -> None:
        """Add a line."""
        if self._file is None:
            raise RuntimeError("the log is not open")
        with storage_errors(str(self._path)):
            self._file.write(json.dumps({"step": step, "epoch": epoch, **figures}) + "\n")
        if self._events is not None:
            for name, value in figures.items():
                self._events.add_scalar(name, value, step)

    def flush(self) -> None:
        """Hand everything to the operating system."""
        if self._file is not None:
            with storage_errors(str(self._path)):
                self._file.flush()

    def close(self) -> None:
        if self._file is not None:
            self.flush()
            self._file.close()
            self._file = None
        if self._events is not None:
            self._events.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The whole lines of a log; empty if there is none."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return []
    lines = []
    for line in text.split("\n")[:-1]:
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            lines.append(record)
    return lines


def _event_writer(folder: Path, steps_done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=steps_done)
