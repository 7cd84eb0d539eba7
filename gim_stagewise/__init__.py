"""Train deep networks module by module through cached activations.

>>> from gim_stagewise import Pipeline, load_encoder, open_cache
>>> result = Pipeline.from_file("pipelines/digits.toml").run()  # doctest: +SKIP
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gim_stagewise.cache import open_cache, open_tiled_cache
    from gim_stagewise.memory import Budget
    from gim_stagewise.pipeline import Pipeline
    from gim_stagewise.stage.encoder import load_encoder
    from gim_stagewise.stage.extraction_plan import Workers

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Pipeline",
    "Workers",
    "__version__",
    "load_encoder",
    "open_cache",
    "open_tiled_cache",
]

_PLACES = {
    "Budget": "gim_stagewise.memory",
    "Pipeline": "gim_stagewise.pipeline",
    "Workers": "gim_stagewise.stage.extraction_plan",
    "load_encoder": "gim_stagewise.stage.encoder",
    "open_cache": "gim_stagewise.cache",
    "open_tiled_cache": "gim_stagewise.cache",
}


def __getattr__(name: str) -> Any:
    # Imported when first used: torch takes seconds, and `gim-stage --help` needs none of it.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_PLACES[name]), name)


def __dir__() -> list[str]:
    # What was not used yet is no attribute; completion shall find it.
    return sorted({*globals(), *__all__})
