"""Tables for people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.console import Console, ConsoleOptions, RenderResult
from rich.markup import escape
from rich.measure import Measurement
from rich.table import Table

from gim_stagewise.config import Mode
from gim_stagewise.pipeline import Pipeline, RunResult
from gim_stagewise.probe.probe import ProbeScores
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


def _size(count: int) -> str:
    return format_bytes(count) if count else ""


@dataclass(frozen=True)
class _Column:
    """One of a table of results; the header may have several lines.

    Parameters
    ----------
    header : str
    cells : list of str
        One a module.
    baselines : dict of str to str
        Of what is compared with modules.
    """

    header: str
    cells: list[str]
    baselines: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ResultsTable:
    """Losses, sizes and probe accuracies of a run, one row a module.

    Where the terminal is too narrow for one table, it is several.
    """

    result: RunResult

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        unlimited = options.update(max_width=10_000)
        groups = [*self._training(), *map(self._probe, self.result.probes)]
        title = f"{self.result.pipeline}: {MODE_NAMES[self.result.mode]}"
        while groups:
            table, count = self._table(groups[:1], title), 1
            while count < len(groups):
                wider = self._table(groups[: count + 1], title)
                if Measurement.get(console, unlimited, wider).maximum > options.max_width:
                    break
                table, count = wider, count + 1
            yield table
            groups, title = groups[count:], ""

    def _training(self) -> Iterator[list[_Column]]:
        stages = self.result.stages
        records = [stage.record for stage in stages]
        yield [
            _Column("epochs", [str(record.epochs) for record in records]),
            _Column("train\nloss", [nats(record.train_loss) for record in records]),
            _Column("validation\nloss", [nats(record.validation_loss) for record in records]),
        ]
        yield [
            _Column("projected", [_size(record.projected_mem) for record in records]),
            _Column("measured", [_size(record.measured_mem) for record in records]),
            _Column("cache", [_size(stage.cache_bytes) for stage in stages]),
        ]

    def _probe(self, scores: ProbeScores) -> list[_Column]:
        result, labels = self.result, scores.labels
        # The paper's words, tables 1 and 3; shorter ones where there are several labels.
        headers = ("accuracy", "randomly\ninitialized")
        if len(result.probes) > 1:
            headers = (f"{labels}\naccuracy", f"{labels},\nrandom")
        trained, random = (
            [
                percent(result.accuracy(stage.module, labels=labels, random=random))
                for stage in result.stages
            ]
            for random in (False, True)
        )
        baselines = {
            name: percent(result.baseline(name, labels=labels)) for name in scores.baselines
        }
        return [_Column(headers[0], trained, baselines), _Column(headers[1], random)]

    def _table(self, groups: Sequence[list[_Column]], title: str) -> Table:
        columns = [column for group in groups for column in group]
        table = Table(title=title or None, title_justify="left")
        for header in ("module", *(column.header for column in columns)):
            table.add_column(header, justify="right", vertical="bottom", no_wrap=True)
        for number, stage in enumerate(self.result.stages):
            table.add_row(str(stage.module), *(column.cells[number] for column in columns))
        table.add_section()
        for name in dict.fromkeys(name for column in columns for name in column.baselines):
            table.add_row(name, *(column.baselines.get(name, "") for column in columns))
        return table


def nats(loss: float | None) -> str:
    """A loss; nothing of a module that has none."""
    return "" if loss is None else f"{loss:.3f}"


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
    again = {"weights": ": trains again", "cache": ": builds its cache again", None: ""}
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
            escape(stage.why + again[stage.made_again]),
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
