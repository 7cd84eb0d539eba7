"""STL-10 in its real binary format, made here, against torchvision's reader."""

from __future__ import annotations

import errno
import re
from pathlib import Path

import numpy as np
import pytest
from helpers import edit, one_error
from torchvision import datasets
from warm import gim_stage

from gim_stagewise.config import SourceConfig, load_pipeline
from gim_stagewise.errors import ConfigError, DataError, DataNotFoundError, StorageError
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.probe.probe import RAW_PIXELS
from gim_stagewise.sources import Request, Source, open_source
from gim_stagewise.sources.base import Split
from gim_stagewise.sources.stl10 import COUNTS

SMALL: dict[Split, int] = {"unlabeled": 24, "train": 12, "test": 7}
FILE = Path(__file__).parent.parent / "pipelines" / "stl10.toml"


def write_stl10(root: Path, counts: dict[Split, int]) -> None:
    """Images written column by column, and labels from 1."""
    folder = root / "stl10_binary"
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    for split, count in counts.items():
        images = draw.integers(0, 256, (count, 3, 96, 96), np.uint8)
        images.transpose(0, 1, 3, 2).tofile(folder / f"{split}_X.bin")
        if split != "unlabeled":
            (np.arange(count, dtype=np.uint8) % 10 + 1).tofile(folder / f"{split}_y.bin")


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for split, count in SMALL.items():
        monkeypatch.setitem(COUNTS, split, count)
    write_stl10(tmp_path, SMALL)
    return tmp_path


def opened(root: Path) -> Source:
    return open_source(SourceConfig(kind="stl10", root=str(root)))


def test_images_and_labels_are_those_that_torchvision_reads(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.STL10, "_check_integrity", lambda self: True)
    source = opened(root)
    labels = dict(zip(source.ids, source.labels("class").tolist(), strict=True))
    for split in COUNTS:
        reference = datasets.STL10(str(root), split=split)
        ids = source.split(split)
        assert len(ids) == len(reference)
        for item_id, own, (image, label) in zip(
            ids, source.read([Request(i) for i in ids]), reference, strict=True
        ):
            np.testing.assert_array_equal(own, np.asarray(image).transpose(2, 0, 1))
            assert labels[item_id] == label


def test_it_is_identified_by_every_image_and_label(root: Path) -> None:
    before = opened(root).content_digest()
    file = root / "stl10_binary" / "unlabeled_X.bin"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert opened(root).content_digest() != before


@pytest.mark.parametrize("bytes_", [-1, -27648, 1])
@pytest.mark.parametrize("name", ["unlabeled_X.bin", "test_y.bin"])
def test_a_download_that_was_not_finished_is_found(root: Path, name: str, bytes_: int) -> None:
    file = root / "stl10_binary" / name
    data = file.read_bytes()
    file.write_bytes(data[:bytes_] if bytes_ < 0 else data + b"\1")
    with pytest.raises(DataError, match=re.escape(name)) as caught:
        opened(root)
    assert "not finished" in str(caught.value)


def test_missing_files_are_named(root: Path) -> None:
    (root / "stl10_binary" / "train_y.bin").unlink()
    with pytest.raises(DataNotFoundError, match=r"no train_y\.bin; set source\.root"):
        opened(root)


def test_a_download_that_fails_is_said(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: object, **options: object) -> None:
        raise OSError("<urlopen error no route to host>")

    monkeypatch.setattr(datasets.STL10, "download", offline)
    (root / "stl10_binary" / "train_y.bin").unlink()
    with pytest.raises(DataNotFoundError, match=r"could not be fetched into .*no route"):
        open_source(SourceConfig(kind="stl10", root=str(root), download=True))


