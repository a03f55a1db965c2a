"""Curves over time, second by second: one line a method, with a 95 % band. Needs matplotlib."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evaluation.study.results import Saved
from evaluation.study.scores import pace_name
from evaluation.study.statistics import means_and_ends
from utils.figures import saved_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

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
    with saved_figure(path, (14, 9)) as figure:
        for axes, (title, (curve, shares)) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
            for index, (name, rows) in enumerate(saved.rows.items()):
                ends = means_and_ends([curve(row) for row in rows], shares=shares)
                seconds = np.arange(ends.shape[1]) + 0.5
                draw_band(axes, index, name, seconds, ends)
            axes.set_title(title)
            axes.set_xlabel("seconds")
            axes.grid(alpha=0.3)
        handles, labels = figure.axes[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, fontsize="small")


def draw_band(
    axes: Axes, index: int, name: str, moments: Sequence[float], mean_and_ends: Sequence[Sequence[float]],
) -> None:
    """The line of the `index`-th method: its mean over time, with its low and high ends around it."""
    mean, low, high = mean_and_ends
    style, colour = ("-", "--", ":")[index // 10 % 3], f"C{index % 10}"
    axes.plot(moments, mean, style, label=name, color=colour, linewidth=1.5)
    axes.fill_between(moments, low, high, color=colour, alpha=0.12, linewidth=0)
