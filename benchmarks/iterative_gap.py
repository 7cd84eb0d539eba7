"""What makes modules that are trained one after another generalise as those trained together.

    python benchmarks/iterative_gap.py                  # goes on with what is missing; hours
    python benchmarks/iterative_gap.py --data digits    # one of the datasets
    python benchmarks/iterative_gap.py --table          # writes the table from what is there
    python benchmarks/iterative_gap.py --quick          # a little of digits; writes nothing
    python benchmarks/iterative_gap.py --json

The paper's iterative training overfits more than its simultaneous training (section 4.1, figure 3).
Every condition changes modules 2 and 3 alone, or the views that all are trained on, and is paired
by seed with simultaneous training on the same samples, for as many steps a module ("equal work"),
or until its loss stalls ("convergence"). The gap is the loss of the frozen weights on held-out
samples less that on as many samples that were trained on. Runs go to results/iterative_gap.jsonl as
they end. Choices are made by validation.
"""

from __future__ import annotations

import os
import re
import shutil
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from repeated import arguments, interval, known, make, paired, show

from gim_stagewise.pipeline import Pipeline
from gim_stagewise.probe.probe import cached_features, chain_features, probe_accuracy
from gim_stagewise.probe.splits import probe_splits
from gim_stagewise.stage.checkpoint import TrainingRecord
from gim_stagewise.stage.extraction_plan import Workers

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
RUNS = RESULTS / "iterative_gap.jsonl"
SEEDS = range(30, 35)
# Runs, each with one of the same seed.
Pairs = list[tuple[dict[str, Any], dict[str, Any]]]
DATA = ("digits", "photos")

# Replacements in the shipped files, for each dataset.
EPOCHS = {
    "equal work": {"digits": 30, "photos": 12},
    "convergence": {"digits": 90, "photos": 30},
}
# Of epochs until "convergence".
PATIENCE = 8
# Views that differ: shifts by a pixel, and mirrored crops.
AUGMENT = {
    "digits": (r"pad = 2 .*", "pad = 3\ncrop = 12"),
    "photos": (r"(?m)^mean = ", "flip = 0.5\nmean = "),
}


@dataclass(frozen=True)
class Condition:
    """A way to train.

    Parameters
    ----------
    name : str
    upper : str
        Lines of the ``train`` tables of modules 2 and 3.
    mode : str
    augmented : bool
        Whether samples are trained on in views that differ.
    views : int
        How many of them are stored.
    """

    name: str
    upper: str = ""
    mode: str = "iterative"
    augmented: bool = False
    views: int = 1


SIMULTANEOUS = Condition("simultaneous", mode="simultaneous")
AUGMENTED = Condition("simultaneous, augmented", mode="simultaneous", augmented=True)
# What conditions are compared with: by whether they are augmented.
REFERENCES = (SIMULTANEOUS, AUGMENTED)
CONDITIONS = [
    SIMULTANEOUS,
    Condition("iterative"),
    Condition("dropout 0.1", "dropout = 0.1"),
    Condition("dropout 0.3", "dropout = 0.3"),
    Condition("noise 0.3", "noise = 0.3"),
    Condition("noise 0.6", "noise = 0.6"),
    Condition("noise 1.0", "noise = 1.0"),
    Condition("dropout 0.3, noise 0.6", "dropout = 0.3\nnoise = 0.6"),
    Condition("dropout 0.5, noise 0.6", "dropout = 0.5\nnoise = 0.6"),
    Condition("average 0.99", "average = 0.99"),
    Condition("dropout 0.1, average 0.99", "dropout = 0.1\naverage = 0.99"),
    Condition("patience 2", "patience = 2"),
    Condition("noise 0.6, patience 2", "noise = 0.6\npatience = 2"),
    Condition("noise 1.0, patience 2", "noise = 1.0\npatience = 2"),
    Condition("dropout 0.5, noise 0.6, patience 2", "dropout = 0.5\nnoise = 0.6\npatience = 2"),
    Condition("narrow shuffle window", 'shuffle_window = "SMALL"'),
    AUGMENTED,
    Condition("iterative, augmented, 1 view", augmented=True),
    Condition("iterative, augmented, 4 views", augmented=True, views=4),
    Condition("noise 0.6, augmented, 4 views", "noise = 0.6", augmented=True, views=4),
]
# Until losses stall it takes several times as long: for one or two of a kind.
CONVERGED = {
    "digits": {
        SIMULTANEOUS.name,
        "iterative",
        "dropout 0.3",
        "noise 0.6",
        "dropout 0.5, noise 0.6",
        "average 0.99",
        "patience 2",
        "noise 1.0, patience 2",
        "dropout 0.5, noise 0.6, patience 2",
        "narrow shuffle window",
        AUGMENTED.name,
        "iterative, augmented, 4 views",
    },
    "photos": {
        SIMULTANEOUS.name,
        "iterative",
        "dropout 0.3",
        "dropout 0.5, noise 0.6",
        "average 0.99",
        "patience 2",
        "noise 1.0, patience 2",
        "dropout 0.5, noise 0.6, patience 2",
        "narrow shuffle window",
        AUGMENTED.name,
        "iterative, augmented, 4 views",
    },
}
# Bytes that a narrow window mixes: little more than a chunk, and a tenth of an epoch.
SMALL = {"digits": "5MB", "photos": "15MB"}


