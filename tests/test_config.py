"""A pipeline file ends in validated objects, or in one error that says where, what and why."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from gim_stagewise.config import PipelineConfig, load_pipeline, parse_pipeline, with_values
from gim_stagewise.config.load import ON_CACHED_INPUTS
from gim_stagewise.errors import ConfigError, GimStageError
from gim_stagewise.units import parse_bytes

HEAD = 'name = "tiny"\n'
SOURCE = '[source]\nkind = "digits"\n'
PATCHES = "[patches]\nsize = 4\nstride = 2\n"
MODULE = '[module.1]\nbuild = "residual"\n'
BASE = HEAD + SOURCE + PATCHES + MODULE

# Words of the validation library, or of Python, that mean nothing in a TOML file.
JARGON = re.compile(
    r"pydantic|validation error|\[type=|input_value|\btuple\b|\bdict\b|constrained|\bunion\b|"
    r"\bmodel\b|string should match pattern|datetime\.|\bstr\b",
    re.IGNORECASE,
)


def module(number: int | str) -> str:
    return f'[module.{number}]\nbuild = "residual"\n'


def parsed(text: str) -> PipelineConfig:
    return parse_pipeline(text, file="tiny.toml")


def refusal(folder: Path, content: str | bytes) -> tuple[Path, ConfigError]:
    """The error that a pipeline file of this content ends in."""
    path = folder / "tiny.toml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_pipeline(path)
    return path, caught.value


UNKNOWN = [
    ("sede = 3\n" + BASE, "sede", "3", "did you mean 'seed'"),
    (BASE + "[train]\nlrr = 3\n", "train.lrr", "3", "did you mean 'lr'"),
    (
        BASE + module(2) + "[module.2.train]\nbacth = 8\n",
        "module.2.train.bacth",
        "8",
        "did you mean 'batch'",
    ),
    (BASE + "optoins = { a = 1 }\n", "module.1.optoins", "'a': 1", "did you mean 'options'"),
    (BASE + "[objective]\nnegative = 4\n", "objective.negative", "4", "did you mean 'negatives'"),
    (BASE + "[augment]\ncorp = 8\n", "augment.corp", "8", "did you mean 'crop'"),
    (BASE + "[module.1.cache]\nchunks = 8\n", "module.1.cache.chunks", "8", "mean 'chunk'"),
    (BASE + "[extrcat]\nbatch = 8\n", "extrcat", "'batch': 8", "did you mean 'extract'"),
    (BASE + "[trian]\nlr = 8\n", "trian", "'lr': 8", "did you mean 'train'"),
    (BASE + "[train]\nzzz = 3\n", "train.zzz", "3", "known keys: batch, "),
    (BASE + "[source.splits.valid]\na = 1\n", "source.splits.valid", "valid", "unlabeled.*train"),
]

WRONG_TYPE = [
    (BASE + '[train]\nbatch = "32"\n', "train.batch", "'32'", "integer"),
    (BASE + "[train]\nbatch = true\n", "train.batch", "(?i)true", "integer"),
    (BASE + "[module.1.train]\nbatch = 3.5\n", "module.1.train.batch", "3.5", "integer"),
    (BASE + '[train]\nlr = "fast"\n', "train.lr", "'fast'", "number"),
    ("seed = 1.5\n" + BASE, "seed", "1.5", "integer"),
    (BASE.replace('"tiny"', "3"), "name", "3", "string"),
    (BASE.replace('"digits"', "3"), "source.kind", "3", "string"),
    (BASE.replace('"residual"', "3"), "module.1.build", "3", "string"),
    (BASE.replace("size = 4", 'size = "4"'), "patches.size", "'4'", "integer"),
    (BASE + '[augment]\nmean = ["x"]\nstd = [1.0]\n', "augment.mean.0", "'x'", "number"),
    (BASE + '[augment]\nflip = "often"\n', "augment.flip", "'often'", "number"),
    (BASE + '[augment]\ngrayscale = "yes"\n', "augment.grayscale", "'yes'", "boolean|true"),
    (
        BASE + '[module.1.objective]\nnegatives = "x"\n',
        "module.1.objective.negatives",
        "'x'",
        "integer",
    ),
]

NO_TABLE = [
    ("train = 3\n" + BASE, "train", "3", "table"),
    (BASE + "train = 3\n", "module.1.train", "3", "table"),
    (BASE + "options = 3\n", "module.1.options", "3", "table"),
    ('source = "digits"\n' + HEAD + PATCHES + MODULE, "source", "'digits'", "table"),
    ("module = 3\n" + HEAD + SOURCE + PATCHES, "module", "3", "table"),
    (BASE.replace("[module.1]", "[[module]]"), "module", "'residual'", "table"),
    (HEAD + SOURCE + PATCHES + '[module]\n1 = "residual"\n', "module.1", "'residual'", "table"),
    (BASE + "[source.splits]\ntrain = 3\n", "source.splits.train", "3", "table"),
]

OUT_OF_RANGE = [
    ("seed = -1\n" + BASE, "seed", "-1", "0"),
    (BASE + "[train]\nbatch = 0\n", "train.batch", "is 0", "greater than 0|at least 1"),
    (BASE + "[train]\nlr = -0.1\n", "train.lr", "-0.1", "greater than 0|above 0"),
    (BASE + "[train]\nlr = nan\n", "train.lr", "nan", "greater than 0|finite"),
    (BASE + "[train]\nvalidation = 1.0\n", "train.validation", "1.0", "less than 1|below 1"),
    (BASE + "[augment]\nflip = 2\n", "augment.flip", "2", "1"),
    (BASE + "[augment]\npad = -1\n", "augment.pad", "-1", "0"),
    (BASE + "[augment]\nviews = 0\n", "augment.views", "0", "greater than 0|at least 1"),
    (BASE + "[augment]\nmean = [0.5]\nstd = [0.0]\n", "augment.std.0", "0.0", "0"),
    (BASE + "[augment]\nmean = [0.5]\n", "augment", "0.5", "mean and std"),
    (BASE + "[augment]\nmean = [0.5]\nstd = [1.0, 1.0]\n", "augment", "0.5", "per channel"),
    (BASE + '[cache]\ncodec = "gzip"\n', "cache.codec", "'gzip'", "'lz4'.*'zstd'.*'none'"),
    (BASE + '[objective]\nkind = "nce"\n', "objective.kind", "'nce'", "'infonce'"),
    (BASE + "[module.1.cache]\nchunk = 0\n", "module.1.cache.chunk", "0", "greater than 0"),
    (BASE + '[train]\nshuffle_window = "2 pc"\n', "train.shuffle_window", "'2 pc'", "2GiB"),
    (BASE + "[train]\nshuffle_window = 0\n", "train.shuffle_window", "0", "above 0"),
]

MODULE_NUMBERS = [
    (BASE.replace("[module.1]", "[module.x]"), "module.x", "x", "number"),
    (BASE.replace("[module.1]", "[module.0]"), "module.0", "0", "number"),
    (BASE.replace("[module.1]", "[module.01]"), "module.01", "01", "number"),
    (BASE.replace("[module.1]", "[module.-1]"), "module.-1", "-1", "number"),
    (BASE + module(3), "module", "'1', '3'", "without a gap"),
    (BASE.replace("[module.1]", "[module.2]"), "module", "'2'", "without a gap"),
    (HEAD + SOURCE + PATCHES + "[module]\n", "module", "none", "numbered 1"),
]


@pytest.mark.parametrize(
    ("text", "key", "value", "expected"),
    [
        pytest.param(*case, id=f"{group}-{case[1]}")
        for group, cases in {
            "unknown": UNKNOWN,
            "type": WRONG_TYPE,
            "table": NO_TABLE,
            "range": OUT_OF_RANGE,
            "number": MODULE_NUMBERS,
        }.items()
        for case in cases
    ],
)
def test_what_is_wrong_is_named_by_file_key_value_and_expectation(
    tmp_path: Path, text: str, key: str, value: str, expected: str
) -> None:
    path, error = refusal(tmp_path, text)
    message = str(error)
    assert (error.file, error.key) == (str(path), key)
    assert message.startswith(f"{path}: {key}: ")
    assert re.search(value, error.problem) or key.endswith(f".{value}")
    assert re.search(expected, error.problem)
    assert "\n" not in message
    assert not JARGON.search(error.problem)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        (SOURCE + PATCHES + MODULE, "name"),
        (HEAD + PATCHES + MODULE, "source"),
        (HEAD + SOURCE + MODULE, "patches"),
        (HEAD + SOURCE + PATCHES, "module"),
        (HEAD + "[source]\n" + PATCHES + MODULE, "source.kind"),
        (BASE.replace("size = 4", ""), "patches.size"),
        (BASE.replace("stride = 2", ""), "patches.stride"),
        (BASE.replace('build = "residual"', ""), "module.1.build"),
        (BASE + "[module.2]\noptions = { a = 1 }\n", "module.2.build"),
        (BASE + "[train]\nlr = 1\n[module.2.train]\nlr = 2\n", "module.2.build"),
    ],
)
def test_what_is_missing_is_named(tmp_path: Path, text: str, key: str) -> None:
    path, error = refusal(tmp_path, text)
    assert str(error).startswith(f"{path}: {key}: missing")
    assert not JARGON.search(error.problem)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("int = 3\n" + BASE, "int"),
        (BASE + "[train]\nstr = 3\n", "train.str"),
        ('"lr (high)" = 3\n' + BASE, "lr (high)"),
    ],
)
def test_an_unknown_key_may_have_any_name(tmp_path: Path, text: str, key: str) -> None:
    _, error = refusal(tmp_path, text)
    assert error.key == key
    assert "unknown key" in error.problem


@pytest.mark.parametrize(
    ("text", "key", "expected"),
    [
        pytest.param(
            BASE + '[cache]\nchunk = "never"\n',
            "cache.chunk",
            "auto",
            id="either-number-or-word",
        ),
        pytest.param(
            BASE + "[augment]\nmean = 0.5\nstd = [1.0]\n",
            "augment.mean",
            "list|array",
            id="array",
        ),
        pytest.param(
            BASE.replace('"tiny"', '"a b"'),
            "name",
            "letters",
            id="name",
        ),
        pytest.param(
            BASE + "[train]\nbatch = 2020-01-01\n",
            "train.batch",
            "2020-01-01",
            id="date",
        ),
        pytest.param(
            BASE.replace("[module.1]", "[modul.1]"),
            "modul",
            "did you mean 'module'",
            id="misspelt-table",
        ),
        pytest.param(
            BASE.replace("build =", "biuld ="),
            "module.1.biuld",
            "did you mean 'build'",
            id="misspelt-key",
        ),
    ],
)
def test_expectations_are_in_the_words_of_the_file(
    tmp_path: Path, text: str, key: str, expected: str
) -> None:
    _, error = refusal(tmp_path, text)
    assert error.key == key
    assert re.search(expected, error.problem)
    assert not JARGON.search(error.problem)


@pytest.mark.parametrize(
    ("extra", "key"),
    [
        ("[train]\nlr = inf\n", "train.lr"),
        ("[augment]\nmean = [inf]\nstd = [1.0]\n", "augment.mean.0"),
        ("[augment]\nmean = [0.0]\nstd = [inf]\n", "augment.std.0"),
    ],
)
def test_numbers_are_finite(tmp_path: Path, extra: str, key: str) -> None:
    _, error = refusal(tmp_path, BASE + extra)
    assert error.key == key


def test_several_mistakes_are_still_one_line(tmp_path: Path) -> None:
    _, error = refusal(tmp_path, BASE + "[train]\nlr = -1\nbatch = 0\nzzz = 1\n")
    assert len(str(error).splitlines()) == 1


def test_a_config_error_is_the_users_to_mend_and_a_value_error(tmp_path: Path) -> None:
    _, error = refusal(tmp_path, "seed = -1\n" + BASE)
    assert isinstance(error, GimStageError)
    assert isinstance(error, ValueError)
    assert error.exit_code == 2


def test_bad_toml_names_the_file_and_the_line(tmp_path: Path) -> None:
    path, error = refusal(tmp_path, BASE + "lr = = 3\n")
    assert str(error).startswith(f"{path}: not valid TOML")
    assert f"line {BASE.count(chr(10)) + 1}" in str(error)


@pytest.mark.parametrize("content", [b"\x80\x00\xff\xfe", b"name = '\xe9'\n"])
def test_a_file_that_is_not_text_is_called_that(tmp_path: Path, content: bytes) -> None:
    path, error = refusal(tmp_path, content)
    assert str(error).startswith(f"{path}: cannot be read as a text file")


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such pipeline file") as caught:
        load_pipeline(tmp_path / "absent.toml")
    assert str(tmp_path / "absent.toml") in str(caught.value)
    with pytest.raises(ConfigError, match="cannot be read") as caught:
        load_pipeline(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_an_absent_stage_is_named_with_those_there_are() -> None:
    with pytest.raises(ConfigError, match=r"no module 3.*modules 1 to 2"):
        parsed(BASE + module(2)).stage(3)


@settings(deadline=None, max_examples=60)
@given(st.sets(st.integers(1, 12), min_size=1, max_size=5))
def test_modules_are_numbered_from_one_without_gaps(numbers: set[int]) -> None:
    text = HEAD + SOURCE + PATCHES + "".join(module(number) for number in sorted(numbers))
    if numbers == set(range(1, len(numbers) + 1)):
        assert set(parsed(text).module) == numbers
    else:
        with pytest.raises(ConfigError, match="without a gap"):
            parsed(text)


def test_the_file_is_returned_with_its_text(tmp_path: Path) -> None:
    path = tmp_path / "tiny.toml"
    path.write_text(BASE)
    config, text = load_pipeline(path)
    assert text == BASE
    assert config.name == "tiny"
    assert config.module[1].build == "residual"


def test_settings_cannot_change_once_read() -> None:
    config = parsed(BASE)
    with pytest.raises(ValidationError):
        config.seed = 3


@pytest.mark.parametrize(
    ("table", "key", "default", "shared", "own"),
    [
        ("train", "lr", 1e-3, 0.5, 0.25),
        ("objective", "negatives", 16, 8, 4),
        ("cache", "codec", "lz4", "zstd", "none"),
    ],
)
def test_a_modules_own_value_wins_over_the_shared_one_over_the_default(
    table: str, key: str, default: object, shared: object, own: object
) -> None:
    def line(value: object) -> str:
        return f"{key} = {value!r}\n"

    def values(text: str) -> list[object]:
        stages = parsed(text).module
        return [getattr(getattr(stages[n], table), key) for n in sorted(stages)]

    own_table = f"[module.2.{table}]\n" + line(own)
    assert values(BASE + module(2)) == [default, default]
    assert values(BASE + module(2) + own_table) == [default, own]
    assert values(BASE + module(2) + f"[{table}]\n" + line(shared)) == [shared, shared]
    both = BASE + f"[{table}]\n" + line(shared) + module(2) + own_table
    assert values(both) == [shared, own]


def test_shared_tables_are_merged_key_by_key() -> None:
    text = BASE + "[train]\nlr = 0.5\nbatch = 7\n" + module(2) + "[module.2.train]\nbatch = 9\n"
    first, second = parsed(text).stage(1).train, parsed(text).stage(2).train
    assert (first.lr, first.batch) == (0.5, 7)
    assert (second.lr, second.batch) == (0.5, 9)
    assert first.patience == second.patience


@pytest.mark.parametrize(
    ("value", "size"),
    [
        (1, 1),
        (2_000_000, 2_000_000),
        ("7", 7),
        ("7B", 7),
        ("2kB", 2_000),
        ("2KiB", 2_048),
        ("3MB", 3_000_000),
        ("3MiB", 3 * 2**20),
        ("2.5GB", 2_500_000_000),
        ("2GiB", 2**31),
        ("1TB", 10**12),
        ("1TiB", 2**40),
        (" 3 mb ", 3_000_000),
        ("0.5 KiB", 512),
    ],
)
def test_sizes_have_decimal_and_binary_units(value: object, size: int) -> None:
    assert parse_bytes(value) == size


@pytest.mark.parametrize(
    "value",
    [0, -1, True, 1.5, None, [], "", "GB", "0", "0.1B", "-1GB", "1XB", "1e9", "1.GB", "1 2", "inf"],
)
def test_what_is_no_size_is_refused(value: object) -> None:
    with pytest.raises(ValueError, match="expected a size above 0"):
        parse_bytes(value)


def test_a_size_beyond_all_floats_is_refused() -> None:
    with pytest.raises(ValueError, match="expected a size above 0"):
        parse_bytes("9" * 400)


@settings(deadline=None)
@given(st.integers(1, 10**6), st.sampled_from(["", " "]), st.booleans())
def test_units_are_exact_multiples(number: int, space: str, lower: bool) -> None:
    for power, letter in enumerate("kMGT", start=1):
        for unit, factor in ((f"{letter}B", 1000**power), (f"{letter}iB", 1024**power)):
            text = f"{number}{space}{unit}"
            assert parse_bytes(text.lower() if lower else text) == number * factor


def test_validation_samples_are_the_same_for_all_modules(tmp_path: Path) -> None:
    path, error = refusal(tmp_path, BASE + "[module.1.train]\nvalidation = 0.2\n")
    assert str(error).startswith(f"{path}: module.1.train.validation: is set once for all modules")


@pytest.mark.parametrize(
    ("text", "changes", "expected"),
    [
        ("seed = 1 # one\n[a]\nseed = 2", {"seed": 7}, "seed = 7 # one\n[a]\nseed = 2"),
        ("'seed' = 1\n", {"seed": 3}, "seed = 3"),
        ("seed = 1", {"seed": None}, "seed = 1"),
        ("[a]\nx = 1", {"mode": "cpc"}, 'mode = "cpc"\n[a]\nx = 1'),
        ("[m.1]\no = { c = 1 }", {"m.1.o.b": False}, "[m.1]\no = { c = 1, b = false }"),
        ("[m]\n1 = {b = 2}", {"m.1.o.b": False}, "[m]\n1 = {b = 2, o = {b = false}}"),
        ("[m.1]\nt.w = 2\n[m.2]", {"m.1.t.w": 3}, "[m.1]\nt.w = 3\n[m.2]"),
        ("[m.1]\nb = 1\n[m.2]", {"m.1.t.w": 3}, "[m.1]\nb = 1\nt.w = 3\n[m.2]"),
    ],
)
def test_values_are_replaced_in_the_text(
    text: str, changes: dict[str, object], expected: str
) -> None:
    assert tomllib.loads(with_values(text, changes)) == tomllib.loads(expected)


def test_all_else_in_the_text_stays() -> None:
    text = "# what\nseed = 1 # one\n\n[a] # two\nx  =  1.50\n"
    assert with_values(text, {"seed": 2}) == text.replace("seed = 1", "seed = 2")
    assert with_values("no toml", {"seed": 1}) == "no toml"


def corruption(text: str, number: int) -> tuple[float, float]:
    train = parsed(text).stage(number).train
    return train.dropout, train.noise


def test_modules_on_cached_inputs_are_kept_from_overfitting() -> None:
    text = BASE + module(2)
    assert corruption(text, 1) == (0, 0)
    assert corruption(text, 2) == tuple(ON_CACHED_INPUTS.values())
    assert corruption(text + "[train]\ndropout = 0.1\nnoise = 0.2\n", 2) == (0.1, 0.2)
    assert corruption(text + "train = { dropout = 0.0, noise = 0.0 }\n", 2) == (0, 0)


def test_modules_trained_in_one_step_can_each_be_corrupted_in_their_own_way() -> None:
    text = BASE + module(2).rstrip() + "\ntrain.dropout = 0.3\n"
    assert corruption(text, 2) == (0.3, ON_CACHED_INPUTS["noise"])
    together = f'mode = "simultaneous"\n{text}'
    assert corruption(together, 1) == (0, 0)
    assert corruption(together, 2) == (0.3, 0)


def test_windows_and_sequences_are_not_corrupted() -> None:
    """They are placed anew in every epoch."""
    for name in ("large_image", "long_audio"):
        config, _ = load_pipeline(Path(__file__).parent.parent / "pipelines" / f"{name}.toml")
        assert len(config.module) > 1
        assert {(own.train.dropout, own.train.noise) for own in config.module.values()} == {(0, 0)}


@pytest.mark.parametrize("mode", ["simultaneous", "cpc", "supervised"])
def test_inputs_that_change_are_not_corrupted(mode: str) -> None:
    assert corruption(f'mode = "{mode}"\n{BASE}{module(2)}', 2) == (0, 0)
