"""The record of a run: ``run.json`` in its folder, and the same on stdout with ``--json``."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from typing import Any

import torch
import zarr

from gim_stagewise import __version__
from gim_stagewise.durable import json_checksum, write_json
from gim_stagewise.lock import exclusive
from gim_stagewise.pipeline import Pipeline, RunResult


def run_record(result: RunResult) -> dict[str, Any]:
    """A run as plain JSON: losses in nats, sizes in bytes, accuracies in [0, 1], seconds.

    Accuracies are null where the dataset has no labels, caches where all modules are trained in one
    step, losses of modules without an objective.
    """
    modules = [
        {
            "module": stage.module,
            "state": "frozen" if stage.cache is None else "sealed",
            "trained": stage.trained,
            "extracted": stage.extracted,
            "epochs": stage.record.epochs,
            "best_epoch": stage.record.best_epoch,
            "train_loss": stage.record.train_loss,
            "validation_loss": stage.record.validation_loss,
            "train_seconds": stage.record.seconds,
            "probe_accuracy": stage.probe_accuracy,
            "probe_validation_accuracy": stage.probe_validation_accuracy,
            "random_probe_accuracy": stage.random_probe_accuracy,
            "cache": None if stage.cache is None else str(stage.cache),
            "cache_bytes": stage.cache_bytes,
            "micro_batch": stage.record.micro_batch,
            "projected_mem": stage.record.projected_mem,
            "measured_mem": stage.record.measured_mem,
            "shuffle_quality": stage.record.shuffle_quality,
        }
        for stage in result.stages
    ]
    return {
        "pipeline": result.pipeline,
        "mode": result.mode,
        "folder": str(result.folder),
        "modules": modules,
        "raw_probe_accuracy": result.raw_probe_accuracy,
        "statistics_probe_accuracy": result.statistics_probe_accuracy,
        "skipped": result.skipped,
        "seconds": result.seconds,
    }


def versions() -> dict[str, str]:
    """What results depend on, besides this package."""
    return {
        "gim-stagewise": __version__,
        "torch": torch.__version__,
        "zarr": zarr.__version__,
        "python": platform.python_version(),
    }


def save_record(pipeline: Pipeline, result: RunResult) -> dict[str, Any]:
    """Write ``run.json`` with the record and the conditions it was made under; returns it."""
    record = run_record(result) | {
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": str(pipeline.workspace.device),
        "seed": pipeline.config.seed,
        "probe": pipeline.config.probe.model_dump(mode="json"),
        "versions": versions(),
    }
    with exclusive(pipeline.workspace.folder):
        write_json(pipeline.workspace.record_path, record | {"checksum": json_checksum(record)})
    return record
