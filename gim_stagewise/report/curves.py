"""Training and validation curves of all stages of a run, as in the paper's Figure 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gim_stagewise.errors import CacheNotFoundError, ConfigError, CorruptCacheError
from gim_stagewise.stage.checkpoint import FrozenWeights
from gim_stagewise.stage.metrics import read_metrics

# Names and styles of the two losses of an epoch, and what a line of the log has of them.
CURVES = ("train", "validation"), ("-", "--")
_EPOCH = {f"{name}_loss" for name in CURVES[0]}


def plot_curves(folder: str | Path, target: str | Path | None = None) -> Path:
    """Draw the losses of every stage over its epochs.

    Parameters
    ----------
    folder : str or Path
        Folder of a run: of frozen weights the losses that they came by are drawn, and those of a
        training that is not finished, which ``logs/m1/metrics.jsonl`` and so on have, in gray
        beside them.
    target : str or Path, optional
        The PNG file; ``curves.png`` in the folder by default.

    Returns
    -------
    Path
        The picture.

    Raises
    ------
    CacheNotFoundError
        If the folder has no logs.
    ConfigError
        If matplotlib is not installed, or ``target`` is no name of a PNG file.
    """
    folder = Path(folder)
    target = Path(target) if target is not None else folder / "curves.png"
    if target.suffix.lower() != ".png" or target.is_dir():
        raise ConfigError(f"is {str(target)!r}, expected a file name in .png", key="--output")
    modules = sorted(int(file.parent.name[1:]) for file in folder.glob("logs/m*/metrics.jsonl"))
    if not modules:
        raise CacheNotFoundError(f"no logs below {folder / 'logs'}; give the folder of a run")
    figure = matplotlib_figure(4 * len(modules), 3.4)
    panels = figure.subplots(1, len(modules), squeeze=False)[0]
    for panel, module in zip(panels, modules, strict=True):
        logged = _logged(folder, module)
        frozen = _frozen(folder, module) or logged
        if frozen != logged:
            _draw(panel, logged, suffix=", not finished", color="lightgray")
        _draw(panel, frozen)
        panel.set_title(f"module {module}")
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
        if frozen and (frozen != logged or module == modules[-1]):
            panel.legend()
    panels[0].set_ylabel("loss (nats)")
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120, format="png")
    return target


def _logged(folder: Path, module: int) -> list[list[float]]:
    """Losses after each epoch, as the log of the last training has them."""
    lines = read_metrics(folder / "logs" / f"m{module}" / "metrics.jsonl")
    return [[line[f"{name}_loss"] for name in CURVES[0]] for line in lines if line.keys() >= _EPOCH]


def _frozen(folder: Path, module: int) -> list[list[float]]:
    """Losses after each epoch of the training that frozen weights come from, if there are any."""
    try:
        return FrozenWeights.load(folder / f"m{module}.safetensors").record.epoch_losses
    except (CacheNotFoundError, CorruptCacheError):
        return []


def _draw(panel: Any, epochs: list[list[float]], suffix: str = "", **look: Any) -> None:
    for name, style, losses in zip(*CURVES, zip(*epochs, strict=True), strict=False):
        numbers = range(1, 1 + len(losses))
        panel.plot(numbers, losses, style, marker=".", label=f"{name}{suffix}", **look)


def matplotlib_figure(width: float, height: float) -> Any:
    """An empty figure of so many inches, that belongs to no window.

    Raises
    ------
    ConfigError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("plots need matplotlib: pip install 'gim-stagewise[plot]'") from None
    return Figure(figsize=(width, height), layout="constrained")
