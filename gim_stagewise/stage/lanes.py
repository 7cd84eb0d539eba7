"""Run a stateful module over recordings, tile after tile, several recordings side by side.

Each recording has a lane, which its place in the dataset decides; a lane's results depend on what
is in it alone, since all lanes are always there, filled with zeros where there is nothing. So a
tile can be computed with or without the others, from the state after the one before it, which was
committed with that one.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray

from gim_stagewise.cache import Block, PrecisionError, StagedBlock, TiledLayout, read_chunk_file
from gim_stagewise.errors import CorruptCacheError
from gim_stagewise.sources import Source
from gim_stagewise.stage.extract import BlockJob, BlockWorker
from gim_stagewise.stage.freeze import frozen_step
from gim_stagewise.stage.storing import Storing, checked_arrays

Outputs = tuple[dict[str, NDArray[np.generic]], PrecisionError | None]


class Lanes:
    """An executor for stateful modules, in this process; a thread stages what is computed."""

    def run(self, job: BlockJob, source: Source, blocks: Iterable[Block]) -> Generator[StagedBlock]:
        worker = job.open(source)
        lanes = LaneWorker(worker)
        groups: dict[int, dict[int, list[Block]]] = defaultdict(lambda: defaultdict(list))
        for block in blocks:
            groups[block.samples.start // lanes.count][block.tile[0]].append(block)
        in_order = [own for tiles in groups.values() for _, own in sorted(tiles.items())]
        staging: deque[Future[StagedBlock]] = deque()

        def staged() -> Generator[StagedBlock]:
            while staging:
                yield staging.popleft().result()

        executor = ThreadPoolExecutor(1, "blocks")
        try:
            for together in in_order:
                try:
                    outputs = lanes.outputs(together)
                except Exception:
                    # What was computed before it is not lost with the tile that failed.
                    yield from staged()
                    raise
                yield from staged()
                for block, own in zip(together, outputs, strict=True):
                    staging.append(executor.submit(worker.stage, block, *own))
                del outputs, own
            yield from staged()
        finally:
            executor.shutdown(cancel_futures=True)


class LaneWorker:
    """Computes the same tile of some recordings, each in its lane.

    Parameters
    ----------
    worker : BlockWorker
        Of a stateful module.
    """

    def __init__(self, worker: BlockWorker) -> None:
        layout = worker.job.manifest.layout
        assert isinstance(layout, TiledLayout)
        self._worker = worker
        self._layout = layout
        self.count = worker.job.config.windows.lanes
        # Of each lane: the recording and the tile that were computed last, and the state after.
        self._last: dict[int, tuple[int, int, NDArray[np.float32]]] = {}

    def outputs(self, blocks: list[Block]) -> list[Outputs]:
        """Read and compute blocks, of different lanes."""
        layout = self._layout
        inputs = [self._worker.read(block)[0] for block in blocks]
        rows = np.zeros((self.count, len(inputs[0]), layout.tile[0]), np.float32)
        states = np.zeros((self.count, layout.state), np.float32)
        for block, own in zip(blocks, inputs, strict=True):
            lane = self._lane(block)
            rows[lane, :, : own.shape[1]] = own
            states[lane] = self._state_before(block)
        config = self._worker.job.config.extract
        z, after = frozen_step(
            self._worker.frozen, torch.from_numpy(rows), torch.from_numpy(states), config
        )
        return [self._of_lane(block, z, after) for block in blocks]

    def _lane(self, block: Block) -> int:
        return block.samples.start % self.count

    def _of_lane(self, block: Block, z: torch.Tensor, after: torch.Tensor) -> Outputs:
        layout, manifest = self._layout, self._worker.job.manifest
        lane, (span,) = self._lane(block), layout.region(block)
        storing = Storing.of(manifest) if layout.materialized else Storing(None)
        own = z[lane : lane + 1, :, : len(span)].contiguous()
        pooled = self._worker.frozen.embeddings(own)
        stored = storing(own)
        (item_id,) = self._worker.ids(block)
        name = f"{item_id} (outputs {span.start} to {span.stop})"
        arrays = checked_arrays(stored, pooled, storing, [name], rows=1)
        state = after[lane].numpy().copy()
        self._last[lane] = (block.samples.start, block.tile[0], state)
        found = {kind: values[0] for kind, values in arrays.items()} | {"states": state[None]}
        return found, storing.error

    def _state_before(self, block: Block) -> NDArray[np.float32]:
        """The state after the tile before: as it was computed just now, or as it was committed."""
        number, (tile,) = block.samples.start, block.tile
        if tile == 0:
            first: NDArray[np.float32] = self._worker.frozen.initial_state().numpy()
            return first
        last = self._last.get(self._lane(block))
        if last is not None and last[:2] == (number, tile - 1):
            return last[2]
        before = Block(-1, 0, block.samples, (tile - 1,))
        part = self._layout.parts(before)["states"]
        try:
            chunk = read_chunk_file(self._worker.job.cache, self._layout, part.files[0])
        except (OSError, ValueError, RuntimeError) as error:
            raise CorruptCacheError(
                f"{self._worker.job.cache}: the state before tile {tile} of "
                f"{self._layout.ids[number]} cannot be read ({error}); mend the tile before it "
                "first, or build the cache again"
            ) from None
        state: NDArray[np.float32] = chunk[part.inside[0]][0].copy()
        return state


def block_stager(worker: BlockWorker) -> Callable[[Block], StagedBlock]:
    """What reads, computes and stages one block, of any module."""
    layout = worker.job.manifest.layout
    if not isinstance(layout, TiledLayout) or not layout.state:
        return worker
    lanes = LaneWorker(worker)
    return lambda block: worker.stage(block, *lanes.outputs([block])[0])
