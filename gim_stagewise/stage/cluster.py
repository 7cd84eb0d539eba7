"""A local Dask cluster that starts quietly and ends at once when a run is interrupted."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from gim_stagewise.processes import main_hidden


@contextmanager
def local_cluster(count: int, scratch: Path, *, threads: int) -> Iterator[Any]:
    """A client of a fresh local cluster that ends, at once if need be, with the block.

    Parameters
    ----------
    count : int
        Worker processes.
    scratch : Path
        Folder for what Dask writes.
    threads : int
        Tasks of one worker at a time.
    """
    import dask.config
    from distributed import Client, LocalCluster, SpecCluster

    for name in ("distributed", "tornado", "asyncio"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # When workers are killed on purpose, Python's resource tracker has nothing to tell a user.
    os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")
    # Without Dask's usual MALLOC_TRIM_THRESHOLD_, which makes glibc give every large buffer back to
    # the system at once: convolutions run at two thirds of their speed with it.
    # One heap for all threads of a worker, from the start: see `use_allocator`.
    quiet_allocator = {
        "distributed.nanny.pre-spawn-environ": {"OMP_NUM_THREADS": "1", "MALLOC_ARENA_MAX": "1"}
    }
    before = set(multiprocessing.active_children())
    client = cluster = None
    with main_hidden(), dask.config.set(quiet_allocator), _loop_deaf_to_ctrl_c() as loop:
        try:
            cluster = LocalCluster(
                loop=loop,
                n_workers=count,
                threads_per_worker=threads,
                # None would ask for port 8787 on every interface, and complain if it is taken.
                dashboard_address="127.0.0.1:0",
                memory_limit=0,
                local_directory=str(scratch),
                silence_logs=logging.CRITICAL,
            )
            client = Client(cluster, set_as_default=False)
            yield client
        except BaseException:
            # Whoever interrupts does not wait for tasks to end; staging is left for the next run.
            _kill(set(multiprocessing.active_children()) - before)
            for thing in (client, cluster):
                with suppress(Exception):
                    if thing is not None:
                        thing.close(timeout=0.2)
            _kill(set(multiprocessing.active_children()) - before)
            # Dask would try once more at exit, and print that a half-made cluster cannot be closed.
            with suppress(AttributeError):
                SpecCluster._instances.clear()
            raise
        client.close()
        cluster.close()


@contextmanager
def _loop_deaf_to_ctrl_c() -> Iterator[Any]:
    """An event loop whose threads, and the workers started from them, do not get Ctrl-C.

    A terminal sends it to the whole group; this process handles it and ends its workers, which
    would otherwise print tracebacks of their own. Signal masks are inherited.
    """
    from distributed.utils import LoopRunner

    runner = LoopRunner(asynchronous=False)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        runner.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    try:
        yield runner.loop
    finally:
        with suppress(Exception):
            runner.stop(timeout=1)


def _kill(processes: Iterable[Any]) -> None:
    for process in processes:
        process.kill()
