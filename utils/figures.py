"""Figures as PNG. They need matplotlib, the optional extra `evaluation`."""
from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from utils.config import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class NoMatplotlibError(ConfigError):
    """A figure was asked for, and matplotlib is not installed."""


@contextmanager
def saved_figure(path: Path, size: tuple[float, float], dpi: int = 110) -> Iterator[Figure]:
    """A matplotlib figure of `size` in inches that is written to `path` at the end.

    Raises: NoMatplotlibError.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise NoMatplotlibError(
            "the figures need matplotlib, which is not installed. Get it with: pip install -e '.[evaluation]'"
        ) from error
    figure = Figure(figsize=size, layout="constrained")
    yield figure
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=dpi)
