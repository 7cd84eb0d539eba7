"""Memory does not grow with the dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from conftest import TINY, make_images

from gim_stagewise.pipeline import Pipeline
from gim_stagewise.stage.extraction_plan import Workers

SCRIPT = """
import json, sys, torch
from gim_stagewise.memory import PeakMeter
from gim_stagewise.memory.peak import high_water_mark
from gim_stagewise.pipeline import Pipeline
file, folder = sys.argv[1:]
stage = Pipeline.from_file(file, folder=folder, device="cpu").stage(2)
# Not getrusage: its mark is at first that of the process that started this one.
weights, _ = stage.train()
trained = high_water_mark()
with PeakMeter(torch.device("cpu")):  # forgets the mark of training
    stage.extract(weights)
print(json.dumps({"train": trained, "extract": high_water_mark()}))
"""


def peaks(file: Path, folder: Path) -> dict[str, int]:
    """The most bytes in training, and in extraction, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file), str(folder)],
        capture_output=True,
        text=True,
        check=True,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_ten_times_the_data_take_the_same_memory(tmp_path: Path) -> None:
    found = []
    for samples in (100, 1000):
        folder = tmp_path / str(samples)
        folder.mkdir()
        make_images(folder, train=samples, test=20)
        file = folder / "pipeline.toml"
        text = TINY.format(root=folder).replace("max_epochs = 3", "max_epochs = 1")
        # 51 kB a sample, 5 and 51 MB in all: a few chunks of 1.6 MB are held, and never more.
        text = text.replace("chunk = 7", 'precision = "float32"\nchunk = 32')
        text = text.replace("channels = 6", "channels = 32").replace(
            "channels = 8, stride = 2", "channels = 32"
        )
        file.write_text(text.replace("batch = 8\n", 'batch = 25\nshuffle_window = "4MB"\n', 1))
        out = folder / "out"
        Pipeline.from_file(file, folder=out, device="cpu").run(until=1, workers=Workers(0))
        found.append(peaks(file, out))
    few, many = found
    assert all(many[what] <= 1.05 * few[what] for what in few), found
