"""The command line: parse, call, print, exit code.

Heavy imports happen inside commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from gim_stagewise.errors import GimStageError

_Command = Callable[..., Any]

if TYPE_CHECKING:
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.progress import Progress

EXIT_CODES = """
\b
Exit codes:
  0    done
  1    a defect of gim-stage itself
  2    bad input or configuration
  3    over the memory or disk budget
  4    storage failed (disk full, input/output error)
  130  interrupted
"""


class _Group(click.Group):
    """Ends every user's error with one line and its exit code."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except GimStageError as error:
            click.echo(f"error: {error}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo(
                "interrupted: what is done stays; give the same command again to go on", err=True
            )
            context.exit(130)
        except OSError as error:
            place = f"{error.filename}: " if error.filename else ""
            click.echo(f"error: {place}{error.strerror or error}", err=True)
            context.exit(4)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            traceback.print_exc()
            click.echo("error: this is a defect of gim-stage; please report it", err=True)
            context.exit(1)


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES
)
@click.version_option(package_name="gim-stagewise")
def main() -> None:
    r"""Train deep networks module by module, through cached activations.

    A stage trains one gradient-isolated module, freezes it and stores its outputs in a Zarr
    cache, from which the next stage trains: one module in memory, no end-to-end backpropagation.

    \b
    Example:
      gim-stage run pipelines/digits.toml
    """


def _folder_option(default: str) -> Callable[[_Command], _Command]:
    return click.option(
        "--dir",
        "folder",
        type=click.Path(path_type=Path, file_okay=False),
        help=f"Folder of the run's files. [default: {default}]",
    )


_device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
_json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, the rest on stderr."
)
_module_option = click.option(
    "--module", "index", type=click.IntRange(min=1), required=True, help="Number of the module."
)
_input_option = click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path),
    help="Cache of the module below; not for module 1.",
)
_pipeline_option = click.option(
    "--pipeline",
    "pipeline_file",
    type=click.Path(path_type=Path),
    help="Pipeline file; by default the one recorded in the input. Needed for module 1, and where "
    "modules are built by your own code.",
)
_force_option = click.option("--force", is_flag=True, help="Do it again even if it is current.")


@main.command()
@click.argument("pipeline_file", metavar="FILE", type=click.Path(path_type=Path))
@_folder_option("cache/NAME, with the pipeline's name")
@_device_option
@_json_option
def run(pipeline_file: Path, folder: Path | None, device: str, as_json: bool) -> None:
    r"""Run all stages of a pipeline FILE, then probe every module.

    What matches the file is kept; what is unfinished goes on; what is stale is made again.

    \b
    Example:
      gim-stage run pipelines/digits.toml
    """
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.report.record import save_record
    from gim_stagewise.report.tables import results_table

    pipeline = Pipeline.from_file(pipeline_file, folder=folder, device=device, progress=_progress())
    with _named_file(pipeline_file):
        result = pipeline.run()
    record = save_record(pipeline, result)
    _print(record if as_json else results_table(result))


