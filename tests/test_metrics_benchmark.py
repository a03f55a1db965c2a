"""Times of the metrics, by a wound clock."""
from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import pytest

from benchmarks import metrics
from utils.config import ConfigError

STARTS_S = [5.0, 5.5, 5.0, 4.8, 4.9, 5.3]  # of the processes, run by run: what is waited for differs by -0.5, 0.2, -0.4


def wind(monkeypatch: pytest.MonkeyPatch, *, copy_s: float) -> None:
    """A run takes its start and `copy_s` a copy, and finds a table that nobody wrote to before."""
    now, starts = [0.0], iter(STARTS_S)

    def measure_videos(videos, names, choices, table: Path, *, workers: int) -> None:
        assert not table.exists()
        table.touch()
        now[0] += next(starts) + copy_s * len(videos)

    monkeypatch.setattr(metrics, "measure_videos", measure_videos)
    monkeypatch.setattr(metrics, "time", Mock(perf_counter=lambda: now[0]))


def test_the_median_of_several_runs_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two processes: four copies more, of 3 s each, less 0.4 s by which the second of two starts was late."""
    wind(monkeypatch, copy_s=3)
    assert metrics.time_together(Path("video.mp4"), ["picture"], 2) == pytest.approx(4 * 3 - 0.4)


def test_a_video_that_drowns_in_the_start_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    wind(monkeypatch, copy_s=0.05)
    with pytest.raises(ConfigError, match=r"too short to be timed: 4 copies more took -0.30 to 0.40 s longer. Give"):
        metrics.time_together(Path("video.mp4"), ["picture"], 2)
