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
import json, sys
from pathlib import Path
from gim_stagewise.memory.peak import high_water_mark
from gim_stagewise.pipeline import Pipeline
file, folder, what = sys.argv[1:]
stage = Pipeline.from_file(file, folder=folder, device="cpu").stage(2)
if what == "train":
    stage.train()
else:
    stage.extract(stage.load_weights())
# Not getrusage: its mark is at first that of the process that started this one.
print(json.dumps(high_water_mark()))
"""


def peak(file: Path, folder: Path, what: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(file), str(folder), what],
        capture_output=True,
        text=True,
        check=True,
    )
    found: int = json.loads(done.stdout)
    return found


def test_ten_times_the_data_take_the_same_memory(tmp_path: Path) -> None:
    peaks: dict[str, list[int]] = {"train": [], "extract": []}
    for samples in (120, 1200):
        folder = tmp_path / str(samples)
        folder.mkdir()
        make_images(folder, train=samples, test=20)
        file = folder / "pipeline.toml"
        text = TINY.format(root=folder).replace("max_epochs = 3", "max_epochs = 1")
        # 51 kB a sample, 6 and 60 MB in all: a few chunks of 1.6 MB are held, and never more.
        text = text.replace("chunk = 7", 'precision = "float32"\nchunk = 32')
        text = text.replace("channels = 6", "channels = 32").replace(
            "channels = 8, stride = 2", "channels = 32"
        )
        file.write_text(text.replace("batch = 8\n", 'batch = 8\nshuffle_window = "4MB"\n', 1))
        out = folder / "out"
        Pipeline.from_file(file, folder=out, device="cpu").run(until=1, workers=Workers(0))
        for what, found in peaks.items():
            found.append(peak(file, out, what))
    for what, (few, many) in peaks.items():
        assert many <= 1.05 * few, (what, few, many)
