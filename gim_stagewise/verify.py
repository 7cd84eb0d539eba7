"""Check every byte of a cache, or of a whole run, and mend what can be computed again."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gim_stagewise.cache import Damage, find_damage, read_manifest, require_cache
from gim_stagewise.durable import read_checked_json
from gim_stagewise.errors import CacheNotFoundError, CorruptCacheError, PartialCacheError
from gim_stagewise.pipeline import Pipeline
from gim_stagewise.progress import Progress
from gim_stagewise.stage.checkpoint import FrozenWeights, check_checkpoint
from gim_stagewise.stage.repair import repair


@dataclass
class Verification:
    """What was checked, and what was found.

    Parameters
    ----------
    checked : list of Path
        Caches and files that were looked at.
    problems : list of (Path, str, str)
        File, kind (see `Damage`) and words.
    damage : dict
        By cache, what is wrong with its files.
    unfinished : list of Path
        Caches that were never sealed, and so could not be checked.
    """

    checked: list[Path] = field(default_factory=list)
    problems: list[tuple[Path, str, str]] = field(default_factory=list)
    damage: dict[Path, list[Damage]] = field(default_factory=dict)
    unfinished: list[Path] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        return {
            "checked": [str(path) for path in self.checked],
            "unfinished": [str(path) for path in self.unfinished],
            "problems": [
                {"file": str(file), "kind": kind, "what": what}
                for file, kind, what in self.problems
            ],
        }


def verify(path: Path, progress: Progress) -> Verification:
    """Check a cache, or everything in a run's folder.

    Raises
    ------
    CacheNotFoundError
        If there is neither.
    PartialCacheError
        If it is a cache that was never sealed.
    """
    found = Verification()
    if not path.is_dir():
        raise CacheNotFoundError(f"no cache and no run's folder at {path}")
    if (path / "zarr.json").exists() or path.suffix == ".zarr":
        require_cache(path)
        _cache(path, found, progress)
        return found
    caches = sorted(path.glob("m*.zarr"), key=_number)
    patterns = ("m*.safetensors", "checkpoints/m*.pt", "checkpoints/joint.pt", "run.json")
    others = [file for pattern in (*patterns, "probe.json") for file in path.glob(pattern)]
    if not caches and not others:
        raise CacheNotFoundError(f"no cache and no run's folder at {path}")
    for cache in caches:
        try:
            _cache(cache, found, progress)
        except PartialCacheError:
            found.unfinished.append(cache)
        except CacheNotFoundError as error:
            found.problems.append((cache / "zarr.json", "missing", str(error)))
    for file in sorted(others):
        _file(file, found)
    known = {*caches, *others}
    found.problems += [
        (file, "missing", "run.json says that it was made")
        for file in _made(path)
        if file not in known
    ]
    return found


def _made(folder: Path) -> list[Path]:
    """What must be in a run's folder by its record."""
    try:
        modules = read_checked_json(folder / "run.json")["modules"]
        made = [(f"m{own['module']}", own["state"] == "sealed") for own in modules]
    except (OSError, CorruptCacheError, KeyError, TypeError):
        return []  # said where the file itself is checked, if it is there
    return [
        folder / f"{name}{suffix}"
        for name, sealed in made
        for suffix in ((".safetensors", ".zarr") if sealed else (".safetensors",))
    ]


def _number(cache: Path) -> tuple[int, str]:
    """The module's number, to sort by: m9 comes before m10."""
    digits = cache.stem.removeprefix("m")
    return (int(digits) if digits.isdecimal() else 0, cache.name)


def _cache(path: Path, found: Verification, progress: Progress) -> None:
    try:
        damage = find_damage(path, progress)
    except CorruptCacheError as error:
        found.checked.append(path)
        found.problems.append((path / "zarr.json", "altered", str(error)))
        return
    found.checked.append(path)
    if damage:
        found.damage[path] = damage
        found.problems += [(path / one.file, one.kind, one.what) for one in damage]


def _file(path: Path, found: Verification) -> None:
    found.checked.append(path)
    check = {".safetensors": _weights, ".pt": check_checkpoint}
    if not path.is_file():
        found.problems.append((path, "altered", "is no file"))
        return
    try:
        check.get(path.suffix, read_checked_json)(path)
    except CorruptCacheError as error:
        found.problems.append((path, "altered", str(error)))


def _weights(path: Path) -> None:
    module = FrozenWeights.load(path).module
    if path.stem != f"m{module}":
        raise CorruptCacheError(f"says that it is module {module}; was it renamed?")


def mend(pipeline: Pipeline, path: Path, damage: list[Damage]) -> None:
    """Compute again what is damaged in a cache, from its module and input beside it.

    Raises
    ------
    CacheNotFoundError, StaleCacheError, CorruptCacheError
        If what is needed is not there, or would not give what was sealed.
    """
    index = read_manifest(path).module
    if path.absolute() != pipeline.workspace.cache_path(index).absolute():
        raise CacheNotFoundError(
            f"{path} cannot be repaired where it lies: its weights and input are looked for beside "
            f"it, and it would be {pipeline.workspace.cache_path(index)}"
        )
    stage = pipeline.stage(index)
    repair(stage.outputs, stage.load_weights(), damage)
