"""Commands that do the work: run, train, extract, probe."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from gim_stagewise.cli import options


@click.command()
@options.pipeline_argument
@options.mode_option
@options.folder_option("cache/NAME, with the pipeline's name, or cache/NAME-MODE")
@click.option("--from", "start", type=int, help="Make this module and those above anew.")
@click.option("--until", type=int, help="Stop after this module.")
@options.workers_option
@options.scheduler_option
@options.allowed_mem_option
@options.allowed_host_mem_option
@options.allowed_disk_option
@options.break_lock_option
@options.device_option
@options.quiet_option
@options.verbose_option
@options.json_option
def run(
    pipeline_file: Path,
    mode: str | None,
    folder: Path | None,
    start: int | None,
    until: int | None,
    worker_count: int | None,
    scheduler: str | None,
    allowed_mem: str | None,
    allowed_host_mem: str | None,
    allowed_disk: str | None,
    device: str,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Run all stages of a pipeline FILE, then probe every module.

    What matches the file is kept; what is unfinished goes on; what is stale is made again, with
    the reason.

    \b
    Examples:
      gim-stage run pipelines/digits.toml
      gim-stage run pipelines/digits.toml --from 2 --workers 2
      gim-stage run pipelines/digits.toml --mode simultaneous
      gim-stage run pipelines/digits.toml --allowed-host-mem 2GB
    """
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.plan import smallest_budget
    from gim_stagewise.report.record import save_record
    from gim_stagewise.report.tables import ResultsTable

    progress = options.progress_for(quiet=quiet, verbose=verbose)
    workers = options.workers_from(worker_count, scheduler)
    pipeline = Pipeline.from_file(
        pipeline_file, folder=folder, device=device, progress=progress, mode=mode
    )
    with options.naming(pipeline_file):
        sizes = options.Sizes(allowed_mem, allowed_host_mem, allowed_disk)
        pipeline = options.limited(pipeline, sizes, lambda: smallest_budget(pipeline))
        result = pipeline.run(start=start, until=until, workers=workers)
    record = save_record(pipeline, result)
    options.show(record if as_json else ResultsTable(result))


@click.command()
@options.pipeline_argument
@options.mode_option
@options.folder_option("cache/NAME, with the pipeline's name, or cache/NAME-MODE")
@options.allowed_mem_option
@options.allowed_host_mem_option
@options.allowed_disk_option
@options.device_option
@options.quiet_option
@options.json_option
def plan(
    pipeline_file: Path,
    mode: str | None,
    folder: Path | None,
    allowed_mem: str | None,
    allowed_host_mem: str | None,
    allowed_disk: str | None,
    device: str,
    quiet: bool,
    as_json: bool,
) -> None:
    """Say what a pipeline FILE will need of memory, disk and work, before anything runs.

    Ends with exit code 3 if that is more than is allowed.

    \b
    Examples:
      gim-stage plan pipelines/digits.toml
      gim-stage plan pipelines/digits.toml --allowed-mem 500MB --allowed-disk 10GB
    """
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.plan import plan_joint, plan_pipeline, smallest_budget
    from gim_stagewise.report.plans import (
        joint_plan_record,
        joint_plan_report,
        plan_record,
        plan_report,
    )

    progress = options.progress_for(quiet=quiet, verbose=False)
    pipeline = Pipeline.from_file(
        pipeline_file, folder=folder, device=device, progress=progress, mode=mode
    )
    with options.naming(pipeline_file):
        sizes = options.Sizes(allowed_mem, allowed_host_mem, allowed_disk)
        pipeline = options.limited(pipeline, sizes, lambda: smallest_budget(pipeline))
        for notice in pipeline.notices:  # a plan itself lists what is left out
            progress.note(notice)
        if not pipeline.config.iterative:
            joint = plan_joint(pipeline)
            parts = joint_plan_report(joint)
            for part in [joint_plan_record(joint)] if as_json else parts:
                options.show(part)
            return
        planned = plan_pipeline(pipeline)
    if as_json:
        options.show(plan_record(planned))
        return
    for part in plan_report(planned):
        options.show(part)


@click.command()
@options.pipeline_argument
@options.folder_option("cache/NAME, with the pipeline's name, or cache/NAME-MODE")
@options.device_option
@options.quiet_option
@options.json_option
def prove(
    pipeline_file: Path, folder: Path | None, device: str, quiet: bool, as_json: bool
) -> None:
    """Show on a slice of the data that stored and computed inputs give the same weights.

    Trains each module of a pipeline FILE for a few steps twice: from stored activations, and from
    activations computed when they are read (cache.materialize = "never"). Ends with exit code 1
    if a single bit differs.

    \b
    Example:
      gim-stage prove pipelines/digits.toml
    """
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.prove import prove as prove_pipeline
    from gim_stagewise.report.plans import proof_record, proof_table

    progress = options.progress_for(quiet=quiet, verbose=False)
    pipeline = Pipeline.from_file(pipeline_file, folder=folder, device=device, progress=progress)
    with options.naming(pipeline_file):
        proofs = prove_pipeline(pipeline)
    options.show(proof_record(proofs) if as_json else proof_table(proofs))
    if not all(proof.equal for proof in proofs):
        click.echo("error: the two ways differ: this is a defect of gim-stage", err=True)
        raise SystemExit(1)


