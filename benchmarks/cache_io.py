"""Reading and building caches beside what others do with the same activations.

    python benchmarks/cache_io.py           # about 40 minutes, 30 GB of disk; writes the results
    python benchmarks/cache_io.py --quick   # under a minute, smaller samples; writes nothing
    python benchmarks/cache_io.py --json    # one JSON object on stdout

Needs the peers: `make bench-env` installs them beside this package (they want an older numpy).

Three questions. Loading: a shuffled epoch over outputs of the paper's ResNet-50 module 2, delivered
as batches of 16 float tensors, from our caches and from other stores of the same float16 values.
Building: an extraction, from the first block to the seal, against a plain forward loop. And what an
epoch of stage 3 takes from a cache, against computing its input again, with what the plan said.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise, repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from conditions import conditions
from digits import one_thread
from photos import crops, write_crops
from precision import RESNET
from stores import ALONE, BATCH, FP16, FP32, QUICK, STORES, WINDOW, count_of

from gim_stagewise import Pipeline, Workers, load_encoder
from gim_stagewise.cache import Cache, discard_cache, read_manifest
from gim_stagewise.progress import Silent, Task
from gim_stagewise.sources import Request
from gim_stagewise.stage.loader import Loader
from gim_stagewise.windows import Span

T = TypeVar("T")
ROOT = Path(__file__).resolve().parent.parent


# The data: activations of real images, by a trained network


def trained(folder: Path, *, quick: bool) -> Pipeline:
    """A pipeline of three modules, the first two trained for a short while."""
    write_crops(folder, count=48 if quick else 192)
    file = folder / "crops.toml"
    text = RESNET.format(folder=folder, width=8 if quick else 64, epochs=1 if quick else 3)
    file.write_text(text.replace('[cache]\nprecision = "float32"\n', ""))
    pipeline = Pipeline.from_file(file, folder=folder / "out", device="cpu")
    pipeline.run(until=2)
    return pipeline


def encode_part(folder: Path, part: Span, shape: tuple[int, ...]) -> None:
    """Write some samples of ``master.npy``: float16, after the ReLU that module 3 begins with."""
    pipeline = Pipeline.from_file(folder / "crops.toml", folder=folder / "out", device="cpu")
    encoder = load_encoder(folder / "out")
    master = np.lib.format.open_memmap(folder / "master.npy", mode="r+")
    images = crops(shape[0], size=64, seed=1)
    mean, std = pipeline.config.augment.mean, pipeline.config.augment.std
    assert mean is not None
    assert std is not None
    for number in range(part.start, part.stop):
        pixels = (torch.from_numpy(images[number]).float() / 255 - mean[0]) / std[0]
        patches = pixels.unfold(0, 16, 8).unfold(1, 16, 8).flatten(0, 1)[:, None]
        master[number] = encoder(patches).relu().half().reshape(shape[1:]).numpy()
    master.flush()


def make_master(folder: Path, count: int) -> None:
    """The activations that all stores get: ``master.npy`` [sample, row, column, channel, ...]."""
    layout = read_manifest(folder / "out" / "m2.zarr").layout
    shape = (count, *layout.grid, *layout.cell)
    np.lib.format.open_memmap(folder / "master.npy", "w+", np.float16, shape).flush()
    cores = len(os.sched_getaffinity(0))
    bounds = np.linspace(0, count, cores + 1).astype(int)
    parts = [Span(int(a), int(b)) for a, b in pairwise(bounds)]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=one_thread) as pool:
        list(pool.map(encode_part, repeat(folder), parts, repeat(shape)))


def apart(quick: bool, function: Callable[..., T], *arguments: Any, **options: Any) -> T:
    """Call a function in a process of its own, unless there is no time for that."""
    if quick:
        return function(*arguments, **options)
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(function, *arguments, **options).result()


# Loading


def settings_of(name: str) -> list[int]:
    """Numbers of worker processes that a store is tried with; ours and plain loops have none."""
    return [0] if name.startswith("ours") or name in ALONE else [0, len(os.sched_getaffinity(0))]


def read_epochs(
    name: str, target: Path, workers: int, *, cold: bool, limit: int, epochs: int
) -> list[float]:
    """Samples a second of some epochs, after one that is not counted; for a fresh process."""
    _, _, read, options = STORES[name]
    if name.startswith("ours"):
        options = (FP16 if options[0] == "float16" else FP32,)
    torch.set_num_threads(1)
    epoch = read(target, workers, *options)
    rates = []
    for number in range(epochs + 1):
        if cold:
            forget_pages(target)
        started, samples = time.perf_counter(), 0
        for batch in epoch(number):
            assert batch.dtype in (FP16, FP32)
            samples += len(batch) if batch.ndim == 6 else BATCH
            if samples >= limit:
                break
        rates.append(samples / (time.perf_counter() - started))
    return rates[1:]


def forget_pages(target: Path) -> None:
    """Have the system drop what it holds of a store's files."""
    for file in target.rglob("*"):
        if file.is_file():
            descriptor = os.open(file, os.O_RDONLY)
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def loading(folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Every store warm and cold, in turn, in rounds."""
    count = count_of(folder)
    rounds = 1 if quick else 3
    found: dict[str, dict[str, Any]] = {}
    stores = {name: STORES[name] for name in QUICK} if quick else STORES
    for name, (place, write, _, options) in stores.items():
        target = folder / place
        if not target.exists():
            started = time.monotonic()
            apart(quick, write, folder, target, *options)
            print(f"{name}: written in {time.monotonic() - started:.0f} s", file=sys.stderr)
        found[name] = {"store": name, "bytes": size_of(target), "warm": [], "cold": []}
    for number in range(rounds):
        for cold in (False, True):
            for name, (place, *_) in stores.items():
                slow = name.startswith("sharded")
                limit = min(count, 8 * BATCH) if slow else count
                epochs = 1 if cold or slow else 2
                best = max(
                    (
                        apart(
                            quick,
                            read_epochs,
                            name,
                            folder / place,
                            workers,
                            cold=cold,
                            limit=limit,
                            epochs=epochs,
                        )
                        for workers in settings_of(name)
                    ),
                    key=statistics.median,
                )
                found[name]["cold" if cold else "warm"].append(statistics.median(best))
                word = "cold" if cold else "warm"
                print(f"round {number}, {word}, {name}: {best}", file=sys.stderr)
    return list(found.values())


def size_of(target: Path) -> int:
    return sum(file.stat().st_size for file in target.rglob("*") if file.is_file())


# Building, and computing again


class FirstBlock(Silent):
    """Notes when blocks are committed, so that start-up can be told apart."""

    def __init__(self) -> None:
        self.times: list[float] = []

    @contextmanager
    def task(self, label: str, *, total: int, done: int = 0, unit: str) -> Iterator[Task]:
        times = self.times

        class Ticks(Task):
            def advance(self, count: int = 1, **figures: float) -> None:
                times.append(time.perf_counter())

        yield Ticks()


def plain_forward(folder: Path, module: int, threads: int) -> float:
    """Seconds of a plain loop over a module's inputs, all in memory; for a fresh process."""
    pipeline = Pipeline.from_file(folder / "crops.toml", folder=folder / "out", device="cpu")
    torch.set_num_threads(threads)
    source = pipeline.stage(module).source
    inputs = [
        torch.from_numpy(np.ascontiguousarray(sample)).flatten(0, 1)
        for sample in source.read([Request(item_id) for item_id in source.ids])
    ]
    encoder: torch.nn.Module = load_encoder(folder / "out")[module - 1].eval()
    with torch.inference_mode():
        encoder(inputs[0])
        started = time.perf_counter()
        for pair in zip(inputs[::2], inputs[1::2], strict=True):
            encoder(torch.cat(pair))
        return time.perf_counter() - started


def extraction(folder: Path, module: int, workers: int) -> tuple[float, float]:
    """Seconds from the first block's start to the seal, and of start-up; for a fresh process."""
    watch = FirstBlock()
    pipeline = Pipeline.from_file(
        folder / "crops.toml", folder=folder / "out", device="cpu", progress=watch
    )
    torch.set_num_threads(1)
    stage = pipeline.stage(module)
    weights = stage.load_weights()
    discard_cache(pipeline.workspace.cache_path(module))
    started = time.perf_counter()
    stage.extract(weights, workers=Workers(workers))
    ended = time.perf_counter()
    # The first blocks, one of each worker, end together: as long as a block takes after start-up.
    side, times = max(1, workers), watch.times
    rate = (len(times) - side) / (times[-1] - times[side - 1])
    startup = max(0.0, times[side - 1] - started - side / rate)
    return ended - started - startup, startup


def building(folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Extraction beside the fastest plain forward loop, module by module, in rounds."""
    cores = len(os.sched_getaffinity(0))
    rows = []
    for module in (1,) if quick else (1, 2):
        plain, own, startup = [], [], []
        for number in range(1 if quick else 3):
            loops = {
                threads: apart(quick, plain_forward, folder, module, threads)
                for threads in ((1,) if quick else sorted({1, cores}))
            }
            workers = 0 if quick else cores
            seconds, first = apart(quick, extraction, folder, module, workers)
            plain.append(min(loops.values()))
            own.append(seconds)
            startup.append(first)
            print(f"module {module}, round {number}: {loops} {seconds}", file=sys.stderr)
        ratios = [a / b for a, b in zip(own, plain, strict=True)]
        rows.append(
            {
                "module": module,
                "samples": read_manifest(folder / "out" / f"m{module}.zarr").layout.samples,
                "plain_seconds": statistics.median(plain),
                "extraction_seconds": statistics.median(own),
                "startup_seconds": statistics.median(startup),
                "ratio": statistics.median(ratios),
                "ratios": ratios,
            }
        )
    return rows


def input_epochs(folder: Path, *, stored: bool, epochs: int) -> float:
    """Median seconds a sample of reading, or computing, the input of stage 3, over epochs."""
    pipeline = Pipeline.from_file(folder / "crops.toml", folder=folder / "out", device="cpu")
    cache = Cache(folder / "out" / "m2.zarr") if stored else pipeline.stage(2).virtual_cache()
    window = min(WINDOW, len(cache.ids) * cache.item_bytes // 2)  # too little to keep them all
    loader = Loader(cache, cache.ids, batch=BATCH, window=window, seed=0, stage=3)
    found = []
    for number in range(epochs + 1):
        started = time.perf_counter()
        for batch in loader.batches(number):
            batch.read(Span(0, batch.rows))
        found.append((time.perf_counter() - started) / (loader.steps * BATCH))
    return statistics.median(found[1:])


def recorded_choice(folder: Path) -> dict[str, Any]:
    """What `materialize = "auto"` measures for module 2; for a fresh process."""
    file = folder / "auto.toml"
    text = (folder / "crops.toml").read_text()
    file.write_text(text.replace("[module.2]\n", '[module.2]\ncache.materialize = "auto"\n'))
    pipeline = Pipeline.from_file(file, folder=folder / "out", device="cpu")
    stage = pipeline.stage(2)
    stage.extract(stage.load_weights(), force=True, workers=Workers(0))
    choice = read_manifest(folder / "out" / "m2.zarr").choice
    assert choice is not None
    return choice


def choosing(folder: Path, *, quick: bool) -> dict[str, Any]:
    """An epoch of stage 3's input, stored and computed, beside what was predicted."""
    rounds = []
    for number in range(1 if quick else 3):
        choice = apart(quick, recorded_choice, folder)
        read = apart(quick, input_epochs, folder, stored=True, epochs=1 if quick else 5)
        compute = apart(quick, input_epochs, folder, stored=False, epochs=1)
        rounds.append(
            {
                "read": read,
                "compute": compute,
                "predicted_read": choice["read_warm"],
                "predicted_compute": choice["compute"],
            }
        )
        print(f"round {number}: {rounds[-1]}", file=sys.stderr)
    row = {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}
    row["ratio"] = statistics.median(one["compute"] / one["read"] for one in rounds)
    row["predicted_ratio"] = statistics.median(
        one["predicted_compute"] / one["predicted_read"] for one in rounds
    )
    return row


def markdown(result: dict[str, Any], about: dict[str, str]) -> str:
    """All tables, with their conditions."""
    rows = {row["store"]: row for row in result["loading"]}

    def ratio(name: str, other: str, kind: str) -> float:
        pairs = zip(rows[name][kind], rows[other][kind], strict=True)
        return float(statistics.median(a / b for a, b in pairs))

    ours = next(iter(rows))
    lines = [
        "# Reading and building caches",
        "",
        "## A shuffled epoch",
        "",
        result["setting"],
        "",
        f"| store | bytes a sample | warm, samples/s | cold | {ours}: warm against it | cold |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        warm, cold = statistics.median(row["warm"]), statistics.median(row["cold"])
        lines.append(
            f"| {name} | {row['bytes'] / result['samples'] / 1e6:.2f} MB | {warm:.0f} | "
            f"{cold:.0f} | {ratio(ours, name, 'warm'):.2f}× | {ratio(ours, name, 'cold'):.2f}× |"
        )
    lines += [
        "",
        "## Extraction against a plain forward loop",
        "",
        "From the first block to the seal, fsync and checksums on, a Dask worker for each core, "
        "start-up apart; the loop holds all inputs in memory, takes two samples at a time, and "
        "does nothing with the outputs; the faster of one thread and one for each core.",
        "",
        "| module | samples | loop (s) | extraction (s) | ratio | start-up (s) |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['module']} | {row['samples']} | {row['plain_seconds']:.1f} | "
        f"{row['extraction_seconds']:.1f} | {row['ratio']:.2f}× | {row['startup_seconds']:.1f} |"
        for row in result["building"]
    ]
    chosen = result["choosing"]
    lines += [
        "",
        "## The input of stage 3: from the cache, or computed again from that of module 1",
        "",
        "Milliseconds a sample, in shuffled batches; predicted: what the plan measured for "
        '`materialize = "auto"`.',
        "",
        "| | read | computed | ratio |",
        "|---|---|---|---|",
        f"| measured | {1e3 * chosen['read']:.2f} | {1e3 * chosen['compute']:.1f} | "
        f"{chosen['ratio']:.0f}× |",
        f"| predicted | {1e3 * chosen['predicted_read']:.2f} | "
        f"{1e3 * chosen['predicted_compute']:.1f} | {chosen['predicted_ratio']:.0f}× |",
        "",
        "Conditions: " + "; ".join(f"{key} {value}" for key, value in about.items()) + ".",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; writes nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--folder", type=Path, help="where data is kept, and taken from if there")
    parser.add_argument("--only", choices=("loading", "building", "choosing"))
    arguments = parser.parse_args()
    quick, started = arguments.quick, time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = arguments.folder or Path(place)
        if not (folder / "master.npy").exists():
            folder.mkdir(parents=True, exist_ok=True)
            trained(folder, quick=quick)
            make_master(folder, 96 if quick else 1280)
            print(f"data: {time.monotonic() - started:.0f} s", file=sys.stderr)
        count = count_of(folder)
        each = np.load(folder / "master.npy", mmap_mode="r")[0].nbytes
        parts = {"loading": loading, "building": building, "choosing": choosing}
        if arguments.only:
            print(json.dumps(parts[arguments.only](folder, quick=quick), indent=2))
            return
        result: dict[str, Any] = {name: work(folder, quick=quick) for name, work in parts.items()}
    result["samples"] = count
    result["setting"] = (
        f"{count} samples of {each / 1e6:.1f} MB in float16 ({count * each / 1e9:.1f} GB), outputs "
        "of ResNet-50 module 2 for crops of photographs after ReLU, in batches of 16 tensors of "
        "float16 (uint8: float32), decoded, ours with checksums verified; peers with as many "
        "worker processes as gave them most (none, or one for each core), medians of rounds in "
        "turn. Warm: the second and third epoch of a process; cold: files dropped from the page "
        "cache before the epoch, after one that started all workers."
    )
    peers = {name: version(name) for name in ("litdata", "mosaicml-streaming", "webdataset")}
    about = conditions() | peers | {"seconds": f"{time.monotonic() - started:.0f}"}
    text = markdown(result, about)
    if not quick:
        (ROOT / "benchmarks" / "results" / "cache_io.md").write_text(text)
    print(json.dumps(result | {"conditions": about}, indent=2) if arguments.json else text)


if __name__ == "__main__":
    main()
