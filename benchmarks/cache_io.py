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
from photos import crops, write_crops
from precision import RESNET
from repeated import one_thread
from stores import ALONE, BATCH, FP16, FP32, QUICK, STORES, WINDOW, count_of

from gim_stagewise import Pipeline, Workers, load_encoder
from gim_stagewise.cache import Cache, discard_cache, read_manifest
from gim_stagewise.progress import Silent, Task
from gim_stagewise.sources import Request
from gim_stagewise.stage.loader import Loader
from gim_stagewise.windows import Span, even_ranges

T = TypeVar("T")
MICRO_BATCH = 98  # patches, as the pipeline trains with
ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cache_io.json"


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
    layout = read_manifest(folder / "out" / "m2.zarr").sample_layout
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
        each = size_of(target) / count
        found[name] = {"store": name, "bytes_a_sample": each, "warm": [], "cold": []}
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
            for rows in even_ranges(batch.rows, MICRO_BATCH):
                batch.read(rows)
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


def loading_table(rows: list[dict[str, Any]], setting: str) -> list[str]:
    """Stores side by side."""
    by_name = {row["store"]: row for row in rows}

    def ratio(name: str, other: str, kind: str) -> float:
        pairs = zip(by_name[name][kind], by_name[other][kind], strict=True)
        return float(statistics.median(a / b for a, b in pairs))

    ours = next(iter(by_name))
    lines = [
        "## A shuffled epoch",
        "",
        setting,
        "",
        f"| store | bytes a sample | warm, samples/s | cold | {ours}: warm against it | cold |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in by_name.items():
        warm, cold = statistics.median(row["warm"]), statistics.median(row["cold"])
        lines.append(
            f"| {name} | {row['bytes_a_sample'] / 1e6:.2f} MB | {warm:.0f} | "
            f"{cold:.0f} | {ratio(ours, name, 'warm'):.2f}× | {ratio(ours, name, 'cold'):.2f}× |"
        )
    return [
        *lines,
        "",
        "Goals: warm at least LitData and 0.9 of the memmap; cold at least 1.5 times the "
        "memmap; 1.5 times MosaicML Streaming and WebDataset in both; 20 times the sharded store. "
        "Against the memmap, warm, both are bound by memory: it copies each value once, a cache "
        "is decompressed, checked and decoded, and from uint8 twice as many bytes are delivered.",
    ]


def building_table(rows: list[dict[str, Any]]) -> list[str]:
    """Extraction beside a plain loop."""
    return [
        "## Extraction against a plain forward loop",
        "",
        "From the first block to the seal, fsync and checksums on, a Dask worker for each core, "
        "start-up apart; the loop holds all inputs in memory, takes two samples at a time, and "
        "does nothing with the outputs; the faster of one thread and one for each core. Goal: "
        "1.1.",
        "",
        "| module | samples | loop (s) | extraction (s) | ratio | of each round | start-up (s) |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['module']} | {row['samples']} | {row['plain_seconds']:.1f} | "
            f"{row['extraction_seconds']:.1f} | {row['ratio']:.2f}× | "
            f"{', '.join(f'{ratio:.2f}' for ratio in row['ratios'])} | "
            f"{row['startup_seconds']:.1f} |"
            for row in rows
        ),
    ]


def choosing_table(chosen: dict[str, Any]) -> list[str]:
    """What was predicted beside what came."""
    return [
        "## The input of stage 3: from the cache, or computed again from that of module 1",
        "",
        "Milliseconds a sample, in shuffled batches and in the micro-batches of training; "
        'predicted: what was measured for `materialize = "auto"`. Goal: the ratio within 20 %.',
        "",
        "| | read | computed | ratio |",
        "|---|---|---|---|",
        f"| measured | {1e3 * chosen['read']:.2f} | {1e3 * chosen['compute']:.1f} | "
        f"{chosen['ratio']:.0f}× |",
        f"| predicted | {1e3 * chosen['predicted_read']:.2f} | "
        f"{1e3 * chosen['predicted_compute']:.1f} | {chosen['predicted_ratio']:.0f}× |",
    ]


def markdown(result: dict[str, Any]) -> str:
    """All parts that were measured, each with its conditions."""
    lines = ["# Reading and building caches", ""]
    tables: dict[str, Callable[..., list[str]]] = {
        "loading": loading_table,
        "building": building_table,
        "choosing": choosing_table,
    }
    for name, table in tables.items():
        if name not in result:
            continue
        part = result[name]
        lines += (
            table(part["found"], part["setting"]) if name == "loading" else table(part["found"])
        )
        about = "; ".join(f"{key} {value}" for key, value in part["conditions"].items())
        lines += ["", f"Conditions: {about}.", ""]
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
        peers = {name: version(name) for name in ("litdata", "mosaicml-streaming", "webdataset")}
        parts: dict[str, Callable[..., Any]] = {
            "loading": loading,
            "building": building,
            "choosing": choosing,
        }
        result: dict[str, Any] = {} if quick or not RESULTS.exists() else read_results()
        for name in [arguments.only] if arguments.only else list(parts):
            began = time.monotonic()
            found = parts[name](folder, quick=quick)
            about = conditions() | (peers if name == "loading" else {})
            about["seconds"] = f"{time.monotonic() - began:.0f}"
            result[name] = {"found": found, "setting": setting(count, each), "conditions": about}
    text = markdown(result)
    if not quick:
        RESULTS.write_text(json.dumps(result, indent=1) + "\n")
        RESULTS.with_suffix(".md").write_text(text)
    print(json.dumps(result, indent=2) if arguments.json else text)


def read_results() -> dict[str, Any]:
    """What was measured before; a part that is measured alone takes its place among it."""
    found: dict[str, Any] = json.loads(RESULTS.read_text())
    return found


def setting(count: int, each: int) -> str:
    """What is read, and how."""
    return (
        f"{count} samples of {each / 1e6:.1f} MB in float16 ({count * each / 1e9:.1f} GB), outputs "
        "of ResNet-50 module 2 for crops of photographs after ReLU, in batches of 16 tensors of "
        "float16 (uint8: float32), decoded, ours with checksums verified; peers with as many "
        "worker processes as gave them most (none, or one for each core), medians of rounds in "
        "turn. Warm: the second and third epoch of a process; cold: files dropped from the page "
        "cache before the epoch, after one that started all workers."
    )


if __name__ == "__main__":
    main()
