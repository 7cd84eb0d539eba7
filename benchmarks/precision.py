"""What a cache weighs in each precision, and what its rounding does to the next stages.

    python benchmarks/precision.py           # about an hour, writes results/precision.md
    python benchmarks/precision.py --quick   # under a minute, smaller networks; writes nothing
    python benchmarks/precision.py --json    # one JSON object on stdout

Bytes: outputs of the paper's ResNet-50 modules 1 and 2 (16×16 patches, 7×7 grid) after a short
training on crops of photographs, stored after the ReLU that the next module begins with. Learning:
the digits pipeline without its test images (as in digits.py --choose), every precision with the
same seeds; modules above the first are trained on what was stored.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conditions import conditions
from digits import without_test_images
from numcodecs import blosc
from numpy.typing import NDArray
from photos import write_crops
from repeated import interval, one_thread, paired
from torch import Tensor

from gim_stagewise.cache import Cache, Precision
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.sources import Request

ROOT = Path(__file__).resolve().parent.parent
FORMS = ("float32", "float16", "bfloat16", "bitround-7", "uint8", "float8_e4m3")
# Compressor, level and shuffle; named as Blosc does.
CODECS: dict[str, tuple[bytes, int, int] | None] = {
    "none": None,
    "lz4": (b"lz4", 5, blosc.NOSHUFFLE),
    "lz4, shuffle": (b"lz4", 5, blosc.SHUFFLE),
    "lz4, bitshuffle": (b"lz4", 5, blosc.BITSHUFFLE),
    "zstd-1": (b"zstd", 1, blosc.NOSHUFFLE),
    "zstd-1, shuffle": (b"zstd", 1, blosc.SHUFFLE),
    "zstd-1, bitshuffle": (b"zstd", 1, blosc.BITSHUFFLE),
}
SEEDS = range(20, 25)
RESNET = """
name = "crops"
[source]
kind = "npy"
root = "{folder}"
splits.unlabeled = {{ images = "crops.npy" }}
options.axes = "sample height width"
[augment]
mean = [0.46]
std = [0.26]
[patches]
size = 16
stride = 8
[objective]
prediction_steps = 5
[train]
batch = 16
lr = 1.5e-4
max_epochs = {epochs}
micro_batch = 98
[cache]
precision = "float32"
[extract]
batch = 98
[module.1]
build = "resnet50"
options = {{ blocks = [1, 3], width = {width} }}
[module.2]
build = "resnet50"
options = {{ blocks = [4, 7], width = {width} }}
[module.3]
build = "resnet50"
options = {{ blocks = [8, 13], width = {width} }}
"""


def resnet_activations(folder: Path, *, quick: bool) -> dict[int, NDArray[np.float32]]:
    """Outputs of modules 1 and 2, after the next module's ReLU: [sample, row, column, ...]."""
    write_crops(folder, count=32 if quick else 192)
    file = folder / "crops.toml"
    file.write_text(
        RESNET.format(folder=folder, width=8 if quick else 64, epochs=1 if quick else 3)
    )
    Pipeline.from_file(file, folder=folder / "out", device="cpu").run(until=2)
    found = {}
    for module in (1, 2):
        cache = Cache(folder / "out" / f"m{module}.zarr")
        assert cache.manifest.stored_operation == "relu"
        found[module] = np.stack(cache.read([Request(i) for i in cache.ids[: 4 if quick else 16]]))
    return found


def weigh(module: int, values: NDArray[np.float32]) -> list[dict[str, Any]]:
    """Bytes, error and speed of every precision with every codec."""
    rows = torch.from_numpy(values).flatten(0, 2)
    extremes = rows.transpose(0, 1).flatten(1).aminmax(dim=1)
    found = []
    for name in FORMS:
        form = Precision(name).calibrated(*extremes)
        encode_seconds, (stored, error) = timed(lambda form=form: form.encode(rows))  # type: ignore[misc]
        decode_seconds, _ = timed(lambda form=form, s=stored: form.decode(s))  # type: ignore[misc]
        plain = stored.dtype == torch.float32
        for codec, settings in CODECS.items():
            if settings is None:
                size, compress, decompress = stored.nbytes, 0.0, 0.0
            else:
                size, compress, decompress = compressed(stored, settings)
            found.append(
                {
                    "module": module,
                    "precision": name,
                    "codec": codec,
                    "sample_bytes": size / len(values),
                    "against_float32": values.nbytes / size,
                    "error": 0.0 if error is None else error.relative,
                    "encode": rate(values, stored is rows, encode_seconds, compress),
                    "decode": rate(values, plain, decode_seconds, decompress),
                }
            )
    return found


def rate(
    values: NDArray[np.float32], unchanged: bool, seconds: float, codec_seconds: float
) -> float | None:
    """Bytes a second of a conversion and its codec; none where there is nothing to do."""
    seconds = (0.0 if unchanged else seconds) + codec_seconds
    return values.nbytes / seconds if seconds else None