def text_of(data: str, regime: str, condition: Condition, epochs: int | None) -> str:
    """The pipeline file of a condition."""
    text = (ROOT / "pipelines" / f"{data}.toml").read_text()
    count = epochs or EPOCHS[regime][data]
    patience = count if regime == "equal work" else PATIENCE
    changes = [
        (r"(?m)^max_epochs = .*", f"max_epochs = {count}"),
        (r"(?m)^patience = .*", f"patience = {patience}"),
        # Fewer crops of photographs than in the shipped file: modules can overfit to them.
        (r"unlabeled = \d+, train = \d+, test = \d+", "unlabeled = 600, train = 1500, test = 750"),
        # A finer top than in the shipped file, of which the first runs were made.
        (r"channels = 128, stride = 2", "channels = 128"),
        (r"(?m)^(dropout|noise|average) = .*\n", ""),
    ]
    if condition.augmented:
        changes.append(AUGMENT[data])
        changes.append((r"(?m)^\[augment\]", f"[augment]\nviews = {condition.views}"))
    for pattern, replacement in changes:
        text = re.sub(pattern, replacement, text)
    if condition.mode == "iterative":
        upper = {"dropout": "0.0", "noise": "0.0"}  # not what is done by default
        for line in condition.upper.replace("SMALL", SMALL[data]).splitlines():
            name, _, value = line.partition(" = ")
            upper[name] = value
        lines = "\n".join(f"{name} = {value}" for name, value in upper.items())
        text += "".join(f"\n[module.{number}.train]\n{lines}\n" for number in (2, 3))
    return text


def measure(
    data: str,
    regime: str,
    condition: Condition,
    seed: int,
    folder: Path,
    *,
    device: str = "cpu",
    epochs: int | None = None,
) -> dict[str, Any]:
    """Train all modules, and probe them on validation samples and on test samples."""
    file = folder / "pipeline.toml"
    file.write_text(text_of(data, regime, condition, epochs))
    pipeline = Pipeline.from_file(
        file, folder=folder / "run", device=device, mode=condition.mode, seed=seed
    )
    splits = probe_splits(pipeline.source)
    assert splits is not None
    ids = [*splits[0].ids, *splits[1].ids]
    shared = f"{data}-{regime}-{seed}".replace(" ", "-")
    base = None if condition.augmented else folder.parent / shared
    records, features = zip(*trained(pipeline, ids, base), strict=True)
    accuracies = [
        probe_accuracy(part, *splits, pipeline.config.probe, seed=seed) for part in features
    ]
    shutil.rmtree(folder)
    return {
        "data": data,
        "regime": regime,
        "condition": condition.name,
        "seed": seed,
        "train_loss": [record.train_loss for record in records],
        "validation_loss": [record.validation_loss for record in records],
        "epochs": [record.epochs for record in records],
        "seconds": [record.seconds for record in records],
        "validation_accuracy": [100 * accuracy.validation for accuracy in accuracies],
        "test_accuracy": [100 * accuracy.test for accuracy in accuracies],
    }


def trained(
    pipeline: Pipeline, ids: list[str], base: Path | None
) -> Iterator[tuple[TrainingRecord, NDArray[np.float32]]]:
    """How training of each module went, and its features."""
    if not pipeline.config.iterative:
        stage = pipeline.joint_stage()
        weights, _ = stage.train()
        parts = chain_features(stage.frozen(weights), pipeline.source, ids, pipeline.config)
        yield from zip((own.record for own in weights), parts, strict=True)
        return
    for index in pipeline.config.module:
        if index == 1 and base and base.exists():  # the recipe tells whether it is this condition's
            _link(base, pipeline.workspace.folder)
        own, _ = pipeline.stage(index).train()
        pipeline.stage(index).extract(own, workers=Workers(0))
        if index == 1 and base and not base.exists():
            keep(pipeline.workspace.folder, base)
        yield (
            own.record,
            cached_features(pipeline.workspace.cache_path(index), ids, pipeline.config),
        )


