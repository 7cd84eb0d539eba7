"""Each setting makes stale what it decides, and nothing else: none can be forgotten."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
from helpers import other_value

from gim_stagewise.config import MODES, PipelineConfig, parse_pipeline, tables, with_values
from gim_stagewise.config.rules import check_together
from gim_stagewise.config.tables import Table
from gim_stagewise.errors import ConfigError
from gim_stagewise.stage.identity import cache_recipe, recipe_differences, stage_recipe

HEAD = """
name = "settings"
[source]
kind = "{kind}"
"""
MODULES = """
[module.1]
build = "residual"
options = { channels = 4 }
[module.2]
build = "residual"
options = { channels = 4 }
"""
PATCHES = "[patches]\nsize = 4\nstride = 2\n"
FLIPPED = "[augment]\nflip = 0.5\n[train]\nbatch = 28\n"
READ_WHOLE = HEAD.format(kind="npy") + PATCHES + FLIPPED + MODULES
WINDOWED = HEAD.format(kind="large") + PATCHES + "[train]\nwindow = 8\n" + MODULES
DENSE = 'encoding = "dense"\n' + HEAD.format(kind="large") + "[train]\nwindow = 16\n" + MODULES

# Where the tables of `gim_stagewise.config.tables` stand in a pipeline; of all its modules.
TABLES: dict[str, type[Table]] = {
    "": tables.PipelineConfig,
    "source": tables.SourceConfig,
    "augment": tables.AugmentConfig,
    "patches": tables.PatchesConfig,
    "windows": tables.WindowsConfig,
    "extract": tables.ExtractConfig,
    "probe": tables.ProbeConfig,
    "context": tables.ContextConfig,
    "module": tables.ModuleConfig,
    "module.objective": tables.ObjectiveConfig,
    "module.train": tables.TrainConfig,
    "module.cache": tables.CacheConfig,
}
SETTINGS = [
    path
    for place, table in TABLES.items()
    for name in table.model_fields
    if (path := f"{place}.{name}".lstrip(".")) not in TABLES and path != "module"
]

# What is not of a module's weights, but of what is stored of it, and so of the weights above.
OF_STORED_VALUES = {
    "extract.batch",
    "extract.threads",
    "augment.views",
    "windows.tile",
    "module.cache.precision",
    "module.cache.stored_operation",
    "module.cache.chunk",
}
# What is read is the same: nothing above is trained again.
OF_STORED_FILES = {"module.cache.codec"}
DECIDE_NOTHING = {
    "name": "what a run is called",
    "keep": "which caches stay when they have been used",
    "source.root": "where data lies; what it is, its content digest says",
    "source.download": "whether data may be fetched; what it is, its content digest says",
    "source.on_error": "which files are left out; those that stay, the content digest says",
    "windows.lanes": "the geometry in a cache's content, of stateful modules alone, says it",
    "module.train.checkpoint_every": "how often state is saved; resumed is uninterrupted",
    "module.cache.pool": "the geometry in a cache's content says it",
    "module.cache.max_error": "whether a cache is refused",
    "module.cache.materialize": "whether values are stored or computed again: the same bits",
    "module.cache.verify_reads": "whether what is read is checked",
    **{
        f"probe.{name}": "scores, which are remembered by it (see test_probe)"
        for name in tables.ProbeConfig.model_fields
    },
}
OF_WEIGHTS = {*SETTINGS} - OF_STORED_VALUES - OF_STORED_FILES - {*DECIDE_NOTHING}
# Settings of weights that have a meaning in some modes only.
ONLY_IN: dict[str, set[str]] = {
    "labels": {"supervised", "greedy_supervised"},
    "context": {"cpc"},
    "module.objective": {"iterative", "simultaneous", "cpc"},
    "module.train": set[str](MODES) - {"random"},
    "module.train.update_every": {"simultaneous", "greedy_supervised"},
}


# Of what can have one value alone, another one is tried that pydantic has never heard of.
without_warnings = pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")


def parsed(text: str, changes: Mapping[str, Any] | None = None) -> PipelineConfig:
    return parse_pipeline(with_values(text, changes or {}), file="settings.toml")


def changed(part: Any, path: str) -> Any:
    """The same with another value of one setting, and of nothing else."""
    if isinstance(part, dict):
        return {number: changed(module, path) for number, module in part.items()}
    name, _, rest = path.partition(".")
    value = changed(getattr(part, name), rest) if rest else other_value(part, name)
    return part.model_copy(update={name: value})


def with_other(config: PipelineConfig, path: str) -> PipelineConfig | None:
    """A pipeline with another value; None where that has no meaning."""
    if path.startswith("patches.") and config.patches is None:
        return None
    if path == "augment.views" and not config.augment.random:
        return None
    other: PipelineConfig = changed(config, path)
    try:
        check_together(other)
    except ConfigError:
        # Of encoding and patches it takes both to change.
        return other if path == "encoding" and config.windowed else None
    return other


def decides_weights(path: str, mode: str) -> bool:
    wanted = [modes for own, modes in ONLY_IN.items() if f"{path}.".startswith(f"{own}.")]
    return path in OF_WEIGHTS and all(mode in modes for modes in wanted)


def test_the_tables_are_all_there_are() -> None:
    known = [own for own in vars(tables).values() if isinstance(own, type)]
    assert {own for own in known if issubclass(own, Table)} == {Table, *TABLES.values()}
    assert {*OF_STORED_VALUES, *OF_STORED_FILES, *DECIDE_NOTHING} <= {*SETTINGS}


@without_warnings
@pytest.mark.parametrize("path", SETTINGS)
def test_a_setting_makes_stale_what_it_decides(path: str) -> None:
    """One that is new has to decide weights, unless a list here says why it does not."""
    weights = decides_weights(path, "iterative")
    stored = weights or path in OF_STORED_VALUES
    expected = (weights, stored or path in OF_STORED_FILES, stored)
    tried = 0
    for kind in (READ_WHOLE, WINDOWED, DENSE):
        old = parsed(kind)
        new = with_other(old, path)
        if new is None:
            continue
        tried += 1
        before, after = (
            (stage_recipe(own, 1), cache_recipe(own, 1), stage_recipe(own, 2)) for own in (old, new)
        )
        stale = tuple(a.value != b.value for a, b in zip(before, after, strict=True))
        assert stale == expected, kind
    assert tried


@without_warnings
@pytest.mark.parametrize("path", SETTINGS)
def test_a_setting_makes_stale_what_it_decides_in_one_step(path: str) -> None:
    for mode in MODES:
        old = parsed(READ_WHOLE, {"mode": mode})
        new = with_other(old, path)
        if mode == "iterative" or new is None:
            continue
        stale = stage_recipe(old, 1).value != stage_recipe(new, 1).value
        assert stale == decides_weights(path, mode), mode


@pytest.mark.parametrize(
    ("key", "values", "said"),
    [
        ("seed", (0, 1), "seed 0 → 1"),
        ("objective.negatives", (16, 17), "module.1.objective.negatives 16 → 17"),
        ("objective.prediction_steps", (3, 2), "module.1.objective.prediction_steps 3 → 2"),
        ("train.lr", (1e-3, 2e-3), "module.1.train.lr 0.001 → 0.002"),
        ("train.batch", (32, 31), "module.1.train.batch 32 → 31"),
        ("train.max_epochs", (100, 99), "module.1.train.max_epochs 100 → 99"),
        ("train.patience", (5, 6), "module.1.train.patience 5 → 6"),
        ("train.validation", (0.1, 0.2), "module.1.train.validation 0.1 → 0.2"),
        (
            "train.shuffle_window",
            ("2 MB", "1 MB"),
            "module.1.train.shuffle_window 2000000 → 1000000",
        ),
    ],
)
@pytest.mark.parametrize("mode", ["iterative", "simultaneous"])
def test_what_changed_is_named(mode: str, key: str, values: tuple[Any, Any], said: str) -> None:
    old, new = (parsed(READ_WHOLE, {"mode": mode, key: value}) for value in values)
    # Of the modules that are trained in one step all are named.
    assert recipe_differences(stage_recipe(old, 1), stage_recipe(new, 1))[0] == said
