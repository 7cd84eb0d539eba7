"""Options that commands share, and how they print."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

if TYPE_CHECKING:
    from gim_stagewise.memory import Budget
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.progress import Progress
    from gim_stagewise.stage.extraction_plan import Workers

Command = TypeVar("Command", bound=Callable[..., Any])
_PATH = click.Path(path_type=Path)


def folder_option(default: str) -> Callable[[Command], Command]:
    """``--dir``."""
    return click.option(
        "--dir",
        "folder",
        type=click.Path(path_type=Path, file_okay=False),
        help=f"Folder of the run's files.  [default: {default}]",
    )


pipeline_argument = click.argument("pipeline_file", metavar="FILE", type=_PATH)
mode_option = click.option(
    "--mode",
    type=click.Choice(
        ["iterative", "simultaneous", "cpc", "supervised", "greedy_supervised", "random"]
    ),
    help='How modules are trained, instead of what the file says; see README, "Modes".',
)
device_option = click.option(
    "--device",
    type=click.Choice(["auto", "cpu", "cuda"]),
    default="auto",
    show_default=True,
    help="Where to compute.",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON object on stdout, the rest on stderr."
)
module_option = click.option(
    "--module", "index", type=click.IntRange(min=1), required=True, help="Number of the module."
)
input_option = click.option(
    "--input",
    "input_path",
    type=_PATH,
    help="Cache of the module below; not for module 1.",
)
pipeline_option = click.option(
    "--pipeline",
    "pipeline_file",
    type=_PATH,
    help="Pipeline file; by default the one recorded in the input. Needed for module 1, and where "
    "modules are built by your own code.",
)
force_option = click.option("--force", is_flag=True, help="Do it again even if it is current.")
quiet_option = click.option("-q", "--quiet", is_flag=True, help="Show no progress.")
verbose_option = click.option("-v", "--verbose", is_flag=True, help="Show a line for every epoch.")


def _break_lock(context: click.Context, parameter: click.Parameter, given: bool) -> None:
    if given:
        from gim_stagewise.lock import ignore_other_hosts

        ignore_other_hosts()


break_lock_option = click.option(
    "--break-lock",
    is_flag=True,
    expose_value=False,
    callback=_break_lock,
    help="Take a lock that another host left in the folder; only if its run is dead.",
)
workers_option = click.option(
    "--workers",
    "worker_count",
    type=click.IntRange(min=0),
    help="Processes that extract; 0 for this one.  "
    "[default: by cores, memory and the work there is]",
)
scheduler_option = click.option(
    "--scheduler",
    metavar="ADDRESS",
    help="Extract on a running Dask cluster, such as tcp://host:8786, that sees the same files.",
)


def _size_option(name: str, what: str) -> Callable[[Command], Command]:
    return click.option(f"--{name}", metavar="SIZE", help=what)


allowed_mem_option = _size_option(
    "allowed-mem", "Most memory of the device, such as 2.5GB.  [default: what a GPU has free]"
)
allowed_host_mem_option = _size_option(
    "allowed-host-mem",
    "Most memory of this machine; on a CPU, all of it.  [default: what is free, or the "
    "container's limit]",
)
allowed_disk_option = _size_option(
    "allowed-disk", "Most disk space of all caches.  [default: no limit]"
)


@dataclass(frozen=True)
class Sizes:
    """Budgets as they were typed."""

    mem: str | None
    host_mem: str | None
    disk: str | None = None


def limited(pipeline: Pipeline, sizes: Sizes, smallest: Callable[[], Budget]) -> Pipeline:
    """A pipeline with the budgets that were typed.

    Raises
    ------
    ConfigError
        If one is no size; the message names the smallest that would do.
    """
    from dataclasses import replace

    from gim_stagewise.errors import ConfigError
    from gim_stagewise.memory import Budget
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.units import parse_bytes

    found: dict[str, int | None] = {}
    places = {"mem": "device", "host_mem": "host", "disk": "disk"}
    for option, field in places.items():
        text = getattr(sizes, option)
        try:
            found[field] = None if text is None else parse_bytes(text)
        except ValueError as error:
            # Rounded up, and measurements differ a little.
            least = 8 + -(-(getattr(smallest(), field) or 1) // 1_000_000)
            raise ConfigError(
                f"is {text!r}: {error}; the smallest workable value here is {least}MB",
                key=f"--allowed-{option.replace('_', '-')}",
            ) from None
    return Pipeline(replace(pipeline.workspace, budget=Budget(**found)))


def workers_from(count: int | None, scheduler: str | None) -> Workers:
    """Who extracts, from ``--workers`` and ``--scheduler``."""
    from gim_stagewise.stage.extraction_plan import Workers

    if count is not None and scheduler is not None:
        raise click.UsageError("--workers and --scheduler exclude each other")
    return Workers(count, scheduler)


def pipeline_from(
    file: Path | None,
    input_path: Path | None,
    folder: Path | None,
    device: str = "auto",
    progress: Progress | None = None,
    mode: str | None = None,
) -> Pipeline:
    """The pipeline named by a file, or by the text that the input cache carries."""
    from gim_stagewise.pipeline import Pipeline

    if file is not None:
        if folder is None and input_path is not None:
            folder = input_path.absolute().parent
        return Pipeline.from_file(file, folder=folder, device=device, progress=progress, mode=mode)
    if input_path is None:
        raise click.UsageError(
            "say what to work on: --input CACHE, or --pipeline FILE for module 1"
        )
    return Pipeline.from_cache(input_path, folder=folder, device=device, progress=progress)


@contextmanager
def naming(file: Path | None) -> Iterator[None]:
    """Make errors in what a pipeline file says name that file."""
    from gim_stagewise.errors import ConfigError

    try:
        yield
    except ConfigError as error:
        is_option = (error.key or "").startswith("--")
        if file is None or is_option:
            raise
        raise error.in_file(str(file)) from error.__cause__


def progress_for(*, quiet: bool, verbose: bool) -> Progress:
    """What shows progress on stderr."""
    from rich.console import Console

    from gim_stagewise.progress import Silent
    from gim_stagewise.report.terminal import TerminalProgress

    return Silent() if quiet else TerminalProgress(Console(stderr=True), verbose=verbose)


def show(result: Any) -> None:
    """Print a result on stdout: a dict as JSON, anything else as a table."""
    if isinstance(result, dict):
        click.echo(json.dumps(result, indent=2))
        return
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else _columns()).print(result)


def _columns() -> int:
    """The width of what is no terminal: a table wider than 80 columns would be folded."""
    asked = os.environ.get("COLUMNS", "")
    return int(asked) if asked.isdecimal() and int(asked) else 132
