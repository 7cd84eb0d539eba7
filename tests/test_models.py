"""Builders and the contract of a module that is trained alone and cached."""

from __future__ import annotations

import importlib
import py_compile
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gim_stagewise.errors import ConfigError, ModuleRefusedError
from gim_stagewise.models import Builder, build_module, output_shape, pool, resolve_builder
from gim_stagewise.models.build import forget_user_code
from gim_stagewise.models.residual import PreActivationBlock, residual_module
from gim_stagewise.models.resnet import resnet34_module, resnet50_module
from gim_stagewise.pipeline import Pipeline

USER_CODE = """
from torch import nn

def block(in_channels, *, channels=4):
    module = nn.Conv2d(in_channels, channels, 3, padding=1)
    module.tag = "{tag}"
    return module

def no_input():
    return nn.Conv2d(2, 3, 1)

def not_a_module():
    return 3

constant = 3
"""


@pytest.fixture
def code(tmp_path: Path) -> Iterator[Path]:
    """A folder for user code; what was imported from it is forgotten afterwards."""
    search_path = list(sys.path)
    yield tmp_path
    sys.path[:] = search_path
    for name, module in list(sys.modules.items()):
        path = getattr(module, "__path__", ())
        places = [getattr(module, "__file__", None), *(path if isinstance(path, Iterable) else ())]
        if any(str(place).startswith(str(tmp_path)) for place in places):
            del sys.modules[name]