def compressed(stored: Tensor, settings: tuple[bytes, int, int]) -> tuple[int, float, float]:
    """Bytes of an array in chunks of one grid row, and seconds there and back."""
    compressor, level, shuffle = settings
    parts = [part.numpy() for part in stored.chunk(max(1, stored.nbytes // 4_000_000))]
    seconds, packed = timed(
        lambda: [blosc.compress(part, compressor, level, shuffle) for part in parts]
    )
    back, _ = timed(lambda: [blosc.decompress(part) for part in packed])
    return sum(map(len, packed)), seconds, back


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Median seconds of three calls, and the result."""
    seconds, result = [], None
    for _ in range(3):
        started = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds), result


def learn(text: str, name: str, seed: int, folder: Path) -> dict[str, Any]:
    """Run the digits pipeline with one precision and seed."""
    file = folder / f"{name}-{seed}.toml"
    changed = text.replace("seed = 0\n", f"seed = {seed}\n")
    file.write_text(f'{changed}\n[cache]\nprecision = "{name}"\n')
    pipeline = Pipeline.from_file(file, folder=folder / f"{name}-{seed}", device="cpu")
    result = pipeline.run()
    caches = [pipeline.workspace.cache_path(stage.module) for stage in result.stages]
    errors = [Cache(path).manifest.error for path in caches]
    return {
        "precision": name,
        "seed": seed,
        "loss": [stage.record.validation_loss for stage in result.stages],
        "accuracy": [100 * (result.accuracy(own.module) or 0) for own in result.stages],
        "activation_bytes": [
            sum(f.stat().st_size for f in (path / "activations").glob("c.*")) for path in caches
        ],
        "float32_bytes": [Cache(path).activations.size * 4 for path in caches],
        "error": [0.0 if error is None else error["relative_l2"] for error in errors],
    }


def learning(folder: Path, *, quick: bool) -> list[dict[str, Any]]:
    """Losses and accuracies of every precision, against float32 with the same seed."""
    text = without_test_images((ROOT / "pipelines" / "digits.toml").read_text(), folder)
    forms, seeds = (("float32", "uint8"), SEEDS[:1]) if quick else (FORMS, SEEDS)
    if quick:
        text = text.replace("max_epochs = 30", "max_epochs = 2")
    jobs = [(name, seed) for seed in seeds for name in forms]
    with ProcessPoolExecutor(mp_context=get_context("spawn"), initializer=one_thread) as pool:
        names, numbers = zip(*jobs, strict=True)
        runs = list(pool.map(learn, repeat(text), names, numbers, repeat(folder)))
    plain = [run for run in runs if run["precision"] == "float32"]
    rows = []
    for name in forms:
        own = [run for run in runs if run["precision"] == name]
        pairs = paired(own, plain)
        rows.append(
            {
                "precision": name,
                "seeds": len(own),
                **{
                    key: [
                        [run[key][module] - other[key][module] for run, other in pairs]
                        for module in range(3)
                    ]
                    for key in ("loss", "accuracy")
                },
                "against_float32": [
                    own[0]["float32_bytes"][module] / own[0]["activation_bytes"][module]
                    for module in range(3)
                ],
                "error": own[0]["error"],
                "runs": own,
            }
        )
    return rows


def shown(rate: float | None) -> str:
    """GB a second."""
    return "" if rate is None else f"{rate / 1e9:.2f}"


def markdown(result: dict[str, Any], about: dict[str, str]) -> str:
    """Both tables, with their conditions."""
    lines = [
        "# Precision of a cache",
        "",
        "## Bytes of a sample",
        "",
        "Outputs of the paper's ResNet-50 modules (7×7 patches of 16×16) after a short training on "
        "crops of photographs, after the ReLU that the next module begins with; chunks of about "
        "4 MB. Encode and decode: GB of float32 values a second on one core, rounding and codec "
        "together, without reading or writing, empty where there is nothing to do. Error: "
        "relative L2.",
        "",
        "| module | precision | codec | MB a sample | smaller than float32 | error | encode | "
        "decode |",
        "|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['module']} | {row['precision']} | {row['codec']} | "
        f"{row['sample_bytes'] / 1e6:.2f} | {row['against_float32']:.1f}× | {row['error']:.1e} | "
        f"{shown(row['encode'])} | {shown(row['decode'])} |"
        for row in result["bytes"]
    ]
    lines += [
        "",
        "## What it does to the next stages",
        "",
        "The digits pipeline without its test images (the end of the training images stands in for "
        f"them), {result['learning'][0]['seeds']} seeds, difference to float32 with the same seed, "
        "mean ± half of a 95 % interval (Student's t). Loss: on held-out samples. Accuracy: of the "
        "linear probe, in points. Module 1 reads images and is the same in all rows. Smaller: "
        "activations of modules 1 / 2 / 3 on disk against float32 values, the codec the default.",
        "",
        "| precision | loss of module 2 | of module 3 | accuracy of module 2 | of module 3 | "
        "error | smaller |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in result["learning"]:
        error = " / ".join(f"{e:.1e}" for e in row["error"])
        smaller = " / ".join(f"{r:.1f}" for r in row["against_float32"])
        lines.append(
            f"| {row['precision']} | {interval(row['loss'][1], 4)} | "
            f"{interval(row['loss'][2], 4)} | {interval(row['accuracy'][1], 1)} | "
            f"{interval(row['accuracy'][2], 1)} | {error} | {smaller} |"
        )
    lines += ["", "Conditions: " + "; ".join(f"{k} {v}" for k, v in about.items()) + ".", ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; writes nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    started = time.monotonic()
    blosc.set_nthreads(1)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        weighed = [
            row
            for module, values in resnet_activations(
                folder / "resnet", quick=arguments.quick
            ).items()
            for row in weigh(module, values)
        ]
        print(f"bytes: {time.monotonic() - started:.0f} s", file=sys.stderr)
        result = {"bytes": weighed, "learning": learning(folder, quick=arguments.quick)}
    about = conditions() | {"seconds": f"{time.monotonic() - started:.0f}"}
    text = markdown(result, about)
    if not arguments.quick:
        (ROOT / "benchmarks" / "results" / "precision.md").write_text(text)
    print(json.dumps(result | {"conditions": about}, indent=2) if arguments.json else text)


if __name__ == "__main__":
    main()
