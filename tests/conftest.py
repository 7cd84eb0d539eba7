"""A pipeline small enough to run in a second, on data made here."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

# Before torch is imported, here and in the processes that tests start: the same thread count
# everywhere, and none of the test processes takes the others' cores.
os.environ["OMP_NUM_THREADS"] = "1"

import gc

import distributed  # noqa: F401
import numpy as np
import pytest
import torch._dynamo  # noqa: F401

import gim_stagewise.pipeline
import gim_stagewise.plan
import gim_stagewise.prove
import gim_stagewise.stage.choose

# `make test-latest` is without torchaudio, which bounds torch; the probes of speech need it.
try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):
    collect_ignore = ["test_audio.py", "test_speech.py", "test_synthetic_speech.py"]

TINY = """
name = "tiny"
seed = 3

[source]
kind = "npy"
root = "{root}"
splits.train = {{ images = "train.npy", labels = "train_labels.npy" }}
splits.test = {{ images = "test.npy", labels = "test_labels.npy" }}

[patches]
size = 4
stride = 2

[objective]
prediction_steps = 2
negatives = 4

[train]
batch = 8
lr = 3e-3
max_epochs = 3
patience = 3
checkpoint_every = 2

[cache]
chunk = 7

[extract]
batch = 50

[module.1]
build = "residual"
options = {{ stem = 4, channels = 6 }}

[module.2]
build = "residual"
options = {{ channels = 8, stride = 2 }}

[module.3]
build = "residual"
options = {{ channels = 5 }}
"""


def make_images(folder: Path, *, train: int = 40, test: int = 12) -> None:
    """Stripes across or along, with noise: two classes that a linear probe can tell apart."""
    draw = np.random.default_rng(0)
    for split, count in {"train": train, "test": test}.items():
        labels = draw.integers(0, 2, count)
        stripes = (np.indices((12, 12)) // 2 % 2)[labels]
        images = stripes * 0.6 + draw.random((count, 12, 12)) * 0.4
        np.save(folder / f"{split}.npy", (images * 255).astype(np.uint8))
        np.save(folder / f"{split}_labels.npy", labels)


def write_tiny(folder: Path) -> Path:
    """A pipeline file with three modules, and its data beside it."""
    make_images(folder)
    file = folder / "tiny.toml"
    file.write_text(TINY.format(root=folder))
    return file


def pytest_collection_finish() -> None:
    # Runs collect garbage before they measure memory; what all tests share need not be looked at.
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _timed_briefly() -> Iterator[None]:
    """Let what ``materialize = "auto"`` times be timed briefly; tests do not rest on the times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gim_stagewise.stage.choose, "SECONDS", 0.02)
        yield


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """Path of a pipeline file of this test's own."""
    return write_tiny(tmp_path)


@pytest.fixture(scope="session")
def new_tiny() -> Callable[[Path], Path]:
    """Writes such a file and its data into a folder, for runs that several tests look at."""
    return write_tiny
