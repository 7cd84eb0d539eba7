"""The stack of frozen modules as one module (paper, equation 5)."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from numpy.typing import NDArray
from torch import Tensor, nn

from gim_stagewise.config import PipelineConfig, load_pipeline, parse_pipeline
from gim_stagewise.errors import (
    CacheNotFoundError,
    ConfigError,
    CorruptCacheError,
    DataError,
    StaleCacheError,
)
from gim_stagewise.models import pool
from gim_stagewise.sources import PatchSource, Request, read_stacked
from gim_stagewise.sources.parts import ArrayPart, PartsSource
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.code import code_staleness
from gim_stagewise.stage.exported import exported_chain
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward
from gim_stagewise.stage.identity import stage_recipe
from gim_stagewise.stage.workspace import Workspace, patch_grid


class Encoder(nn.Sequential):
    """Frozen modules in order; its forward gives the top module's activations.

    Attributes
    ----------
    config : PipelineConfig or None
        The pipeline that the modules were trained with; None of an encoder that `load_encoder` did
        not give, such as a part of one.
    in_shape : tuple of int
        A patch as module 1 was trained on it, (channel, height, width); of pipelines that are not
        of patches, a window.
    """

    config: PipelineConfig | None = None
    in_shape: tuple[int, ...] = ()

    def forward(self, input: Float[Tensor, "row channel *space"]) -> Tensor:
        """The top module's activations.

        Raises
        ------
        DataError
            If these are patches of another shape than modules were trained on.
        """
        own, wanted = tuple(input.shape[1:]), self.in_shape
        if self.config is not None and not self.config.dense and own != wanted:
            raise DataError(
                f"rows are {_sizes(own)}, this encoder takes patches of {_sizes(wanted)} "
                "(channels×height×width); features(images) cuts images as they were in training"
            )
        activations: Tensor = super().forward(input)  # type: ignore[no-untyped-call]
        return activations

    def embed(
        self, patches: Float[Tensor, "patch channel height width"]
    ) -> Float[Tensor, "patch embedding"]:
        """The top module's embeddings of patches: its ``pool``, or the mean over space."""
        return pool(self[-1], self(patches))

    def features(
        self, images: NDArray[Any] | Tensor, *, module: int | None = None
    ) -> Float[Tensor, "image grid_row grid_col embedding"]:
        """Embeddings of images, which are augmented and cut into patches as evaluation has them.

        They are computed as those in a cache are, a few images at a time: of a dataset's own images
        they are the same bits under the same numerics, where caches below are float32.

        Parameters
        ----------
        images : array or Tensor
            [image, channel, height, width], at least one, as the dataset has them: integers (uint8,
            uint16), which are scaled to [0, 1], or floats, which are taken as they are. They may be
            of another size than the dataset's; the grid has as many patches as fit.
        module : int, optional
            Whose embeddings, counted from 1; by default the top module's.

        Returns
        -------
        Tensor
            float32, on the CPU. Their mean over the grid is what the probe sees by default; with
            ``augment.grid_crop``, over its middle.

        Raises
        ------
        DataError
            If the images have other channels or axes, no patch fits, or values are not finite.
        ConfigError
            If the pipeline is not one of images that are read whole, there is no such module, or
            this is a part of an encoder.
        """
        top = self._top(module)
        assert self.config is not None
        source = self._cut(images, self.config)
        piece = self.config.extract
        device = next(self.parameters()).device
        # Of copies: whoever trains the encoder on goes on having gradients.
        frozen = [FrozenModule(deepcopy(own), device) for own in list(self)[:top]]
        ids, grid = list(source.ids), source.extent
        at_once = max(1, piece.batch // math.prod(grid))
        found = []
        for start in range(0, len(ids), at_once):
            with _calling_them_images():
                patches = read_stacked(source, [Request(i) for i in ids[start : start + at_once]])
            z = torch.from_numpy(patches).flatten(0, 2)
            for own in frozen:
                z, embeddings = frozen_forward(own, z, piece)
            found.append(embeddings)
        return torch.cat(found).reshape(len(ids), *grid, -1)

    def _top(self, module: int | None) -> int:
        """The module that is asked for, where features can be."""
        if self.config is None:
            raise ConfigError(
                "only an encoder as load_encoder gives it has features, and not a part of one; ask "
                "it for features(images, module=N)"
            )
        if self.config.windowed:
            raise ConfigError(
                f"is {self.config.source.kind!r}, whose items are read in windows, and features() "
                "is for images that are read whole; call the encoder itself",
                key="source.kind",
            )
        if module is not None and not 1 <= module <= len(self):
            raise ConfigError(f"there is no module {module}; this encoder has 1 to {len(self)}")
        return len(self) if module is None else module

    def _cut(self, images: NDArray[Any] | Tensor, config: PipelineConfig) -> PatchSource:
        """Images as a source of their patches."""
        if isinstance(images, Tensor):
            images = images.detach().cpu()
            images = (images.float() if images.is_floating_point() else images).numpy()
        shape = tuple(images.shape)
        if len(shape) != 4 or 0 in shape:
            raise DataError(f"images have shape {shape}, expected [image, channel, height, width]")
        if not config.augment.grayscale and shape[1] != self.in_shape[0]:
            raise DataError(
                f"images have {shape[1]} channels, this encoder was trained on {self.in_shape[0]}; "
                "expected [image, channel, height, width]"
            )
        grid = patch_grid(config)
        assert grid is not None
        with _calling_them_images():
            data = PartsSource({"train": ArrayPart(images, None)})
            return PatchSource(data, config.augment, grid, seed=config.seed)


def _sizes(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))


