"""What several tests compare."""

from __future__ import annotations

import gc
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, get_args

import numpy as np
import torch
import zarr
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError
from safetensors.torch import load_file

from gim_stagewise.config.tables import Table
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.progress import Silent, Task
from gim_stagewise.report.record import save_record
from gim_stagewise.stage.extraction_plan import Workers

# A module whose forward looks at values, which are not there when it is traced or counted.
LOOKS_AT_VALUES = """
from torch import nn

class Own(nn.Module):
    def __init__(self, in_channels, width=4):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, width, 3, padding=1)

    def forward(self, x):
        z = self.conv(x)
        return z * 2 if float(z.detach().sum()) > 1e30 else z
"""


class StopError(Exception):
    """Ends a run at a chosen point."""


class Heard(Silent):
    """Notes what was begun and said."""

    def __init__(self) -> None:
        self.tasks: list[str] = []
        self.notes: list[str] = []

    @contextmanager
    def task(self, label: str, *, total: int, done: int = 0, unit: str) -> Iterator[Task]:
        self.tasks.append(label)
        with super().task(label, total=total, done=done, unit=unit) as task:
            yield task

    def note(self, text: str) -> None:
        self.notes.append(text)


def edit(file: Path, old: str, new: str) -> None:
    """Change a pipeline file; ``old`` must be there."""
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    """All frozen weights of a run, by module and name."""
    found = {}
    for file in sorted(folder.glob("m*.safetensors")):
        for name, tensor in load_file(file).items():
            found[f"{file.stem}.{name}"] = tensor
    return found


def caches_of(folder: Path) -> dict[str, NDArray[Any]]:
    """All decoded arrays of all caches of a run, read with plain Zarr."""
    found = {}
    for path in sorted(folder.glob("m*.zarr")):
        group = zarr.open_group(str(path), mode="r")
        for name, member in group.members(max_depth=None):
            if isinstance(member, zarr.Array) and not name.startswith("checksums"):
                array: Any = member
                found[f"{path.stem}/{name}"] = array[...]
    return found


def assert_same_run(one: Path, other: Path) -> None:
    """Weights and decoded caches of two runs are equal to the last bit."""
    weights, expected = weights_of(one), weights_of(other)
    assert weights.keys() == expected.keys()
    assert weights
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name]), name
    arrays, wanted = caches_of(one), caches_of(other)
    assert arrays.keys() == wanted.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(array, wanted[name], err_msg=name)


def assert_same_files(one: Path, other: Path) -> None:
    """As `assert_same_run`, and every file of every cache is equal to the last byte."""
    assert_same_run(one, other)
    files = files_of(other)
    assert files_of(one).keys() == files.keys()
    for name, content in files_of(one).items():
        assert content == files[name], name


def files_of(folder: Path) -> dict[str, bytes]:
    """All files of all caches of a run."""
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for cache in folder.glob("m*.zarr")
        for file in cache.rglob("*")
        if file.is_file()
    }


def results_of(folder: Path) -> list[object]:
    """Losses and probes of a run, as recorded."""
    record = json.loads((folder / "run.json").read_text())
    names = ("train_loss", "validation_loss", "probe_accuracy", "random_probe_accuracy")
    stages = [[stage[name] for name in names] for stage in record["modules"]]
    return [*stages, record["probes"]]


def run_and_record(file: Path, folder: Path) -> None:
    """What `gim-stage run` does, in this process."""
    pipeline = Pipeline.from_file(file, folder=folder, device="cpu")
    save_record(pipeline, pipeline.run(workers=Workers(0)))


def shorten(
    file: Path, *, modules: int, batch: int, epochs: int, chunk: int, probe: bool = True
) -> Path:
    """Fewer modules, steps and blocks for the tiny pipeline; without labels nothing is probed."""
    file.write_text(file.read_text().partition(f"[module.{modules + 1}]")[0])
    edit(file, "batch = 8\n", f"batch = {batch}\n")
    edit(file, "max_epochs = 3", f"max_epochs = {epochs}")
    edit(file, "chunk = 7", f"chunk = {chunk}")
    if not probe:
        for split in ("train", "test"):
            edit(file, f', labels = "{split}_labels.npy"', "")
    return file


def live_parameters() -> int:
    """Numbers held by all parameters that exist in this process, garbage included."""
    return sum(o.numel() for o in gc.get_objects() if isinstance(o, torch.nn.Parameter))


def one_error(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The single message of a command that failed as it should."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def other_value(table: Table, name: str) -> Any:
    """A value that a setting can have, and has not; of one that can have no other, any."""
    field = type(table).model_fields[name]
    possible: TypeAdapter[Any] = TypeAdapter(Annotated[field.annotation, field])  # type: ignore[arg-type]
    now, choices = getattr(table, name), get_args(field.annotation)
    others = [7, 0.3, "other", "float16", (0.5,), {"other": 1}, {"test": {}}]
    for value in [*choices, not now, *others]:
        with suppress(ValidationError):
            if value != now and possible.validate_python(value, strict=True) == value:
                return value
    return "another"