def write(path: Path, tag: str = "", *, text: str = USER_CODE) -> Path:
    """A file of user code; the folder that holds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text.replace("{tag}", tag))
    return path.parent


def tag(folder: Path, reference: str) -> str:
    module = resolve_builder(reference, code_folder=folder).call(1)
    return str(module.tag)


def built(builder: Builder, *, seed: int = 0, index: int = 1, **options: object) -> nn.Module:
    return build_module(builder, options, in_channels=3, seed=seed, index=index, key="the.key")


def residual() -> Builder:
    return resolve_builder("residual", code_folder=None)


def same_weights(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


# The residual module


@pytest.mark.parametrize(
    ("options", "side", "expected"),
    [
        ({"channels": 8}, 6, (8, 6, 6)),
        ({"channels": 8, "stride": 2}, 6, (8, 3, 3)),
        ({"channels": 8, "stride": 2}, 5, (8, 3, 3)),
        ({"channels": 3, "blocks": 3}, 6, (3, 6, 6)),
        ({"channels": 8, "blocks": 2, "stride": 3}, 7, (8, 3, 3)),
        ({"channels": 8, "stem": 5}, 6, (8, 6, 6)),
        ({"channels": 8, "stem": 5, "stem_kernel": 5, "stride": 2}, 6, (8, 3, 3)),
        ({"channels": 8, "stem": 5, "stem_kernel": 1}, 1, (8, 1, 1)),
        ({"channels": 8, "stem": 5, "stem_kernel": 5, "stem_stride": 2}, 6, (8, 3, 3)),
    ],
)
def test_a_residual_module_has_the_shape_its_options_say(
    options: dict[str, Any], side: int, expected: tuple[int, ...]
) -> None:
    module = residual_module(3, **options)
    assert tuple(module(torch.randn(2, 3, side, side)).shape[1:]) == expected
    assert output_shape(module, (3, side, side), key="module.1") == (expected, expected[:1])


def test_only_the_first_block_strides_and_there_are_as_many_as_asked() -> None:
    module = residual_module(3, channels=8, blocks=3, stride=2, stem=4)
    blocks = [layer for layer in module if isinstance(layer, PreActivationBlock)]
    assert [block.conv1.stride for block in blocks] == [(2, 2), (1, 1), (1, 1)]
    assert len(module) == 4


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("channels", 0, "channels must be at least 1, got 0"),
        ("blocks", 0, "blocks must be at least 1, got 0"),
        ("stride", -1, "stride must be at least 1, got -1"),
        ("stem", -1, "stem must be at least 1, got -1"),
        ("stem", 0, "stem must be at least 1, got 0"),
        ("stem_kernel", 4, "stem_kernel must be odd, got 4"),
        ("stem_kernel", -3, "stem_kernel must be at least 1, got -3"),
        ("chanels", 3, "chanels"),
    ],
)
def test_a_wrong_option_is_refused_with_its_value(option: str, value: int, reason: str) -> None:
    with pytest.raises(ConfigError) as caught:
        built(residual(), **{"channels": 4, option: value})
    assert str(caught.value).startswith("the.key: ")
    assert reason in str(caught.value)


def test_a_missing_option_is_named() -> None:
    with pytest.raises(ConfigError, match=r"the\.key: .*channels"):
        built(residual())


@pytest.mark.parametrize("value", ["8", 2.5])
def test_an_option_of_the_wrong_type_is_named_with_what_was_expected(value: object) -> None:
    with pytest.raises(ConfigError, match=r"integer|whole number"):
        built(residual(), channels=value)


@pytest.mark.parametrize(
    ("in_channels", "channels", "stride"), [(3, 8, 1), (4, 4, 2), (3, 8, 2), (8, 3, 3)]
)
def test_a_block_that_changes_shape_reads_its_input_only_through_relu(
    in_channels: int, channels: int, stride: int
) -> None:
    torch.manual_seed(0)
    block = PreActivationBlock(in_channels, channels, stride=stride)
    x = torch.randn(5, in_channels, 7, 7)
    assert (x < 0).any()
    assert torch.equal(block(F.relu(x)), block(x))


def test_a_block_that_keeps_shape_passes_its_input_on() -> None:
    torch.manual_seed(0)
    block = PreActivationBlock(4, 4)
    with torch.no_grad():
        block.conv2.weight.zero_()
        assert block.conv2.bias is not None
        block.conv2.bias.zero_()
    x = torch.randn(2, 4, 5, 5)
    assert torch.equal(block(x), x)


def test_a_block_is_relu_convolution_twice_plus_a_shortcut() -> None:
    torch.manual_seed(0)
    block = PreActivationBlock(2, 3, stride=2)
    x = torch.randn(2, 2, 6, 6)
    names = dict(block.named_parameters())
    hidden = F.conv2d(
        x.clamp(min=0), names["conv1.weight"], names["conv1.bias"], stride=2, padding=1
    )
    residual = F.conv2d(hidden.clamp(min=0), names["conv2.weight"], names["conv2.bias"], padding=1)
    shortcut = F.conv2d(x.clamp(min=0), names["shortcut.weight"], names["shortcut.bias"], stride=2)
    torch.testing.assert_close(block(x), shortcut + residual)


# Builders


def test_a_builtin_needs_no_folder_and_ignores_the_folder(code: Path) -> None:
    here = resolve_builder("residual", code_folder=code)
    assert here == residual()
    assert here.call is residual_module


def test_an_unknown_name_is_told_what_there_is(code: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_builder("resnet", code_folder=code, key="module.2.build")
    message = str(caught.value)
    assert message.startswith("module.2.build: is 'resnet'")
    assert "'residual'" in message
    assert '"my_nets:block"' in message


def test_code_may_be_a_file_beside_the_pipeline_or_in_a_package(code: Path) -> None:
    write(code / "nets_of_mine.py", "file")
    write(code / "pack_of_mine" / "__init__.py", "package")
    write(code / "pack_of_mine" / "deep" / "__init__.py", text="")
    write(code / "pack_of_mine" / "deep" / "nets.py", "deep")
    assert tag(code, "nets_of_mine:block") == "file"
    assert tag(code, "pack_of_mine:block") == "package"
    assert tag(code, "pack_of_mine.deep.nets:block") == "deep"


def test_a_builder_may_be_a_class_inside_something(code: Path) -> None:
    text = "from torch import nn\nclass Nets:\n    class Block(nn.Identity): ...\n"
    write(code / "nets_in_class.py", text=text)
    builder = resolve_builder("nets_in_class:Nets.Block", code_folder=code)
    assert isinstance(built(builder), nn.Identity)


@pytest.mark.parametrize("file", ["twin.py", "twin/__init__.py"])
def test_two_folders_may_use_one_name(code: Path, file: str) -> None:
    for folder in ("one", "two"):
        write(code / folder / file, folder)
    order = ["one", "two", "one", "two"]
    assert [tag(code / folder, "twin:block") for folder in order] == order


def test_a_folder_and_one_below_it_may_use_one_name(code: Path) -> None:
    write(code / "nested_twin.py", "above")
    write(code / "below" / "nested_twin.py", "below")
    assert tag(code / "below", "nested_twin:block") == "below"
    assert tag(code, "nested_twin:block") == "above"


def test_two_folders_may_have_helpers_of_one_name(code: Path) -> None:
    text = USER_CODE.replace('"{tag}"', "TAG") + "\nfrom twin_helper import TAG\n"
    for folder in ("one", "two"):
        write(code / folder / "twin_user.py", text=text)
        write(code / folder / "twin_helper.py", text=f"TAG = {folder!r}\n")
    assert tag(code / "one", "twin_user:block") == "one"
    assert tag(code / "two", "twin_user:block") == "two"


def test_two_folders_may_have_plain_subfolders_of_one_name(code: Path) -> None:
    for folder in ("one", "two"):
        write(code / folder / "twin_plain" / "nets.py", folder)
    assert tag(code / "one", "twin_plain.nets:block") == "one"
    assert tag(code / "two", "twin_plain.nets:block") == "two"


@pytest.mark.parametrize("name", ["other_twin", "other_twin.nets"])
def test_code_of_that_name_imported_by_others_is_not_taken(code: Path, name: str) -> None:
    file = name.replace(".", "/") + ".py"
    for folder in ("elsewhere", "here"):
        write(code / folder / file, folder)
    sys.path.insert(0, str(code / "elsewhere"))
    importlib.import_module(name)
    assert tag(code / "here", f"{name}:block") == "here"


@pytest.mark.parametrize(
    "line",
    [
        "from torch import ops",
        pytest.param(
            "from torch import classes",
        ),
    ],
)
def test_code_may_import_unusual_modules(code: Path, line: str) -> None:
    write(code / "unusual_code.py", "unusual", text=f"{line}\n{USER_CODE}")
    assert tag(code, "unusual_code:block") == "unusual"


def test_user_code_is_not_imported_without_a_pipeline_file(code: Path) -> None:
    write(code / "trap.py", text=f"open({str(code / 'sprung')!r}, 'w')\n")
    sys.path.insert(0, str(code))
    with pytest.raises(ConfigError) as caught:
        resolve_builder("trap:block", code_folder=None, key="module.1.build")
    assert str(caught.value).startswith("module.1.build: is 'trap:block'")
    assert "--pipeline" in str(caught.value)
    assert not (code / "sprung").exists()


@pytest.mark.parametrize(
    ("reference", "reason"),
    [
        ("absent_code:block", "No module named 'absent_code'"),
        ("broken_syntax:block", "SyntaxError"),
        ("broken_import:block", "ZeroDivisionError"),
        ("lone_code:absent", "absent"),
        ("lone_code:", "AttributeError"),
        (":block", "Empty module name"),
        ("lone_code:constant", "not callable"),
    ],
)
def test_code_that_cannot_be_used_says_why_and_where(
    code: Path, reference: str, reason: str
) -> None:
    write(code / "lone_code.py")
    write(code / "broken_syntax.py", text="def block(:\n")
    write(code / "broken_import.py", text="1 / 0\n")
    with pytest.raises(ConfigError) as caught:
        resolve_builder(reference, code_folder=code, key="module.1.build")
    message = str(caught.value)
    assert message.startswith(f"module.1.build: is {reference!r}")
    assert reason in message
    assert str(code) in message or reason == "not callable"


def test_the_digest_follows_the_code_and_not_the_folder(code: Path) -> None:
    def digest(folder: str) -> str:
        return resolve_builder("digest_pack.nets:block", code_folder=code / folder).source_digest

    first = code / "first" / "digest_pack"
    write(first / "__init__.py", text="")
    write(first / "helper.py", text="SIZE = 3\n")
    write(first / "nets.py", "same", text=USER_CODE + "\nfrom digest_pack.helper import SIZE\n")
    for folder in ("moved", "edited", "edited_helper"):
        shutil.copytree(code / "first", code / folder)
    write(code / "edited" / "digest_pack" / "nets.py", "other")
    write(code / "edited_helper" / "digest_pack" / "helper.py", text="SIZE = 4\n")
    write(code / "moved" / "digest_pack" / "never_imported.py", text="x = 1\n")
    assert digest("moved") == digest("first")
    assert digest("edited") != digest("first")
    assert digest("edited_helper") != digest("first")
    assert digest("first") != residual().source_digest


def test_the_digest_follows_links(code: Path) -> None:
    shared, folder = code / "shared_part.py", code / "pipelines"
    folder.mkdir()
    (folder / "linked_part.py").symlink_to(shared)
    (folder / "linking.py").write_text("import linked_part\n\nblock = linked_part.make\n")
    found = []
    for rows in ("nn.ReLU()", "nn.Tanh()", "nn.ReLU()"):
        shared.write_text(f"from torch import nn\n\n\ndef make():\n    return {rows}\n")
        forget_user_code()
        found.append(resolve_builder("linking:block", code_folder=folder).source_digest)
    assert found[0] == found[2] != found[1]


@pytest.mark.parametrize("reference", ["edited_pack.blocks:block", "edited_pack:block"])
def test_the_digest_follows_code_elsewhere_on_the_path(
    code: Path, monkeypatch: pytest.MonkeyPatch, reference: str
) -> None:
    """As what is installed to be edited, whose release says nothing."""
    package, folder = code / "elsewhere" / "edited_pack", code / "pipelines"
    folder.mkdir()
    package.mkdir(parents=True)
    monkeypatch.syspath_prepend(package.parent)
    (package / "__init__.py").write_text("from edited_pack.blocks import block\n")
    (package / "blocks.py").write_text("from edited_pack import layers\n\nblock = layers.make\n")
    found = []
    for rows in ("nn.ReLU()", "nn.Tanh()", "nn.ReLU()"):
        layers = package / "layers.py"
        layers.write_text(f"from torch import nn\n\n\ndef make():\n    return {rows}\n")
        for name in [own for own in sys.modules if own.startswith("edited_pack")]:
            del sys.modules[name]
        found.append(resolve_builder(reference, code_folder=folder).source_digest)
    assert found[0] == found[2] != found[1]


def test_the_digest_follows_code_that_is_compiled(
    code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere, folder = code / "elsewhere", code / "pipelines"
    elsewhere.mkdir()
    folder.mkdir()
    monkeypatch.syspath_prepend(elsewhere)
    found = []
    for number in (1, 2, 1):
        source = code / "source.py"
        source.write_text(f"block = lambda: {number}\n")
        py_compile.compile(
            str(source),
            cfile=str(elsewhere / "compiled_code.pyc"),
            invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH,
        )
        sys.modules.pop("compiled_code", None)
        found.append(resolve_builder("compiled_code:block", code_folder=folder).source_digest)
    assert found[0] == found[2] != found[1]


def test_the_digest_of_a_release_is_that_of_one_file(code: Path) -> None:
    (code / "plain_code.py").touch()
    first = resolve_builder("torchvision.ops:Conv2dNormActivation", code_folder=code)
    assert (
        first.source_digest
        == resolve_builder("torchvision.ops:MLP", code_folder=code).source_digest
    )


def test_the_digest_does_not_depend_on_what_else_was_imported(code: Path) -> None:
    write(code / "order_one.py", "one")
    write(code / "order_two.py", "two")
    before = resolve_builder("order_one:block", code_folder=code).source_digest
    resolve_builder("order_two:block", code_folder=code)
    assert resolve_builder("order_one:block", code_folder=code).source_digest == before


@pytest.mark.parametrize("reference", ["residual", "seeded_code:block"])
def test_weights_are_a_function_of_seed_and_index(code: Path, reference: str) -> None:
    write(code / "seeded_code.py")
    builder = resolve_builder(reference, code_folder=code)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = built(builder, seed=5, index=2, channels=4)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(2)
    assert same_weights(first, built(builder, seed=5, index=2, channels=4))
    assert not same_weights(first, built(builder, seed=5, index=3, channels=4))
    assert not same_weights(first, built(builder, seed=6, index=2, channels=4))


def test_in_channels_is_handed_over_where_wanted_and_the_file_wins(code: Path) -> None:
    write(code / "wanting_code.py")
    block = resolve_builder("wanting_code:block", code_folder=code)
    no_input = resolve_builder("wanting_code:no_input", code_folder=code)
    assert built(block).weight.shape[1] == 3  # type: ignore[index]
    assert built(block, in_channels=7).weight.shape[1] == 7  # type: ignore[index]
    assert built(no_input).weight.shape[1] == 2  # type: ignore[index]


def test_a_builder_must_return_a_module(code: Path) -> None:
    write(code / "number_code.py")
    builder = resolve_builder("number_code:not_a_module", code_folder=code)
    with pytest.raises(ConfigError, match=r"the\.key: 'number_code:not_a_module' returned int"):
        built(builder)


def test_a_builder_without_a_signature_is_refused_as_configuration(code: Path) -> None:
    with pytest.raises(ConfigError):
        built(resolve_builder("builtins:max", code_folder=code))


# The contract of a module


class Custom(nn.Module):
    """A convolution, then whatever the test asks for."""

    def __init__(self, then: Callable[[Custom, Tensor], object], channels: int = 4) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, channels, 3, padding=1)
        self.then = then
        self.register_buffer("calls", torch.zeros(1))

    def forward(self, x: Tensor) -> object:
        return self.then(self, x)


class OwnPool(Custom):
    """A module that says what its embeddings are."""

    def __init__(
        self,
        embed: Callable[[Tensor], object],
        then: Callable[[Custom, Tensor], object] = lambda m, x: m.conv(x),
    ) -> None:
        super().__init__(then)
        self.embed = embed

    def pool(self, z: Tensor) -> object:
        return self.embed(z)


def count_call(module: Custom, x: Tensor) -> Tensor:
    module.get_buffer("calls").add_(1)
    y: Tensor = module.conv(x)
    return y


def assert_nothing(module: Custom, x: Tensor) -> Tensor:
    raise AssertionError  # as an assertion without words does in a user's own file


def mix_last_channel(module: Custom, x: Tensor) -> Tensor:
    y = module.conv(x)
    return torch.cat([y[:, :-1], y[:, -1:] + y[:, -1:].mean(0)], dim=1)


def refusal(module: nn.Module, in_shape: tuple[int, ...] = (3, 4, 4)) -> str:
    """Why a module is refused; its error names the module's key."""
    with pytest.raises(ModuleRefusedError) as caught:
        output_shape(module, in_shape, key="module.2")
    assert caught.value.key == "module.2"
    assert str(caught.value).startswith("module.2: ")
    return caught.value.problem


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Identity(), (3, 4, 4)),
        (nn.GroupNorm(3, 3), (3, 4, 4)),
        (nn.LayerNorm([3, 4, 4]), (3, 4, 4)),
        (nn.InstanceNorm2d(3), (3, 4, 4)),
        (nn.Dropout(0.5), (3, 4, 4)),
        (nn.Conv2d(3, 7, 3), (7, 2, 2)),
        (nn.AvgPool2d(4), (3, 1, 1)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_layers_that_treat_each_row_alone_are_accepted(
    layer: nn.Module, shape: tuple[int, ...]
) -> None:
    module = nn.Sequential(nn.Conv2d(3, 3, 1), layer)
    assert output_shape(module, (3, 4, 4), key="module.1") == (shape, shape[:1])


def test_embeddings_are_the_spatial_mean_or_the_modules_own() -> None:
    z = torch.randn(5, 4, 2, 3)
    torch.testing.assert_close(pool(nn.Identity(), z), z.mean(dim=(2, 3)))
    assert torch.equal(pool(nn.Identity(), z[:, :, 0, 0]), z[:, :, 0, 0])
    own = OwnPool(lambda z: z.flatten(1))
    assert torch.equal(pool(own, z), z.flatten(1))
    assert output_shape(own, (3, 2, 2), key="module.1") == ((4, 2, 2), (16,))


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.BatchNorm2d(3), "running_mean"),
        (nn.BatchNorm2d(3, track_running_stats=False), "depends on the other rows"),
        (Custom(lambda m, x: m.conv(x) + m.conv(x).mean(0)), "depends on the other rows"),
        (Custom(lambda m, x: m.conv(x).flip(0)), "depends on the other rows"),
        (Custom(lambda m, x: m.conv(x) / 0), "gives NaN or infinity"),
        (OwnPool(lambda z: z.mean((2, 3)).log()), "gives NaN or infinity"),
        (Custom(lambda m, x: m.conv(x).cumsum(0)), "depends on the other rows"),
        (Custom(lambda m, x: m.conv(x).flip(0).cumsum(0).flip(0)), "depends on the other rows"),
        (Custom(lambda m, x: m.conv(x) / m.conv(x).abs().max().detach()), "the other rows"),
        (OwnPool(lambda z: z[:, :3].mean((2, 3)), mix_last_channel), "the other rows"),
        (OwnPool(lambda z: z.mean((2, 3)) + z.mean()), "depends on the other rows"),
        (Custom(count_call), "changes the buffer 'calls'"),
        (nn.ReLU(), "no parameters that can be trained"),
        (nn.Conv2d(3, 4, 3).requires_grad_(False), "no parameters that can be trained"),
        (nn.LazyConv2d(4, 3), "has lazy layers"),
        (Custom(lambda m, x: F.dropout(m.conv(x), 0.1)), "is random in evaluation mode"),
        (OwnPool(lambda z: z.mean((2, 3)) * torch.rand(1)), "is random in evaluation mode"),
        (Custom(lambda m, x: (m.conv(x), x)), "returned tuple, expected one tensor"),
        (Custom(lambda m, x: None), "returned NoneType, expected one tensor"),
        (Custom(lambda m, x: m.conv(x).flatten(1)), r"shape \(2, 64\).*channel, height, width"),
        (Custom(lambda m, x: m.conv(x)[:1]), r"shape \(1, 4, 4, 4\)"),
        (Custom(lambda m, x: m.conv(x)[:, :0]), r"shape \(2, 0, 4, 4\)"),
        (Custom(lambda m, x: m.conv(x).sum()), r"shape \(\)"),
        (Custom(lambda m, x: m.conv(x).double()), "float64, expected torch.float32"),
        (Custom(lambda m, x: torch.ones(2, 4, 4, 4)), "does not depend on its input"),
        (Custom(lambda m, x: m.conv.weight[:, 0].expand(2, 4, 3, 3)), "not depend on its input"),
        (Custom(lambda m, x: x.reshape(7, -1)), "cannot take its input"),
        (Custom(lambda m, x: m.absent), "cannot take its input.*absent"),
        (Custom(assert_nothing), "cannot take its input.*AssertionError"),
        (OwnPool(lambda z: None), "pool returned NoneType"),
        (OwnPool(lambda z: z.reshape(7, -1)), "pool failed"),
        (OwnPool(lambda z: z), r"pool returned shape \(2, 4, 4, 4\)"),
        (OwnPool(lambda z: z.mean((0, 2, 3))), r"pool returned shape \(4,\)"),
    ],
)
def test_modules_that_break_the_contract_are_refused_with_the_reason(
    module: nn.Module, reason: str
) -> None:
    with pytest.raises(ModuleRefusedError, match=reason):
        output_shape(module, (3, 4, 4), key="module.2")
    refusal(module)


