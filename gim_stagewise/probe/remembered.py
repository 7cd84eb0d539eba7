"""Probe scores that are known already: ``probe.json`` in a run's folder, and in those beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gim_stagewise.cache import Digest
from gim_stagewise.durable import json_checksum, read_checked_json, write_json
from gim_stagewise.errors import CorruptCacheError
from gim_stagewise.probe.classifier import Accuracy
from gim_stagewise.probe.probe import (
    BASELINES,
    PARTS,
    RANDOM,
    TRAINED,
    Probes,
    ProbeScores,
    Rows,
)
from gim_stagewise.stage.workspace import Workspace

# To be raised when probes are computed in another way.
VERSION = 1
_NAME = "probe.json"


def remembered_scores(
    space: Workspace, probes: Probes, *, dataset: str, features: Sequence[str], fresh: Sequence[str]
) -> list[ProbeScores]:
    """Scores part by part: those of the same features that are known, the others computed and kept.

    Modules before training, and what nothing is learned for, are the same in all modes: their
    scores may be known from a run whose folder lies beside this one's.

    Parameters
    ----------
    space : Workspace
    probes : Probes
    dataset : str
        The dataset's digest.
    features : sequence of str
        Digests of all that features of trained modules come from: modules, and caches.
    fresh : sequence of str
        Digests of modules before training.

    Returns
    -------
    list of ProbeScores
        For each kind of labels; empty if there are none.
    """
    if not probes.labels:
        return []
    keys = _keys(space, dataset, list(features), list(fresh))
    path = space.folder / _NAME
    kept = _parts(path)
    found: dict[str, list[Rows]] = {}
    for name, compute in probes.parts.items():
        own = kept.get(name, {})
        if own.get("key") != keys[name]:
            own = _from_beside(space.folder, name, keys[name]) if name != TRAINED else {}
            if not own:
                own = {"key": keys[name], "rows": _as_json(compute())}
            kept[name] = own
            content = {"parts": kept}
            write_json(path, content | {"checksum": json_checksum(content)})
        found[name] = _from_json(own["rows"])
    return [
        _scores(labels, {name: rows[n] for name, rows in found.items()})
        for n, labels in enumerate(probes.labels)
    ]


def _keys(space: Workspace, dataset: str, features: list[str], fresh: list[str]) -> dict[str, str]:
    """What the scores of each part depend on."""
    config = space.config
    shared = {
        "version": VERSION,
        "dataset": dataset,
        "probe": config.probe.model_dump(mode="json"),
        "grid_crop": config.augment.grid_crop,
        "seed": config.seed,
    }
    modules = {
        "extract": config.extract.model_dump(mode="json"),
        "modules": [[own.build, own.options] for own in config.module.values()],
        "pool": [config.stored_pool(n) for n in config.module] if config.dense else None,
    }
    own: dict[str, dict[str, Any]] = {
        TRAINED: modules | {"features": features},
        RANDOM: modules | {"fresh": fresh},
        BASELINES: {},
    }
    return {name: Digest.of({"part": name} | shared | own[name]).value for name in PARTS}


def _from_beside(folder: Path, name: str, key: str) -> dict[str, Any]:
    """A part as another run has kept it; empty if none has."""
    for path in sorted(folder.absolute().parent.glob(f"*/{_NAME}")):
        own = _parts(path).get(name, {})
        if own.get("key") == key:
            return own
    return {}


def _parts(path: Path) -> dict[str, dict[str, Any]]:
    """What a file has of parts; nothing if it is not there, damaged, or of another version."""
    try:
        content: dict[str, dict[str, Any]] = read_checked_json(path)["parts"]
    except (OSError, CorruptCacheError, KeyError, TypeError):
        return {}
    return content


def _as_json(rows: list[Rows]) -> list[dict[str, Any]]:
    return [{row: own and asdict(own) for row, own in kind.items()} for kind in rows]


def _from_json(rows: list[dict[str, Any]]) -> list[Rows]:
    return [{row: own and Accuracy(**own) for row, own in kind.items()} for kind in rows]


def _scores(labels: str, rows: dict[str, Rows]) -> ProbeScores:
    baselines = rows.get(BASELINES, {})
    return ProbeScores(
        labels,
        [*rows.get(TRAINED, {}).values()],
        [*rows.get(RANDOM, {}).values()],
        {name: own for name, own in baselines.items() if own is not None},
    )
