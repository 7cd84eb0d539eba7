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
from gim_stagewise.probe.probe import ProbeScores


def run_record(result: RunResult) -> dict[str, Any]:
    """A run as plain JSON: losses in nats, sizes in bytes, accuracies in [0, 1], seconds.

    Accuracies of a module are those for the first labels that the dataset has, and null if it has
    none; ``probes`` has all. Caches are null where all modules are trained in one step, losses of
    modules without an objective.
    """
    first = result.scores()
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
            "probe_accuracy": result.accuracy(stage.module),
            "probe_validation_accuracy": _validation(first, stage.module),
            "random_probe_accuracy": result.accuracy(stage.module, random=True),
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
        "probes": [
            {
                "labels": scores.labels,
                "accuracies": [own and own.test for own in scores.trained],
                "validation_accuracies": [own and own.validation for own in scores.trained],
                "random_accuracies": [own and own.test for own in scores.random],
                "baselines": {name: own.test for name, own in scores.baselines.items()},
            }
            for scores in result.probes
        ],
        "skipped": result.skipped,
        "notices": list(result.notices),
        "seconds": result.seconds,
    }


def _validation(scores: ProbeScores | None, module: int) -> float | None:
    found = None if scores is None else scores.trained[module - 1]
    return None if found is None else found.validation


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
