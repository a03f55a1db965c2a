"""From the tidy table to the numbers that tables, figures and the page show. A metric is called name@granularity,
or name@granularity:start for the window that begins at `start` seconds.

Seeds of one prompt are no independent samples: each prompt is averaged first, and intervals are over prompts. A video
whose prompt is not known stands for itself.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from evaluation.metrics.catalogue import share_names
from evaluation.metrics.table import Row
from evaluation.study.statistics import Interval, means, means_and_ends
from utils.config import ConfigError


@dataclass(frozen=True)
class MetricName:
    """What stands left and right of the @."""

    metric: str
    granularity: str
    start_s: float | None = None  # None: all windows, averaged

    @classmethod
    def parse(cls, text: str) -> MetricName:
        metric, _, rest = text.partition("@")
        granularity, colon, start = rest.partition(":")
        return cls(metric, granularity, float(start) if colon else None)

    def fits(self, row: Row) -> bool:
        return (row.metric, row.granularity) == (self.metric, self.granularity) and row.value is not None and (
            self.start_s is None or row.start_s == self.start_s
        )


@dataclass(frozen=True)
class Curve:
    """Mean over the prompts, window by window, with its 95 % band; NaN where none knows."""

    start_s: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


class Numbers:
    """The tidy table, found by method and metric."""

    def __init__(self, rows: Sequence[Row]):
        self._rows: dict[tuple[str, str, str], list[Row]] = {}
        self._prompts = {row.video: row.prompt for row in rows if row.prompt}
        for row in rows:
            self._rows.setdefault((row.method, row.metric, row.granularity), []).append(row)

    def per_video(self, method: str, name: MetricName, protocol: str = "") -> dict[str, float]:
        """One number a video: the mean over the windows that `name` means, made by a protocol that holds `protocol`.

        Raises: ConfigError if that leaves several protocols: their numbers are not comparable.
        """
        found: dict[str, list[float]] = {}
        for row in self._of(method, name.metric, name.granularity, protocol):
            if name.fits(row):
                found.setdefault(row.video, []).append(row.value)
        return {video: float(np.mean(values)) for video, values in found.items()}

    def mean(self, method: str, name: MetricName, protocol: str = "") -> Interval | None:
        """The mean over the prompts with its 95 % interval; None if no video has the number."""
        values = self._by_prompt(self.per_video(method, name, protocol))
        return Interval(*means_and_ends(values, shares=name.metric in share_names()).tolist()) if values else None

    def curve(self, method: str, metric: str, granularity: str) -> Curve | None:
        """None if no video has one."""
        videos = self.curves(method, metric, granularity)
        if not videos:
            return None
        starts = sorted({start for curve in videos.values() for start in curve})
        values = self._by_prompt({
            video: [curve.get(start, np.nan) for start in starts] for video, curve in videos.items()
        })
        return Curve(starts, *means_and_ends(values, shares=metric in share_names()).tolist())

    def curves(self, method: str, metric: str, granularity: str) -> dict[str, dict[float, float]]:
        """video -> start_s -> value."""
        found: dict[str, dict[float, float]] = {}
        for row in self._of(method, metric, granularity):
            if row.start_s is not None and row.value is not None:
                found.setdefault(row.video, {})[row.start_s] = row.value
        return found

    def metrics_over_time(self, granularity: str) -> list[str]:
        """Metrics that have a value for every window of this kind, in the order of the table."""
        return list(dict.fromkeys(
            row.metric for rows in self._rows.values() for row in rows[:1]
            if row.granularity == granularity and row.start_s is not None
        ))

    def protocol(self, name: MetricName, protocol: str = "") -> str:
        """How the number was made; empty if nobody has it."""
        return "; ".join(self.protocols(name, protocol))

    def protocols(self, name: MetricName, protocol: str = "") -> list[str]:
        """All by which it was made; `protocol` is a part of those meant."""
        return sorted({row.protocol for (_, metric, granularity), rows in self._rows.items() for row in rows
                       if (metric, granularity) == (name.metric, name.granularity) and protocol in row.protocol})

    def _by_prompt(self, videos: Mapping[str, float | list[float]]) -> list[np.ndarray]:
        """Means over each prompt's videos of what they know; NaN where none does."""
        found: dict[str, list] = {}
        for video, values in videos.items():
            found.setdefault(self._prompts.get(video, video), []).append(values)
        return [means(values) for values in found.values()]

    def _of(self, method: str, metric: str, granularity: str, protocol: str = "") -> list[Row]:
        rows = [row for row in self._rows.get((method, metric, granularity), ()) if protocol in row.protocol]
        protocols = sorted({row.protocol for row in rows})
        if len(protocols) > 1:
            raise ConfigError(
                f"{metric}@{granularity} of {method} was measured by {len(protocols)} protocols "
                f"({'; '.join(protocols)}), which are not comparable. "
                "Name a part of the one that is meant as the column's protocol."
            )
        return rows