def test_a_disk_that_is_full_is_no_missing_file(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(datasets.STL10, "download", full)
    (root / "stl10_binary" / "train_y.bin").unlink()
    with pytest.raises(StorageError, match=r"fetching STL-10 into .*no space left"):
        open_source(SourceConfig(kind="stl10", root=str(root), download=True))


@pytest.mark.parametrize("there", [False, True], ids=["new", "unfinished"])
def test_what_is_missing_is_fetched_once_to_where_it_is_read(
    root: Path, monkeypatch: pytest.MonkeyPatch, there: bool
) -> None:
    """By torchvision itself, of which the network and the real files' checksums are replaced."""
    fetched: list[str] = []

    def unpack(url: str, download_root: str, **_: object) -> None:
        fetched.append(url)
        write_stl10(Path(download_root), SMALL)  # the folder is in the archive

    monkeypatch.setattr(datasets.stl10, "download_and_extract_archive", unpack)
    monkeypatch.setattr(datasets.stl10, "check_integrity", lambda file, md5: Path(file).is_file())
    monkeypatch.chdir(root)  # where a wrong root would lead
    place = root / "new" / "data"
    if there:
        write_stl10(place, SMALL)
        (place / "stl10_binary" / "train_y.bin").unlink()
    for _ in range(2):
        source = open_source(SourceConfig(kind="stl10", root=str(place), download=True))
        assert fetched == [datasets.STL10.url]
    expected = opened(root)
    requests = [Request(item_id) for item_id in expected.ids]
    np.testing.assert_array_equal(source.read(requests), expected.read(requests))
    np.testing.assert_array_equal(source.labels("class"), expected.labels("class"))


def test_labels_out_of_range_are_refused(root: Path) -> None:
    (root / "stl10_binary" / "test_y.bin").write_bytes(bytes(7))
    with pytest.raises(DataError, match=r"test_y\.bin has other labels"):
        opened(root)


def test_settings_without_meaning_are_refused(root: Path) -> None:
    with pytest.raises(ConfigError, match=r"source\.options"):
        open_source(SourceConfig(kind="stl10", root=str(root), options={"folds": 1}))


def test_the_command_says_where_it_looked(tmp_path: Path) -> None:
    file = tmp_path / "stl10.toml"
    file.write_text(FILE.read_text().replace('root = "data"', f'root = "{tmp_path}"'))
    message = one_error(gim_stage("run", file, "--dir", tmp_path / "out"), 2)
    assert str(tmp_path / "stl10_binary") in message


def test_the_shipped_pipeline_has_the_papers_settings() -> None:
    """Section 4.1 and appendix A.1."""
    config, _ = load_pipeline(FILE)
    augment, train, objective = config.augment, config.stage(1).train, config.stage(1).objective
    assert (augment.grayscale, augment.crop, augment.flip, augment.pad) == (True, 64, 0.5, 0)
    assert config.patches is not None
    assert (config.patches.size, config.patches.stride) == (16, 8)
    assert (objective.prediction_steps, objective.negatives) == (5, 16)
    assert (train.batch, objective.negatives_group) == (8 * 16, 16)  # on 8 GPUs
    assert (train.lr, train.max_epochs, train.patience) == (1.5e-4, 300, 300)
    assert {(own.train.dropout, own.train.noise) for own in config.module.values()} == {(0, 0)}
    assert (config.probe.classifier, config.probe.lr) == ("adam", 1e-3)
    assert (config.probe.validation, config.probe.pooling) == (0.2, "mean")
    blocks = [own.options["blocks"] for own in config.module.values()]
    assert blocks == [[1, 3], [4, 7], [8, 13]]  # of a ResNet-50, without the fourth stage


@pytest.mark.parametrize("mode", ["iterative", "simultaneous"])
def test_the_shipped_pipeline_on_a_narrow_network(root: Path, tmp_path: Path, mode: str) -> None:
    file = tmp_path / "stl10.toml"
    file.write_text(FILE.read_text())
    edit(file, 'root = "data"', f'root = "{root}"')
    edit(file, "batch = 128\n", "batch = 16\n")
    edit(file, "negatives_group = 16 ", "negatives_group = 8 ")
    edit(file, "max_epochs = 300", "max_epochs = 1")
    edit(file, 'micro_batch = "auto"', "micro_batch = 100")
    for blocks in ("[1, 3]", "[4, 7]", "[8, 13]"):
        edit(file, f"blocks = {blocks} }}", f"blocks = {blocks}, width = 2 }}")
    result = Pipeline.from_file(file, folder=tmp_path / "out", device="cpu", mode=mode).run()
    assert [stage.module for stage in result.stages] == [1, 2, 3]
    assert all(result.accuracy(stage.module) is not None for stage in result.stages)
    assert result.baseline(RAW_PIXELS) is None
