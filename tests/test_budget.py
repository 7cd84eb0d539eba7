"""What is over a budget is refused before anything is done, and what is not is left alone."""

from __future__ import annotations

import gc
import re
import tracemalloc
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import edit, one_error, weights_of
from warm import gim_stage

from gim_stagewise.cache import Cache, auto_chunk, read_manifest
from gim_stagewise.errors import OverBudgetError, StorageError
from gim_stagewise.memory import Budget, PeakMeter, resident_bytes
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.plan import plan_pipeline
from gim_stagewise.probe.fit import check_probe_of_patches
from gim_stagewise.probe.probe import chain_features
from gim_stagewise.prove import prove
from gim_stagewise.stage.chain import fresh_chain
from gim_stagewise.stage.fit import plan_training
from gim_stagewise.stage.needs import chain_needs
from gim_stagewise.stage.project import count_step


def open_pipeline(file: Path, folder: Path, *, mode: str | None = None, **budget: int) -> Pipeline:
    own = Budget(**budget)
    return Pipeline.from_file(file, folder=folder, device="cpu", mode=mode, budget=own)


def test_extraction_that_does_not_fit_is_refused_before_training(
    tiny: Path, tmp_path: Path
) -> None:
    edit(tiny, "[extract]\nbatch = 50", "[extract]\nbatch = 1500000")
    arguments: list[str | Path] = [tiny, "--dir", tmp_path / "out", "--device", "cpu"]
    for command in ("plan", "run"):
        error = one_error(gim_stage(command, *arguments, "--allowed-host-mem", "1300MB"), 3)
        assert "extraction with 0 workers projects" in error
        assert "lower extract.batch from 1500000" in error
    assert not list((tmp_path / "out").glob("m*"))


