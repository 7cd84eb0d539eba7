"""Two ways to score drawn negatives: a matrix of all scores, or gathering those drawn.

    python benchmarks/infonce.py            # a minute, writes benchmarks/results/infonce.md
    python benchmarks/infonce.py --quick    # the smallest cases; writes nothing
    python benchmarks/infonce.py --json     # one JSON object on stdout

Forward and backward for one prediction step, one thread; the median of five after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from conditions import conditions

from gim_stagewise.objectives import scores
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


def seconds(case: tuple[str, int, int, int, int], *, matrix: bool) -> float:
    """Median time of forward and backward, one way."""
    _, pairs, rows, negatives, channels = case
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(rows, channels, generator=generator, requires_grad=True)
    weights = torch.randn(1, channels, channels, generator=generator, requires_grad=True)
    contexts = torch.randint(rows, (pairs,), generator=generator)
    bag = torch.randint(rows, (pairs, 1 + negatives), generator=generator)
    draws = [scores.Draw(1, Span(0, rows), contexts, bag)]
    times = []
    with patch.object(scores, "MATRIX_CANDIDATES_PER_NEGATIVE", 10**9 if matrix else 0):
        for _ in range(6):
            started = time.perf_counter()
            scores.Scores.apply(z, weights, draws)[0].sum().backward()  # type: ignore[no-untyped-call]
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
        ratio = seconds(case, matrix=False) / seconds(case, matrix=True)
        rows.append(
            {
                "case": name,
                "candidates_per_negative": candidates / negatives,
                "matrix_bytes": 4 * pairs * candidates,
                "gathered_bytes": min(4 * pairs * negatives * channels, scores.GATHERED_BYTES),
                "gathered_time_over_matrix": ratio,
                "chosen": "matrix"
                if candidates <= scores.MATRIX_CANDIDATES_PER_NEGATIVE * negatives
                else "gathered",
            }
        )
    lines = [
        "# Scores of drawn negatives",
        "",
        "| case | candidates per negative | matrix | gathered | time, gathered / matrix | chosen |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['case']} | {row['candidates_per_negative']:.0f} | "
        f"{row['matrix_bytes'] / 1e6:.1f} MB | {row['gathered_bytes'] / 1e6:.1f} MB | "
        f"{row['gathered_time_over_matrix']:.2f} | {row['chosen']} |"
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
