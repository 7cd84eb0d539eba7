"""The paper's tables and figures."""

from __future__ import annotations

from pathlib import Path

import click

from gim_stagewise.cli import options

WHAT = ("table1", "table2", "table3", "table4", "figure2", "figure3", "figure4")
OVER_SEEDS = ("table1", "table3", "table4")


@click.command()
@click.argument("what", type=click.Choice(WHAT))
@click.option(
    "--pipeline",
    "pipeline_file",
    type=click.Path(path_type=Path),
    required=True,
    help="Pipeline file, such as pipelines/photos.toml.",
)
@click.option(
    "--seeds",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Runs of each mode (tables 1, 3 and 4), with the file's seed and those that follow it.",
)
@click.option(
    "--dir",
    "base",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path("cache"),
    show_default=True,
    help="Folder of the runs' folders.",
)
@click.option(
    "--to",
    "target",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder for the result.  [default: NAME-reproduced, beside the runs]",
)
@options.allowed_mem_option
@options.allowed_host_mem_option
@options.break_lock_option
@options.device_option
@options.quiet_option
@options.json_option
def reproduce(
    what: str,
    pipeline_file: Path,
    seeds: int,
    base: Path,
    target: Path | None,
    allowed_mem: str | None,
    allowed_host_mem: str | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Make a table or figure of the paper from a pipeline's runs.

    Runs that are missing are made, unfinished ones go on; the paper's figures stand beside those
    that are measured.

    \b
    table1   accuracies of all modes
    table2   memory of training all modules, and one at a time
    table3   accuracies of phones and speakers, all modes
    table4   the context network without BPTT, and left out
    figure2  patches that excite a neuron most
    figure3  training curves, simultaneous against iterative
    figure4  speaker errors by module

    \b
    Examples:
      gim-stage reproduce table1 --pipeline pipelines/photos.toml --seeds 5
      gim-stage reproduce figure3 --pipeline pipelines/digits.toml
      gim-stage reproduce table3 --pipeline pipelines/speech.toml --seeds 3
    """
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.plan import smallest_budget
    from gim_stagewise.reproduce.audio import figure_4, table_3, table_4
    from gim_stagewise.reproduce.figures import figure_2, figure_3
    from gim_stagewise.reproduce.runs import Reproduction
    from gim_stagewise.reproduce.tables import table_1, table_2

    if seeds > 1 and what not in OVER_SEEDS:
        raise click.UsageError(
            f"--seeds is for {', '.join(OVER_SEEDS)}; {what} is made of one run of a mode"
        )
    progress = options.progress_for(quiet=quiet, verbose=False)
    first = Pipeline.from_file(pipeline_file, device=device, mode="iterative")
    with options.naming(pipeline_file):
        sizes = options.Sizes(allowed_mem, allowed_host_mem)
        first = options.limited(first, sizes, lambda: smallest_budget(first))
        work = Reproduction(
            file=pipeline_file,
            base=base,
            target=target or base / f"{first.config.name}-reproduced",
            seeds=seeds,
            device=device,
            progress=progress,
            budget=first.workspace.budget,
        )
        makers = {
            "table1": table_1,
            "table2": table_2,
            "table3": table_3,
            "table4": table_4,
            "figure2": figure_2,
            "figure3": figure_3,
            "figure4": figure_4,
        }
        path = makers[what](work)
    if as_json:
        options.show({"what": what, "path": str(path)})
        return
    click.echo(path.with_suffix(".md").read_text(encoding="utf-8"))
    click.echo(str(path))
