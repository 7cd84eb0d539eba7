"""The tables of a pipeline file, as frozen, validated objects."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from gim_stagewise.errors import ConfigError
from gim_stagewise.units import parse_bytes

ByteSize = Annotated[int, BeforeValidator(parse_bytes)]
# How activations can be stored; see `gim_stagewise.cache.precision`.
PRECISIONS = ("float32", "float16", "bfloat16", "float8_e4m3", "uint8")
BITROUND = r"bitround-([1-9]|1\d|2[0-2])"
# Sources whose items are read in windows.
LARGE_KINDS = frozenset({"large", "mosaic", "audio", "speech", "synthetic_speech"})
# Those of them that have recordings.
SEQUENCE_KINDS = frozenset({"audio", "speech", "synthetic_speech"})
Fraction = Annotated[float, Field(ge=0, le=1)]
Mode = Literal["iterative", "simultaneous", "cpc", "supervised", "greedy_supervised", "random"]
MODES: tuple[Mode, ...] = get_args(Mode)


class Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class SourceConfig(Table):
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


class AugmentConfig(Table):
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


class PatchesConfig(Table):
    """The grid of patches (paper, section 4.1), in pixels."""

    size: PositiveInt
    stride: PositiveInt


class WindowsConfig(Table):
    """How items that may be larger than memory are read (sources of `LARGE_KINDS`).

    ``tile`` is the side, in positions or patches of a module's output, of what is computed, stored
    and committed at once; "auto" takes the smallest whose halo costs little and whose chunks are
    large enough. Modules are trained on ``samples`` windows an epoch ("auto": so many as cover the
    data once, within reason), of ``train.window`` a side, placed anew in every epoch; all places
    are equally likely, so that items count by their area. Each axis of an item is cut into
    ``zones``, of which ``train.validation`` are held out: windows for validation lie in those, all
    others outside. Windows that vary less than ``min_variance`` times as much as windows do on
    average are drawn again. A stateful module goes over ``lanes`` recordings at once.
    """

    tile: PositiveInt | Literal["auto"] = "auto"
    samples: Annotated[int, Field(ge=1, le=1_000_000)] | Literal["auto"] = "auto"
    zones: Annotated[int, Field(ge=1, le=64)] = 4
    min_variance: Fraction = 0.0
    lanes: Annotated[int, Field(ge=1, le=4096)] = 8


class ObjectiveConfig(Table):
    """InfoNCE (paper, equations 3 and 4).

    Negatives are drawn from all of a batch; with ``negatives_group`` from so many samples of it, as
    where a batch is spread over GPUs. Where there are more rows (steps of a sequence) than
    ``window``, contexts and targets are taken from so many of them, anew for each batch or group.
    With ``encoding = "dense"`` ``pool`` positions a side of a module's output share an embedding,
    their mean.
    """

    kind: Literal["infonce"] = "infonce"
    prediction_steps: PositiveInt = 3
    skip: Annotated[int, Field(ge=0)] = 1
    negatives: PositiveInt = 16
    negatives_group: PositiveInt | None = None
    window: PositiveInt | None = None
    pool: PositiveInt = 1


class TrainConfig(Table):
    """How one module is trained.

    ``batch`` counts samples, ``micro_batch`` patches (all of a batch by default; "auto" takes the
    most that the memory budget allows), ``patience`` epochs. ``window`` is the side of the windows
    that a module is trained on where items are read in windows: patches, or positions of its input.

    Against overfitting on inputs that never change: ``dropout`` sets so many of a module's inputs
    to zero, ``noise`` multiplies them with normal numbers of mean 1 and this standard deviation
    (Srivastava et al. 2014, section 10), both in training alone; with ``average`` what is
    validated and frozen are the exponential moving averages of the weights, with this decay a step.
    Modules above the first have dropout and noise by default where they are trained one after
    another on patches (`gim_stagewise.config.load.ON_CACHED_INPUTS`).

    In the modes "simultaneous" and "greedy_supervised" this one's weights are changed in the first
    of every ``update_every`` steps of the run, by that step's gradients alone.
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
    window: PositiveInt | None = None
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    noise: Annotated[float, Field(ge=0)] = 0.0
    average: Annotated[float, Field(ge=0, lt=1)] = 0.0
    update_every: PositiveInt = 1


class ContextConfig(Table):
    """The context network of mode "cpc" (see `gim_stagewise.models.PixelCNN`)."""

    channels: PositiveInt = 256
    layers: PositiveInt = 5


def _known_precision(name: str) -> str:
    if name not in PRECISIONS and not re.fullmatch(BITROUND, name):
        raise ValueError(
            f"expected one of {', '.join(PRECISIONS)}, or bitround-N with N bits of mantissa, 1 to "
            "22"
        )
    return name


