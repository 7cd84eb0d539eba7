"""Stored activations: layout on disk, identity, writing, reading."""

from __future__ import annotations

from gim_stagewise.cache.codecs import codec_implementation, encode
from gim_stagewise.cache.columns import metadata_problem, write_checksums, write_samples
from gim_stagewise.cache.create import create_arrays, padding
from gim_stagewise.cache.digests import Digest, files_digest, flatten
from gim_stagewise.cache.features import Pooling, grid_features, mean_feature, pool_grid
from gim_stagewise.cache.frames import read_chunk_file
from gim_stagewise.cache.journal import BuildFolder
from gim_stagewise.cache.layout import Block, CacheLayout, auto_chunk
from gim_stagewise.cache.manifest import (
    Manifest,
    read_manifest,
    require_cache,
    write_manifest,
)
from gim_stagewise.cache.precision import PLAIN, Precision, is_precision
from gim_stagewise.cache.precision_error import PrecisionError
from gim_stagewise.cache.reader import Cache
from gim_stagewise.cache.removal import discard_cache, drop_activations, is_cache
from gim_stagewise.cache.sealed import SealedCache
from gim_stagewise.cache.tiled import TiledCache, open_cache, open_sealed, open_tiled_cache
from gim_stagewise.cache.tiles import Layout, TiledLayout
from gim_stagewise.cache.verify import (
    Damage,
    find_damage,
    sealed_digests,
    stored_blocks,
    visible_damage,
)
from gim_stagewise.cache.writer import (
    CacheWriter,
    StagedBlock,
    block_digests,
    stage_block,
)

__all__ = [
    "PLAIN",
    "Block",
    "BuildFolder",
    "Cache",
    "CacheLayout",
    "CacheWriter",
    "Damage",
    "Digest",
    "Layout",
    "Manifest",
    "Pooling",
    "Precision",
    "PrecisionError",
    "SealedCache",
    "StagedBlock",
    "TiledCache",
    "TiledLayout",
    "auto_chunk",
    "block_digests",
    "codec_implementation",
    "create_arrays",
    "discard_cache",
    "drop_activations",
    "encode",
    "files_digest",
    "find_damage",
    "flatten",
    "grid_features",
    "is_cache",
    "is_precision",
    "mean_feature",
    "metadata_problem",
    "open_cache",
    "open_sealed",
    "open_tiled_cache",
    "padding",
    "pool_grid",
    "read_chunk_file",
    "read_manifest",
    "require_cache",
    "sealed_digests",
    "stage_block",
    "stored_blocks",
    "visible_damage",
    "write_checksums",
    "write_manifest",
    "write_samples",
]
