"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.markup import escape
from rich.table import Table

from gim_stagewise.pipeline import Pipeline, RunResult
from gim_stagewise.status import StageStatus
from gim_stagewise.units import format_bytes


def results_table(result: RunResult) -> Table:
    """Losses, sizes and probe accuracies of a run, one row a module."""
    labelled = result.raw_probe_accuracy is not None
    title = f"{result.pipeline}: Greedy InfoMax, one module at a time"
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
        table.add_column(name, justify="right")
    if labelled:
        # The paper's words, tables 1 and 3.
        table.add_column("accuracy", justify="right")
        table.add_column("randomly initialized", justify="right")
    for stage in result.stages:
        row = [
            str(stage.module),
            str(stage.record.epochs),
            f"{stage.record.train_loss:.3f}",
            f"{stage.record.validation_loss:.3f}",
            format_bytes(stage.record.projected_mem),
            format_bytes(stage.record.measured_mem),
            format_bytes(stage.cache_bytes),
        ]
        if labelled:
            row += [percent(stage.probe_accuracy), percent(stage.random_probe_accuracy)]
        table.add_row(*row)
    if labelled:
        table.add_section()
        table.add_row("raw pixels", "", "", "", "", "", "", percent(result.raw_probe_accuracy), "")
    return table


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
            "" if record is None else f"{record.validation_loss:.3f}",
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
