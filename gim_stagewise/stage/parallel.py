"""Who computes the blocks of a cache: this process, a local Dask cluster, or one that is running.

The result does not depend on any of this: a block's bits are decided by the block, the module and
the recorded numerics, and only the coordinator commits.
"""

from __future__ import annotations

import socket
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np
from numpy.typing import NDArray

from gim_stagewise.cache import Block, StagedBlock
from gim_stagewise.errors import ConfigError, GimStageError, WorkersLostError
from gim_stagewise.sources import Source
from gim_stagewise.stage.cluster import local_cluster
from gim_stagewise.stage.extract import BLOCKS_AT_ONCE, BlockJob, BlockWorker, Executor
from gim_stagewise.stage.extraction_plan import ExtractionPlan, Workers
from gim_stagewise.stage.lanes import Lanes

# Starting a cluster takes some seconds; work that is done sooner stays in this process.
WORTH_A_CLUSTER_SECONDS = 20.0
NO_WORKERS_SECONDS = 60.0


def choose_executor(workers: Workers, plan: ExtractionPlan, *, stateful: bool) -> Executor:
    """The executor for what was asked and planned; a stateful module has one of its own."""
    if stateful:
        return Lanes()
    if workers.scheduler is not None:
        return DaskCluster(workers.scheduler)
    if plan.workers:
        return Adaptive(plan.workers) if workers.count is None else LocalWorkers(plan.workers)
    return InProcess(plan.writers)


class InProcess:
    """Runs blocks in this process: while one is computed, the next is read and the last written.

    It is computed by the thread that asks, whose memory is kept (see `use_allocator`); others read,
    compress and write.
    """

    def __init__(self, writers: int = 1) -> None:
        self._writers = writers

    def run(self, job: BlockJob, source: Source, blocks: Iterable[Block]) -> Generator[StagedBlock]:
        worker = job.open(source)
        writing: deque[Future[StagedBlock]] = deque()
        executor = ThreadPoolExecutor(1 + self._writers, "blocks")
        waiting = iter(blocks)

        def read_next() -> tuple[Block, Future[NDArray[np.float32]]] | None:
            block = next(waiting, None)
            if block is None:
                return None
            return block, executor.submit(worker.read, block)

        try:
            ahead = read_next()
            while ahead is not None:
                block, reading = ahead
                samples = reading.result()
                ahead = read_next()
                try:
                    outputs = worker.outputs(block, samples)
                except Exception:
                    # What was computed before it is not lost with the block that failed.
                    for future in writing:
                        yield future.result()
                    raise
                del samples
                if len(writing) == self._writers:
                    yield writing.popleft().result()
                writing.append(executor.submit(worker.stage, block, *outputs))
                del outputs
            while writing:
                yield writing.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)


class Adaptive:
    """Begins in this process, and starts a local cluster if that will be worth its start-up."""

    def __init__(self, count: int) -> None:
        self._count = count

    def run(self, job: BlockJob, source: Source, blocks: list[Block]) -> Generator[StagedBlock]:
        rest = deque(blocks)
        worth_it = False

        def own() -> Iterator[Block]:
            while rest and not worth_it:
                yield rest.popleft()

        started = time.monotonic()
        for done, staged in enumerate(InProcess().run(job, source, own()), start=1):
            yield staged
            per_block = (time.monotonic() - started) / done
            worth_it = done > 1 and per_block * len(rest) > WORTH_A_CLUSTER_SECONDS
        yield from LocalWorkers(self._count).run(job, source, list(rest))


class LocalWorkers:
    """Runs blocks in the processes of a local cluster, which ends with the run."""

    def __init__(self, count: int) -> None:
        self._count = count

    def run(self, job: BlockJob, source: Source, blocks: list[Block]) -> Generator[StagedBlock]:
        if not blocks:
            return
        count = min(self._count, len(blocks))
        with local_cluster(count, job.staging / "dask", threads=BLOCKS_AT_ONCE) as client:
            yield from _run_on(client, job, blocks)


class DaskCluster:
    """Runs blocks on a Dask cluster that is already running.

    Its workers need this package, the input, and the run's folder under the same path.
    """

    def __init__(self, scheduler: str) -> None:
        self._scheduler = scheduler

    def run(self, job: BlockJob, source: Source, blocks: list[Block]) -> Generator[StagedBlock]:
        import distributed

        if not blocks:
            return
        with _answering(self._scheduler):
            client: Any = distributed.Client(self._scheduler, timeout=10, set_as_default=False)
        try:
            yield from _run_on(client, job, blocks)
        finally:
            client.close(timeout=1)