def test_an_input_that_does_not_fit_is_named_with_its_size() -> None:
    problem = refusal(residual_module(3, channels=4), (5, 8, 6))
    assert "5×8×6" in problem
    assert "3 channels" in problem
    assert "\n" not in problem


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "module", [residual_module(3, channels=4), nn.BatchNorm2d(3), Custom(count_call)]
)
def test_a_check_leaves_module_and_random_state_as_they_were(
    module: nn.Module, training: bool
) -> None:
    module.train(training)
    before = {name: value.clone() for name, value in module.state_dict().items()}
    random_state = torch.get_rng_state()
    try:
        output_shape(module, (3, 4, 4), key="module.1")
    except ModuleRefusedError:
        assert before.keys() - dict(module.named_parameters()).keys()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    assert module.training is training
    assert all(parameter.grad is None for parameter in module.parameters())


def test_buffers_come_back_whatever_the_reason() -> None:
    module = nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(5, 4, 1))
    before = {name: value.clone() for name, value in module.named_buffers()}
    refusal(module)
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())


def test_checks_give_the_same_shape_whatever_the_random_state() -> None:
    module = residual_module(3, channels=4)
    for seed in range(2):
        torch.manual_seed(seed)
        assert output_shape(module, (3, 6, 6), key="module.1") == ((4, 6, 6), (4,))


