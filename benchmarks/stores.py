"""Activations in our caches and in other stores: how each is written and read.

A store is written from ``master.npy`` [sample, row, column, channel, height, width] of float16, and
gives the batches of a shuffled epoch. Peers are imported where they are used.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from torch.utils.data import DataLoader, Dataset

from gim_stagewise.cache import (
    Cache,
    CacheWriter,
    Precision,
    auto_chunk,
    read_manifest,
    stage_block,
)
from gim_stagewise.config import TrainConfig
from gim_stagewise.sources import Item, Split, UniformItems
from gim_stagewise.stage.loader import Loader
from gim_stagewise.windows import Span

BATCH = 16
WINDOW = TrainConfig.model_fields["shuffle_window"].default
Epoch = Callable[[int], Iterator[torch.Tensor]]


class Master:
    """The activations as the input of a cache writer, which wants ids and splits."""

    label_names: tuple[str, ...] = ()

    def __init__(self, folder: Path) -> None:
        self.values = np.load(folder / "master.npy", mmap_mode="r")
        self.ids = [f"crop/{number:05d}" for number in range(len(self.values))]

    def split(self, name: Split) -> list[str]:
        return self.ids if name == "unlabeled" else []

    def items(self) -> UniformItems | list[Item]:
        return []


def write_ours(folder: Path, target: Path, form: str, codec: str) -> None:
    master: Any = Master(folder)
    manifest = read_manifest(folder / "out" / "m2.zarr")
    sample = torch.from_numpy(master.values[:64].astype(np.float32)).flatten(0, 2)
    precision = Precision(form).calibrated(*sample.transpose(0, 1).flatten(1).aminmax(dim=1))
    dtype = np.dtype(precision.stored_dtype)
    layout = replace(
        manifest.sample_layout,
        samples=len(master.values),
        codec=codec,
        dtype=dtype.name,
        chunk=auto_chunk(dtype.itemsize * master.values[0].size),
    )
    unsealed = replace(manifest, layout=layout, precision=precision, sealed=False, error=None)
    writer = CacheWriter(target, unsealed, master)
    for block in writer.pending:
        values = torch.from_numpy(master.values[block.samples.slice].astype(np.float32))
        stored, error = precision.encode(values.flatten(0, 2))
        arrays = {
            "activations": stored.reshape(values.shape).numpy(),
            "pooled": values.mean((-2, -1)).numpy(),
        }
        writer.commit(stage_block(target, writer.staging, unsealed, block, arrays, error=error))
    writer.seal()


def read_ours(target: Path, workers: int, dtype: torch.dtype) -> Epoch:
    cache = Cache(target)
    loader = Loader(cache, cache.ids, batch=BATCH, window=WINDOW, seed=0, stage=3)

    # As a training does: a batch's memory is used for the next.
    patches = BATCH * math.prod(cache.manifest.sample_layout.grid)
    memory = torch.empty(patches, *cache.manifest.sample_layout.cell, dtype=dtype)

    def epoch(number: int) -> Iterator[torch.Tensor]:
        for batch in loader.batches(number):
            yield batch.read(Span(0, batch.rows), out=memory)

    return epoch


def write_memmap(folder: Path, target: Path) -> None:
    target.mkdir()
    shutil.copyfile(folder / "master.npy", target / "values.npy")


def read_memmap(target: Path, workers: int) -> Epoch:
    def epoch(number: int) -> Iterator[torch.Tensor]:
        # Mapped anew: pages that a process has mapped are not dropped from the page cache.
        values = np.load(target / "values.npy", mmap_mode="r")
        order = np.random.default_rng(number).permutation(len(values))
        for start in range(0, len(order) - BATCH + 1, BATCH):
            yield torch.from_numpy(values[order[start : start + BATCH]])

    return epoch


class _MemmapDataset(Dataset[torch.Tensor]):
    def __init__(self, file: Path) -> None:
        self.file = file
        self.count = len(np.load(file, mmap_mode="r"))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.array(np.load(self.file, mmap_mode="r")[index]))


def read_dataloader(target: Path, workers: int) -> Epoch:
    dataset = _MemmapDataset(target / "values.npy")
    loader = DataLoader(
        dataset,
        BATCH,
        shuffle=True,
        num_workers=workers,
        persistent_workers=workers > 0,
        drop_last=True,
    )
    return lambda number: iter(loader)


def write_litdata(folder: Path, target: Path) -> None:
    import litdata

    litdata.optimize(
        fn=litdata_sample,
        inputs=[(str(folder / "master.npy"), number) for number in range(count_of(folder))],
        output_dir=str(target),
        chunk_bytes="64MB",
        num_workers=1,
    )


def litdata_sample(where: tuple[str, int]) -> torch.Tensor:
    file, number = where
    return torch.from_numpy(np.array(np.load(file, mmap_mode="r")[number]))


def read_litdata(target: Path, workers: int) -> Epoch:
    import litdata

    dataset = litdata.StreamingDataset(str(target), shuffle=True, drop_last=False, seed=0)
    loader = litdata.StreamingDataLoader(
        dataset, batch_size=BATCH, num_workers=workers, persistent_workers=workers > 0
    )
    return lambda number: iter(loader)


def write_mosaic(folder: Path, target: Path) -> None:
    from streaming import MDSWriter

    values = np.load(folder / "master.npy", mmap_mode="r")
    columns = {"x": "ndarray:float16:" + ",".join(map(str, values.shape[1:]))}
    with MDSWriter(out=str(target), columns=columns) as out:
        for sample in values:
            out.write({"x": np.array(sample)})


def read_mosaic(target: Path, workers: int) -> Epoch:
    from streaming import StreamingDataset
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    dataset = StreamingDataset(local=str(target), shuffle=True, batch_size=BATCH)
    loader = DataLoader(
        dataset, BATCH, num_workers=workers, persistent_workers=workers > 0, drop_last=True
    )

    def epoch(number: int) -> Iterator[torch.Tensor]:
        for batch in loader:
            yield batch["x"]

    return epoch


def write_webdataset(folder: Path, target: Path) -> None:
    import webdataset

    target.mkdir()
    values = np.load(folder / "master.npy", mmap_mode="r")
    with webdataset.ShardWriter(str(target / "%05d.tar"), maxsize=256e6, verbose=0) as out:
        for number, sample in enumerate(values):
            out.write({"__key__": f"{number:06d}", "x.npy": np.array(sample)})


def read_webdataset(target: Path, workers: int) -> Epoch:
    import webdataset

    shards = sorted(map(str, target.glob("*.tar")))
    each = np.load(target.parent / "master.npy", mmap_mode="r")[0].nbytes
    dataset = (
        webdataset.WebDataset(
            shards,
            shardshuffle=len(shards),
            seed=0,
            workersplitter=webdataset.shardlists.split_by_worker,
            empty_check=False,
        )
        .shuffle(max(BATCH, WINDOW // each), initial=max(BATCH, WINDOW // each))
        .decode()
        .to_tuple("x.npy")
    )
    loader = DataLoader(
        dataset, BATCH, num_workers=workers, persistent_workers=workers > 0, drop_last=True
    )

    def epoch(number: int) -> Iterator[torch.Tensor]:
        for (batch,) in loader:
            yield batch

    return epoch


def write_sharded(folder: Path, target: Path) -> None:
    values = np.load(folder / "master.npy", mmap_mode="r")
    array = zarr.create_array(
        str(target),
        shape=values.shape,
        dtype=values.dtype,
        chunks=(1, *values.shape[1:]),
        shards=(64, *values.shape[1:]),
    )
    for start in range(0, len(values), 64):
        array[start : start + 64] = values[start : start + 64]


def read_sharded(target: Path, workers: int) -> Epoch:
    array: Any = zarr.open_array(str(target), mode="r")

    def epoch(number: int) -> Iterator[torch.Tensor]:
        order = np.random.default_rng(number).permutation(array.shape[0])
        for start in range(0, len(order) - BATCH + 1, BATCH):
            wanted = np.sort(order[start : start + BATCH])
            yield torch.from_numpy(array.oindex[wanted])

    return epoch


def count_of(folder: Path) -> int:
    return len(np.load(folder / "master.npy", mmap_mode="r"))


FP32, FP16 = torch.float32, torch.float16
# Name, how it is written, under which name it lies, how it is read.
STORES: dict[str, tuple[str, Callable[..., None], Callable[..., Epoch], tuple[Any, ...]]] = {
    "ours, uint8 + lz4 (the default)": ("ours-uint8", write_ours, read_ours, ("uint8", "lz4")),
    "ours, float16 + lz4": ("ours-float16-lz4", write_ours, read_ours, ("float16", "lz4")),
    "ours, float16": ("ours-float16", write_ours, read_ours, ("float16", "none")),
    "npy memmap, random batches": ("memmap", write_memmap, read_memmap, ()),
    "npy memmap, DataLoader": ("memmap", write_memmap, read_dataloader, ()),
    "LitData": ("litdata", write_litdata, read_litdata, ()),
    "MosaicML Streaming": ("mosaic", write_mosaic, read_mosaic, ()),
    "WebDataset": ("webdataset", write_webdataset, read_webdataset, ()),
    "sharded Zarr, zarr-python": ("sharded", write_sharded, read_sharded, ()),
}
QUICK = ("ours, uint8 + lz4 (the default)", "npy memmap, random batches")
ALONE = ("npy memmap, random batches", "sharded Zarr, zarr-python")
