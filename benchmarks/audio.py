"""The paper's tables 3 and 4 on synthetic speech, and the memory of its audio encoder.

    python benchmarks/audio.py                  # goes on with what is missing; hours
    python benchmarks/audio.py --table          # writes the tables from what is there
    python benchmarks/audio.py --quick          # memory, and a little training; writes nothing
    python benchmarks/audio.py --json

Three seeds of each mode of pipelines/speech.toml, as `gim-stage run --mode` gives them: every row
has the same data, probes and splits. Settings were chosen on validation data with another seed.
Runs go to results/audio.jsonl as they end. Memory is that of the paper's encoder
(pipelines/librispeech.toml) at a batch of 8: tensors are counted, and steps of micro-batches are
measured in fresh processes.
"""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from repeated import arguments, interval, known, make, paired, show

from gim_stagewise.config import load_pipeline
from gim_stagewise.pipeline import Pipeline, RunResult
from gim_stagewise.processes import in_fresh_process
from gim_stagewise.reproduce.audio import accuracies_without_bptt
from gim_stagewise.reproduce.runs import spread
from gim_stagewise.stage.chain import windowed_shapes
from gim_stagewise.stage.probe_sequences import MFCC, MFCC_STATISTICS, RecordingProbe
from gim_stagewise.stage.project import count_step, measure_step
from gim_stagewise.stage.spec import step_spec
from gim_stagewise.stage.walks import cached_walk
from gim_stagewise.stage.workspace import Workspace

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = RESULTS / "audio.jsonl"
SEEDS = range(50, 53)
LABELS = ("phone", "speaker")
# Name of a row, its mode, and the labels that it is trained on.
ROWS = {
    "randomly initialized": ("random", None),
    "supervised by phones": ("supervised", "phone"),
    "supervised by speakers": ("supervised", "speaker"),
    "greedy supervised by phones": ("greedy_supervised", "phone"),
    "greedy supervised by speakers": ("greedy_supervised", "speaker"),
    "CPC": ("cpc", None),
    "GIM, simultaneous": ("simultaneous", None),
    "GIM, iterative": ("iterative", None),
}
ITERATIVE, RANDOM = "GIM, iterative", "randomly initialized"
QUICK = {
    "source.options": {"speakers": 2, "train": 6, "test": 2},
    "windows.samples": 32,
    "train.max_epochs": 1,
    "train.validation": 0.5,
    "probe.step_epochs": 1,
}
# Points of speaker accuracy above the random encoder.
ABOVE_RANDOM = 10.0
# Module 1, a batch of 8, in one pass and in micro-batches; and the reference code's (facts counted
# in the same way: it builds negatives for all steps, and reads those of a window).
MOST_ONE_PASS, MOST_MICRO_BATCH = 330, 100


def measure(
    row: str, seed: int, folder: Path, *, device: str = "cpu", quick: bool = False
) -> dict[str, Any]:
    """One run; accuracies in percent. A quick one is of few recordings."""
    mode, labels = ROWS[row]
    # Runs of a seed lie side by side: modules before training, and MFCC, are probed once for all.
    beside = folder.parent / f"seed-{seed}"
    changes: dict[str, Any] = {
        "labels": labels,
        "source.root": str(ROOT / "cache"),
    }
    if quick:
        changes |= QUICK
    file = ROOT / "pipelines" / "speech.toml"

    def opened(own: Path, extra: dict[str, Any]) -> Pipeline:
        stated = changes | extra
        return Pipeline.from_file(
            file, folder=own, device=device, mode=mode, seed=seed, changes=stated
        )

    pipeline = opened(beside / row, {})
    made = [pipeline.workspace.folder]
    result = pipeline.run()
    run: dict[str, Any] = {
        "row": row,
        "seed": seed,
        **{name: by_module(result, name) for name in LABELS},
        "epochs": [stage.record.epochs for stage in result.stages],
        "train_loss": [stage.record.train_loss for stage in result.stages],
        "validation_loss": [stage.record.validation_loss for stage in result.stages],
    }
    if mode == "iterative":
        top = result.stages[-1].module
        blocked = opened(beside / "blocked", {f"module.{top}.options.bptt": False})
        made.append(blocked.workspace.folder)
        found = accuracies_without_bptt(blocked, result)
        run["without_bptt"] = {name: 100 * (own or 0) for name, own in found.items()}
        run["mfcc"] = {name: 100 * (result.baseline(MFCC, labels=name) or 0) for name in LABELS}
        simple = result.baseline(MFCC_STATISTICS, labels="speaker")
        run["mfcc_statistics"] = 100 * (simple or 0)
        run["statistics"] = 100 * speakers_by_statistics(pipeline, top)
    for own in made:
        for cache in own.glob("*/"):  # probe.json stays
            shutil.rmtree(cache)
    return run


