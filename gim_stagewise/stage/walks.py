"""Features of recordings, one recording after another: of modules, or without learning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from gim_stagewise.cache import TiledCache
from gim_stagewise.errors import ConfigError, OverBudgetError
from gim_stagewise.memory import resident_bytes
from gim_stagewise.sources import PatchSource, Request, Source
from gim_stagewise.stage.forward import project_forward
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward
from gim_stagewise.stage.probe import probe_splits, samples_at_once
from gim_stagewise.stage.project import round_up
from gim_stagewise.stage.shape import Shape
from gim_stagewise.stage.spec import step_spec
from gim_stagewise.stage.step_classifier import Walk
from gim_stagewise.stage.workspace import Workspace
from gim_stagewise.units import format_bytes

# As mel-frequency cepstral coefficients are usually taken.
MFCC_A_SECOND = 100


def cached_walk(paths: Sequence[Path]) -> Walk:
    """Embeddings of recordings in the caches of modules."""
    caches = [TiledCache(path) for path in paths]
    return lambda ids: ([cache.read_pooled(item_id) for cache in caches] for item_id in ids)


def chain_walk(modules: Sequence[FrozenModule], source: Source, space: Workspace) -> Walk:
    """Embeddings of recordings, each computed as a whole by modules one on top of another."""

    def walk(ids: Sequence[str]) -> Iterator[list[NDArray[np.float32]]]:
        for item_id in ids:
            rows = torch.from_numpy(source.read([Request(item_id)])[0])[None]
            found = []
            for frozen in modules:
                rows, embeddings = frozen_forward(frozen, rows, space.config.extract)
                found.append(embeddings[0].numpy())
            yield found

    return walk


def check_mfcc(source: Source) -> None:
    """Refuse recordings that will be probed where what MFCC are computed with is missing.

    Raises
    ------
    ConfigError
    """
    if not sample_rate(source) or probe_splits(source) is None:
        return
    try:
        import torchaudio  # noqa: F401
    except (ImportError, OSError) as error:  # built for another PyTorch, it cannot be loaded
        raise ConfigError(
            f"has labelled recordings, whose probes need torchaudio, which cannot be imported "
            f'({error}); install it with `pip install "gim-stagewise[audio]"`',
            key="source.kind",
        ) from None


def check_probe_of_recordings(space: Workspace, source: Source, shapes: Sequence[Shape]) -> None:
    """Refuse recordings too long for the probe of modules, which takes each as a whole.

    Parameters
    ----------
    space : Workspace
    source : Source
        The dataset.
    shapes : sequence of Shape
        Of the modules, from module 1 on.

    Raises
    ------
    OverBudgetError
        That names the longest recording.
    """
    splits = probe_splits(source)
    if splits is None or not space.config.sequences:
        return
    probed = {*splits[0].ids, *splits[1].ids}
    longest = max((own for own in source.items() if own.id in probed), key=lambda own: own.extent)
    needed = resident_bytes() + _probe_bytes(longest.extent, longest.channels, shapes, space)
    allowed = space.budget.host_bytes()
    if needed > allowed:
        raise OverBudgetError(
            f"the probe takes recordings as a whole, and projects {format_bytes(needed)} of host "
            f"memory for the longest, {longest.id}; allowed {format_bytes(allowed)}: cut it into "
            f"several, or allow --allowed-host-mem {round_up(needed)}",
            needed=needed,
        )


def check_probe_of_patches(space: Workspace, source: Source, shapes: Sequence[Shape]) -> None:
    """Refuse pieces of the frozen forward too large for all modules, one on top of another.

    Parameters are those of `check_probe_of_recordings`.

    Raises
    ------
    OverBudgetError
    """
    if probe_splits(source) is None or not isinstance(source, PatchSource):
        return
    needed = resident_bytes() + _patches_probe_bytes(source, shapes, space)
    allowed = space.budget.host_bytes()
    if needed > allowed:
        raise OverBudgetError(
            f"the probe of all modules, one on top of another, projects {format_bytes(needed)} of "
            f"host memory, allowed {format_bytes(allowed)}: lower extract.batch from "
            f"{space.config.extract.batch}, or allow --allowed-host-mem {round_up(needed)}",
            needed=needed,
        )


def _patches_probe_bytes(source: PatchSource, shapes: Sequence[Shape], space: Workspace) -> int:
    """What `chain_features` holds at once on the host: weights, a piece, its inputs and outputs."""
    # Each module by itself, whatever they are trained with.
    space = replace(space, config=space.config.model_copy(update={"mode": "iterative"}))
    rows = samples_at_once(source, space.config) * math.prod(source.extent)
    weights = most = 0
    for index, shape in enumerate(shapes, start=1):
        held = 4 * rows * (math.prod(shape.cell_in) + math.prod(shape.cell_out))
        if space.device.type == "cpu":
            module = space.build(index, shape.cell_in[0])
            weights += sum(parameter.nbytes for parameter in module.parameters())
            held += project_forward(step_spec(space, index, shape), measure=False)
        most = max(most, held)
    return weights + most


def _probe_bytes(
    extent: tuple[int, ...], channels: int, shapes: Sequence[Shape], space: Workspace
) -> int:
    """What `chain_walk` holds at once of a recording: float32 throughout."""
    most = embeddings = 0
    inputs = 4 * channels * math.prod(extent)
    for index, shape in enumerate(shapes, start=1):
        extent = shape.extent_out(extent)
        steps = math.prod(extent)
        outputs = 4 * shape.cell_out[0] * steps
        # Outputs before and after an activation, those that are kept, and what a convolution makes
        # of its own in another order.
        most = max(most, inputs + 5 * outputs + embeddings)
        embeddings += 4 * shape.embedding * -(-steps // space.config.stored_pool(index))
        inputs = outputs
    return max(most, embeddings)


def mfcc_walk(source: Source, rate: int) -> Walk:
    """Mel-frequency cepstral coefficients: 13 every 10 ms, with first and second differences.

    Of windows of 25 ms, in the middle of the 10 ms that they stand for; ``rate`` is in Hz.
    """
    from torchaudio.functional import compute_deltas
    from torchaudio.transforms import MFCC

    hop, size = rate // MFCC_A_SECOND, 2 ** math.ceil(math.log2(rate / 40))
    mel = {"n_fft": size, "win_length": rate // 40, "hop_length": hop, "n_mels": 40}
    transform = MFCC(sample_rate=rate, n_mfcc=13, melkwargs={**mel, "center": False})
    before = (size - hop) // 2
    after = size - hop - before

    def walk(ids: Sequence[str]) -> Iterator[list[NDArray[np.float32]]]:
        for item_id in ids:
            (samples,) = source.read([Request(item_id)])
            mono = torch.from_numpy(samples.mean(0, keepdims=True))
            mono = F.pad(mono, (0, max(0, hop - mono.shape[1])))
            # What is shorter than a margin has too little to be mirrored at its ends.
            mirrored = mono.shape[1] > max(before, after)
            mono = F.pad(mono, (before, after), mode="reflect" if mirrored else "constant")
            plain = transform(mono[0])
            first = compute_deltas(plain)
            yield [torch.cat([plain, first, compute_deltas(first)]).T.numpy()]

    return walk


def sample_rate(source: Source) -> int:
    """Samples a second of all recordings; 0 where it is not known."""
    return int(getattr(source, "rate", 0))
