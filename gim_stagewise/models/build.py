"""From a module's table to an ``nn.Module``: built-in builders, or the user's own code.

User code is imported only when a pipeline file was given (its folder comes first on the
import path), never because a cache says so.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gim_stagewise.errors import ConfigError
from gim_stagewise.models.residual import residual_module
from gim_stagewise.seeds import derive_seed

BUILTIN: Mapping[str, Callable[..., nn.Module]] = {"residual": residual_module}


@dataclass(frozen=True)
class Builder:
    """A callable that makes a module, and a digest of the code behind it."""

    reference: str
    call: Callable[..., nn.Module]
    source_digest: str


def resolve_builder(reference: str, *, code_folder: Path | None, key: str = "build") -> Builder:
    """Find the callable that a module's ``build`` names.

    Parameters
    ----------
    reference : str
        The name of a built-in builder, or ``"package.module:callable"``.
    code_folder : Path or None
        Folder of the pipeline file, from which user code may be imported; None forbids user code.
    key : str
        What errors call the value.

    Raises
    ------
    ConfigError
        If there is no such builder, its import fails, or user code is not allowed here.
    """
    module_name, separator, attribute = reference.partition(":")
    if not separator:
        if reference in BUILTIN:
            return Builder(reference, BUILTIN[reference], _files_digest(_our_files()))
        raise ConfigError(
            f"is {reference!r}, expected one of {', '.join(map(repr, BUILTIN))} or an import "
            'path such as "my_nets:block"',
            key=key,
        )
    if code_folder is None:
        raise ConfigError(
            f"is {reference!r}, your own code, which is never imported on the word of a cache; "
            "add --pipeline FILE to name the pipeline file that it belongs to",
            key=key,
        )
    try:
        module = _import_from(module_name, code_folder)
        call = attrgetter(attribute)(module)
    except Exception as error:
        raise ConfigError(
            f"is {reference!r}, which cannot be imported ({type(error).__name__}: {error}); looked "
            f"in {code_folder.absolute()} and on Python's path",
            key=key,
        ) from error
    if not callable(call):
        raise ConfigError(f"is {reference!r}, which is not callable", key=key)
    return Builder(reference, call, _files_digest({*_our_files(), *_user_files(module)}))


def build_module(
    builder: Builder,
    options: Mapping[str, Any],
    *,
    in_channels: int,
    seed: int,
    index: int,
    key: str = "options",
) -> nn.Module:
    """Make a module with seeded initial weights.

    ``in_channels`` is handed over where the builder has a parameter of that name. The weights
    depend on (seed, index) alone; the global random state is left as it was.

    Raises
    ------
    ConfigError
        If the builder refuses the options or does not return an ``nn.Module``.
    """
    arguments = dict(options)
    if "in_channels" in inspect.signature(builder.call).parameters:
        arguments.setdefault("in_channels", in_channels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed(seed, "weights", index))
        try:
            module = builder.call(**arguments)
        except (TypeError, ValueError) as error:
            raise ConfigError(
                f"{builder.reference!r} refused {arguments}: {error}", key=key
            ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{builder.reference!r} returned {type(module).__name__}, expected a torch.nn.Module",
            key=key,
        )
    return module


def _import_from(name: str, folder: Path) -> Any:
    folder = folder.resolve()
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))
    top = name.partition(".")[0]
    loaded = sys.modules.get(top)
    if loaded is not None and any(
        (folder / f).is_file() for f in (f"{top}.py", f"{top}/__init__.py")
    ):
        origin = getattr(loaded, "__file__", None)
        if origin is None or not Path(origin).resolve().is_relative_to(folder):
            # Another pipeline's code of the same name was imported before.
            for known in [key for key in sys.modules if key == top or key.startswith(f"{top}.")]:
                del sys.modules[known]
            sys.path.remove(str(folder))
            sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    return importlib.import_module(name)


def _our_files() -> set[Path]:
    return set(Path(__file__).parent.glob("*.py"))


def _user_files(module: Any) -> set[Path]:
    """Imported files that belong to the builder: its package, or its folder if it has none."""
    origin = getattr(module, "__file__", None)
    if origin is None:
        return set()
    root = Path(origin).resolve().parent
    for _ in range(module.__name__.count(".") - (0 if hasattr(module, "__path__") else 1)):
        root = root.parent
    files = set()
    for loaded in list(sys.modules.values()):
        path = getattr(loaded, "__file__", None)
        if path and path.endswith(".py"):
            resolved = Path(path).resolve()
            if (
                resolved.is_relative_to(root)
                and "site-packages" not in resolved.relative_to(root).parts
            ):
                files.add(resolved)
    return files


def _files_digest(files: set[Path]) -> str:
    """Hash of file names and contents; where the files lie does not matter."""
    entries = sorted((file.name, hashlib.sha256(file.read_bytes()).hexdigest()) for file in files)
    return hashlib.sha256(repr(entries).encode()).hexdigest()
