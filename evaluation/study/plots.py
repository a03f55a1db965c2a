"""Curves over time, second by second: one line a method, with a 95 % band. Needs matplotlib."""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np

from evaluation.study.results import Saved
from evaluation.study.scores import pace_name
from evaluation.study.statistics import means_and_ends
from utils.config import ConfigError

PANELS: dict[str, tuple[Callable[[dict], list], bool]] = {  # what is drawn, and whether that are shares of frames
    "background drift (0..1)": (lambda row: row["curves"]["background_drift"], False),
    "colour right (share of frames)": (lambda row: row["curves"]["colour"], True),
    "shape right (share of frames)": (lambda row: row["curves"]["shape"], True),
    "speed (pixels a second)": (lambda row: row["curves"][pace_name(row)], False),
}


def draw_curves(saved: Saved, path: Path) -> None:
    """Write a PNG of every panel.

    Raises: ConfigError if matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError(
            "the curves need matplotlib, which is not installed. Get it with: pip install 'deep-forcing[evaluation]'"
        ) from error
    figure = Figure(figsize=(14, 9), layout="constrained")
    for axes, (title, (curve, shares)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for index, (name, rows) in enumerate(saved.rows.items()):
            mean, low, high = means_and_ends([curve(row) for row in rows], shares=shares)
            seconds = np.arange(len(mean)) + 0.5
            style = ("-", "--", ":")[index // 10 % 3]
            axes.plot(seconds, mean, style, label=name, linewidth=1.5, color=f"C{index % 10}")
            axes.fill_between(seconds, low, high, alpha=0.12, linewidth=0, color=f"C{index % 10}")
        axes.set_title(title)
        axes.set_xlabel("seconds")
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")
    figure.savefig(path, dpi=110)
