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
        self.protocol([method], name, protocol)
        for row in self._of(method, name, protocol):
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
        name = MetricName(metric, granularity)
        self.protocol([method], name)
        for row in self._of(method, name):
            if row.start_s is not None and row.value is not None:
                found.setdefault(row.video, {})[row.start_s] = row.value
        return found

    def metrics_over_time(self, granularity: str) -> list[str]:
        """Metrics that have a value for every window of this kind, in the order of the table."""
        return list(dict.fromkeys(
            row.metric for rows in self._rows.values() for row in rows[:1]
            if row.granularity == granularity and row.start_s is not None
        ))

    def prompts(self, method: str, name: MetricName, protocol: str = "") -> set[str]:
        """Those that the mean is over."""
        return {self._prompts.get(video, video) for video in self.per_video(method, name, protocol)}

    def protocol(self, methods: Sequence[str], name: MetricName, protocol: str = "") -> str:
        """How the number of these methods was made; empty if none has it.

        Raises: ConfigError if it was made in several ways: their numbers are not comparable.
        """
        found = self.protocols(methods, name, protocol)
        if len(found) > 1:
            raise ConfigError(
                f"{name.metric}@{name.granularity} of {', '.join(methods)} was measured by {len(found)} protocols "
                f"({'; '.join(found)}), which are not comparable. "
                "Name a part of the one that is meant as the column's protocol."
            )
        return "".join(found)

    def protocols(self, methods: Sequence[str], name: MetricName, protocol: str = "") -> list[str]:
        """All by which it was made; `protocol` is a part of those meant."""
        return sorted({row.protocol for method in methods for row in self._of(method, name, protocol)})

    def _by_prompt(self, videos: Mapping[str, float | list[float]]) -> list[np.ndarray]:
        """Means over each prompt's videos of what they know; NaN where none does."""
        found: dict[str, list] = {}
        for video, values in videos.items():
            found.setdefault(self._prompts.get(video, video), []).append(values)
        return [means(values) for values in found.values()]

    def _of(self, method: str, name: MetricName, protocol: str = "") -> list[Row]:
        rows = self._rows.get((method, name.metric, name.granularity), ())
        return [row for row in rows if protocol in row.protocol]
