"""Scores of drawn negatives: ours, and two ways that PyTorch's own gradients see to.

    python benchmarks/infonce.py            # a minute, writes benchmarks/results/infonce.md
    python benchmarks/infonce.py --quick    # the smallest cases; writes nothing
    python benchmarks/infonce.py --json     # one JSON object on stdout

*Gathered*: embeddings of targets and negatives are copied into bags and multiplied. *Matrix*: all
embeddings are multiplied, and the drawn scores picked. *Ours* reads embeddings where they lie.
Forward and backward for one prediction step, one thread; the median of five after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from conditions import conditions
from torch import Tensor

from gim_stagewise.objectives.scores import Draw, Scores
from gim_stagewise.windows import Span

RESULT = Path(__file__).resolve().parent / "results" / "infonce.md"
# What it stands for; pairs, candidates, negatives a pair, and channels.
CASES = (
    ("digits, module 1", 320, 800, 16, 32),
    ("16 images, module 1", 560, 784, 16, 256),
    ("16 images, module 3", 560, 784, 16, 1024),
    ("32 images, module 3", 1120, 1568, 16, 1024),
    ("64 images, module 3", 2240, 3136, 16, 1024),
    ("audio, module 5", 1016, 1024, 10, 512),
    ("audio, module 3", 1016, 4096, 10, 512),
    ("audio, module 1", 1016, 32760, 10, 512),
)
Score = Callable[[Tensor, Tensor, Draw], Tensor]


def ours(z: Tensor, weights: Tensor, draw: Draw) -> Tensor:
    scores: Tensor = Scores.apply(z, weights, [draw])[0]  # type: ignore[no-untyped-call]
    return scores


def gathered(z: Tensor, weights: Tensor, draw: Draw) -> Tensor:
    prediction = z[draw.contexts] @ weights[0].T
    return torch.bmm(z[draw.bag], prediction.unsqueeze(2)).squeeze(2)


def matrix(z: Tensor, weights: Tensor, draw: Draw) -> Tensor:
    return (z[draw.contexts] @ weights[0].T @ z.T).gather(1, draw.bag)


def seconds(case: tuple[str, int, int, int, int], score: Score) -> float:
    """Median time of forward and backward, one way."""
    _, pairs, rows, negatives, channels = case
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, channels, generator=generator, requires_grad=True)
    weights = torch.randn(1, channels, channels, generator=generator, requires_grad=True)
    contexts = torch.randint(rows, (pairs,), generator=generator)
    bag = torch.randint(rows, (pairs, 1 + negatives), generator=generator)
    draw = Draw(1, Span(0, rows), contexts, bag)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        score(z, weights, draw).log_softmax(1)[:, 0].mean().backward()  # type: ignore[no-untyped-call]
        times.append(time.perf_counter() - started)
        z.grad = weights.grad = None
    return statistics.median(times[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="under a minute; writes nothing")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for case in CASES[:3] if arguments.quick else CASES:
        name, pairs, candidates, negatives, channels = case
        own = seconds(case, ours)
        rows.append(
            {
                "case": name,
                "candidates": candidates,
                "channels": channels,
                "gathered_bytes": 4 * pairs * (1 + negatives) * channels,
                "gathered_time": seconds(case, gathered) / own,
                "matrix_bytes": 4 * pairs * candidates,
                "matrix_time": seconds(case, matrix) / own,
            }
        )
    lines = [
        "# Scores of drawn negatives",
        "",
        "Forward and backward of one prediction step. Time: against ours, which reads embeddings "
        "where they lie. Bytes: of the copies, or of the matrix, that ours does without.",
        "",
        "| case | candidates | channels | gathered: bytes | time | matrix: bytes | time |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['candidates']} | {row['channels']} | "
        f"{row['gathered_bytes'] / 1e6:.1f} MB | {row['gathered_time']:.1f}× | "
        f"{row['matrix_bytes'] / 1e6:.1f} MB | {row['matrix_time']:.1f}× |"
        for row in rows
    ]
    about = conditions() | {"threads": "1"}
    lines += ["", "Conditions: " + "; ".join(f"{k} {v}" for k, v in about.items()) + ".", ""]
    text = "\n".join(lines)
    if not arguments.quick:
        RESULT.write_text(text)
    print(json.dumps({"cases": rows, "conditions": about}, indent=2) if arguments.json else text)


if __name__ == "__main__":
    main()
