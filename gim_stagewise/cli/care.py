"""Commands that look after what is there: status, export, inspect, clean, plot."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import asdict
from pathlib import Path

import click

from gim_stagewise.cli import options


@click.command()
@options.pipeline_argument
@options.mode_option
@options.folder_option("cache/NAME, with the pipeline's name, or cache/NAME-MODE")
@options.json_option
def status(pipeline_file: Path, mode: str | None, folder: Path | None, as_json: bool) -> None:
    """Show where each stage of a pipeline FILE stands, and why.

    \b
    Example:
      gim-stage status pipelines/digits.toml
    """
    from gim_stagewise.report.tables import status_table
    from gim_stagewise.status import pipeline_status

    pipeline = options.pipeline_from(pipeline_file, None, folder, device="cpu", mode=mode)
    with options.naming(pipeline_file):
        stages = pipeline_status(pipeline)
    if as_json:
        options.show(
            {
                "pipeline": pipeline.config.name,
                "folder": str(pipeline.workspace.folder),
                "modules": [asdict(stage) for stage in stages],
            }
        )
    else:
        options.show(status_table(pipeline, stages))


@click.command()
@options.pipeline_argument
@options.mode_option
@click.option(
    "--to",
    "target",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write: .safetensors, or .pt2 for a program of torch.export.",
)
@options.folder_option("cache/NAME, with the pipeline's name, or cache/NAME-MODE")
@options.json_option
def export(
    pipeline_file: Path, mode: str | None, target: Path, folder: Path | None, as_json: bool
) -> None:
    """Write the trained modules of a pipeline FILE, one on top of another, as one encoder.

    \b
    Examples:
      gim-stage export pipelines/digits.toml --to encoder.safetensors
      gim-stage export pipelines/digits.toml --to encoder.pt2
    """
    from gim_stagewise.stage.export import export_encoder

    pipeline = options.pipeline_from(pipeline_file, None, folder, device="cpu", mode=mode)
    with options.naming(pipeline_file):
        encoder = export_encoder(pipeline.workspace, target, pipeline=pipeline_file)
    parameters = sum(parameter.numel() for parameter in encoder.parameters())
    if as_json:
        options.show({"encoder": str(target), "modules": len(encoder), "parameters": parameters})
    else:
        click.echo(f"{len(encoder)} modules, {parameters} parameters: {target}")


@click.command()
@click.argument("cache", type=click.Path(path_type=Path))
@options.json_option
def inspect(cache: Path, as_json: bool) -> None:
    """Show what a CACHE holds and where it came from, also if it is unfinished or damaged.

    \b
    Example:
      gim-stage inspect cache/digits/m1.zarr
    """
    from gim_stagewise.report.inspect import inspect_cache
    from gim_stagewise.report.tables import inspection

    found = inspect_cache(cache)
    if as_json:
        options.show(found)
    else:
        for part in inspection(found):
            options.show(part)


@click.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option(
    "--repair", is_flag=True, help="Compute what is damaged again, from the module and its input."
)
@options.pipeline_option
@options.break_lock_option
@options.device_option
@options.quiet_option
@options.json_option
def verify(
    path: Path,
    repair: bool,
    pipeline_file: Path | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Check every byte of a cache, or of all caches, weights and records in a run's folder.

    Every missing, torn, altered or non-finite chunk is listed; with any, the exit code is 4.

    \b
    Examples:
      gim-stage verify cache/digits/m1.zarr
      gim-stage verify cache/digits --repair
    """
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.verify import mend
    from gim_stagewise.verify import verify as check

    progress = options.progress_for(quiet=quiet, verbose=False)
    found = check(path, progress)
    mended = []
    if repair:
        # From the bottom up: a module's input is whole before its outputs are computed again.
        for cache, damage in found.damage.items():
            for one in damage:
                click.echo(f"{cache / one.file}: {one.kind}: {one.what}", err=True)
            if pipeline_file is None:
                pipeline = Pipeline.from_cache(cache, device=device, progress=progress)
            else:
                folder = cache.absolute().parent
                pipeline = Pipeline.from_file(
                    pipeline_file, folder=folder, device=device, progress=progress
                )
            mend(pipeline, cache, damage)
            mended.append(cache)
            files = "1 file" if len(damage) == 1 else f"{len(damage)} files"
            click.echo(f"{cache}: {files} repaired", err=True)
        found = check(path, progress) if mended else found
    if as_json:
        options.show(found.as_json() | {"repaired": [str(cache) for cache in mended]})
    for file, kind, what in found.problems:
        click.echo(f"{file}: {kind}: {what}", err=True)
    for cache in found.unfinished:
        click.echo(f"{cache}: not sealed yet, not checked", err=True)
    if found.problems:
        count = len(found.problems)
        click.echo(f"error: {count} of the files checked are not what they should be", err=True)
        raise click.exceptions.Exit(4)
    if not as_json:
        what = "every byte of what is sealed" if found.unfinished else "every byte"
        click.echo(f"{path}: {what} is what it should be")


@click.command()
@options.pipeline_argument
@options.mode_option
@options.folder_option("cache/NAME, with the pipeline's name, or cache/NAME-MODE")
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@options.break_lock_option
@options.json_option
def clean(
    pipeline_file: Path, mode: str | None, folder: Path | None, yes: bool, as_json: bool
) -> None:
    """Remove leftovers and stale things from a run's folder, after listing them.

    Current weights and caches stay, and so does work that can be gone on with.

    \b
    Example:
      gim-stage clean pipelines/digits.toml
    """
    from gim_stagewise.clean import removable, remove
    from gim_stagewise.lock import exclusive
    from gim_stagewise.units import format_bytes

    pipeline = options.pipeline_from(pipeline_file, None, folder, device="cpu", mode=mode)
    place = pipeline.workspace.folder
    # Nobody works there between the list and the removal.
    with options.naming(pipeline_file), exclusive(place) if place.exists() else nullcontext():
        listed = removable(pipeline)
        total = sum(thing.bytes for thing in listed)
        for thing in listed:
            click.echo(f"{format_bytes(thing.bytes):>10}  {thing.path}  ({thing.why})", err=True)
        if not listed:
            click.echo("nothing to remove", err=True)
        question = f"Remove these, {format_bytes(total)} in all?"
        agreed = bool(listed) and (yes or _confirmed(question))
        for thing in listed if agreed else ():
            remove(thing)
    if agreed:
        click.echo(f"removed {format_bytes(total)}", err=True)
    if as_json:
        removed = [{"path": str(t.path), "bytes": t.bytes, "why": t.why} for t in listed]
        options.show({"removed": removed if agreed else [], "bytes": total if agreed else 0})


def _confirmed(question: str) -> bool:
    """What is answered.

    Raises
    ------
    KeyboardInterrupt
        At Ctrl-C.
    UsageError
        If there is nobody to answer.
    """
    try:
        return click.confirm(question, err=True)
    except click.Abort as error:
        if isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise click.UsageError("nobody answers here; give --yes to remove these") from None


@click.command()
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="PNG file.  [default: DIR/curves.png]"
)
def plot(folder: Path, output: Path | None) -> None:
    """Draw training and validation curves of all stages of the run in DIR.

    \b
    Example:
      gim-stage plot cache/digits
    """
    from gim_stagewise.report.curves import plot_curves

    click.echo(plot_curves(folder, output))
