"""Images for benchmarks: crops of the photographs that come with scikit-learn."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn.datasets import load_sample_images


def write_crops(folder: Path, *, count: int, size: int = 64, seed: int = 0) -> None:
    """Grayscale crops at random places, as ``crops.npy`` [sample, height, width] of uint8."""
    folder.mkdir(parents=True, exist_ok=True)
    np.save(folder / "crops.npy", crops(count, size=size, seed=seed))


def crops(count: int, *, size: int, seed: int) -> NDArray[np.uint8]:
    draw = np.random.default_rng(seed)
    photos = [np.asarray(image).mean(axis=2) for image in load_sample_images().images]
    found = np.empty((count, size, size), np.uint8)
    for number in range(count):
        photo = photos[number % len(photos)]
        top, left = (int(draw.integers(length - size + 1)) for length in photo.shape)
        found[number] = photo[top : top + size, left : left + size]
    return found
