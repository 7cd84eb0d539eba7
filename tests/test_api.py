"""The Python API as README shows it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import edit
from torch.utils.data import DataLoader

from gim_stagewise import Pipeline, load_encoder, open_cache
from gim_stagewise.errors import CacheNotFoundError, ConfigError, StaleCacheError
from gim_stagewise.models.build import forget_user_code
from gim_stagewise.sources import Request


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
    edit(
        tiny, 'build = "residual"\noptions = { stem = 4, channels = 6 }', 'build = "api_nets:block"'
    )
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run(until=1)
    with pytest.raises(ConfigError, match="--pipeline FILE"):
        load_encoder(tmp_path / "out")
    assert load_encoder(tmp_path / "out", pipeline=tiny)(torch.ones(2, 1, 4, 4)).shape[1] == 4
    # Weights would fit these as well.
    code = (tmp_path / "api_nets.py").read_text()
    (tmp_path / "api_nets.py").write_text(code.replace("4, 3)", "4, 3, dilation=1, padding=1)"))
    forget_user_code()
    with pytest.raises(StaleCacheError, match="computes something else now"):
        load_encoder(tmp_path / "out", pipeline=tiny)


def test_an_encoder_of_another_file_is_refused(tiny: Path, tmp_path: Path) -> None:
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").run(until=1)
    edit(tiny, "lr = 3e-3", "lr = 1e-3")  # says nothing of what is computed
    assert load_encoder(tmp_path / "out", pipeline=tiny)(torch.ones(2, 1, 4, 4)).shape[2] == 4
    edit(tiny, "{ stem = 4, channels = 6 }", "{ stem = 4, channels = 6, stride = 2 }")
    with pytest.raises(StaleCacheError, match=r"module\.1\.options\.stride"):
        load_encoder(tmp_path / "out", pipeline=tiny)


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
