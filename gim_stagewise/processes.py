"""Cores, and processes of our own that never import the user's script."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def usable_cores() -> int:
    """Cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1  # macOS does not tell


@contextmanager
def main_hidden() -> Iterator[None]:
    """Keep new processes from importing the user's script, which may have no ``__main__`` guard.

    They need nothing of it, and without a guard it would start the whole run again in each.
    """
    main = sys.modules["__main__"]
    kept: dict[str, Any] = {n: vars(main)[n] for n in ("__file__", "__spec__") if n in vars(main)}
    vars(main).pop("__file__", None)
    vars(main)["__spec__"] = None
    try:
        yield
    finally:
        vars(main).update(kept)


def end_fresh_processes() -> None:
    """End the server that `in_fresh_process` copies: it holds half a gigabyte, and starts anew."""
    from multiprocessing import forkserver

    server: Any = forkserver._forkserver
    if stop := getattr(server, "_stop", None):  # what the standard library's own tests use
        stop()


def in_fresh_process(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Call a function in a process that has done nothing before; its errors come back here."""
    if "forkserver" in multiprocessing.get_all_start_methods():
        # A server imports what is needed once, and every process is a fresh copy of it.
        context: Any = multiprocessing.get_context("forkserver")
        # (the first optimizer of a process loads this as well)
        context.set_forkserver_preload([function.__module__, "torch._dynamo"])
    else:
        context = multiprocessing.get_context("spawn")
    with main_hidden(), ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *args, **kwargs).result()