def speakers_by_statistics(pipeline: Pipeline, module: int) -> float:
    """Speakers from mean and deviation of a cached module's features, as from those of MFCC."""
    probe = RecordingProbe.of(pipeline.workspace, pipeline.source)
    assert probe is not None
    walk = cached_walk([pipeline.workspace.cache_path(module)])
    (accuracy,) = probe.of_recordings(walk, deviation=True)
    assert accuracy is not None
    return accuracy.test


def by_module(result: RunResult, labels: str) -> list[float]:
    return [100 * (result.accuracy(own.module, labels=labels) or 0) for own in result.stages]


def make_missing(*, device: str) -> None:
    """Run what is missing, first what the goals are about."""
    there = {(run["row"], run["seed"]) for run in known(RUNS)}
    rows = sorted(ROWS, key=(ITERATIVE, RANDOM).__contains__, reverse=True)
    wanted = [(row, seed) for row in rows for seed in SEEDS if (row, seed) not in there]
    make(RUNS, measure, wanted, device=device)


def chosen(runs: list[dict[str, Any]], row: str) -> list[dict[str, Any]]:
    return sorted((run for run in runs if run["row"] == row), key=lambda run: run["seed"])


def tables(runs: list[dict[str, Any]]) -> list[str]:
    """Accuracies by module, table 4, and what was wanted."""
    lines = []
    for labels in LABELS:
        lines += [
            f"## {labels.capitalize()}s",
            "",
            "| method | " + " | ".join(f"module {n}" for n in range(1, 7)) + " | seeds |",
            "|---|" + "---|" * 7,
        ]
        for row in ROWS:
            if own := chosen(runs, row):
                cells = [spread(values) for values in zip(*(r[labels] for r in own), strict=True)]
                lines.append(f"| {row} | {' | '.join(cells)} | {len(own)} |")
        if trained := chosen(runs, ITERATIVE):
            mfcc = spread([run["mfcc"][labels] for run in trained])
            lines.append(f"| MFCC |{' |' * 5} {mfcc} | {len(trained)} |")
            if labels == "speaker":
                both = spread([run["mfcc_statistics"] for run in trained])
                lines.append(f"| MFCC, mean and deviation |{' |' * 5} {both} | {len(trained)} |")
                both = spread([run["statistics"] for run in trained])
                name = f"{ITERATIVE}, mean and deviation"
                lines.append(f"| {name} |{' |' * 5} {both} | {len(trained)} |")
        lines.append("")
    return [*lines, *context_network(runs), *judged(runs)]


def context_network(runs: list[dict[str, Any]]) -> list[str]:
    """Table 4."""
    trained = chosen(runs, ITERATIVE)
    if not trained:
        return []
    lines = [
        "## The context network (table 4)",
        "",
        "| method | phone | speaker |",
        "|---|---|---|",
    ]
    rows = {
        "GIM": [[run[name][-1] for run in trained] for name in LABELS],
        "GIM without BPTT": [[run["without_bptt"][name] for run in trained] for name in LABELS],
        "GIM without g_ar": [[run[name][-2] for run in trained] for name in LABELS],
    }
    for name, values in rows.items():
        lines.append(f"| {name} | {' | '.join(spread(own) for own in values)} |")
    return [*lines, ""]


