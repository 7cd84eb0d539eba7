"""The Python API as README shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import edit, shorten
from torch.utils.data import DataLoader

from gim_stagewise import Pipeline, load_encoder, open_cache
from gim_stagewise.errors import CacheNotFoundError, ConfigError, DataError, StaleCacheError
from gim_stagewise.models.build import forget_user_code
from gim_stagewise.sources import Request
from gim_stagewise.stage.encoder import Encoder
from gim_stagewise.stage.export import export_encoder


@pytest.fixture
def done(tiny: Path, tmp_path: Path) -> Path:
    """The folder of a run that stored values as they were computed."""
    edit(tiny, "[cache]\n", '[cache]\nprecision = "float32"\n')
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run()
    return tmp_path / "out"


def test_importing_the_package_is_cheap() -> None:
    code = "import gim_stagewise, sys; print('torch' in sys.modules, 'zarr' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_completion_finds_what_is_imported_when_used() -> None:
    code = (
        "import gim_stagewise as g, sys\n"
        "print(set(g.__all__) <= set(dir(g)), 'torch' in sys.modules)\n"
        "print(all(getattr(g, name) for name in g.__all__))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False", "True"]


def test_help_needs_none_of_the_heavy_libraries() -> None:
    code = (
        "import sys\n"
        "from gim_stagewise.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "print({'torch', 'zarr', 'pydantic', 'rich', 'distributed', 'numpy'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def test_the_encoder_is_the_stack_of_frozen_modules(tiny: Path, done: Path) -> None:
    encoder = load_encoder(done)
    assert len(encoder) == 3
    assert not encoder.training
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    source = Pipeline.from_file(tiny, folder=done, device="cpu").source
    cache = open_cache(done / "m3.zarr")
    for item in ("train/0", "test/3"):
        patches = torch.from_numpy(source.read([Request(item)])[0]).flatten(0, 1)
        stored = torch.from_numpy(cache.read([Request(item)])[0]).flatten(0, 1)
        torch.testing.assert_close(encoder(patches), stored, rtol=1e-5, atol=1e-6)
        pooled = torch.from_numpy(cache.read_pooled([item])[0]).flatten(0, 1)
        torch.testing.assert_close(encoder.embed(patches), pooled, rtol=1e-5, atol=1e-6)


def test_features_of_the_datasets_images_are_those_in_its_caches(
    done: Path, tmp_path: Path
) -> None:
    images = np.concatenate([np.load(tmp_path / f"{split}.npy") for split in ("train", "test")])
    encoder = load_encoder(done).requires_grad_(True).train()
    for index in (1, 2, 3):
        cache = open_cache(done / f"m{index}.zarr")
        found = encoder.features(images[:, None], module=index)
        assert found.shape == (52, 5, 5, (6, 8, 5)[index - 1])
        np.testing.assert_array_equal(found.numpy(), cache.read_pooled(cache.ids))
    again = encoder.features(torch.from_numpy(images[:, None]).float() / 255)
    torch.testing.assert_close(again, found)
    # Images of another size have another grid.
    assert encoder.features(images[:1, None, :, :8]).shape == (1, 5, 3, 5)
    # Whoever trains on goes on doing so.
    assert encoder.training
    assert all(own.requires_grad for own in encoder.parameters())


def test_features_are_of_images_as_evaluation_has_them(tiny: Path, tmp_path: Path) -> None:
    """Also if the pipeline file that is given says something else now."""
    shorten(tiny, modules=1, batch=8, epochs=1, chunk=7)
    augment = (
        "[augment]\npad = 1\ncrop = 10\nflip = 0.5\ngrayscale = true\nmean = [0.4]\nstd = [0.3]\n"
    )
    edit(tiny, "[patches]", f"{augment}\n[patches]")
    gray = np.load(tmp_path / "train.npy")
    images = np.stack([gray, gray // 2, 255 - gray], axis=1)
    for split in ("train", "test"):
        np.save(tmp_path / f"{split}.npy", images[: len(np.load(tmp_path / f"{split}.npy"))])
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run()
    edit(tiny, "crop = 10", "crop = 8")
    cache = open_cache(tmp_path / "out" / "m1.zarr")
    found = load_encoder(tmp_path / "out", pipeline=tiny).features(images)
    np.testing.assert_array_equal(found.numpy(), cache.read_pooled(cache.split("train")))


def test_an_encoder_refuses_what_it_was_not_trained_on(tiny: Path, tmp_path: Path) -> None:
    shorten(tiny, modules=2, batch=8, epochs=1, chunk=7)
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run()
    encoder = load_encoder(tmp_path / "out")
    for shape in ((1, 8, 8), (1, 2, 2), (3, 4, 4)):
        own = "×".join(map(str, shape))
        with pytest.raises(DataError, match=f"rows are {own}, this encoder takes .* 1×4×4"):
            encoder(torch.zeros(2, *shape))
    below = encoder[:1](torch.zeros(2, 1, 4, 4))
    assert encoder[1:](below).shape == (2, 8, 2, 2)
    images = np.zeros((2, 1, 12, 12), np.float32)
    for wrong, message in (
        (images[:, 0], r"images have shape \(2, 12, 12\), expected \[image, channel"),
        (images[:0], r"images have shape \(0, 1, 12, 12\)"),
        (np.repeat(images, 3, axis=1), "images have 3 channels, this encoder was trained on 1"),
        (images[..., :3], "is 4, but the image is 12×3 pixels"),
        (images.astype(np.int64), "image 0 has pixels of type int64"),
    ):
        with pytest.raises(DataError, match=message):
            encoder.features(wrong)
    images[1, 0, 3, 3] = np.nan
    with pytest.raises(DataError, match=r"^image 1 has values that are NaN"):
        encoder.features(images)
    with pytest.raises(ConfigError, match="no module 3; this encoder has 1 to 2"):
        encoder.features(images, module=3)
    part = encoder[:1]
    assert isinstance(part, Encoder)
    with pytest.raises(ConfigError, match=r"features\(images, module=N\)"):
        part.features(images)


def test_modules_that_do_not_belong_together_are_not_stacked(
    tiny: Path, done: Path, tmp_path: Path
) -> None:
    edit(tiny, "lr = 3e-3", "lr = 1e-3")
    Pipeline.from_file(tiny, folder=tmp_path / "other", device="cpu").run(until=1)
    (done / "m1.safetensors").write_bytes((tmp_path / "other" / "m1.safetensors").read_bytes())
    with pytest.raises(StaleCacheError, match="trained on another module 1"):
        load_encoder(done)
    with pytest.raises(CacheNotFoundError, match="run the pipeline first"):
        load_encoder(tmp_path)


def test_an_encoder_of_ones_own_code_needs_the_pipeline_file(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "api_nets.py").write_text(
        "from torch import nn\ndef block(in_channels):\n    return nn.Conv2d(in_channels, 4, 3)\n"
    )
    shorten(tiny, modules=1, batch=8, epochs=1, chunk=7)
    edit(
        tiny, 'build = "residual"\noptions = { stem = 4, channels = 6 }', 'build = "api_nets:block"'
    )
    pipeline = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu")
    pipeline.run()
    exported = tmp_path / "enc.safetensors"
    export_encoder(pipeline.workspace, exported, pipeline=tiny)
    for path in (tmp_path / "out", exported):
        with pytest.raises(ConfigError, match="--pipeline FILE"):
            load_encoder(path)
        assert load_encoder(path, pipeline=tiny)(torch.ones(2, 1, 4, 4)).shape[1] == 4
    # Weights would fit these as well.
    code = (tmp_path / "api_nets.py").read_text()
    (tmp_path / "api_nets.py").write_text(code.replace("4, 3)", "4, 3, dilation=1, padding=1)"))
    forget_user_code()
    for path in (tmp_path / "out", exported):
        with pytest.raises(StaleCacheError, match="computes something else now"):
            load_encoder(path, pipeline=tiny)


def test_an_encoder_of_another_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    shorten(tiny, modules=1, batch=8, epochs=1, chunk=7)
    pipeline = Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu")
    pipeline.run()
    exported = tmp_path / "enc.safetensors"
    export_encoder(pipeline.workspace, exported, pipeline=tiny)
    edit(tiny, "lr = 3e-3", "lr = 1e-3")  # says nothing of what is computed
    for path in (tmp_path / "out", exported):
        assert load_encoder(path, pipeline=tiny)(torch.ones(2, 1, 4, 4)).shape[2] == 4
    edit(tiny, "{ stem = 4, channels = 6 }", "{ stem = 4, channels = 6, stride = 2 }")
    for path, name in ((tmp_path / "out", r"m1\.safetensors"), (exported, r"module 1 of .*enc\.")):
        with pytest.raises(StaleCacheError, match=rf"{name}.* stale: module\.1\.options\.stride"):
            load_encoder(path, pipeline=tiny)


def test_a_cache_is_a_torch_dataset_and_a_dask_array(done: Path, tmp_path: Path) -> None:
    cache = open_cache(done / "m2.zarr")
    dataset = cache.dataset("train")
    assert len(dataset) == 40
    loader = DataLoader(dataset, batch_size=8, shuffle=True)
    labels = np.load(tmp_path / "train_labels.npy")
    seen = []
    for activations, classes in loader:
        assert activations.shape == (8, 5, 5, 8, 2, 2)
        seen += classes.tolist()
    assert sorted(seen) == sorted(labels.tolist())
    activations, label = dataset[7]
    np.testing.assert_array_equal(activations, cache.activations[0, 7])
    assert label == labels[7]
    mean = cache.dask().mean().compute()
    assert mean == pytest.approx(np.asarray(cache.activations).mean(), rel=1e-4)
    assert cache.dask("pooled").shape == (1, 52, 5, 5, 8)


def test_from_and_until_choose_the_stages(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline = Pipeline.from_file(tiny, folder=out, device="cpu")
    result = pipeline.run(until=2)
    assert [stage.module for stage in result.stages] == [1, 2]
    assert not (out / "m3.safetensors").exists()
    assert [(s.trained, s.extracted) for s in pipeline.run().stages] == [
        (False, False),
        (False, False),
        (True, True),
    ]
    before = {file: file.read_bytes() for file in out.glob("m*.safetensors")}
    assert [s.trained for s in pipeline.run(start=2).stages] == [False, True, True]
    tensors = {name: data for name, data in before.items() if name.name == "m1.safetensors"}
    assert {name: name.read_bytes() for name in tensors} == tensors
    with pytest.raises(ConfigError, match="--until: is 9; this pipeline has modules 1 to 3"):
        pipeline.run(until=9)
    with pytest.raises(ConfigError, match="--from: is 0"):
        pipeline.run(start=0)
    with pytest.raises(ConfigError, match="--from: is 3, above --until 2"):
        pipeline.run(start=3, until=2)
    assert [s.trained for s in pipeline.run(start=1).stages] == [True, True, True]


def test_from_a_stage_whose_input_is_missing_removes_nothing(tiny: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pipeline = Pipeline.from_file(tiny, folder=out, device="cpu")
    pipeline.run()
    edit(tiny, "lr = 3e-3", "lr = 1e-3")
    before = sorted(out.rglob("*"))
    with pytest.raises(StaleCacheError):
        Pipeline.from_file(tiny, folder=out, device="cpu").run(start=3)
    assert sorted(out.rglob("*")) == before
