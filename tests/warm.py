"""Processes that start at once: forked from one that has everything imported and nothing running.

Run as a script this is the server: for every request, a line of JSON, it forks a child that calls a
function with an argument, and answers with the child's exit status.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import multiprocessing
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing import forkserver
from pathlib import Path
from typing import Any, NoReturn


def serve() -> None:
    """Answer requests until there are no more."""
    # What commands need; nothing of it starts a thread.
    import distributed  # noqa: F401
    import sklearn.linear_model
    import sklearn.preprocessing  # noqa: F401
    import torch._dynamo
    import torch._subclasses

    import gim_stagewise

    for module in pkgutil.walk_packages(gim_stagewise.__path__, "gim_stagewise."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    torch.set_num_threads(1)
    share_forkserver()
    for line in sys.stdin:
        request = json.loads(line)
        module, name = request["function"].split(":")
        function = getattr(importlib.import_module(module), name)
        if request["before"]:
            getattr(importlib.import_module(module), request["before"])(request["argument"])
        gc.freeze()  # so that children need not look at, and so copy, what they share
        child = os.fork()
        if child == 0:
            for number, file in enumerate((os.devnull, request["stdout"], request["stderr"])):
                if file is not None:
                    os.dup2(os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600), number)
            if request["cwd"]:
                os.chdir(request["cwd"])
            end(function, request["argument"])
        timer = threading.Timer(request["kill_after"], os.kill, (child, signal.SIGKILL))
        timer.start()
        _, status = os.waitpid(child, 0)
        timer.cancel()
        print(os.waitstatus_to_exitcode(status), flush=True)


def end(function: Callable[[Any], None], argument: Any) -> NoReturn:
    """Call it, and exit as an interpreter does, but for taking down all that was imported."""
    status: Any = 0
    try:
        function(argument)
    except SystemExit as exit_:
        status = exit_.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def share_forkserver() -> None:
    """Start the server that fresh processes are copied from, once for all that are forked here."""
    multiprocessing.set_forkserver_preload(["gim_stagewise.stage.project", "torch._dynamo"])
    forkserver.ensure_running()
    server: Any = forkserver._forkserver
    # Whoever has not started it can neither wait for it nor end it.
    server.ensure_running = lambda: None
    server._forkserver_pid = None


class Warm:
    """Asks a server of its own for calls."""

    def __init__(self) -> None:
        self._server = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        atexit.register(self.close)

    def __call__(
        self,
        function: str,
        argument: Any,
        *,
        before: str | None = None,
        stdout: Path | None = None,
        stderr: Path | None = None,
        cwd: Path | None = None,
        kill_after: float = 3600,
    ) -> int:
        """Call ``"module:function"`` in a new process, and ``before`` in the server beforehand.

        Returns
        -------
        int
            The exit status; negative is the signal that ended it.
        """
        request = {
            "function": function,
            "argument": argument,
            "before": before,
            "stdout": str(stdout or os.devnull),
            "stderr": None if stderr is None else str(stderr),
            "cwd": None if cwd is None else str(cwd),
            "kill_after": kill_after,
        }
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        return int(self._server.stdout.readline())

    def close(self) -> None:
        self._server.communicate()


@cache
def warm() -> Warm:
    """The server of this process, started when it is first needed."""
    return Warm()


def run_command(arguments: list[str]) -> None:
    """``gim-stage`` with these arguments."""
    from gim_stagewise.cli import main

    sys.argv = ["gim-stage", *arguments]
    main()


def gim_stage(*arguments: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line in a process of its own."""
    given = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        code = warm()("warm:run_command", given, stdout=out, stderr=err, cwd=cwd or Path.cwd())
        return subprocess.CompletedProcess(given, code, out.read_text(), err.read_text())


if __name__ == "__main__":
    serve()