@pytest.mark.parametrize(
    ("build", "channels", "parameters"),
    [
        (resnet50_module, [256, 512, 1024], [216_064, 1_216_000, 7_088_128]),
        (resnet34_module, [64, 128, 256], [223_232, 1_115_264, 6_819_072]),
    ],
)
def test_resnets_are_those_of_the_paper(
    build: Callable[..., nn.Sequential], channels: list[int], parameters: list[int]
) -> None:
    x = torch.randn(2, 1, 16, 16)
    sizes = [16, 8, 4]
    for blocks, out, size, count in zip(
        ([1, 3], [4, 7], [8, 13]), channels, sizes, parameters, strict=True
    ):
        module = build(x.shape[1], blocks=blocks)
        x = module(x)
        assert x.shape == (2, out, size, size)
        assert sum(parameter.numel() for parameter in module.parameters()) == count


@pytest.mark.parametrize("cut", [1, 3, 6, 12])
@pytest.mark.parametrize("build", [resnet50_module, resnet34_module])
def test_a_resnet_cut_anywhere_is_the_whole_one(
    build: Callable[..., nn.Sequential], cut: int
) -> None:
    whole = build(1, blocks=[1, 13], width=8)
    lower = build(1, blocks=[1, cut], width=8)
    x = torch.randn(1, 1, 16, 16)
    middle = lower(x).shape[1]
    upper = build(middle, blocks=[cut + 1, 13], width=8)
    parts = [*lower, *upper]
    for part, original in zip(parts, whole, strict=True):
        part.load_state_dict(original.state_dict())
    assert torch.equal(upper(lower(x)), whole(x))