def keep(made: Path, base: Path) -> None:
    """Keep module 1, which many conditions share; another process may be first."""
    own = base.with_name(f"{base.name}-{os.getpid()}")
    _link(made, own)
    try:
        own.rename(base)
    except OSError:
        shutil.rmtree(own)


def _link(made: Path, target: Path) -> None:
    """The same files under another name; a lock is each folder's own."""
    ignore = shutil.ignore_patterns(".lock")
    shutil.copytree(made, target, copy_function=os.link, ignore=ignore)


def key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["data"], run["regime"], run["condition"], run["seed"]


def make_missing(data: list[str], *, device: str) -> None:
    """Run what is missing, seed by seed, so that conditions are even at any time."""
    there = {key(run) for run in known(RUNS)}
    missing = [
        (name, regime, condition, seed)
        for regime in EPOCHS
        for seed in SEEDS
        for name in data
        for condition in CONDITIONS
        if (name, regime, condition.name, seed) not in there and wanted(name, regime, condition)
    ]
    make(RUNS, measure, missing, device=device)


def wanted(data: str, regime: str, condition: Condition) -> bool:
    """Whether a condition is tried."""
    return regime == "equal work" or condition.name in CONVERGED[data]


def gap(run: dict[str, Any], module: int) -> float:
    difference: float = run["validation_loss"][module - 1] - run["train_loss"][module - 1]
    return difference


