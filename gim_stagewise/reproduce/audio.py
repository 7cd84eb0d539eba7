"""Tables 3 and 4 and figure 4 of the paper: who speaks, and what (section 4.2).

Each is written to a file below ``work.target``, whose path is given; beside the figure there is a
Markdown file with its numbers and conditions.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from gim_stagewise.config import Mode
from gim_stagewise.errors import ConfigError, DataError
from gim_stagewise.pipeline import Pipeline, RunResult
from gim_stagewise.probe.probe import TRAINED, Probes, Rows
from gim_stagewise.probe.remembered import remembered_scores
from gim_stagewise.probe.sequences import (
    MFCC,
    MFCC_STATISTICS,
    RecordingProbe,
    modules_with_steps,
)
from gim_stagewise.probe.splits import (
    ProbeSplit,
    nothing_to_probe,
    of_known_labels,
    probe_splits,
)
from gim_stagewise.probe.walks import cached_walk
from gim_stagewise.report.curves import matplotlib_figure
from gim_stagewise.reproduce.figures import save_figure
from gim_stagewise.reproduce.paper import TABLE_3, TABLE_4
from gim_stagewise.reproduce.runs import (
    DOES_NOT_FIT,
    Reproduction,
    markdown_table,
    over_seeds,
    spread,
)
from gim_stagewise.sources import Source, step_labelled
from gim_stagewise.stage.extraction_plan import Workers

# Lines of figure 4.
_SHOWN: tuple[tuple[str, Mode, str], ...] = (
    ("Greedy InfoMax, iterative", "iterative", "o-"),
    ("CPC", "cpc", "s--"),
    ("Supervised", "supervised", "^:"),
    ("Greedy Supervised", "greedy_supervised", "v-."),
)


def table_3(work: Reproduction) -> Path:
    """Test accuracies of phones and of speakers, by the same probes (table 3; section 4.2).

    Supervised modes are trained for each of the two by itself. A second table has all modules.

    Raises
    ------
    ConfigError
        If the dataset has no labels of recordings, or none of their steps.
    """
    speaker, phone = _labels(work)
    work.check([mode for _, mode, *_ in TABLE_3 if mode is not None])
    pipeline = work.pipeline("iterative")
    count = len(pipeline.config.module)
    # Of speakers that nobody could know there is no accuracy to train for.
    unknown = nothing_to_probe(*_splits(pipeline.source), speaker, pipeline.config)
    rows, by_module = [], []
    runs: list[RunResult] = work.runs("iterative")
    for name, mode, *paper in TABLE_3:
        if mode is None:
            cells = [_baseline(runs, MFCC, labels) for labels in (phone, speaker)]
            rows.append([name, *paper, *cells])
            continue
        supervised = mode.endswith("supervised")
        for labels in (phone, speaker):
            cells = [""] * count
            if not (supervised and labels == speaker and unknown):
                own = work.runs(mode, labels=labels if supervised else None)
                cells = [_accuracy(own, n, labels) for n in range(1, count + 1)]
            if labels == phone:
                rows.append([name, *paper])
            rows[-1].append(cells[-1])
            by_module.append([name, labels, *cells])
    statistics = ["MFCC, mean and deviation", "", "", "", _baseline(runs, MFCC_STATISTICS, speaker)]
    text = (
        f"# Table 3: {pipeline.config.name}\n\n"
        "Test accuracy in percent of linear classifiers on frozen features, of the top module; the "
        "paper's columns are LibriSpeech. Recordings are classified by the mean of their features "
        "over time, from their beginning to their end where the paper takes 1.28 s of each; steps "
        "by their own, of lower modules the mean over one label's length."
        f"{over_seeds(work.seeds)}\n\n"
        + markdown_table(
            ["method", f"paper, {phone}", f"paper, {speaker}", phone, speaker],
            [*rows, statistics],
        )
        + "\n## By module\n\n"
        + markdown_table(
            ["method", "labels", *(f"module {n}" for n in range(1, count + 1))], by_module
        )
        + f"\n{work.conditions()}\n"
    )
    return work.write("table3.md", text)


def table_4(work: Reproduction) -> Path:
    """The context network with blocked gradients in time, and left out (table 4; section 4.2).

    All of them stand on the same modules: those of the iterative run.

    Raises
    ------
    ConfigError
        If labels are missing, or the last module is not built by "gru".
    """
    speaker, phone = _labels(work)
    config = work.pipeline("iterative").config
    top = len(config.module)
    if config.stage(top).build != "gru" or top == 1:
        raise ConfigError(
            f'is {config.stage(top).build!r}; table 4 takes a context network, build = "gru", as '
            "the last of several modules",
            key=f"module.{top}.build",
        )
    if config.stage(top).options.get("bptt") is False:
        raise ConfigError(
            "is false, but table 4 compares with a context network that has it; leave it out",
            key=f"module.{top}.options.bptt",
        )
    if config.keep == "last":
        raise ConfigError(
            f"is 'last', but table 4 trains another module on the outputs of module {top - 1}; use "
            "'last-two' or 'all'",
            key="keep",
        )
    others = [_without_bptt(work, number) for number in range(work.seeds)]
    runs = work.runs("iterative")
    blocked = [accuracies_without_bptt(other, run) for other, run in zip(others, runs, strict=True)]
    measured = [
        [_accuracy(runs, top, labels) for labels in (phone, speaker)],
        [_spread([own[labels] for own in blocked]) for labels in (phone, speaker)],
        [_accuracy(runs, top - 1, labels) for labels in (phone, speaker)],
    ]
    rows = [[*row, *cells] for row, cells in zip(TABLE_4, measured, strict=True)]
    text = (
        f"# Table 4: {config.name}\n\n"
        "Test accuracy in percent, trained iteratively; the paper's columns are LibriSpeech. "
        "Without BPTT no gradient goes through the context network's state from step to step; "
        f"without g_ar features are those of module {top - 1}.{over_seeds(work.seeds)}\n\n"
        + markdown_table(["method", f"paper, {phone}", f"paper, {speaker}", phone, speaker], rows)
        + f"\n{work.conditions()}\n"
    )
    return work.write("table4.md", text)


def figure_4(work: Reproduction) -> Path:
    """Error rates of speakers by module, on a log scale (figure 4).

    Raises
    ------
    ConfigError
        If labels are missing, or matplotlib is not installed.
    """
    pipeline = work.pipeline("iterative")
    source, config = pipeline.source, pipeline.config
    if not source.label_names or not config.sequences:
        raise ConfigError(
            'has no recordings with labels; figure 4 takes speech, such as kind = "speech"',
            key="source.kind",
        )
    speaker = source.label_names[0]
    splits = _splits(source)
    if why := nothing_to_probe(*splits, speaker, config):
        raise ConfigError(f"{why}; figure 4 shows nothing else", key="source.splits")
    work.check([mode for _, mode, _ in _SHOWN])
    # No error at all is drawn as half of one, since there is no zero on a log scale.
    least = 0.5 / len(of_known_labels(*splits).ids)
    figure = matplotlib_figure(6, 4)
    panel = figure.subplots()
    rows = []
    for name, mode, style in _SHOWN:
        supervised = mode.endswith("supervised")
        for run in work.runs(mode, labels=speaker if supervised else None):
            found = {s.module: run.accuracy(s.module, labels=speaker) for s in run.stages}
            errors = {n: 100 * max(1 - own, least) for n, own in found.items() if own is not None}
            panel.plot([*errors], [*errors.values()], style, label=name, alpha=0.8)
            rows.append(
                [name, *("" if a is None else f"{100 - 100 * a:.1f}" for a in found.values())]
            )
    panel.set(xlabel="module", ylabel=f"{speaker} error (%)", yscale="log")
    panel.yaxis.set_major_formatter("{x:g}")
    panel.yaxis.set_minor_formatter("{x:g}")
    panel.xaxis.get_major_locator().set_params(integer=True)
    panel.grid(alpha=0.3, which="both")
    panel.legend()
    modules = [f"module {n}" for n in work.pipeline("iterative").config.module]
    return save_figure(
        work,
        figure,
        4,
        f"Test errors in percent of linear classifiers of the {speaker} of a recording, on the "
        f"mean of a module's features over time; none at all is drawn at {100 * least:.2g}.\n\n"
        + markdown_table(["method", *modules], rows),
    )


def _labels(work: Reproduction) -> tuple[str, str]:
    """Names of the labels of recordings, and of their steps."""
    source = work.pipeline("iterative").source
    stepped = step_labelled(source)
    if not source.label_names or stepped is None:
        raise ConfigError(
            "has no labels of recordings and of their steps; tables 3 and 4 take "
            'speech with phones: kind = "synthetic_speech", or "speech" with options.phones',
            key="source.kind",
        )
    _splits(source)
    return source.label_names[0], str(stepped.step_label_name)


def _splits(source: Source) -> tuple[ProbeSplit, ProbeSplit]:
    """Labelled recordings; a dataset that has none is refused before anything is trained."""
    splits = probe_splits(source)
    if splits is None:
        raise ConfigError(
            "has no labelled recordings for both training and test, so that there is nothing to "
            "compare; give it both",
            key="source.splits",
        )
    return splits


def _accuracy(runs: Sequence[RunResult], module: int, labels: str) -> str:
    if not runs:
        return DOES_NOT_FIT
    return _spread([run.accuracy(module, labels=labels) for run in runs])


def _baseline(runs: Sequence[RunResult], name: str, labels: str) -> str:
    return _spread([run.baseline(name, labels=labels) for run in runs])


def _spread(accuracies: Sequence[float | None]) -> str:
    known = [100 * own for own in accuracies if own is not None]
    return spread(known) if len(known) == len(accuracies) else ""


def _without_bptt(work: Reproduction, number: int) -> Pipeline:
    """The pipeline with a context network that is trained without BPTT."""
    top = len(work.pipeline("iterative").config.module)
    changes = {f"module.{top}.options.bptt": False}
    return work.pipeline("iterative", number, changes=changes, suffix="-without-bptt")


def accuracies_without_bptt(pipeline: Pipeline, run: RunResult) -> dict[str, float | None]:
    """Train another top module on the cache below a run's, and probe it.

    Parameters
    ----------
    pipeline : Pipeline
        The same, but for its last module.
    run : RunResult
        Of the iterative mode.

    Returns
    -------
    dict
        Test accuracies in [0, 1] by name of the labels.

    Raises
    ------
    DataError
        If the dataset has no labels of recordings and of their steps.
    """
    top, below = run.stages[-1].module, run.stages[-2].cache
    assert below is not None
    stage = pipeline.stage(top, below)
    weights, _ = stage.train()
    manifest, _ = stage.extract(weights, workers=Workers(0))
    space, source = pipeline.workspace, pipeline.source

    probe = RecordingProbe.of(space, source)
    if probe is None or probe.stepped is None:
        raise DataError("the dataset has no labels of recordings and of their steps")
    stepped = probe.stepped

    def probed() -> list[Rows]:
        fitting = modules_with_steps(space, pipeline.check(), stepped)
        found = probe(cached_walk([space.cache_path(top)]), [0] if top - 1 in fitting else [])
        return [{str(top): accuracy} for (accuracy,) in found]

    names = [source.label_names[0], str(stepped.step_label_name)]
    scores = remembered_scores(
        space,
        Probes(names, {TRAINED: probed}),
        dataset=source.content_digest(),
        features=[manifest.content.value],
        fresh=[],
    )
    found = {own.labels: own.trained[0] for own in scores}
    return {labels: None if own is None else own.test for labels, own in found.items()}