class CacheConfig(Table):
    """How a module's outputs are stored.

    For ``precision`` see `gim_stagewise.cache.precision`; a cache whose relative L2 error is above
    ``max_error`` is refused. ``stored_operation = "auto"`` stores activations after the
    operation that the next module begins with. ``chunk`` counts samples; "auto" aims at 4 MB or
    more. With ``materialize = "never"`` embeddings alone are stored, and the next module's input is
    computed whenever it is read; "auto" measures which of the two is faster here, and keeps to it.
    ``pool`` positions a side share a stored embedding in dense encoding; by default as many as in
    ``objective.pool``. ``verify_reads = false`` trusts the storage: chunks are not compared with
    their checksums when they are read.
    """

    precision: Annotated[str, AfterValidator(_known_precision)] = "uint8"
    max_error: PositiveFloat | None = None
    stored_operation: Literal["auto", "none"] = "auto"
    codec: Literal["lz4", "zstd", "none"] = "lz4"
    chunk: PositiveInt | Literal["auto"] = "auto"
    materialize: Literal["always", "never", "auto"] = "always"
    pool: PositiveInt | None = None
    verify_reads: bool = True


class ExtractConfig(Table):
    """The one forward of frozen modules: rows per piece, and threads within an operation.

    Rows are patches; with ``encoding = "dense"`` they are windows, one at a time.
    """

    batch: PositiveInt = 256
    threads: Annotated[int, Field(ge=1, le=1024)] = 1


class ProbeConfig(Table):
    """The linear classifier that says how good frozen features are.

    ``classifier = "logistic"`` is fitted to convergence, its L2 strength chosen on a
    ``validation`` part of the training split. "adam" is trained for ``epochs`` at most at a rate of
    ``lr``, as the paper's is (appendix A.1); the number of epochs is chosen there. That part is
    drawn at random, or with ``validation_part = "last"`` the end of the training split, for data in
    which neighbours are alike.

    Steps of recordings that have labels of their own are always classified by Adam, at a rate of
    ``step_lr``, ``step_batch`` recordings at a time, for ``step_epochs`` at most.
    """

    pooling: Literal["mean", "all"] = "mean"
    validation: Annotated[float, Field(gt=0, lt=1)] = 0.2
    validation_part: Literal["random", "last"] = "random"
    classifier: Literal["logistic", "adam"] = "logistic"
    lr: PositiveFloat = 1e-3
    epochs: PositiveInt = 100
    batch: PositiveInt = 128
    step_lr: PositiveFloat = 1e-3
    step_epochs: PositiveInt = 30
    step_batch: PositiveInt = 8


class ModuleConfig(Table):
    """One gradient-isolated module and all that belongs to its stage."""

    build: str
    options: dict[str, Any] = {}
    objective: ObjectiveConfig = ObjectiveConfig()
    train: TrainConfig = TrainConfig()
    cache: CacheConfig = CacheConfig()


class PipelineConfig(Table):
    """A whole pipeline file; ``module`` maps 1, 2, ... to the modules, bottom first.

    ``mode`` says how they are trained: *iterative*, one after another, through caches;
    *simultaneous*, all in one step, gradients blocked between them; *cpc*, end to end with a
    context network on top; *supervised*, end to end with a classifier; *greedy_supervised*, in one
    step with a classifier each, gradients blocked; *random*, not at all. ``labels`` says which
    labels of the dataset supervised modes are trained on; by default the first that it has.
    """

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
    seed: Annotated[int, Field(ge=0)] = 0
    mode: Mode = "iterative"
    labels: str | None = None
    keep: Literal["all", "last-two", "last"] = "all"
    encoding: Literal["patch", "dense"] = "patch"
    source: SourceConfig
    augment: AugmentConfig = AugmentConfig()
    patches: PatchesConfig | None = None
    windows: WindowsConfig = WindowsConfig()
    extract: ExtractConfig = ExtractConfig()
    probe: ProbeConfig = ProbeConfig()
    context: ContextConfig = ContextConfig()
    module: dict[int, ModuleConfig]

    @property
    def windowed(self) -> bool:
        """Whether items are read in windows, and may be of any size."""
        return self.source.kind in LARGE_KINDS

    @property
    def iterative(self) -> bool:
        """Whether modules are trained one after another, each from the cache of the one below."""
        return self.mode == "iterative"

    @property
    def supervised(self) -> bool:
        """Whether training wants labels."""
        return self.mode in ("supervised", "greedy_supervised")

    @property
    def isolated(self) -> bool:
        """Whether no gradient goes from a module to the one below."""
        return self.mode not in ("cpc", "supervised")

    @property
    def dense(self) -> bool:
        """Whether modules see the whole input, and not patches of it."""
        return self.encoding == "dense"

    @property
    def sequences(self) -> bool:
        """Whether items have one axis, of time, and not two."""
        return self.source.kind in SEQUENCE_KINDS

    def stored_pool(self, index: int) -> int:
        """Positions a side of module ``index``'s outputs that share a stored embedding."""
        module = self.stage(index)
        return module.cache.pool or module.objective.pool

    def stage(self, index: int) -> ModuleConfig:
        """The table of module ``index``, counted from 1."""
        try:
            return self.module[index]
        except KeyError:
            raise ConfigError(
                f"there is no module {index}; this pipeline has modules 1 to {len(self.module)}"
            ) from None
