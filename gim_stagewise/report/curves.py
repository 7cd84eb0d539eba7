"""Training and validation curves of all stages of a run, as in the paper's Figure 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from gim_stagewise.errors import CacheNotFoundError, ConfigError
from gim_stagewise.stage.metrics import read_metrics


def plot_curves(folder: str | Path, target: str | Path | None = None) -> Path:
    """Draw the losses of every stage over its epochs.

    Parameters
    ----------
    folder : str or Path
        Folder of a run, with ``logs/m1/metrics.jsonl`` and so on.
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
    logs = sorted(folder.glob("logs/m*/metrics.jsonl"), key=lambda file: int(file.parent.name[1:]))
    if not logs:
        raise CacheNotFoundError(f"no logs below {folder / 'logs'}; give the folder of a run")
    figure = matplotlib_figure(4 * len(logs), 3.4)
    panels = figure.subplots(1, len(logs), squeeze=False)[0]
    for panel, file in zip(panels, logs, strict=True):
        epochs = [line for line in read_metrics(file) if "validation_loss" in line]
        numbers = [line["epoch"] for line in epochs]
        for name, style in (("train_loss", "-"), ("validation_loss", "--")):
            label = name.removesuffix("_loss")
            panel.plot(numbers, [line[name] for line in epochs], style, marker=".", label=label)
        panel.set_title(f"module {file.parent.name[1:]}")
        panel.set_xlabel("epoch")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("loss (nats)")
    panels[-1].legend()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=120, format="png")
    return target


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
