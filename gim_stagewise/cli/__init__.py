"""The command line: parse, call, print, exit code.

Heavy imports happen inside commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Any

import click

from gim_stagewise.cli.care import clean, export, inspect, plot, status, verify
from gim_stagewise.cli.paper import reproduce
from gim_stagewise.cli.work import extract, plan, probe, prove, run, train
from gim_stagewise.errors import GimStageError

EXIT_CODES = """
\b
Exit codes:
  0    done
  1    a defect of gim-stage itself
  2    bad input or configuration
  3    over the memory or disk budget
  4    storage or workers failed (disk full, input/output error, all workers lost), or
       verify found damage
  130  interrupted
"""


class _Group(click.Group):
    """Ends every user's error with one line and its exit code."""

    def invoke(self, context: click.Context) -> Any:
        _mend_streams()
        given = list(context.args)  # they are taken away one by one
        try:
            # A polite `kill` ends a run like Ctrl-C, with its workers.
            signal.signal(signal.SIGTERM, _interrupt)
            return super().invoke(context)
        except GimStageError as error:
            click.echo(f"error: {error}", err=True)
            context.exit(error.exit_code)
        except KeyboardInterrupt:
            # These would have it done again from the start.
            afresh = [o for o in ("--from", "--force") if _has(given, o)]
            without = f" without {afresh[0]}" if afresh else ""
            click.echo(
                f"interrupted: what is done stays; give the same command again{without} to go on",
                err=True,
            )
            context.exit(130)
        except OSError as error:
            if isinstance(error, BrokenPipeError) and _unread():
                raise  # who read has seen enough: click ends quietly
            place = f"{error.filename}: " if error.filename else ""
            click.echo(f"error: {place}{error.strerror or error}", err=True)
            context.exit(4)
        except (click.ClickException, click.exceptions.Exit, click.Abort):
            raise
        except Exception:
            traceback.print_exc()
            click.echo("error: this is a defect of gim-stage; please report it", err=True)
            context.exit(1)


def _unread() -> bool:
    """Whether nobody reads what is printed any more."""
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except BrokenPipeError:
        return True
    return False


def _has(arguments: list[str], option: str) -> bool:
    return any(own == option or own.startswith(f"{option}=") for own in arguments)


def _mend_streams() -> None:
    """Streams that are closed swallow what is written; letters that one lacks become others."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


@click.group(
    cls=_Group, context_settings={"help_option_names": ["-h", "--help"]}, epilog=EXIT_CODES
)
@click.version_option(package_name="gim-stagewise")
def main() -> None:
    """Train deep networks module by module, through cached activations.

    A stage trains one gradient-isolated module, freezes it and stores its outputs in a Zarr
    cache, from which the next stage trains: one module in memory, no end-to-end backpropagation.

    \b
    Example:
      gim-stage run pipelines/digits.toml
    """
    # Read by PyTorch when it is imported: large tensors in pages of 2 MB, where the system has
    # them. Memory that comes and goes, as it does under a budget, is then cheap.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


for _command in (
    run,
    plan,
    prove,
    train,
    extract,
    probe,
    status,
    export,
    inspect,
    verify,
    clean,
    plot,
    reproduce,
):
    main.add_command(_command)
