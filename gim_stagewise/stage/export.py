"""The trained encoder as one file, for use without this package's caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from gim_stagewise.durable import write_atomic
from gim_stagewise.errors import CacheNotFoundError, ConfigError, StaleCacheError
from gim_stagewise.stage.code import code_staleness
from gim_stagewise.stage.encoder import Encoder, frozen_chain, load_encoder
from gim_stagewise.stage.exported import save_encoder
from gim_stagewise.stage.identity import recipe_differences, stage_recipe
from gim_stagewise.stage.workspace import Workspace

SUFFIXES = (".safetensors", ".pt2")
# What the pipeline's text is called among the extra files of a program.
PIPELINE_FILE = "pipeline.toml"


def export_encoder(space: Workspace, target: Path, *, pipeline: Path) -> Encoder:
    """Write the stacked encoder (paper, equation 5): all frozen modules, one on top of another.

    Parameters
    ----------
    space : Workspace
        Of the pipeline, with its frozen modules.
    target : Path
        ``.safetensors``: weights, which `load_encoder` reads, with the pipeline's text and digests
        of weights, options and code. ``.pt2``: a program of ``torch.export``, for any number of
        rows (in dense encoding of any size), which PyTorch alone runs, with the pipeline's text
        among its ``extra_files``.
    pipeline : Path
        The pipeline file.

    Returns
    -------
    Encoder
        What was written.

    Raises
    ------
    CacheNotFoundError
        If not all modules are trained.
    StaleCacheError
        If one belongs to other settings or code.
    ConfigError
        If ``target`` ends in something else or is the run's own, or the modules cannot be exported.
    """
    if target.suffix not in SUFFIXES:
        raise ConfigError(
            f"is {target}, expected a file that ends in {' or '.join(SUFFIXES)}", key="--to"
        )
    place = target.resolve()
    own = {space.weights_path(index).resolve() for index in space.config.module}
    if place in own or any(above.suffix == ".zarr" for above in place.parents):
        raise ConfigError(
            f"is {target}, where a run has its own weights or a cache; give another file",
            key="--to",
        )
    chain = frozen_chain(space.folder)
    if len(chain) < len(space.config.module):
        raise CacheNotFoundError(
            f"module {len(chain) + 1} of {len(space.config.module)} is not trained yet in "
            f"{space.folder}; run the pipeline first"
        )
    chain = chain[: len(space.config.module)]
    for weights in chain:
        changes = recipe_differences(weights.recipe, stage_recipe(space.config, weights.module))
        if reason := "; ".join(changes) or code_staleness(space, weights):
            raise StaleCacheError(
                f"{space.weights_path(weights.module)} is stale: {reason}; run the pipeline first"
            )
    encoder = load_encoder(space.folder, pipeline=pipeline)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == ".safetensors":
        save_encoder(chain, target, text=space.text)
    else:
        program = _exported(encoder, chain[0].in_shape, dense=space.config.dense)
        write_atomic(target, lambda temporary: _save_program(program, space.text, temporary))
    return encoder


def _exported(encoder: Encoder, in_shape: tuple[int, ...], *, dense: bool) -> Any:
    # More than one row: what is 1 is taken for a constant.
    rows = torch.randn(2, *in_shape)
    # Any size is demanded: what "auto" cannot make of any size it makes of this one, silently.
    any_size = torch.export.Dim.DYNAMIC
    sizes = {0: any_size} | (dict.fromkeys(range(2, rows.ndim), any_size) if dense else {})
    try:
        return torch.export.export(encoder, (rows,), dynamic_shapes=(sizes,))
    except Exception as error:  # whatever a module does that cannot be traced
        reason = (str(error).splitlines() or [""])[0][:200]
        raise ConfigError(
            f"is a program of torch.export, which these modules cannot be made "
            f"({type(error).__name__}: {reason}); use a file that ends in .safetensors",
            key="--to",
        ) from error


def _save_program(program: Any, text: str, path: Path) -> None:
    with path.open("wb") as file:
        torch.export.save(program, file, extra_files={PIPELINE_FILE: text})