@main.command()
@_module_option
@_input_option
@_pipeline_option
@_folder_option("the input's folder, else cache/NAME")
@_device_option
@_force_option
@_json_option
def train(
    index: int,
    input_path: Path | None,
    pipeline_file: Path | None,
    folder: Path | None,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    r"""Train one module and freeze it: writes mN.safetensors.

    \b
    Examples:
      gim-stage train --module 1 --pipeline pipelines/digits.toml
      gim-stage train --module 2 --input cache/digits/m1.zarr
    """
    pipeline = _pipeline(pipeline_file, input_path, folder, device)
    with _named_file(pipeline_file):
        weights, trained = pipeline.stage(index, input_path).train(force=force)
    path = pipeline.workspace.weights_path(index)
    record = weights.record
    if as_json:
        _print(
            {
                "module": index,
                "trained": trained,
                "weights": str(path),
                "epochs": record.epochs,
                "best_epoch": record.best_epoch,
                "train_loss": record.train_loss,
                "validation_loss": record.validation_loss,
                "seconds": record.seconds,
            }
        )
        return
    done = "trained and frozen" if trained else "nothing to do, the frozen weights match"
    click.echo(
        f"module {index}: {done}; {record.epochs} epochs, train loss {record.train_loss:.3f}, "
        f"validation loss {record.validation_loss:.3f}: {path}"
    )


@main.command()
@_module_option
@_input_option
@_pipeline_option
@_folder_option("the input's folder, else cache/NAME")
@_device_option
@_force_option
@_json_option
def extract(
    index: int,
    input_path: Path | None,
    pipeline_file: Path | None,
    folder: Path | None,
    device: str,
    force: bool,
    as_json: bool,
) -> None:
    r"""Store the outputs of a frozen module for the whole dataset: writes mN.zarr.

    \b
    Examples:
      gim-stage extract --module 1 --pipeline pipelines/digits.toml
      gim-stage extract --module 2 --input cache/digits/m1.zarr
    """
    from gim_stagewise.pipeline import folder_bytes
    from gim_stagewise.report.tables import format_bytes

    pipeline = _pipeline(pipeline_file, input_path, folder, device)
    with _named_file(pipeline_file):
        stage = pipeline.stage(index, input_path)
        manifest, extracted = stage.extract(stage.load_weights(), force=force)
    path = pipeline.workspace.cache_path(index)
    size = folder_bytes(path)
    if as_json:
        _print(
            {
                "module": index,
                "extracted": extracted,
                "state": "sealed",
                "cache": str(path),
                "cache_bytes": size,
                "samples": manifest.layout.samples,
                "content": manifest.content.value,
            }
        )
        return
    done = "extracted and sealed" if extracted else "nothing to do, the sealed cache matches"
    click.echo(
        f"module {index}: {done}; {manifest.layout.samples} samples, {format_bytes(size)}: {path}"
    )


@main.command()
@click.option(
    "--input",
    "input_path",
    type=click.Path(path_type=Path),
    required=True,
    help="Cache of the module to probe.",
)
@click.option(
    "--pooling",
    type=click.Choice(["mean", "all"]),
    help="Mean over patches, or all patch features.  [default: as in the pipeline file]",
)
@_json_option
def probe(input_path: Path, pooling: Literal["mean", "all"] | None, as_json: bool) -> None:
    r"""Say how good a cache's features are, by a linear classifier on top of them.

    \b
    Example:
      gim-stage probe --input cache/digits/m3.zarr
    """
    from gim_stagewise.pipeline import probe_cache
    from gim_stagewise.report.tables import percent

    module, chosen, accuracy = probe_cache(input_path, pooling=pooling)
    if as_json:
        _print({"module": module, "pooling": chosen, "probe_accuracy": accuracy})
    else:
        click.echo(f"module {module}: {percent(accuracy)} test accuracy ({chosen} pooling)")


def _pipeline(
    file: Path | None, input_path: Path | None, folder: Path | None, device: str
) -> Pipeline:
    """The pipeline named by a file, or by the text that the input cache carries."""
    from gim_stagewise.pipeline import Pipeline

    if file is not None:
        if folder is None and input_path is not None:
            folder = input_path.absolute().parent
        return Pipeline.from_file(file, folder=folder, device=device, progress=_progress())
    if input_path is None:
        raise click.UsageError(
            "say what to work on: --input CACHE, or --pipeline FILE for module 1"
        )
    return Pipeline.from_cache(input_path, folder=folder, device=device, progress=_progress())


class _named_file:  # noqa: N801 - reads as a verb in a with statement
    """Makes errors of a pipeline's content name the file they come from."""

    def __init__(self, file: Path | None) -> None:
        self._file = file

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        from gim_stagewise.errors import ConfigError

        is_option = isinstance(error, ConfigError) and (error.key or "").startswith("--")
        if isinstance(error, ConfigError) and self._file is not None and not is_option:
            raise error.in_file(str(self._file)) from error.__cause__


def _progress() -> Progress:
    from rich.console import Console

    from gim_stagewise.report.terminal import TerminalProgress

    return TerminalProgress(Console(stderr=True))


def _print(result: Any) -> None:
    if isinstance(result, dict):
        click.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console

    # A table wider than a pipe's assumed 80 columns would be folded.
    width = None if sys.stdout.isatty() else int(os.environ.get("COLUMNS", "120"))
    Console(width=width).print(result)


if __name__ == "__main__":
    main()