def judged(runs: list[dict[str, Any]]) -> list[str]:
    """What was wanted, and what came out."""
    pairs = paired(chosen(runs, ITERATIVE), chosen(runs, RANDOM))
    if not pairs:
        return []
    trained = [run for run, _ in pairs]
    # Differences in points by seed, and the goal.
    rows: dict[str, tuple[list[float], float]] = {
        "speakers, module 6 less MFCC, both averaged": (
            [run["speaker"][-1] - run["mfcc"]["speaker"] for run in trained],
            0,
        ),
        "speakers, module 6 less MFCC, of both mean and deviation": (
            [run["statistics"] - run["mfcc_statistics"] for run in trained],
            0,
        ),
        "speakers, module 6 averaged less mean and deviation of MFCC": (
            [run["speaker"][-1] - run["mfcc_statistics"] for run in trained],
            0,
        ),
        "speakers, module 6 less the random encoder, both averaged": (
            [run["speaker"][-1] - other["speaker"][-1] for run, other in pairs],
            ABOVE_RANDOM,
        ),
    }
    for n in range(1, len(trained[0]["phone"])):
        steps = [run["phone"][n] - run["phone"][n - 1] for run in trained]
        rows[f"phones, module {n + 1} less module {n}"] = (steps, 0)
    return [
        f"Iterative, paired by seed, {len(pairs)} of them; mean ± half of a 95 % interval "
        "(Student's t):",
        "",
        "| difference | points | goal |",
        "|---|---|---|",
        *(f"| {name} | {interval(own, 1)} | {goal:g} |" for name, (own, goal) in rows.items()),
        "",
    ]


def memory(*, quick: bool) -> list[dict[str, Any]]:
    """Bytes of a training step of each module of the paper's encoder, a batch of 8.

    A quick one counts the first alone.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = ROOT / "pipelines" / "librispeech.toml"
        config, text = load_pipeline(file, {"train.batch": 8})
        space = Workspace(config, text, Path(folder), None, torch.device("cpu"))
        shapes = windowed_shapes(space, 1)
        rows = []
        for index, shape in enumerate(shapes[:1] if quick else shapes, start=1):
            spec = replace(step_spec(space, index, shape), lean=True)
            small = replace(spec, micro_batch=1)
            rows.append(
                {
                    "module": index,
                    "one_pass": count_step(spec).count / 1e6,
                    "micro_batch": count_step(small).count / 1e6,
                }
            )
            if not quick:
                rows[-1]["one_pass_measured"] = _measured(spec)
                rows[-1]["micro_batch_measured"] = _measured(small)
    return rows


def _measured(spec: Any) -> float:
    peak: float = in_fresh_process(measure_step, spec, steps=2) / 1e6
    return peak


def memory_table(rows: list[dict[str, Any]]) -> list[str]:
    lines = [
        "## Memory",
        "",
        "Bytes of a training step (the second, with Adam's state) of each module of the paper's "
        "encoder, 512 channels, 8 recordings of 20480 samples; MB = 10^6 bytes. The reference code "
        "takes 2868 MB for module 1, and 322 MB with negatives that are built only where they are "
        "read (counted).",
        "",
        "| module | one pass, counted | measured | micro-batches of 1, counted | measured |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [
            row["one_pass"],
            row.get("one_pass_measured"),
            row["micro_batch"],
            row.get("micro_batch_measured"),
        ]
        shown = ("" if cell is None else f"{cell:.0f} MB" for cell in cells)
        lines.append(f"| {row['module']} | {' | '.join(shown)} |")
    first = rows[0]
    return [
        *lines,
        "",
        f"Module 1 counts {first['one_pass']:.0f} MB in one pass (goal: {MOST_ONE_PASS}), and "
        f"{first['micro_batch']:.0f} MB in micro-batches (goal: {MOST_MICRO_BATCH}).",
        "",
    ]


def main() -> None:
    given = arguments(__doc__, ("synthetic_speech",))
    if given.quick:
        with tempfile.TemporaryDirectory() as folder:
            runs = [
                measure(row, SEEDS[0], Path(folder) / row, quick=True)
                for row in (RANDOM, ITERATIVE)
            ]
    else:
        if not given.table:
            make_missing(device=given.device)
        runs = known(RUNS)
    rows = memory(quick=given.quick)
    text = "\n".join(
        [
            "# Audio: synthetic speech",
            "",
            "Test accuracy in percent of linear classifiers on frozen features of each module of "
            "pipelines/speech.toml; mean ± standard deviation over seeds. Speakers are classified "
            "by the mean of a recording's features, phones step by step. The classifier of "
            "speakers is a logistic regression fitted to convergence, its regularisation chosen; "
            "that of phones learns at 3e-3 for up to 12 epochs, not at the paper's 1e-4 for as "
            "long as it takes. Both are the same for every row.",
            "",
            *tables(runs),
            *memory_table(rows),
        ]
    )
    show(given, [*runs, *rows], text, RESULTS / "audio.md")


if __name__ == "__main__":
    main()