def test_delta_orthogonal_kernels_keep_lengths_at_their_centre() -> None:
    module = resnet34_module(1, blocks=[1, 5], init="delta_orthogonal", width=8)
    kernels = [layer.weight for layer in module.modules() if isinstance(layer, nn.Conv2d)]
    for kernel in kernels:
        centre = kernel[:, :, kernel.shape[2] // 2, kernel.shape[3] // 2]
        assert kernel.count_nonzero() == centre.count_nonzero()
        narrow = centre.T @ centre if centre.shape[0] >= centre.shape[1] else centre @ centre.T
        torch.testing.assert_close(narrow, 2 * torch.eye(len(narrow)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "options", "expected"),
    [
        (1, {"blocks": [0, 3]}, "within 1 to 13"),
        (1, {"blocks": [3, 2]}, "within 1 to 13"),
        (1, {"blocks": [1, 14]}, "within 1 to 13"),
        (1, {"blocks": 3}, "within 1 to 13"),
        (1, {"blocks": [1, 2], "width": 0}, "width must be at least 1"),
        (99, {"blocks": [4, 7]}, "block 4 takes 256 channels, the module's input has 99"),
    ],
)
def test_resnets_refuse_cuts_that_do_not_exist(
    channels: int, options: dict[str, Any], expected: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(expected)):
        resnet50_module(channels, **options)


@pytest.mark.parametrize(
    ("below", "own", "first"), [("[1, 3]", "[3, 7]", 4), ("[1, 4]", "[6, 7]", 5)]
)
def test_blocks_of_modules_follow_on(tiny: Path, below: str, own: str, first: int) -> None:
    text = tiny.read_text().partition("[module.1]")[0]
    for number, blocks in enumerate((below, own), start=1):
        text += f'[module.{number}]\nbuild = "resnet34"\n'
        text += f"options = {{ blocks = {blocks}, width = 4 }}\n"
    tiny.write_text(text)
    with pytest.raises(ConfigError, match=f"let it begin with block {first}") as caught:
        Pipeline.from_file(tiny, device="cpu").check()
    assert caught.value.key == "module.2.options.blocks"
