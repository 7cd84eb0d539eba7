"""Probe scores that are known already: ``probe.json`` in a run's folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from gim_stagewise.cache import Digest
from gim_stagewise.durable import json_checksum, read_checked_json, write_json
from gim_stagewise.errors import CorruptCacheError
from gim_stagewise.stage.classifier import Accuracy
from gim_stagewise.stage.probe import ProbeScores
from gim_stagewise.stage.workspace import Workspace

# To be raised when probes are computed in another way.
VERSION = 5


def remembered_scores(
    space: Workspace, features: list[str], compute: Callable[[], list[ProbeScores]]
) -> list[ProbeScores]:
    """Scores of an earlier run, if they are of the same features; else computed, and kept.

    Parameters
    ----------
    space : Workspace
    features : list of str
        Digests of all that features come from: the dataset, modules and caches.
    compute : callable
    """
    config = space.config
    key = Digest.of(
        {
            "version": VERSION,
            "features": features,
            "probe": config.probe.model_dump(mode="json"),
            "grid_crop": config.augment.grid_crop,
            "extract": config.extract.model_dump(mode="json"),
            "modules": [[own.build, own.options] for own in config.module.values()],
            "pool": [config.stored_pool(n) for n in config.module] if config.dense else None,
            "seed": config.seed,
        }
    ).value
    path = space.folder / "probe.json"
    try:
        content = read_checked_json(path)
        if content["key"] == key:
            return [_from_json(own) for own in content["scores"]]
    except (FileNotFoundError, CorruptCacheError, KeyError, TypeError):
        pass  # computed again
    scores = compute()
    content = {"key": key, "scores": [asdict(own) for own in scores]}
    write_json(path, content | {"checksum": json_checksum(content)})
    return scores


def _from_json(content: dict[str, Any]) -> ProbeScores:
    trained, random = (
        [None if own is None else Accuracy(**own) for own in content[name]]
        for name in ("trained", "random")
    )
    baselines = {name: Accuracy(**own) for name, own in content["baselines"].items()}
    return ProbeScores(content["labels"], trained, random, baselines)
