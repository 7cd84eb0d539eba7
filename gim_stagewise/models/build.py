"""From a module's table to an ``nn.Module``: built-in builders, or the user's own code.

User code is imported only when a pipeline file was given (its folder comes first on the
import path), never because a cache says so.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import inspect
import sys
import sysconfig
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import resolve_name
from operator import attrgetter
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from gim_stagewise.errors import ConfigError
from gim_stagewise.models.residual import residual_module
from gim_stagewise.models.resnet import resnet34_module, resnet50_module
from gim_stagewise.models.sequence import conv1d_module, gru_module
from gim_stagewise.seeds import derive_seed

BUILTIN: Mapping[str, Callable[..., nn.Module]] = {
    "residual": residual_module,
    "resnet34": resnet34_module,
    "resnet50": resnet50_module,
    "conv1d": conv1d_module,
    "gru": gru_module,
}


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
            return Builder(reference, BUILTIN[reference], _our_digest())
        raise ConfigError(
            f"is {reference!r}, expected one of {', '.join(map(repr, BUILTIN))} or an import "
            'path such as "my_nets:block"',
            key=key,
        )
    if code_folder is None:
        raise ConfigError(
            f"is {reference!r}, your own code, which is never imported on the word of a cache; "
            "name the pipeline file that it belongs to: --pipeline FILE, in Python pipeline=FILE",
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
    if module not in _digests:
        # Of the code as it was imported: a file that is edited later is not what runs here.
        _digests[module] = _files_digest(_our_files() | _user_files(module, code_folder.resolve()))
    return Builder(reference, call, _digests[module])


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
    if _takes_in_channels(builder):
        arguments.setdefault("in_channels", in_channels)
    with torch.random.fork_rng(devices=[]):
        # Not `seeds.seeded`: users' code may draw on a GPU before the module is moved.
        torch.manual_seed(derive_seed(seed, "weights", index))
        try:
            with _noting_imports(set(_imported.values())):  # of what it imports only now
                module = builder.call(**arguments)
        except Exception as error:
            raise ConfigError(
                f"{builder.reference!r} refused {arguments}: {type(error).__name__}: {error}",
                key=key,
            ) from error
    if not isinstance(module, nn.Module):
        raise ConfigError(
            f"{builder.reference!r} returned {type(module).__name__}, expected a torch.nn.Module",
            key=key,
        )
    return module


def _takes_in_channels(builder: Builder) -> bool:
    try:
        return "in_channels" in inspect.signature(builder.call).parameters
    except ValueError:  # some callables written in C have no signature
        return False


# Modules that came from a pipeline's folder, by name: another pipeline in the same process may have
# modules of the same names in another folder.
_imported: dict[str, Path] = {}


def _import_from(name: str, folder: Path) -> ModuleType:
    folder = folder.resolve()
    for known, origin in list(_imported.items()):
        if origin != folder:
            sys.modules.pop(known, None)
            del _imported[known]
            if str(origin) in sys.path:
                sys.path.remove(str(origin))
    if str(folder) in sys.path:
        sys.path.remove(str(folder))
    sys.path.insert(0, str(folder))
    top = name.partition(".")[0]
    in_folder = any((folder / place).exists() for place in (f"{top}.py", top))
    namesakes = [key for key in sys.modules if key == top or key.startswith(f"{top}.")]
    files = [sys.modules[key] for key in namesakes if getattr(sys.modules[key], "__file__", None)]
    if in_folder and not all(_lies_under(module, folder) for module in files):
        # Imported from elsewhere before, by a notebook for instance; the pipeline means its own.
        for known in namesakes:
            del sys.modules[known]
    importlib.invalidate_caches()
    with _noting_imports({folder}):
        return importlib.import_module(name)


@contextmanager
def _noting_imports(folders: Collection[Path]) -> Iterator[None]:
    """Remember which modules come from these folders meanwhile."""
    before = set(sys.modules)
    try:
        yield
    finally:
        for new in set(sys.modules) - before:
            for folder in folders:
                if _lies_under(sys.modules[new], folder):
                    _imported[new] = folder


def forget_user_code() -> None:
    """Import user code anew when it is next asked for; a long-lived process may have old code."""
    for known in list(_imported):
        module = sys.modules.pop(known, None)
        if module is not None:
            _digests.pop(module, None)
        del _imported[known]


def _lies_under(module: ModuleType, folder: Path) -> bool:
    """Whether a module's code is below a folder, and not in an environment that lies there."""
    packages = getattr(module, "__path__", None)
    listed = list(packages) if isinstance(packages, Iterable) else []
    for place in [getattr(module, "__file__", None), *listed]:
        if isinstance(place, str) and (below := _below(Path(place), folder)):
            return "site-packages" not in Path(below).parts
    return False


