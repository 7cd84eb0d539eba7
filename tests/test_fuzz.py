"""Nonsense in a pipeline file or a manifest is answered with one line, and never with a crash."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import signal
import string
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from gim_stagewise.cli import main
from gim_stagewise.durable import json_checksum
from gim_stagewise.pipeline import Pipeline

FILES = 1500
MANIFESTS = 600
SECONDS = 20

NASTY = [
    *("0", "-1", "1", "2", "1.5", "-0.0", "1e308", "1e-320", "nan", "inf", "-inf", "true", "false"),
    *("1000000000000", "-9223372036854775808", "99999999999999999999999999"),
    *('""', '"auto"', '"../../etc/passwd"', '"/dev/zero"', '"💥"', '"a\\u0000b"', '"os:system"'),
    *("[]", "[1]", "[[]]", '["a"]', "{}", "{ a = 1 }", "1979-05-27", '"uint8"', "'''\nx'''"),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, new_tiny: Callable[[Path], Path]) -> Path:
    folder = tmp_path_factory.mktemp("fuzz")
    file = new_tiny(folder)
    file.write_text(file.read_text().partition("[module.3]")[0])
    Pipeline.from_file(file, folder=folder / "out", device="cpu").run()
    return folder


@pytest.fixture(autouse=True)
def no_hang() -> Iterator[None]:
    """A command that takes long is interrupted, and then it has not ended with 0 or 2."""
    terminate = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, terminate)
    signal.alarm(0)


def call(*arguments: str | Path) -> int:
    """The exit code of a command, in this process."""

    def give_up(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS)
    try:
        return int(main.main([*map(str, arguments)], standalone_mode=False) or 0)
    except click.ClickException as error:
        return error.exit_code
    finally:
        signal.alarm(0)


def mutated(text: str, draw: random.Random) -> str:
    """A pipeline file with something wrong in it, or several things."""
    for _ in range(draw.choice((1, 1, 1, 2, 4))):
        lines = text.split("\n")
        place = draw.randrange(len(lines))
        line = lines[place]
        match draw.randrange(9):
            case 0:
                del lines[place]
            case 1:
                lines.insert(place, line)
            case 2 | 3 | 4 if "=" in line:
                lines[place] = f"{line.split('=')[0]}= {draw.choice(NASTY)}"
            case 5 if "=" in line:
                lines[place] = line.replace("=", draw.choice(("", "==", " = = ", "=\n")), 1)
            case 6:
                other = draw.randrange(len(lines))
                lines[place], lines[other] = lines[other], line
            case 7:
                cut = draw.randrange(len(text))
                return text[:cut] + draw.choice(string.printable) + text[cut + 1 :]
            case _:
                lines.insert(place, f"{draw.choice(string.ascii_letters)} = {draw.choice(NASTY)}")
        text = "\n".join(lines)
    return text


@pytest.mark.parametrize("part", range(4))
def test_pipeline_files(made: Path, tmp_path: Path, part: int, capfd: Any) -> None:
    text = (made / "tiny.toml").read_text()
    file = tmp_path / "fuzzed.toml"
    codes = set()
    for seed in range(part, FILES, 4):
        file.write_text(mutated(text, random.Random(seed)), encoding="utf-8")
        folder = made / "out" if seed % 3 == 0 else tmp_path / "new"
        code = call("status", file, "--dir", folder)
        captured = capfd.readouterr()
        assert code in (0, 2), (seed, captured.err)
        assert "Traceback" not in captured.err, seed
        assert code == 0 or len(captured.err.strip()) > 10, seed
        codes.add(code)
    assert codes == {0, 2}


def replaced(content: Any, draw: random.Random) -> Any:
    """JSON with one value somewhere that is another."""
    values: list[Any] = [
        *(None, True, 0, -1, 1, 2**31, 2**62, 10**30, 1.5, -1e308, "", "x", "../../../etc/passwd"),
        *([], [1], {}, {"a": 1}, "0" * 64, "💥", [10**12] * 3, "gzip", "float64"),
    ]
    if isinstance(content, dict) and content and draw.random() < 0.93:
        key = draw.choice(sorted(content))
        if draw.random() < 0.04:
            return {k: v for k, v in content.items() if k != key}
        return {**content, key: replaced(content[key], draw)}
    if isinstance(content, list) and content and draw.random() < 0.7:
        place = draw.randrange(len(content))
        return [*content[:place], replaced(content[place], draw), *content[place + 1 :]]
    return draw.choice(values)


@pytest.mark.parametrize(
    "part", [0, *(pytest.param(part, marks=pytest.mark.slow) for part in range(1, 4))]
)
def test_manifests(made: Path, tmp_path: Path, part: int, capfd: Any) -> None:
    """Of somebody who knows how to make the checksum right, too."""
    shutil.copytree(made / "out", tmp_path / "out")
    path = tmp_path / "out" / "m1.zarr"
    file = path / "zarr.json"
    whole = json.loads(file.read_text())
    for seed in range(part, MANIFESTS, 4):
        draw = random.Random(seed)
        content = replaced(whole["attributes"]["gim_stage"], draw)
        if isinstance(content, dict) and draw.random() < 0.9:
            content["checksum"] = json_checksum(content)
        file.write_text(json.dumps({**whole, "attributes": {"gim_stage": content}}))
        for command, allowed in (
            (("inspect", path), (0, 2)),
            (("status", made / "tiny.toml", "--dir", tmp_path / "out"), (0, 2)),
            (("verify", path, "-q"), (0, 2, 4)),
            (("probe", "--input", path), (0, 2)),
        )[:: 1 if seed % 10 == 0 else 2]:
            code = call(*command)
            captured = capfd.readouterr()
            assert code in allowed, (seed, command, captured.err)
            assert "Traceback" not in captured.err, (seed, command, captured.err)


@pytest.mark.parametrize(
    "change",
    [
        {"recipe": {"parts": [1]}},
        {"content": {"parts": "x"}},
        {"content": {"parts": {}}},
        {"files": {"a\0b": "0" * 64}},
    ],
)
def test_manifests_that_were_made_up(
    made: Path, tmp_path: Path, change: dict[str, Any], capfd: Any
) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    file = tmp_path / "out" / "m1.zarr" / "zarr.json"
    whole = json.loads(file.read_text())
    content = {**whole["attributes"]["gim_stage"], **change}
    content["checksum"] = json_checksum(content)
    file.write_text(json.dumps({**whole, "attributes": {"gim_stage": content}}))
    ends_in_one_line(made, tmp_path / "out", capfd)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"attributes": ' + "9" * 5000 + "}", '{"zarr_format": []}']
)
def test_manifests_that_json_cannot_take(made: Path, tmp_path: Path, text: str, capfd: Any) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    (tmp_path / "out" / "m1.zarr" / "zarr.json").write_text(text)
    ends_in_one_line(made, tmp_path / "out", capfd)


@pytest.mark.parametrize(
    ("part", "value"),
    [("validation_loss", None), ("seconds", "x"), ("epochs", True), ("numerics", 3)],
)
def test_weights_with_records_that_were_made_up(
    made: Path, tmp_path: Path, part: str, value: Any, capfd: Any
) -> None:
    shutil.copytree(made / "out", tmp_path / "out")
    file = tmp_path / "out" / "m1.safetensors"
    with safe_open(file, framework="pt") as opened:
        about = json.loads(opened.metadata()["gim_stage"])
    about["record"][part] = value
    text = json.dumps(about)
    metadata = {"gim_stage": text, "sha256": hashlib.sha256(text.encode()).hexdigest()}
    save_file(load_file(file), file, metadata=metadata)
    ends_in_one_line(made, tmp_path / "out", capfd)


def ends_in_one_line(made: Path, out: Path, capfd: Any) -> None:
    for command in (
        ("inspect", out / "m1.zarr"),
        ("status", made / "tiny.toml", "--dir", out),
        ("verify", out, "-q"),
        ("probe", "--input", out / "m1.zarr"),
        ("train", "--module", "2", "--input", out / "m1.zarr", "-q"),
        ("extract", "--module", "1", "--pipeline", made / "tiny.toml", "--dir", out, "-q"),
        ("verify", out / "m1.zarr", "--repair", "-q"),
    ):
        code = call(*command)
        captured = capfd.readouterr()
        assert code in (0, 2, 4), (command, captured.err)
        assert "Traceback" not in captured.err, (command, captured.err)


@pytest.mark.parametrize("text", ["a = " + "[" * 5000, "seed = " + "9" * 5000])
def test_pipeline_files_that_toml_cannot_take(tmp_path: Path, text: str, capfd: Any) -> None:
    (tmp_path / "x.toml").write_text(text)
    assert call("run", tmp_path / "x.toml") == 2
    assert "not valid TOML" in capfd.readouterr().err
