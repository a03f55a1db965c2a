"""Curves as a PNG. Needs matplotlib, the optional extra `evaluation`."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from utils.figures import saved_figure

Line = tuple[Sequence[float], Sequence[float]]  # x and y of each point


@dataclass(frozen=True)
class Panel:
    """One diagram."""

    title: str
    x_label: str
    y_label: str
    lines: dict[str, Line]
    logarithmic_x: bool = False


def draw(panels: Sequence[Panel], path: Path) -> None:
    """Write the panels side by side.

    Raises: ConfigError if matplotlib is not installed.
    """
    with saved_figure(path, (6.5 * len(panels), 4.5)) as figure:
        for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False).flat, panels, strict=True):
            for name, (x, y) in panel.lines.items():
                axes.plot(x, y, "o-" if len(x) < 50 else "-", label=name, linewidth=1.5, markersize=4)
            if panel.logarithmic_x:
                axes.set_xscale("log")
                ticks = sorted({value for x, _ in panel.lines.values() for value in x})
                axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
                axes.minorticks_off()
            axes.set_ylim(0, 1.2 * max((value for _, y in panel.lines.values() for value in y), default=1))
            axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
            axes.grid(alpha=0.3)
            axes.legend(fontsize="small")