@contextmanager
def _calling_them_images() -> Iterator[None]:
    """Errors say "image 3", and not "sample train/3", which the dataset has as well."""
    try:
        yield
    except (ConfigError, DataError) as error:
        raise DataError(str(error).replace("sample train/", "image ")) from None


def load_encoder(path: str | Path, *, pipeline: str | Path | None = None) -> Encoder:
    """Load the frozen modules of a run as one module.

    Parameters
    ----------
    path : str or Path
        A run's folder, with ``m1.safetensors``, ``m2.safetensors`` and so on; or a file that
        `export_encoder` wrote.
    pipeline : str or Path, optional
        The pipeline file; needed where modules are built by the user's own code, which is never
        imported on the word of a weights file. Modules that it builds otherwise now are refused.

    Returns
    -------
    Encoder
        Of all modules that lie there, also one that the pipeline file has no more, unless
        ``pipeline`` is given or ``gim-stage clean`` has removed it.
        On the CPU, in evaluation mode, without gradients. It takes float32 patches
        [patch, channel, height, width], as ``Pipeline.source`` gives them; in dense encoding images
        [image, channel, height, width] or recordings [recording, channel, time]. Its `features`
        take images as they are.

    Raises
    ------
    CacheNotFoundError
        If the folder has no frozen modules from the first on.
    CorruptCacheError, StaleCacheError, ConfigError
        If they cannot be read, do not belong together, or cannot be built.
    """
    path = Path(path)
    found = exported_chain(path) if path.is_file() else frozen_chain(path)
    space = _workspace(path, found[-1].pipeline_text, pipeline)
    count = len(space.config.module)
    if path.is_dir():
        found = found[:count]  # more may be left of an earlier file
    elif len(found) > count:
        raise StaleCacheError(
            f"{path} has {len(found)} modules, and the pipeline file {count}; give the pipeline "
            "file of its training"
        )
    if pipeline is not None:
        for weights in found:
            _check_builds(space, weights)
    encoder = Encoder(*(_build(space, weights, found) for weights in found))
    # As it was trained: another file may have other patches, or another augmentation.
    encoder.config = _recorded(path, found[-1].pipeline_text)
    encoder.in_shape = found[0].in_shape
    encoder.eval()
    encoder.requires_grad_(False)
    return encoder


def _check_builds(space: Workspace, weights: FrozenWeights) -> None:
    """Refuse weights of another module than file and code build now, also where they would fit."""
    number = weights.module
    own = (f"module.{number}.build", f"module.{number}.options")
    now = stage_recipe(space.config, number)
    others = [key for key in {*weights.recipe.parts, *now.parts} if not key.startswith(own)]
    changes = weights.recipe.differences(now, ignore=others)
    if reason := "; ".join(changes) or code_staleness(space, weights):
        raise StaleCacheError(
            f"{_place(space, number)} is stale: {reason}; give the pipeline file of its training"
        )


def _place(space: Workspace, number: int) -> str:
    """What errors call a module: its file, or its part of an exported one."""
    if space.folder.is_file():
        return f"module {number} of {space.folder}"
    return str(space.weights_path(number))


def frozen_chain(folder: Path) -> list[FrozenWeights]:
    """Weights of all modules of a run's folder, from the first on.

    Raises
    ------
    CacheNotFoundError
        If there are none.
    CorruptCacheError
        If they cannot be read.
    """
    found: list[FrozenWeights] = []
    while (path := folder / f"m{len(found) + 1}.safetensors").is_file():
        found.append(FrozenWeights.load(path))
    if not found:
        raise CacheNotFoundError(f"no frozen modules in {folder}; run the pipeline first")
    return found


def _workspace(folder: Path, text: str, pipeline: str | Path | None) -> Workspace:
    config, code_folder = _recorded(folder, text), None
    if pipeline is not None:
        config, text = load_pipeline(pipeline)
        code_folder = Path(pipeline).resolve().parent
    return Workspace(config, text, folder, code_folder, torch.device("cpu"))


def _recorded(path: Path, text: str) -> PipelineConfig:
    return parse_pipeline(text, file=f"the pipeline recorded in {path}")


def _build(space: Workspace, weights: FrozenWeights, chain: list[FrozenWeights]) -> nn.Module:
    position = chain.index(weights) + 1
    place = _place(space, position)
    if weights.module != position:
        raise CorruptCacheError(f"{place} says that it is module {weights.module}, not {position}")
    if position > 1 and weights.chain != chain[position - 2].digest:
        raise StaleCacheError(
            f"{place} was trained on another module {position - 1} than the one beside it: "
            "`gim-stage run` makes them match, or, if the pipeline has no such module any more, "
            "`gim-stage clean` removes it"
        )
    module = space.build(position, weights.in_shape[0])
    try:
        module.load_state_dict(weights.tensors)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise StaleCacheError(
            f"{place} does not fit the module that is built now: {reason}"
        ) from None
    return module
