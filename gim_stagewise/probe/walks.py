"""Features of recordings, one recording after another: of modules, or without learning."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from gim_stagewise.cache import TiledCache
from gim_stagewise.errors import ConfigError
from gim_stagewise.probe.splits import probe_splits
from gim_stagewise.probe.step_classifier import Walk
from gim_stagewise.sources import Item, Request, Source
from gim_stagewise.stage.freeze import FrozenModule, frozen_forward
from gim_stagewise.stage.workspace import Workspace

# As mel-frequency cepstral coefficients are usually taken.
MFCC_A_SECOND = 100
# Bytes that they take of each sample of each window while they are computed.
_MFCC_BYTES = 18


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


def mfcc_walk(source: Source, rate: int) -> Walk:
    """Mel-frequency cepstral coefficients: 13 every 10 ms, with first and second differences.

    Of windows of 25 ms, in the middle of the 10 ms that they stand for; ``rate`` is in Hz.
    """
    from torchaudio.functional import compute_deltas
    from torchaudio.transforms import MFCC

    hop, size = _mfcc_window(rate)
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


def mfcc_bytes(item: Item, rate: int) -> int:
    """What `mfcc_walk` holds at once of a recording, which it reads as a whole."""
    hop, size = _mfcc_window(rate)
    (samples,) = item.extent
    return samples * (4 * item.channels + _MFCC_BYTES * size // hop)


def _mfcc_window(rate: int) -> tuple[int, int]:
    """Samples from one window to the next, and in one, padded to a power of 2."""
    return rate // MFCC_A_SECOND, 2 ** math.ceil(math.log2(rate / 40))


def sample_rate(source: Source) -> int:
    """Samples a second of all recordings; 0 where it is not known."""
    return int(getattr(source, "rate", 0))