def test_the_probe_of_a_chain_takes_what_is_said_and_is_refused_before_any_work(
    tiny: Path, tmp_path: Path
) -> None:
    edit(tiny, "channels = 6", "channels = 200")
    edit(tiny, "[extract]\nbatch = 50", "[extract]\nbatch = 500")
    pipeline = open_pipeline(tiny, tmp_path / "out")
    space, source, shapes = pipeline.workspace, pipeline.source, pipeline.check()
    ids = list(source.ids)
    chain = fresh_chain(space, [shape.cell_in[0] for shape in shapes])
    chain_features(chain, source, ids[:1], space.config)  # what a first one loads
    gc.collect()
    with PeakMeter(space.device) as meter:
        chain_features(chain, source, ids, space.config)
    few = replace(space, budget=Budget(host=resident_bytes() + meter.peak // 2))
    with pytest.raises(OverBudgetError, match=r"lower extract\.batch from 500") as caught:
        check_probe_of_patches(few, source, shapes)
    assert meter.peak < 1.1 * (caught.value.needed - resident_bytes())
    check_probe_of_patches(space, source, shapes)
    with pytest.raises(OverBudgetError, match="the probe of all modules"):
        open_pipeline(tiny, tmp_path / "random", host=1_000_000, mode="random").run()
    assert not list((tmp_path / "random").glob("m*"))


def test_a_budget_that_is_named_is_enough(tiny: Path, tmp_path: Path) -> None:
    """Also where the count alone is over what was allowed, and the workspace comes on top."""
    edit(tiny, "channels = 6", "channels = 400")
    edit(tiny, "batch = 8\n", "batch = 32\n")
    pipeline = open_pipeline(tiny, tmp_path / "out")
    (needs,) = chain_needs(pipeline.workspace, pipeline.source, pipeline.check())[:1]
    counted = count_step(replace(needs.spec, micro_batch=needs.spec.rows)).count
    with pytest.raises(OverBudgetError, match="or less, or allow") as caught:
        plan_training(needs, recorded=None, budget=Budget(device=counted - 1, host=2**40))
    assert "at least" not in str(caught.value)
    named = re.search(r"--allowed-mem (\d+)MB", str(caught.value))
    assert named is not None
    enough = Budget(device=1_000_000 * int(named[1]), host=2**40)
    plan = plan_training(needs, recorded=None, budget=enough)
    assert plan.step.total <= caught.value.needed


def test_a_stage_that_will_be_made_again_is_checked_first(tiny: Path, tmp_path: Path) -> None:
    open_pipeline(tiny, tmp_path / "out").run()
    before = weights_of(tmp_path / "out")
    edit(tiny, "channels = 8", "channels = 9")
    edit(tiny, "channels = 5", "channels = 900")
    with pytest.raises(OverBudgetError, match="module 3"):
        open_pipeline(tiny, tmp_path / "out", device=60_000_000).run()
    assert weights_of(tmp_path / "out").keys() == before.keys()
    assert Pipeline.from_file(tiny, folder=tmp_path / "out", device="cpu").first_to_make(3) == 2


def test_what_is_there_needs_no_budget(tiny: Path, tmp_path: Path) -> None:
    open_pipeline(tiny, tmp_path / "out").run()
    stages = open_pipeline(tiny, tmp_path / "out", device=1000, disk=1000).run().stages
    assert not any(stage.trained or stage.extracted for stage in stages)


def test_a_cache_that_is_stale_says_nothing_of_the_next_ones_size(
    tiny: Path, tmp_path: Path
) -> None:
    edit(tiny, "[cache]\n", '[cache]\nmaterialize = "never"\n')
    open_pipeline(tiny, tmp_path / "out").run()
    edit(tiny, 'materialize = "never"', 'materialize = "always"')
    plan = plan_pipeline(open_pipeline(tiny, tmp_path / "out"))
    fresh = plan_pipeline(open_pipeline(tiny, tmp_path / "fresh"))
    assert [c.bytes for c in plan.disk.caches] == [c.bytes for c in fresh.disk.caches]
    edit(tiny, "channels = 5", "channels = 50")
    grown = plan_pipeline(open_pipeline(tiny, tmp_path / "out"))
    assert grown.disk.caches[2].bytes > 5 * fresh.disk.caches[2].bytes


def test_the_disk_budget_is_for_what_is_asked(tiny: Path, tmp_path: Path) -> None:
    one = plan_pipeline(open_pipeline(tiny, tmp_path / "x")).disk.caches[0].bytes
    allowed = one + one // 20
    with pytest.raises(OverBudgetError, match="on disk"):
        open_pipeline(tiny, tmp_path / "out", disk=allowed).run()
    assert open_pipeline(tiny, tmp_path / "out", disk=allowed).run(until=1).stages[0].extracted


def test_a_disk_with_too_little_space_is_refused_before_anything_is_written(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage(10**6, 10**6 - 10**5, 10**5))
    with pytest.raises(StorageError, match=r"about .* are to be written, and 100.0 kB are free"):
        open_pipeline(tiny, tmp_path / "out").run()
    assert not list((tmp_path / "out").glob("*"))
    assert StorageError("").exit_code == 4


def test_computing_is_counted_where_it_may_be_chosen(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "[cache]\n", '[cache]\nmaterialize = "auto"\n')
    pipeline = open_pipeline(tiny, tmp_path / "out")
    shapes = pipeline.check()
    undecided = [n.chain for n in chain_needs(pipeline.workspace, pipeline.source, shapes)]
    assert 0 == undecided[0] < undecided[1] < undecided[2]
    decided = chain_needs(pipeline.workspace, pipeline.source, shapes, {1: True, 2: False})
    assert decided[1].chain == 0 < decided[2].chain < undecided[2]


def test_a_module_that_cannot_be_counted_is_measured_in_a_chain_too(
    tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "nets.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, in_channels, look):\n"
        "        super().__init__()\n"
        "        self.conv, self.look = nn.Conv2d(in_channels, 64, 3, padding=1), look\n"
        "    def forward(self, x):\n"
        "        if self.look:\n"
        "            x.sum().item()\n"
        "        return self.conv(x)\n"
    )
    edit(tiny, "[cache]\n", '[cache]\nmaterialize = "never"\n')
    edit(tiny, "[extract]\nbatch = 50", "[extract]\nbatch = 20000")
    build = 'build = "residual"\noptions = { stem = 4, channels = 6 }'
    chains = {}
    for look in ("true", "false"):
        edit(tiny, build, f'build = "nets:Net"\noptions = {{ look = {look} }}')
        build = f'build = "nets:Net"\noptions = {{ look = {look} }}'
        pipeline = open_pipeline(tiny, tmp_path / look)
        needs = chain_needs(pipeline.workspace, pipeline.source, pipeline.check())
        chains[look] = needs[1].chain
    # 20 000 patches of 64 × 4 × 4 values are 82 MB.
    assert chains["false"] > 82_000_000
    assert chains["true"] > 0.9 * chains["false"]


def test_storing_is_not_chosen_where_the_disk_budget_has_no_room(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from gim_stagewise.stage import settle
    from gim_stagewise.stage.choose import measure_choice

    # Computing is slow, so that only room can speak against storing.
    def slow(*args: object, **options: object) -> object:
        choice, values = measure_choice(*args, **options)  # type: ignore[arg-type]
        return replace(choice, compute=1.0), values

    monkeypatch.setattr(settle, "measure_choice", slow)
    edit(tiny, "[cache]\n", '[cache]\nmaterialize = "auto"\n')
    full = plan_pipeline(open_pipeline(tiny, tmp_path / "x"))
    assert [stage.choice and stage.choice.store for stage in full.stages] == [True, True, None]
    sizes = full.disk.caches
    allowed = sum(cache.bytes for cache in sizes) - (sizes[1].bytes - sizes[1].pooled) // 2
    plan = plan_pipeline(open_pipeline(tiny, tmp_path / "x", disk=allowed))
    assert [stage.choice and stage.choice.store for stage in plan.stages] == [True, False, None]
    for attempt in range(2):
        result = open_pipeline(tiny, tmp_path / "out", disk=allowed).run()
        assert any(stage.extracted for stage in result.stages) is (attempt == 0)
    stored = [Cache(tmp_path / "out" / f"m{index}.zarr").materialized for index in (1, 2, 3)]
    assert stored == [True, False, True]
    choice = Cache(tmp_path / "out" / "m2.zarr").manifest.choice
    assert choice is not None
    assert choice["room"] is not None


@pytest.mark.slow
def test_a_proof_has_the_same_micro_batch_both_ways(tiny: Path, tmp_path: Path) -> None:
    edit(tiny, "[train]\n", '[train]\nmicro_batch = "auto"\n')
    edit(tiny, "[extract]\nbatch = 50", "[extract]\nbatch = 100000")
    pipeline = open_pipeline(tiny, tmp_path / "x")
    needs = chain_needs(
        replace(pipeline.workspace, config=_never(pipeline)), pipeline.source, pipeline.check()
    )
    # Enough for every forward, and little beside the chain that computes inputs.
    room = max(one.chain for one in needs) + 30_000_000
    proofs = prove(open_pipeline(tiny, tmp_path / "x", device=max(room, 200_000_000)))
    assert all(proof.equal for proof in proofs)


def _never(pipeline: Pipeline):  # type: ignore[no-untyped-def]
    modules = {
        index: module.model_copy(
            update={"cache": module.cache.model_copy(update={"materialize": "never"})}
        )
        for index, module in pipeline.config.module.items()
    }
    return pipeline.config.model_copy(update={"module": modules})


@pytest.mark.parametrize("precision", ["uint8", "float32"])
def test_a_block_on_its_way_takes_no_more_than_is_counted(
    tiny: Path, tmp_path: Path, precision: str
) -> None:
    """Of an input that is stored as bytes, and becomes floats when it is read."""
    edit(tiny, "chunk = 7", f'chunk = 40\nprecision = "{precision}"\nstored_operation = "none"')
    edit(tiny, "channels = 6", "channels = 32")
    pipeline = open_pipeline(tiny, tmp_path / "out")
    pipeline.run(until=2)
    stage, manifest = pipeline.stage(2), read_manifest(tmp_path / "out" / "m2.zarr")
    weights = stage.load_weights()
    worker = stage.outputs.block_job(weights, manifest, tmp_path / "staging").open(stage.source)
    block, *_ = manifest.layout.blocks(stage.source)
    (tmp_path / "staging").mkdir()
    worker(block)
    tracemalloc.start()
    try:
        worker(block)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    inputs = 4 * 40 * 25 * 32 * 4 * 4  # float32 of [sample, row * column, channel, height, width]
    assert inputs < peak <= stage.needs.block


def test_a_chunk_of_little_is_not_made_from_much() -> None:
    small, large = 1000, 1_000_000
    assert auto_chunk(small) == auto_chunk(small, small) == 4000
    assert auto_chunk(small, large) == 64
    assert auto_chunk(small, 100_000_000) == 1