@contextmanager
def _answering(address: str) -> Iterator[None]:
    """Refuse a scheduler that does not answer, or not to what is done here."""
    try:
        _check_address(address)
        yield
    except (OSError, TimeoutError, ValueError) as error:
        raise ConfigError(
            f"is {address!r}, where no Dask scheduler answers ({error}); start one with `dask "
            "scheduler`, or leave --scheduler out",
            key="--scheduler",
        ) from None


def _check_address(address: str) -> None:
    """Knock at a scheduler's door before a client is made that would not give up for long."""
    from distributed.comm.addressing import parse_address, parse_host_port

    scheme, place = parse_address(address)
    if scheme in {"tcp", "tls"}:
        host, port = parse_host_port(place)
        if port is None:
            raise ValueError("it names no port")
        socket.create_connection((host, port), timeout=5).close()


def check_scheduler(workers: Workers) -> None:
    """Refuse a scheduler that does not answer, before any work.

    Raises
    ------
    ConfigError
    """
    if workers.scheduler is not None:
        with _answering(workers.scheduler):
            pass


def _run_on(client: Any, job: BlockJob, blocks: list[Block]) -> Generator[StagedBlock]:
    """Keep every worker supplied with blocks, and hand over what is staged."""
    from distributed.client import FuturesCancelledError
    from distributed.comm.core import CommClosedError

    try:
        yield from _supply(client, job, blocks)
    except GimStageError:
        raise
    except (FuturesCancelledError, CancelledError, CommClosedError, TimeoutError, OSError) as error:
        raise WorkersLostError(
            f"the Dask cluster was lost ({type(error).__name__}: {error}); give the same command "
            "again when it is back: blocks that are done stay"
        ) from None


def _supply(client: Any, job: BlockJob, blocks: list[Block]) -> Generator[StagedBlock]:
    from distributed import wait

    _wait_for_workers(client)
    # The module and the input's address go to each worker once, also to those that join later.
    plugin = _plugin(job)
    client.register_plugin(plugin)
    waiting = list(reversed(blocks))
    running: set[Any] = set()
    last_sign = time.monotonic()
    try:
        while waiting or running:
            threads = sum(client.nthreads().values())
            if threads:
                last_sign = time.monotonic()
            elif time.monotonic() - last_sign > NO_WORKERS_SECONDS:
                raise WorkersLostError(
                    f"no Dask worker has been there for {NO_WORKERS_SECONDS:.0f} s; start some and "
                    "give the same command again: blocks that are done stay"
                )
            while waiting and len(running) < 2 * max(threads, 1):
                running.add(
                    client.submit(
                        _stage_block, plugin.name, job.staging.name, waiting.pop(), pure=False
                    )
                )
            try:
                with client.as_current():
                    finished = wait(running, timeout=2, return_when="FIRST_COMPLETED").done
            except TimeoutError:
                continue
            for future in finished:
                running.discard(future)
                yield _result(future)
    finally:
        with suppress(Exception):  # whoever is interrupted has lost the cluster by now
            client.cancel(list(running), force=True)
            client.unregister_worker_plugin(plugin.name)


def _wait_for_workers(client: Any) -> None:
    try:
        client.wait_for_workers(1, timeout=NO_WORKERS_SECONDS)
    except TimeoutError:
        raise WorkersLostError(
            f"the Dask scheduler has no workers after {NO_WORKERS_SECONDS:.0f} s; "
            "start some with `dask worker ADDRESS`"
        ) from None


def _result(future: Any) -> StagedBlock:
    from distributed import KilledWorker

    try:
        staged: StagedBlock = future.result()
    except GimStageError:
        raise
    except KilledWorker as error:
        raise WorkersLostError(
            f"several workers died on the same block ({error}); is there enough memory for that "
            "many workers on their machines? Blocks that are done stay"
        ) from None
    if not (staged.folder / staged.files[0]).is_file():
        raise WorkersLostError(
            f"a worker says that it wrote {staged.folder}, which is not there for this process; "
            "all workers need the run's folder under the same path"
        )
    return staged


# The worker of the last job in this process: opening it again for every block would be waste.
_opened: dict[str, BlockWorker] = {}
_opening = threading.Lock()


def _stage_block(plugin_name: str, token: str, block: Block) -> StagedBlock:
    from distributed import get_worker

    with _opening:
        if token not in _opened:
            _opened.clear()
            plugin: Any = get_worker().plugins[plugin_name]
            _opened[token] = plugin.job.open()
        worker = _opened[token]
    return worker(block)


def _plugin(job: BlockJob) -> Any:
    """What makes the job known to every worker of a cluster, whenever it joins."""
    from distributed import WorkerPlugin

    class JobPlugin(WorkerPlugin):
        # One name for each cache: what a killed run left behind is replaced by the next.
        name = f"gim-stage-{job.cache}"

        def __init__(self) -> None:
            self.job = job

    return JobPlugin()