def _below(path: Path, folder: Path) -> str:
    """Where a file lies in a folder, as it is named there or as links lead; empty if it does not.

    A link below the folder belongs to it, whatever it leads to.
    """
    for place in (path.absolute(), path.resolve()):
        if place.is_relative_to(folder):
            return place.relative_to(folder).as_posix()
    return ""


_digests: WeakKeyDictionary[ModuleType, str] = WeakKeyDictionary()


@cache
def _our_digest() -> str:
    return _files_digest(_our_files())


def _our_files() -> dict[str, Path]:
    return {f"gim_stagewise/{file.name}": file for file in Path(__file__).parent.glob("*.py")}


def _user_files(module: ModuleType, folder: Path) -> dict[str, Path]:
    """The builder's file and what it imports, at any remove, from the pipeline's folder.

    Of a module elsewhere on Python's path it is what lies there. Of one that is installed, its own
    file stands for the release it belongs to; of one that is compiled, for all that it has.
    """
    if not _lies_under(module, folder):
        origin = getattr(module, "__file__", None)
        if not origin:
            return {}
        # The folder that its outermost package lies in, as on Python's path.
        folder = Path(origin).resolve().parents[_packages_above(module)]
        if _is_installed(folder) or not origin.endswith(".py"):
            return {module.__name__: Path(origin)}
    files: dict[str, Path] = {}
    waiting = [module]
    while waiting:
        current = waiting.pop()
        origin = getattr(current, "__file__", None)
        if not origin or not origin.endswith(".py") or not _lies_under(current, folder):
            continue
        file = Path(origin).absolute()
        place = _below(file, folder)
        if place not in files:
            files[place] = file
            names = _imported_names(file, current)
            waiting += [sys.modules[name] for name in names if name in sys.modules]
            # What is imported only once a function runs is code of the builder as well.
            later = [path for name in names for path in _places(name, folder)]
            files |= _files_below(later, folder, files)
    return files


def _packages_above(module: ModuleType) -> int:
    """Packages that a module's file lies in, its own folder included if it is a package."""
    return module.__name__.count(".") + hasattr(module, "__path__")


def _is_installed(folder: Path) -> bool:
    """Whether code of others lies there, that is not edited: a release, or Python's own."""
    own = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib")}
    return bool({"site-packages", "dist-packages"} & {*folder.parts}) or folder in own


def _places(name: str, folder: Path) -> list[Path]:
    """Files in a folder that an import of that name would run."""
    stem = folder.joinpath(*name.split("."))
    found = [stem.with_suffix(".py"), stem / "__init__.py"]
    return [path for path in found if path.is_file()]


def _files_below(waiting: list[Path], folder: Path, known: Mapping[str, Path]) -> dict[str, Path]:
    """Files that are not imported yet, and what they would import, by their places."""
    files: dict[str, Path] = {}
    while waiting:
        file = waiting.pop()
        place = file.relative_to(folder).as_posix()
        if "site-packages" in Path(place).parts:
            continue
        if place in known or place in files:
            continue
        files[place] = file
        package = ".".join(Path(place).parent.parts)
        waiting += [path for name in _names_in(file, package) for path in _places(name, folder)]
    return files


def _imported_names(file: Path, module: ModuleType) -> set[str]:
    """Names of modules that a file's import statements may mean."""
    package = getattr(module, "__package__", None) or ""
    return _names_in(file, package) | ({module.__name__.rpartition(".")[0]} - {""})


def _names_in(file: Path, package: str) -> set[str]:
    names: set[str] = set()
    try:
        tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError):
        return names  # nothing can have imported it
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            relative = "." * node.level + (node.module or "")
            if node.level and not package:
                continue  # cannot have been run: there is no package to be relative to
            base = resolve_name(relative, package) if node.level else relative
            names |= {base, *(f"{base}.{alias.name}" for alias in node.names)}
    # "import a.b" runs a as well.
    return {".".join(name.split(".")[:n]) for name in names for n in range(1, 9)} - {""}


def _files_digest(files: Mapping[str, Path]) -> str:
    """Hash of contents by relative place; where the whole lies does not matter."""
    entries = [(p, hashlib.sha256(f.read_bytes()).hexdigest()) for p, f in sorted(files.items())]
    return hashlib.sha256(repr(entries).encode()).hexdigest()