def table(runs: list[dict[str, Any]], data: str, regime: str) -> list[str]:
    """Rows of one dataset and regime; differences are paired by seed with simultaneous training."""
    lines = [
        f"## {data}, {regime}",
        "",
        "| condition | seeds | gap 2 | gap 3 | gap 2 − sim. | gap 3 − sim. | validation loss 3 | "
        "accuracy 3 | accuracy 3 − sim. | accuracy 2 − sim. | goal | test 3 | test 3 − sim. | "
        "test 3 − iter. |",
        f"|{'---|' * 14}",
    ]
    by_key = {key(run): run for run in runs}
    for condition, pairs in comparisons(runs, data, regime):
        gaps = [[gap(own, module) for own, _ in pairs] for module in (2, 3)]
        accuracy = [own["validation_accuracy"][2] for own, _ in pairs]
        *lower, better = against_reference(pairs)
        second = [
            own["validation_accuracy"][1] - other["validation_accuracy"][1] for own, other in pairs
        ]
        cells = [
            condition.name,
            str(len(pairs)),
            *(f"{statistics.mean(values):.3f}" for values in gaps),
            *(interval(values, 3) for values in lower),
            f"{statistics.mean(own['validation_loss'][2] for own, _ in pairs):.3f}",
            f"{statistics.mean(accuracy):.1f}",
            interval(better, 1),
            interval(second, 1),
            goal_cell(condition, pairs),
            *tested(pairs, [by_key.get((data, regime, "iterative", o["seed"])) for o, _ in pairs]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return [*lines, "", alike(runs, data, regime), ""]


def comparisons(
    runs: list[dict[str, Any]], data: str, regime: str
) -> Iterator[tuple[Condition, Pairs]]:
    """Runs of each condition, with simultaneous ones of the same seed."""
    for condition in CONDITIONS:
        reference = REFERENCES[condition.augmented]
        own, others = (
            [run for run in runs if key(run)[:3] == (data, regime, name)]
            for name in (condition.name, reference.name)
        )
        if pairs := paired(own, others):
            yield condition, pairs


def against_reference(pairs: Pairs) -> tuple[list[float], list[float], list[float]]:
    """Gaps of modules 2 and 3, and validation accuracy of module 3, less the reference's."""
    gap_2, gap_3 = ([gap(own, m) - gap(other, m) for own, other in pairs] for m in (2, 3))
    accuracy = [o["validation_accuracy"][2] - s["validation_accuracy"][2] for o, s in pairs]
    return gap_2, gap_3, accuracy


def reached(pairs: Pairs) -> bool:
    """Whether, in means, gaps are no larger and accuracy is no lower than simultaneously.

    Not of conditions that were given up after some of the seeds.
    """
    if len(pairs) < len(SEEDS):
        return False
    gap_2, gap_3, accuracy = map(statistics.mean, against_reference(pairs))
    return gap_2 <= 0 and gap_3 <= 0 and accuracy >= 0


def goal_cell(condition: Condition, pairs: Pairs) -> str:
    """What a table says of the goal."""
    if condition in REFERENCES or len(pairs) < len(SEEDS):
        return ""
    return "yes" if reached(pairs) else "no"


def alike(runs: list[dict[str, Any]], data: str, regime: str) -> str:
    """What pairs share, and how long modules were trained."""
    pairs = [
        pair
        for condition, own in comparisons(runs, data, regime)
        if condition not in REFERENCES
        for pair in own
    ]
    same = sum(run["train_loss"][0] == other["train_loss"][0] for run, other in pairs)
    said = f"Module 1 is the same in both runs of {same} of {len(pairs)} pairs"
    if regime == "equal work":
        return f"{said}."
    most = EPOCHS[regime][data]
    epochs = [
        count
        for run in runs
        if (run["data"], run["regime"]) == (data, regime)
        for count in run["epochs"]
    ]
    ended = sum(count == most for count in epochs)
    return f"{said}. {ended} of {len(epochs)} modules were trained for all {most} epochs."


def reaching(runs: list[dict[str, Any]], data: str, regime: str) -> list[str]:
    """Names of conditions that reach the goal."""
    return [
        condition.name
        for condition, pairs in comparisons(runs, data, regime)
        if condition not in REFERENCES and reached(pairs)
    ]


def tested(pairs: Pairs, plain: list[dict[str, Any] | None]) -> list[str]:
    """Test accuracy of module 3, and its differences from simultaneous and plain training."""

    def test(run: dict[str, Any]) -> float:
        accuracy: float = run["test_accuracy"][2]
        return accuracy

    own = f"{statistics.mean(test(run) for run, _ in pairs):.1f}"
    together = interval([test(run) - test(sim) for run, sim in pairs], 1)
    known = [(run, other) for (run, _), other in zip(pairs, plain, strict=True) if other]
    alone = interval([test(run) - test(other) for run, other in known], 1) if known else ""
    return [own, together, alone]


def markdown(runs: list[dict[str, Any]]) -> str:
    """All tables."""
    lines = [
        "# The gap between iterative and simultaneous training",
        "",
        "What modules 2 and 3 lose on held-out samples against samples that were trained on, with "
        "frozen weights (nats), and accuracies of the probe on validation samples (%). "
        "Differences are paired by seed with simultaneous training, mean ± half of a 95 % "
        "interval (Student's t over seeds); of augmented conditions with simultaneous training on "
        "augmented samples. The goal is that, in the mean, neither gap is larger and accuracy is "
        "not lower. Nothing was chosen by test accuracies, which stand at the end: of module 3, "
        "less simultaneous training, and less plain iterative training. Losses of samples that "
        "were trained on are those of their first view: from a cache it was trained on, while "
        "simultaneous training has new views every time. Runs were made on several machines and by "
        "several versions of this package, whose last bits differ: then module 1 of the two runs "
        "of a pair differs as well, and intervals are the wider. Simultaneous modules stop "
        "together, by the sum of their losses.",
        "",
        f"Equal work is {EPOCHS['equal work']['digits']} epochs of digits and "
        f"{EPOCHS['equal work']['photos']} of photos; convergence is {PATIENCE} epochs without a "
        f"lower validation loss, but {EPOCHS['convergence']['digits']} and "
        f"{EPOCHS['convergence']['photos']} epochs at most. Photos are 600 unlabeled crops, an "
        "eighth of those in pipelines/photos.toml, and the third module has no stride, so that "
        "there is something to overfit. Crops are held out at random and overlap with those that "
        "are trained on, so that gaps are smaller on photos than they would be on other "
        "photographs.",
        "",
        "Reaching the goal:",
        "",
        *(
            f"- {data}, {regime}: {'; '.join(reaching(runs, data, regime)) or 'none'}"
            for data in DATA
            for regime in EPOCHS
        ),
        "",
    ]
    for data in DATA:
        for regime in EPOCHS:
            if any(run["data"] == data and run["regime"] == regime for run in runs):
                lines += table(runs, data, regime)
    return "\n".join(lines)


def main() -> None:
    given = arguments(__doc__, DATA)
    if given.quick:
        runs = []
        with tempfile.TemporaryDirectory() as folder:
            for number, condition in enumerate(CONDITIONS[:2]):
                own = Path(folder) / str(number)
                own.mkdir()
                runs.append(measure("digits", "equal work", condition, SEEDS[0], own, epochs=1))
    else:
        if not given.table:
            make_missing([given.data] if given.data else list(DATA), device=given.device)
        runs = known(RUNS)
    show(given, runs, markdown(runs), RESULTS / "iterative_gap.md")


if __name__ == "__main__":
    main()