@click.command()
@options.module_option
@options.input_option
@options.pipeline_option
@options.folder_option("the input's folder, else cache/NAME")
@options.allowed_mem_option
@options.allowed_host_mem_option
@options.break_lock_option
@options.device_option
@options.force_option
@options.quiet_option
@options.verbose_option
@options.json_option
def train(
    index: int,
    input_path: Path | None,
    pipeline_file: Path | None,
    folder: Path | None,
    allowed_mem: str | None,
    allowed_host_mem: str | None,
    device: str,
    force: bool,
    quiet: bool,
    verbose: bool,
    as_json: bool,
) -> None:
    """Train one module and freeze it: writes mN.safetensors.

    \b
    Examples:
      gim-stage train --module 1 --pipeline pipelines/digits.toml
      gim-stage train --module 2 --input cache/digits/m1.zarr
    """
    from gim_stagewise.report.tables import nats
    from gim_stagewise.stage.fit import smallest_training

    progress = options.progress_for(quiet=quiet, verbose=verbose)
    pipeline = options.pipeline_from(pipeline_file, input_path, folder, device, progress)
    with options.naming(pipeline_file):
        sizes = options.Sizes(allowed_mem, allowed_host_mem)
        pipeline = options.limited(
            pipeline, sizes, lambda: smallest_training(pipeline.stage(index, input_path).needs)
        )
        if index == 1:
            pipeline.note_data()
        weights, trained = pipeline.stage(index, input_path).train(force=force)
    path = pipeline.workspace.weights_path(index)
    record = weights.record
    if as_json:
        options.show(
            {
                "module": index,
                "trained": trained,
                "weights": str(path),
                "epochs": record.epochs,
                "best_epoch": record.best_epoch,
                "train_loss": record.train_loss,
                "validation_loss": record.validation_loss,
                "seconds": record.seconds,
                "micro_batch": record.micro_batch,
                "projected_mem": record.projected_mem,
                "measured_mem": record.measured_mem,
                "shuffle_quality": record.shuffle_quality,
            }
        )
        return
    done = "trained and frozen" if trained else "nothing to do, the frozen weights match"
    click.echo(
        f"module {index}: {done}; {record.epochs} epochs, train loss {nats(record.train_loss)}, "
        f"validation loss {nats(record.validation_loss)}: {path}"
    )


@click.command()
@options.module_option
@options.input_option
@options.pipeline_option
@options.folder_option("the input's folder, else cache/NAME")
@options.workers_option
@options.scheduler_option
@options.allowed_host_mem_option
@options.break_lock_option
@options.device_option
@options.force_option
@options.quiet_option
@options.json_option
def extract(
    index: int,
    input_path: Path | None,
    pipeline_file: Path | None,
    folder: Path | None,
    worker_count: int | None,
    scheduler: str | None,
    allowed_host_mem: str | None,
    device: str,
    force: bool,
    quiet: bool,
    as_json: bool,
) -> None:
    """Store the outputs of a frozen module for the whole dataset: writes mN.zarr.

    \b
    Examples:
      gim-stage extract --module 1 --pipeline pipelines/digits.toml
      gim-stage extract --module 2 --input cache/digits/m1.zarr --workers 2
    """
    from gim_stagewise.stage.disk import folder_bytes
    from gim_stagewise.stage.extraction_plan import smallest_extraction
    from gim_stagewise.units import format_bytes

    progress = options.progress_for(quiet=quiet, verbose=False)
    workers = options.workers_from(worker_count, scheduler)
    pipeline = options.pipeline_from(pipeline_file, input_path, folder, device, progress)
    with options.naming(pipeline_file):
        sizes = options.Sizes(None, allowed_host_mem)
        pipeline = options.limited(
            pipeline, sizes, lambda: smallest_extraction(pipeline.stage(index, input_path).needs)
        )
        if index == 1:
            pipeline.note_data()
        stage = pipeline.stage(index, input_path)
        manifest, extracted = stage.extract(stage.load_weights(), force=force, workers=workers)
    path = pipeline.workspace.cache_path(index)
    size = folder_bytes(path)
    if as_json:
        options.show(
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


@click.command()
@click.option(
    "--input", "input_path", type=click.Path(path_type=Path), help="Cache of the module to probe."
)
@click.option(
    "--module", "index", type=click.IntRange(min=1), help="Or: number of the module in --dir."
)
@options.folder_option("cache")
@click.option(
    "--pooling",
    type=click.Choice(["mean", "all"]),
    help="Mean over patches, or all patch features.  [default: as in the pipeline file]",
)
@options.device_option
@options.json_option
def probe(
    input_path: Path | None,
    index: int | None,
    folder: Path | None,
    pooling: Literal["mean", "all"] | None,
    device: str,
    as_json: bool,
) -> None:
    """Say how good a cache's features are, by a linear classifier on top of them.

    The features were computed when the cache was built; the classifier runs on the CPU.

    \b
    Examples:
      gim-stage probe --input cache/digits/m3.zarr
      gim-stage probe --dir cache/digits --module 3 --pooling all
    """
    from gim_stagewise.probe.probe import probe_cache
    from gim_stagewise.report.tables import percent
    from gim_stagewise.stage.freeze import resolve_device

    if (input_path is None) == (index is None):
        raise click.UsageError("say which cache: --input CACHE, or --module N with --dir FOLDER")
    if input_path is not None and folder is not None:
        raise click.UsageError("--input names the cache; leave out --dir")
    resolve_device(device)
    path = input_path or (folder or Path("cache")) / f"m{index}.zarr"
    module, chosen, accuracy, left_out = probe_cache(path, pooling=pooling)
    if left_out:
        click.echo(left_out, err=True)
    if as_json:
        options.show({"module": module, "pooling": chosen, "probe_accuracy": accuracy})
    else:
        click.echo(f"module {module}: {percent(accuracy)} test accuracy ({chosen} pooling)")
