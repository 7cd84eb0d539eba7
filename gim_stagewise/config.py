"""A pipeline file (TOML) becomes frozen, validated objects.

Top-level ``[objective]``, ``[train]`` and ``[cache]`` tables are defaults for every module;
a module's own table of that name wins key by key. Whatever is wrong with a file ends in one
`ConfigError` that names the file, the key path, the value and what was expected.
"""

from __future__ import annotations

import difflib
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    model_validator,
)

from gim_stagewise.errors import ConfigError
from gim_stagewise.units import parse_bytes

ByteSize = Annotated[int, BeforeValidator(parse_bytes)]
# How activations can be stored; see `gim_stagewise.cache.precision`.
PRECISIONS = ("float32", "float16", "bfloat16", "float8_e4m3", "uint8")
BITROUND = r"bitround-([1-9]|1\d|2[0-2])"
Fraction = Annotated[float, Field(ge=0, le=1)]


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


_T = TypeVar("_T", bound=_Table)


class SourceConfig(_Table):
    """Where samples come from; see `gim_stagewise.sources.open_source` for the kinds.

    ``root``, ``options`` and ``splits`` are passed on to the source, which checks them. ``digest``
    says how much of the data decides its identity (see `gim_stagewise.sources.parts.PartsSource`).
    ``on_error = "skip"`` leaves out large files that cannot be used, and records which.
    """

    kind: str
    root: str | None = None
    download: bool = False
    options: dict[str, Any] = {}
    splits: dict[Literal["unlabeled", "train", "test"], dict[str, Any]] = {}
    digest: Literal["full", "sampled"] = "full"
    on_error: Literal["stop", "skip"] = "stop"


class AugmentConfig(_Table):
    """What is done to an image before it is cut into patches, in this order.

    Integer pixels are scaled to [0, 1]; then grayscale, zero padding, crop (random in
    training views, centred in the evaluation view), flip, normalisation per channel.

    ``grid_crop`` comes after the cut: modules are trained on so many rows and columns of patches,
    at a place drawn for each sample and epoch, and judged on those in the middle; caches hold the
    whole grid. ``views`` are stored, because a flip does not commute with a convolution.
    """

    grayscale: bool = False
    pad: Annotated[int, Field(ge=0, le=4096)] = 0
    crop: PositiveInt | None = None
    flip: Fraction = 0.0
    mean: tuple[float, ...] | None = Field(default=None, strict=False)
    std: tuple[PositiveFloat, ...] | None = Field(default=None, strict=False)
    grid_crop: PositiveInt | None = None
    views: PositiveInt = 1

    @model_validator(mode="after")
    def _both_or_none(self) -> AugmentConfig:
        if (self.mean is None) != (self.std is None) or len(self.mean or ()) != len(self.std or ()):
            raise ValueError("mean and std are given together, one number per channel each")
        if self.views > 1 and not self.random:
            raise ValueError(
                f"views = {self.views} without crop or flip: nothing is drawn, and all views would "
                "be the same; set one of them, or leave views out"
            )
        return self

    @property
    def random(self) -> bool:
        """Whether two views of a sample can differ."""
        return self.crop is not None or self.flip > 0


class PatchesConfig(_Table):
    """The grid of patches (paper, section 4.1), in pixels."""

    size: PositiveInt
    stride: PositiveInt


class ObjectiveConfig(_Table):
    """InfoNCE (paper, equations 3 and 4)."""

    kind: Literal["infonce"] = "infonce"
    prediction_steps: PositiveInt = 3
    skip: Annotated[int, Field(ge=0)] = 1
    negatives: PositiveInt = 16


class TrainConfig(_Table):
    """How one module is trained.

    ``batch`` counts samples, ``micro_batch`` patches (all of a batch by default; "auto" takes the
    most that the memory budget allows), ``patience`` epochs.
    """

    batch: PositiveInt = 32
    micro_batch: PositiveInt | Literal["auto"] | None = None
    optimizer: Literal["adam"] = "adam"
    lr: PositiveFloat = 1e-3
    max_epochs: PositiveInt = 100
    patience: PositiveInt = 5
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.1
    shuffle_window: ByteSize = 256_000_000
    checkpoint_every: PositiveInt = 100


