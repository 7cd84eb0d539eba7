"""Tables for people."""

from __future__ import annotations

from rich.table import Table

from gim_stagewise.pipeline import RunResult


def results_table(result: RunResult) -> Table:
    """Losses, sizes and probe accuracies of a run, one row a module."""
    labelled = result.raw_probe_accuracy is not None
    title = f"{result.pipeline}: Greedy InfoMax, one module at a time"
    table = Table(title=title, title_justify="left")
    for name in ("module", "epochs", "train loss", "validation loss", "cache"):
        table.add_column(name, justify="right")
    if labelled:
        table.add_column("probe", justify="right")
        table.add_column("random encoder", justify="right")
    for stage in result.stages:
        row = [
            str(stage.module),
            str(stage.record.epochs),
            f"{stage.record.train_loss:.3f}",
            f"{stage.record.validation_loss:.3f}",
            format_bytes(stage.cache_bytes),
        ]
        if labelled:
            row += [percent(stage.probe_accuracy), percent(stage.random_probe_accuracy)]
        table.add_row(*row)
    if labelled:
        table.add_section()
        table.add_row("raw pixels", "", "", "", "", percent(result.raw_probe_accuracy), "")
    return table


def percent(fraction: float | None) -> str:
    """An accuracy in [0, 1] as percent."""
    return "" if fraction is None else f"{100 * fraction:.1f} %"


def format_bytes(count: float) -> str:
    """A size in decimal units, as disks are sold: "1.3 GB"."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
