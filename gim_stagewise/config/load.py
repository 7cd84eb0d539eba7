"""A pipeline file (TOML) becomes frozen, validated objects.

Top-level ``[objective]``, ``[train]`` and ``[cache]`` tables are defaults for every module;
a module's own table of that name wins key by key. Whatever is wrong with a file ends in one
`ConfigError` that names the file, the key path, the value and what was expected.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import tomlkit
from pydantic import BaseModel, ValidationError
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import InlineTable

from gim_stagewise.config.rules import check_together
from gim_stagewise.config.tables import (
    LARGE_KINDS,
    CacheConfig,
    ModuleConfig,
    ObjectiveConfig,
    PipelineConfig,
    Table,
    TrainConfig,
)
from gim_stagewise.errors import ConfigError

_T = TypeVar("_T", bound=Table)

# What may stand at the top level as a default for all modules.
_SHARED: dict[str, type[Table]] = {
    "objective": ObjectiveConfig,
    "train": TrainConfig,
    "cache": CacheConfig,
}

# Inputs that never change invite overfitting (paper, figure 3). Of what was tried against it, only
# this, with early stopping or without, and noise of 1.0 with early stopping lost no more by
# generalisation than simultaneous training and had no less accuracy on validation samples in all
# comparisons on digits, and on photographs at equal work; without, it needs no patience that fits
# the data. On few photographs for 30 epochs none did: with this, gaps are 0.03 and 0.24 nats above
# those of simultaneous training instead of 0.40 and 0.77. See benchmarks/results/iterative_gap.md.
# Validation losses are higher with it, so that it is better turned off where nothing is overfitted.
# On windows and sequences, which are placed anew in every epoch, it was not tried.
ON_CACHED_INPUTS = {"dropout": 0.5, "noise": 0.6}


def load_pipeline(
    path: str | Path, changes: Mapping[str, Any] | None = None
) -> tuple[PipelineConfig, str]:
    """Read and validate a pipeline file.

    Parameters
    ----------
    path : str or Path
    changes : mapping, optional
        Values that replace the file's, in the text as well (see `with_values`).

    Returns
    -------
    (PipelineConfig, str)
        The validated pipeline and the file's text, which every cache carries along.

    Raises
    ------
    ConfigError
        If the file is missing, is not TOML, or says something that cannot be meant.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise ConfigError("no such pipeline file", file=str(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot be read as a text file ({error})", file=str(path)) from None
    text = with_values(text, changes or {})
    return parse_pipeline(text, file=str(path)), text


def with_values(text: str, changes: Mapping[str, Any]) -> str:
    """A pipeline file's text with other values; comments and all else stay as they are.

    What is recorded of a run is then a file that says the same.

    Parameters
    ----------
    text : str
    changes : mapping
        Values by their keys, such as ``"seed"`` or ``"module.6.options.bptt"``; those that are None
        stay as they are.
    """
    changes = {key: value for key, value in changes.items() if value is not None}
    if not changes:
        return text
    try:
        document = tomlkit.parse(text)
    except (TOMLKitError, RecursionError):
        return text  # whoever reads it says what is wrong
    for key, value in changes.items():
        *tables, name = key.split(".")
        table: Any = document
        for own in tables:
            inline = isinstance(table, InlineTable)
            table = table.setdefault(own, tomlkit.inline_table() if inline else tomlkit.table())
        table[name] = value
    return tomlkit.dumps(document)


def parse_pipeline(text: str, *, file: str) -> PipelineConfig:
    """Validate the text of a pipeline file; ``file`` is what errors call it."""
    try:
        content = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # numbers and nests without an end, too
        raise ConfigError(f"not valid TOML: {error}", file=file) from None
    try:
        return _validate(content)
    except ConfigError as error:
        raise error.in_file(file) from None


def _validate(content: dict[str, Any]) -> PipelineConfig:
    content = dict(content)
    shared = {name: content.pop(name) for name in _SHARED if name in content}
    for name, table in shared.items():
        # Checked on its own first, so that an error carries the path that stands in the file.
        _parse(_SHARED[name], table, prefix=(name,))
    _one_window_a_piece(content)
    modules = content.get("module")
    if isinstance(modules, dict):
        _refuse_own_validation(modules)
        numbered = {_module_number(key): module for key, module in modules.items()}
        content["module"] = {
            number: _with_defaults(module, _against_overfitting(shared, content, number))
            for number, module in numbered.items()
        }
        if sorted(content["module"]) != list(range(1, len(modules) + 1)) or not modules:
            raise ConfigError(
                f"found {sorted(modules) or 'none'}; expected modules numbered 1, 2, ... "
                "without a gap, as in [module.1]",
                key="module",
            )
    config = _parse(PipelineConfig, content)
    check_together(config)
    return config


def _against_overfitting(
    shared: dict[str, Any], content: dict[str, Any], number: int
) -> dict[str, Any]:
    """Defaults for a module, with `ON_CACHED_INPUTS` where it is trained on those."""
    source = content.get("source")
    kind = str(source.get("kind")) if isinstance(source, dict) else ""
    one_by_one = content.get("mode", "iterative") == "iterative"
    patches = content.get("encoding", "patch") == "patch"
    if number == 1 or not one_by_one or not patches or kind in LARGE_KINDS:
        return shared
    return shared | {"train": {**ON_CACHED_INPUTS, **shared.get("train", {})}}


def _one_window_a_piece(content: dict[str, Any]) -> None:
    """Where nothing is said, dense encoding has one window in a piece of the frozen forward."""
    extract = content.get("extract", {})
    if content.get("encoding") == "dense" and isinstance(extract, dict):
        content["extract"] = {"batch": 1, **extract}


def _module_number(key: str) -> int:
    if not re.fullmatch(r"[1-9][0-9]{0,3}", key):
        raise ConfigError("expected a module number, as in [module.1]", key=f"module.{key}")
    return int(key)


def _with_defaults(module: Any, shared: dict[str, Any]) -> Any:
    if not isinstance(module, dict):
        return module
    merged = dict(module)
    for name, defaults in shared.items():
        own = module.get(name, {})
        merged[name] = {**defaults, **own} if isinstance(own, dict) else own
    return merged


def _refuse_own_validation(modules: dict[str, Any]) -> None:
    for number, module in modules.items():
        train = module.get("train") if isinstance(module, dict) else None
        if isinstance(train, dict) and "validation" in train:
            raise ConfigError(
                "is set once for all modules, as train.validation: the same samples are held out "
                "in every stage",
                key=f"module.{number}.train.validation",
            )


def _parse(model: type[_T], content: Any, prefix: tuple[str, ...] = ()) -> _T:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        # A misspelt key is also a missing one; the misspelling is what helps.
        found = error.errors(include_url=False)
        first = min(found, key=lambda details: details["type"] != "extra_forbidden")
        raise _explain(first, model, prefix) from None


_UNION_MARKERS = {"int", "str", "constrained-int", "literal['auto']", "[key]"}


def _explain(details: Any, model: type[Table], prefix: tuple[str, ...]) -> ConfigError:
    kind, value = details["type"], details["input"]
    location = tuple(str(part) for part in details["loc"])
    if kind != "extra_forbidden":
        # Pydantic ends the path of a union with a marker of its own.
        while location and location[-1] in _UNION_MARKERS:
            location = location[:-1]
    key = ".".join((*prefix, *location)) or None
    if kind == "missing":
        return ConfigError("missing; the pipeline file must give it", key=key)
    if kind == "extra_forbidden":
        allowed = _allowed_keys(model, location[:-1])
        near = difflib.get_close_matches(location[-1], allowed, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known keys: {', '.join(allowed)}"
        return ConfigError(f"unknown key (value {_as_toml(value)}){hint}", key=key)
    if kind in {"model_type", "model_attributes_type", "dict_type"}:
        return ConfigError(f"is {_as_toml(value)}, expected a table", key=key)
    return ConfigError(f"is {_as_toml(value)}: {_expectation(details)}", key=key)


def _expectation(details: Any) -> str:
    """What was expected, in words of the pipeline file."""
    known = {
        "tuple_type": "expected a list of numbers",
        "string_pattern_mismatch": "expected letters, digits, dots, hyphens and underscores, "
        "with a letter or digit first",
        "finite_number": "expected a finite number",
    }
    if details["loc"][-2:] and details["loc"][-1] in ("constrained-int", "literal['auto']"):
        return 'expected a whole number greater than 0, or "auto"'
    message: str = known.get(details["type"], details["msg"].removeprefix("Value error, "))
    return message[0].lower() + message[1:]


def _as_toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return value.isoformat() if hasattr(value, "isoformat") else repr(value)


def _allowed_keys(model: type[BaseModel], location: tuple[str, ...]) -> list[str]:
    """The keys of the table at ``location`` below ``model``."""
    current: type[BaseModel] = model
    for part in location:
        if part.isdigit():
            current = ModuleConfig
        elif part in current.model_fields:
            annotation = current.model_fields[part].annotation
            if isinstance(annotation, type) and issubclass(annotation, BaseModel):
                current = annotation
    names = list(current.model_fields)
    return names + list(_SHARED) if current is PipelineConfig else names
