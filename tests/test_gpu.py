"""The same promises on a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import StopError, assert_same_run, caches_of, edit
from numpy.typing import NDArray
from test_audio import write_speech
from test_windowed import write_large

from gim_stagewise.cache import open_tiled_cache
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.sources import Request
from gim_stagewise.stage.checkpoint import FrozenWeights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    # PyTorch says so of an operation whose results differ from run to run.
    pytest.mark.filterwarnings("error:.*deterministic implementation"),
]


def test_a_run_on_a_gpu_is_repeatable_and_resumes(tiny: Path, tmp_path: Path) -> None:
    def stop(module: int, step: int) -> None:
        if (module, step) == (2, 6):
            raise StopError

    Pipeline.from_file(tiny, folder=tmp_path / "whole", device="cuda").run()
    with pytest.raises(StopError):
        Pipeline.from_file(tiny, folder=tmp_path / "parts", device="cuda", on_step=stop).run()
    Pipeline.from_file(tiny, folder=tmp_path / "parts", device="cuda").run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


@pytest.mark.parametrize("mode", ["simultaneous", "cpc", "supervised"])
def test_one_step_for_all_on_a_gpu_is_repeatable_and_resumes(
    tiny: Path, tmp_path: Path, mode: str
) -> None:
    def stop(module: int, step: int) -> None:
        if step == 6:
            raise StopError

    switches = "dropout = 0.2\nnoise = 0.3\naverage = 0.9\nmicro_batch = 30"
    edit(tiny, "lr = 3e-3", f"lr = 3e-3\n{switches}")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Pipeline.from_file(tiny, folder=whole, device="cuda", mode=mode).run()
    with pytest.raises(StopError):
        Pipeline.from_file(tiny, folder=parts, device="cuda", mode=mode, on_step=stop).run()
    Pipeline.from_file(tiny, folder=parts, device="cuda", mode=mode).run()
    assert_same_run(parts, whole)


def extracted_on_both(
    tiny: Path, tmp_path: Path, precision: str
) -> tuple[NDArray[Any], NDArray[Any]]:
    """What a GPU and a CPU store of the same module's activations."""
    edit(tiny, "max_epochs = 3", "max_epochs = 1")
    edit(tiny, "chunk = 7", f'chunk = 7\nprecision = "{precision}"')
    on_gpu = Pipeline.from_file(tiny, folder=tmp_path / "gpu", device="cuda")
    on_gpu.run()
    on_cpu = Pipeline.from_file(tiny, folder=tmp_path / "cpu", device="cpu")
    on_cpu.stage(1).extract(FrozenWeights.load(on_gpu.workspace.weights_path(1)))
    one, other = caches_of(tmp_path / "gpu"), caches_of(tmp_path / "cpu")
    return one["m1/activations"], other["m1/activations"]


def test_gpu_and_cpu_extract_the_same_within_rounding(tiny: Path, tmp_path: Path) -> None:
    one, other = extracted_on_both(tiny, tmp_path, "float32")
    np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)


def test_a_gpu_and_a_cpu_store_the_same_codes_but_for_rounding(tiny: Path, tmp_path: Path) -> None:
    """A value in the middle between two codes may become either."""
    one, other = extracted_on_both(tiny, tmp_path, "uint8")
    apart = np.abs(one.astype(int) - other)
    assert apart.max() <= 1
    assert np.count_nonzero(apart) <= apart.size // 1000


def test_no_parameter_stays_on_the_gpu(tiny: Path, tmp_path: Path) -> None:
    before = torch.cuda.memory_allocated()
    Pipeline.from_file(tiny, folder=tmp_path / "out", device="cuda").run()
    assert torch.cuda.memory_allocated() == before


def test_windows_on_a_gpu_are_those_of_the_cpu_within_rounding(tmp_path: Path) -> None:
    file = write_large(tmp_path)
    Pipeline.from_file(file, folder=tmp_path / "gpu", device="cuda").run()
    (tmp_path / "cpu").mkdir()
    for index in (1, 2):
        weights = tmp_path / "gpu" / f"m{index}.safetensors"
        (tmp_path / "cpu" / weights.name).write_bytes(weights.read_bytes())
    Pipeline.from_file(file, folder=tmp_path / "cpu", device="cpu").stage(1).extract(
        FrozenWeights.load(tmp_path / "gpu" / "m1.safetensors")
    )
    one, other = (open_tiled_cache(tmp_path / name / "m1.zarr") for name in ("gpu", "cpu"))
    for item_id in one.ids:
        (left,), (right,) = one.read([Request(item_id)]), other.read([Request(item_id)])
        np.testing.assert_allclose(left, right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", ["iterative", "cpc", "greedy_supervised"])
def test_speech_on_a_gpu_is_trained_and_probed(tmp_path: Path, mode: str) -> None:
    file = write_speech(tmp_path)
    changes = {"train.micro_batch": 1, "labels": "phone"}  # streamed where modules train alone
    results = [
        Pipeline.from_file(
            file, folder=tmp_path / device, device=device, mode=mode, changes=changes
        ).run()
        for device in ("cuda", "cpu")
    ]
    for own, other in zip(*(result.stages for result in results), strict=True):
        loss, expected = own.record.validation_loss, other.record.validation_loss
        assert (loss is None) == (expected is None)
        assert loss is None or loss == pytest.approx(expected, rel=1e-2)
    assert [scores.labels for scores in results[0].probes] == ["speaker", "phone"]
