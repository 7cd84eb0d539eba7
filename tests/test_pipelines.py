"""The pipelines that are shipped, shortened, on small data."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from helpers import edit
from numpy.typing import NDArray
from warm import gim_stage

from gim_stagewise.cache import open_tiled_cache
from gim_stagewise.config import SourceConfig, with_values
from gim_stagewise.errors import ConfigError
from gim_stagewise.sources import SPLITS, Request, Source, open_source
from gim_stagewise.sources.photographs import PHOTOGRAPHS, mosaic_region, photograph
from gim_stagewise.windows import Span

FOLDER = Path(__file__).parent.parent / "pipelines"


@pytest.mark.parametrize("file", sorted(FOLDER.glob("*.toml")), ids=lambda file: str(file.stem))
def test_a_pipeline_opens_with_the_command_that_runs_it(file: Path) -> None:
    first = file.read_text().splitlines()[0]
    assert first == f"# gim-stage run pipelines/{file.name}"
    assert re.search(rf'^name = "{file.stem}"$', file.read_text(), re.MULTILINE)


def shortened(tmp_path: Path, name: str) -> Path:
    file = tmp_path / f"{name}.toml"
    text = (FOLDER / f"{name}.toml").read_text()
    text = re.sub(r"max_epochs = \d+", "max_epochs = 1", text)
    text = re.sub(r"samples = 1024", "samples = 32", text)
    text = re.sub(r"channels = \d+", "channels = 8", text)
    text = re.sub(r"(?m)train.window = 128$", "train.window = 32", text)  # of the GRU, step by step
    file.write_text(with_values(text, {"probe.epochs": 2, "probe.step_epochs": 2}))
    return file


def test_large_image(tmp_path: Path) -> None:
    file = shortened(tmp_path, "large_image")
    edit(file, 'kind = "mosaic"', f'kind = "mosaic"\nroot = "{tmp_path}"')
    edit(file, "side = 20000", "side = 1600")
    edit(file, "batch = 32", "batch = 8")
    found = gim_stage("run", file, "--dir", tmp_path / "out", "--workers", "0", "--json")
    assert found.returncode == 0, found.stderr
    assert [module["state"] for module in json.loads(found.stdout)["modules"]] == ["sealed"] * 3
    cache = open_tiled_cache(tmp_path / "out" / "m3.zarr")
    assert cache.layout.extents == ((200, 200),)
    (values,) = cache.read([Request(cache.ids[0])])
    assert values.std() > 0


@pytest.mark.slow
def test_long_audio(tmp_path: Path) -> None:
    file = shortened(tmp_path, "long_audio")
    recordings = tmp_path / "recordings"
    recordings.mkdir()
    draw = np.random.default_rng(0)
    for number, seconds in enumerate((9.3, 4.1)):
        times = np.arange(int(seconds * 16000)) / 16000
        values = np.sin(2 * np.pi * (300 + 200 * number) * times) * np.sin(9 * times)
        values = 0.4 * values + draw.normal(0, 0.02, len(times))
        soundfile.write(recordings / f"{number}.flac", values, 16000)
    edit(file, "data/audio", str(recordings))
    edit(file, "zones = 8", "zones = 6")
    found = gim_stage("run", file, "--dir", tmp_path / "out", "--workers", "0", "--json")
    assert found.returncode == 0, found.stderr
    assert [module["state"] for module in json.loads(found.stdout)["modules"]] == ["sealed"] * 6
    cache = open_tiled_cache(tmp_path / "out" / "m6.zarr")
    # A stored embedding for each 160 samples, 10 ms, of every module.
    lengths = {
        len(open_tiled_cache(tmp_path / "out" / f"m{index}.zarr").read_pooled(cache.ids[0]))
        for index in range(1, 7)
    }
    assert max(lengths) - min(lengths) <= 1
    assert abs(min(lengths) - 9.3 * 100) < 3


# The photographs, and the image that is made of them


def mosaic(tmp_path: Path, **options: object) -> Source:
    return open_source(SourceConfig(kind="mosaic", root=str(tmp_path), options=options))


def test_photographs_are_gray_and_differ() -> None:
    images = [photograph(name) for name in PHOTOGRAPHS]
    assert len(images) == 15
    assert all(image.ndim == 2 and image.dtype == np.uint8 for image in images)
    assert all(image.std() > 10 for image in images)
    assert len({image.tobytes() for image in images}) == 15


def photos(**options: object) -> Source:
    return open_source(SourceConfig(kind="photos", options=options))


def is_part_of(area: NDArray[Any], crop: NDArray[Any]) -> bool:
    """Whether a crop was cut out of an area, anywhere in it."""
    windows = np.lib.stride_tricks.sliding_window_view(area, crop.shape)
    # Corners first: to compare all pixels at all places takes long.
    found = (windows[:, :, 0, 0] == crop[0, 0]) & (windows[:, :, -1, -1] == crop[-1, -1])
    return any((windows[row, column] == crop).all() for row, column in np.argwhere(found))


def test_crops_of_photographs_are_labelled_and_share_no_pixel() -> None:
    source = photos(unlabeled=30, train=90, test=30)
    counts = [len(source.split(split)) for split in SPLITS]
    assert counts == [30, 90, 30]
    labels = dict(zip(source.ids, source.labels("class").tolist(), strict=True))
    for split in ("train", "test"):
        ids = source.split(split)
        assert {labels[item_id] for item_id in ids} == set(range(15))
        for item_id, crop in zip(ids, source.read([Request(i) for i in ids]), strict=True):
            photo = photograph(PHOTOGRAPHS[labels[item_id]])
            middle, border = photo.shape[1] // 2, photo.shape[0] - photo.shape[0] // 3
            half = photo[:, middle:] if split == "test" else photo[:, :middle]
            if split == "train":
                upper = ids.index(item_id) < 60
                half = half[:border] if upper else half[border:]
            assert is_part_of(half, crop[0])


def test_unlabeled_crops_lie_where_those_for_training_do() -> None:
    """Encoders are trained on them: a pixel of a test crop among them would leak."""
    source = photos(unlabeled=30, train=15, test=15)
    ids = source.split("unlabeled")
    labels = dict(zip(source.ids, source.labels("class").tolist(), strict=True))
    assert {labels[item_id] for item_id in ids} == {-1}
    halves = [photo[:, : photo.shape[1] // 2] for photo in map(photograph, PHOTOGRAPHS)]
    shown = [
        [number for number, half in enumerate(halves) if is_part_of(half, crop[0])]
        for crop in source.read([Request(i) for i in ids])
    ]
    # No label says of which photograph they are: twice of each.
    assert sorted(shown) == [[number] for number in range(15) for _ in range(2)]


def test_crops_are_the_same_every_time_and_others_with_another_seed() -> None:
    assert photos().content_digest() == photos().content_digest()
    assert photos(seed=1).content_digest() != photos().content_digest()


@pytest.mark.parametrize("options", [{"size": 500}, {"size": 0}, {"train": "many"}, {"crop": 3}])
def test_options_of_photos_are_checked(options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"source\.options"):
        photos(**options)


def test_a_mosaic_is_made_once_and_is_the_same(tmp_path: Path) -> None:
    source = mosaic(tmp_path, side=1700)
    (path,) = tmp_path.glob("*.zarr")
    made = path.stat().st_mtime_ns
    (item,) = source.items()
    assert item.extent == (1700, 1700)
    (values,) = source.read([Request(item.id)])
    assert mosaic(tmp_path, side=1700).content_digest() == source.content_digest()
    assert path.stat().st_mtime_ns == made
    elsewhere = mosaic(tmp_path / "elsewhere", side=1700)
    assert elsewhere.content_digest() == source.content_digest()
    assert mosaic(tmp_path, side=1700, seed=1).content_digest() != source.content_digest()
    # A larger one begins with the same squares.
    part = mosaic_region((Span(500, 1000), Span(1000, 1500)), seed=0)
    np.testing.assert_array_equal(values[0, 500:1000, 1000:1500], part)
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("options", [{"side": 0}, {"side": "x"}, {"seed": -1}, {"size": 3}])
def test_options_of_a_mosaic_are_checked(tmp_path: Path, options: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=r"source\.options"):
        mosaic(tmp_path, **options)


@pytest.mark.slow
def test_speech(tmp_path: Path) -> None:
    pytest.importorskip("espeakng_loader")
    pytest.importorskip("torchaudio")  # probes
    file = shortened(tmp_path, "speech")
    edit(file, 'root = "data"', f'root = "{tmp_path}"')
    edit(file, "train = 120, test = 12", "speakers = 3, train = 2, test = 1")
    found = gim_stage("run", file, "--dir", tmp_path / "out", "--workers", "0", "--json")
    assert found.returncode == 0, found.stderr
    speaker, phone = json.loads(found.stdout)["probes"]
    assert (speaker["labels"], phone["labels"]) == ("speaker", "phone")
    assert None not in phone["accuracies"]
    assert "is not probed" not in found.stderr


def test_librispeech(tmp_path: Path) -> None:
    """In the layout that it has, and with the files that Oord et al. published."""
    pytest.importorskip("torchaudio")  # probes
    recordings, labels = tmp_path / "LibriSpeech" / "train-clean-100", tmp_path / "labels"
    labels.mkdir()
    draw = np.random.default_rng(0)
    lines = []
    for speaker in (19, 26, 27):
        for number, steps in enumerate((32000, 41000, 30000, 9000)):  # the last is too short
            name = f"{speaker}-198-{number:04}"
            place = recordings / str(speaker) / "198"
            place.mkdir(parents=True, exist_ok=True)
            soundfile.write(place / f"{name}.flac", draw.normal(0, 0.05, steps), 16000)
            phones = draw.integers(0, 41, steps // 160 - 2)  # frames of 25 ms every 10 ms
            lines.append(" ".join([name, *map(str, phones)]))
            split = "test" if number == 2 else "train"
            with (labels / f"{split}_split.txt").open("a") as list_:
                list_.write(f"{name}\n")
    (labels / "converted_aligned_phones.txt").write_text("\n".join(lines) + "\n")
    file = shortened(tmp_path, "librispeech")
    edit(file, 'root = "data"', f'root = "{tmp_path}"')
    edit(file, "[augment]", 'on_error = "skip"\n\n[augment]')
    edit(file, "samples = 22830", "samples = 36")
    edit(file, "validation = 0.02", "validation = 0.2")
    edit(file, "batch = 32", "batch = 16")
    edit(file, 'micro_batch = "auto"', "micro_batch = 5")
    found = gim_stage("run", file, "--dir", tmp_path / "out", "--workers", "0", "--json")
    assert found.returncode == 0, found.stderr
    record = json.loads(found.stdout)
    assert [module["state"] for module in record["modules"]] == ["sealed"] * 6
    assert sorted(record["skipped"]) == [f"train/{s}-198-0003" for s in (19, 26, 27)]
    assert all("smaller than a window" in why for why in record["skipped"].values())
    assert all(None not in scores["accuracies"] for scores in record["probes"])
