"""What modules do to positions, as they say and as it is found by trying."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gim_stagewise.errors import ModuleRefusedError
from gim_stagewise.models import module_geometry, probed_geometry
from gim_stagewise.models.residual import residual_module
from gim_stagewise.models.resnet import resnet34_module, resnet50_module
from gim_stagewise.windows import Geometry

LAYERS: dict[str, tuple[nn.Module, list[tuple[int, int, int]]]] = {
    "one": (nn.Conv2d(2, 3, 3, padding=1), [(3, 1, 1)]),
    "strided": (nn.Conv2d(2, 3, 5, stride=3, padding=2), [(5, 3, 2)]),
    "gaps": (nn.Conv2d(2, 3, 2, stride=4), [(2, 4, 0)]),
    "dilated": (nn.Conv2d(2, 3, 3, dilation=3, padding=3), [(7, 1, 3)]),
    "pooling": (
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.MaxPool2d(2)),
        [(3, 1, 0), (2, 2, 0)],
    ),
    "chain": (
        nn.Sequential(
            nn.Conv2d(2, 3, 4, 2, 1), nn.ReLU(), nn.Conv2d(3, 3, 3, 2, 1), nn.Conv2d(3, 2, 5, 1, 2)
        ),
        [(4, 2, 1), (3, 2, 1), (5, 1, 2)],
    ),
}


@pytest.mark.parametrize("name", LAYERS)
def test_what_is_found_is_what_the_layers_are(name: str) -> None:
    module, chain = LAYERS[name]
    expected = Geometry.of_chain(chain)
    for found in probed_geometry(module, 2, 2, key="module.1"):
        assert (found.kernel, found.stride, found.before) == (
            expected.kernel,
            expected.stride,
            expected.before,
        )
        assert all(found.count(n) == expected.count(n) for n in range(expected.least, 99))


@pytest.mark.parametrize(
    ("module", "channels"),
    [
        (residual_module(1, stem=4, stem_kernel=5, channels=6), 1),
        (residual_module(3, channels=4, stride=2, blocks=2), 3),
        (resnet34_module(1, blocks=[1, 2], width=4), 1),
        (resnet50_module(16, blocks=[4, 5], width=4), 16),
    ],
)
def test_our_modules_say_what_is_found(module: nn.Module, channels: int) -> None:
    said = module_geometry(module, channels, 2, key="module.1")
    found = probed_geometry(module, channels, 2, key="module.1")
    for one, other in zip(said, found, strict=True):
        assert (one.kernel, one.stride, one.before) == (other.kernel, other.stride, other.before)
        assert all(one.count(n) == other.count(n) for n in range(8, 99))


def test_the_papers_audio_layers() -> None:
    chain = [(10, 5, 2), (8, 4, 2), (4, 2, 2), (4, 2, 2), (4, 2, 1)]
    layers = [nn.Conv1d(1 if n == 0 else 2, 2, *layer) for n, layer in enumerate(chain)]
    assert Geometry.of_chain(chain).count(20480) == 128
    for layer, own in zip(layers, chain, strict=True):
        (found,) = probed_geometry(layer, layer.in_channels, 1, key="module.1")
        expected = Geometry.of_chain([own])
        assert all(found.count(n) == expected.count(n) for n in range(12, 200))
        assert found.before == expected.before


def test_axes_may_differ() -> None:
    rows, columns = probed_geometry(nn.Conv2d(1, 1, (3, 5), (1, 2)), 1, 2, key="module.1")
    assert (rows.kernel, rows.stride) == (3, 1)
    assert (columns.kernel, columns.stride) == (5, 2)


class Mean(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - x.mean()


@pytest.mark.parametrize("module", [nn.GroupNorm(1, 2), nn.InstanceNorm2d(2), Mean(), nn.Flatten()])
def test_what_sees_everything_is_refused(module: nn.Module) -> None:
    with pytest.raises(ModuleRefusedError, match=r"no regular distance|has not the 2 axes"):
        probed_geometry(module, 2, 2, key="module.1")


@pytest.mark.parametrize("declared", [3, [(3, 1)], [(3, 0, 1)], [("a", 1, 1)]])
def test_a_geometry_that_cannot_be_is_refused(declared: Any) -> None:
    module = nn.Conv2d(1, 1, 3)
    module.geometry = declared
    with pytest.raises(ModuleRefusedError, match="expected a"):
        module_geometry(module, 1, 2, key="module.1")
