"""Memory does not grow with the dataset."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TINY, make_images

SCRIPT = """
import json, resource, sys
from pathlib import Path
from gim_stagewise.pipeline import Pipeline
file, folder, what = sys.argv[1:]
stage = Pipeline.from_file(file, folder=folder, device="cpu").stage(2)
if what == "train":
    stage.train()
else:
    stage.extract(stage.load_weights())
print(json.dumps(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss))
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


@pytest.mark.parametrize("what", ["train", "extract"])
def test_ten_times_the_data_take_the_same_memory(tmp_path: Path, what: str) -> None:
    peaks = []
    for samples in (200, 2000):
        folder = tmp_path / str(samples)
        folder.mkdir()
        make_images(folder, train=samples, test=20)
        file = folder / "pipeline.toml"
        text = TINY.format(root=folder).replace("max_epochs = 3", "max_epochs = 1")
        # 51 kB a sample, 10 and 100 MB in all: a few chunks of 1.6 MB are held, and never more.
        text = text.replace("chunk = 7", 'precision = "float32"\nchunk = 32')
        text = text.replace("channels = 6", "channels = 32").replace(
            "channels = 8, stride = 2", "channels = 32"
        )
        file.write_text(text.replace("batch = 8\n", 'batch = 8\nshuffle_window = "8MB"\n', 1))
        out = folder / "out"
        done = subprocess.run(
            [
                *(sys.executable, "-m", "gim_stagewise.cli", "run", str(file)),
                *("--dir", str(out), "--until", "2" if what == "extract" else "1", "-q"),
                *("--device", "cpu", "--workers", "0"),
            ],
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        if what == "extract":
            subprocess.run(["rm", "-rf", str(out / "m2.zarr")], check=True)
        peaks.append(peak(file, out, what))
    assert peaks[1] <= 1.05 * peaks[0], peaks
