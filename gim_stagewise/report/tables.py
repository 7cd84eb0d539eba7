"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from gim_stagewise.config import Mode
from gim_stagewise.pipeline import Pipeline, RunResult
from gim_stagewise.status import StageStatus
from gim_stagewise.units import format_bytes

# The paper's words, table 1.
MODE_NAMES: dict[Mode, str] = {
    "iterative": "Greedy InfoMax, one module at a time",
    "simultaneous": "Greedy InfoMax, all modules in one step",
    "cpc": "CPC, end to end",
    "supervised": "supervised, end to end",
    "greedy_supervised": "greedy supervised, all modules in one step",
    "random": "randomly initialized",
}


def results_table(result: RunResult) -> Table:
    """Losses, sizes and probe accuracies of a run, one row a module."""
    title = f"{result.pipeline}: {MODE_NAMES[result.mode]}"
    table = Table(title=title, title_justify="left")
    for name in (
        "module",
        "epochs",
        "train loss",
        "validation loss",
        "projected",
        "measured",
        "cache",
    ):
        table.add_column(name, justify="right", no_wrap=name == "module")
    for scores in result.probes:
        # The paper's words, tables 1 and 3; shorter ones where there are several labels.
        own = ("accuracy", "randomly initialized")
        if len(result.probes) > 1:
            own = (f"{scores.labels} accuracy", f"{scores.labels}, random")
        for name in own:
            table.add_column(name, justify="right")
    for stage in result.stages:
        row = [
            str(stage.module),
            str(stage.record.epochs),
            nats(stage.record.train_loss),
            nats(stage.record.validation_loss),
            _size(stage.record.projected_mem),
            _size(stage.record.measured_mem),
            _size(stage.cache_bytes),
        ]
        for scores in result.probes:
            row += [
                percent(result.accuracy(stage.module, labels=scores.labels, random=random))
                for random in (False, True)
            ]
        table.add_row(*row)
    if result.probes:
        table.add_section()
    for name in dict.fromkeys(name for scores in result.probes for name in scores.baselines):
        cells = [percent(result.baseline(name, labels=own.labels)) for own in result.probes]
        table.add_row(name, *[""] * 6, *(text for cell in cells for text in (cell, "")))
    return table


def nats(loss: float | None) -> str:
    """A loss; nothing of a module that has none."""
    return "" if loss is None else f"{loss:.3f}"


def _size(count: int) -> str:
    return format_bytes(count) if count else ""


def percent(fraction: float | None) -> str:
    """An accuracy in [0, 1] as percent."""
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def status_table(pipeline: Pipeline, stages: Sequence[StageStatus]) -> Table:
    """The chain of stages, one row each, with its state and the reason for it."""
    title = escape(f"{pipeline.config.name}: {pipeline.workspace.folder}")
    table = Table(title=title, title_justify="left")
    for name in ("module", "state", "epochs", "validation loss", "trained in", "cache", "why"):
        words = name in ("state", "why")
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    colours = {"sealed": "green", "stale": "yellow", "corrupt": "red"}
    for stage in stages:
        state: str = stage.state
        if stage.done is not None:
            state = f"{state} {100 * stage.done:.0f} %"
        colour = colours.get(stage.state, "default")
        record = stage.record
        table.add_row(
            str(stage.module),
            f"[{colour}]{state}[/]",
            "" if record is None else str(record.epochs),
            "" if record is None else nats(record.validation_loss),
            "" if record is None else f"{record.seconds:.0f} s",
            format_bytes(stage.cache_bytes) if stage.cache_bytes else "",
            escape(stage.why),
        )
    return table


def inspection(found: dict[str, Any]) -> Iterator[Table | str]:
    """What `inspect_cache` found, for people."""
    yield escape(f"{found['path']}: {found['state']}, {format_bytes(found['bytes'])}")
    if blocks := found.get("blocks"):
        yield f"{blocks['done']} of {blocks['total']} blocks are done"
    for problem in found["problems"]:
        yield f"[red]problem:[/] {escape(problem)}"
    yield ""
    for name, array in found["arrays"].items():
        axes = " ".join(
            f"{axis}={size}" for axis, size in zip(array["axes"], array["shape"], strict=True)
        )
        chunk = "×".join(map(str, array["chunks"]))
        many = "chunk" if array["stored_chunks"] == 1 else "chunks"
        yield f"[bold]{escape(name)}[/] {escape(array['dtype'])}: {axes}"
        yield (
            f"    {array['stored_chunks']} {many} of {chunk}, {', '.join(array['codecs'])}, "
            f"{format_bytes(array['bytes'])}"
        )
    if manifest := found.get("manifest"):
        yield ""
        yield _origin(manifest)
    if channels := found.get("channels"):
        yield ""
        yield _channels(channels)


def _origin(manifest: dict[str, Any]) -> Table:
    table = Table(title="where it came from", title_justify="left", show_header=False)
    table.add_row("pipeline", f"{manifest['pipeline']}, module {manifest['module']}")
    table.add_row("encoding", manifest["encoding"])
    for name, text in _precision(manifest):
        table.add_row(name, escape(text))
    for name in ("recipe", "content"):
        table.add_row(f"{name} digest", _shortened(manifest[name]["digest"]))
    for key, value in manifest["content"]["parts"].items():
        table.add_row(f"  {key}", escape(_shortened(value)))
    return table


def _precision(manifest: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """How activations are stored, and what that did to them."""
    precision, operation = manifest["precision"], manifest["stored_operation"]
    yield "stored as", precision["name"] + (f", after {operation}" if operation else "")
    if precision["calibration"]:
        yield "calibrated on", precision["calibration"]
    if error := precision["error"]:
        seen = f"error on {error['sampled']} samples" if "sampled" in error else "error"
        yield (
            f"relative L2 {seen}",
            f"{error['relative_l2']:.2e}; worst channel, {error['worst_channel']}: "
            f"{error['worst_channel_relative_l2']:.2e}",
        )
        yield "saturated", f"{error['saturated']} of {error['values']} values"


def _shortened(value: Any) -> str:
    """A hash by its beginning; ``--json`` has it whole."""
    text = "none" if value is None else str(value)
    return text[:16] + "…" if len(text) == 64 else text


def _channels(channels: Sequence[dict[str, float]], shown: int = 8) -> Table:
    title = (
        f"activations per channel (first {min(shown, len(channels))} of {len(channels)}, sampled)"
    )
    table = Table(title=title, title_justify="left")
    table.add_column("channel", justify="right")
    for name in channels[0]:
        table.add_column(name, justify="right")
    for number, row in enumerate(channels[:shown]):
        table.add_row(str(number), *(f"{value:.3f}" for value in row.values()))
    return table