def _known_precision(name: str) -> str:
    if name not in PRECISIONS and not re.fullmatch(BITROUND, name):
        raise ValueError(
            f"expected one of {', '.join(PRECISIONS)}, or bitround-N with N bits of mantissa, 1 to "
            "22"
        )
    return name


class CacheConfig(_Table):
    """How a module's outputs are stored.

    For ``precision`` see `gim_stagewise.cache.precision`; a cache whose relative L2 error is above
    ``max_error`` is refused. ``stored_operation = "auto"`` stores activations after the
    operation that the next module begins with. ``chunk`` counts samples; "auto" aims at 4 MB or
    more. With ``materialize = "never"`` embeddings alone are stored, and the next module's input is
    computed whenever it is read; "auto" measures which of the two is faster here, and keeps to it.
    ``verify_reads = false`` trusts the storage: chunks are not compared with their checksums when
    they are read.
    """

    precision: Annotated[str, AfterValidator(_known_precision)] = "uint8"
    max_error: PositiveFloat | None = None
    stored_operation: Literal["auto", "none"] = "auto"
    codec: Literal["lz4", "zstd", "none"] = "lz4"
    chunk: PositiveInt | Literal["auto"] = "auto"
    materialize: Literal["always", "never", "auto"] = "always"
    verify_reads: bool = True


class ExtractConfig(_Table):
    """The one forward of frozen modules: patches per piece, and threads within an operation."""

    batch: PositiveInt = 256
    threads: Annotated[int, Field(ge=1, le=1024)] = 1


class ProbeConfig(_Table):
    """The linear classifier that says how good frozen features are."""

    pooling: Literal["mean", "all"] = "mean"
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2


class ModuleConfig(_Table):
    """One gradient-isolated module and all that belongs to its stage."""

    build: str
    options: dict[str, Any] = {}
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    cache: CacheConfig = CacheConfig()


class PipelineConfig(_Table):
    """A whole pipeline file; ``module`` maps 1, 2, ... to the modules, bottom first."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    seed: Annotated[int, Field(ge=0)] = 0
    keep: Literal["all", "last-two", "last"] = "all"
    source: SourceConfig
    augment: AugmentConfig = AugmentConfig()
    patches: PatchesConfig
    extract: ExtractConfig = ExtractConfig()
    probe: ProbeConfig = ProbeConfig()
    module: dict[int, ModuleConfig]

    def stage(self, index: int) -> ModuleConfig:
        """The table of module ``index``, counted from 1."""
        try:
            return self.module[index]
        except KeyError:
            raise ConfigError(
                f"there is no module {index}; this pipeline has modules 1 to {len(self.module)}"
            ) from None


# What may stand at the top level as a default for all modules.
_SHARED: dict[str, type[_Table]] = {
    "objective": ObjectiveConfig,
    "train": TrainConfig,
    "cache": CacheConfig,
}


def load_pipeline(path: str | Path) -> tuple[PipelineConfig, str]:
    """Read and validate a pipeline file.

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
    return parse_pipeline(text, file=str(path)), text


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
    modules = content.get("module")
    if isinstance(modules, dict):
        _refuse_own_validation(modules)
        content["module"] = {
            _module_number(key): _with_defaults(module, shared) for key, module in modules.items()
        }
        if sorted(content["module"]) != list(range(1, len(modules) + 1)) or not modules:
            raise ConfigError(
                f"found {sorted(modules) or 'none'}; expected modules numbered 1, 2, ... "
                "without a gap, as in [module.1]",
                key="module",
            )
    return _parse(PipelineConfig, content)


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


def _explain(details: Any, model: type[_Table], prefix: tuple[str, ...]) -> ConfigError:
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
