"""The rows of a sweep that are missing: `<folder>/rows/<variant>/<video>.<settings>.<metric>.csv`, each written whole.

`settings` is the beginning of the fingerprint of all that decides the pixels, so rows never outlive their video.
"""
from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from evaluation.metrics.catalogue import EVERY
from evaluation.metrics.measuring import measure
from evaluation.metrics.protocol import Metric, VideoInfo
from evaluation.metrics.table import Row, read_ends, read_table, write_csv
from evaluation.study.sources import chunk_layout
from evaluation.sweep.make import Task
from evaluation.sweep.work import Unit
from pipeline.render import Job, is_finished
from utils.outputs import reason
from utils.video import open_video

logger = logging.getLogger(__name__)

ROWS = "rows"
DIGITS = 8


class MeasureError(ValueError):
    """Metrics that gave no values; the message says why."""


def measure_units(folder: Path, task: Task, metrics: Sequence[Metric]) -> list[Unit]:
    """One unit a video: it is decoded once for all metrics that lack rows."""
    return [
        Unit(
            unit_name(task.variant.name, job.stem),
            lambda job=job: not _missing(folder, task, job, metrics),
            lambda job=job: _measure(folder, task, job, metrics),
            lambda job=job: is_finished(task.output, job),
        )
        for job in task.jobs
    ]


def unit_name(variant: str, stem: str) -> str:
    """What the unit of one video is called."""
    return f"measure.{variant}.{stem}"


def read_rows(folder: Path, task: Task, job: Job, metrics: Sequence[Metric]) -> list[Row]:
    """What is known of one video, errors of `metrics` included; values of others that an earlier run measured, too.

    Raises: MeasureError for a damaged table.
    """
    asked, rows = [metric.name for metric in metrics], []
    for name in dict.fromkeys((*asked, *EVERY)):
        try:
            found = read_table(rows_path(folder, task, job, name))
        except ValueError as error:
            raise MeasureError(f"{error} Delete it: the same command measures its video again.") from error
        rows += [row for row in found if name in asked or not row.error]
    return rows


def rows_path(folder: Path, task: Task, job: Job, metric: str) -> Path:
    return folder / ROWS / task.variant.name / f"{job.stem}.{job.fingerprint[:DIGITS]}.{metric}.csv"


def _missing(folder: Path, task: Task, job: Job, metrics: Sequence[Metric]) -> list[Metric]:
    """Metrics without rows, or whose rows end in a failure, or were made by another protocol."""
    def is_there(metric: Metric) -> bool:
        try:
            rows = read_ends(rows_path(folder, task, job, metric.name))  # written whole, an error last
        except ValueError as error:
            logger.warning("measured again, since its table is damaged: %s", error)
            return False
        return bool(rows) and all(row.protocol == metric.protocol and not row.failed for row in rows)

    return [metric for metric in metrics if not is_there(metric)]


def _measure(folder: Path, task: Task, job: Job, metrics: Sequence[Metric]) -> None:
    """Measure one video; what is wrong with it becomes a row that says so, and is raised."""
    missing, errors = _missing(folder, task, job, metrics), []
    values, failed = _values(task, job, missing)
    for metric in missing:
        def row(name: str, granularity: str, start_s: float | None, value: float | None, error: str = "",
                protocol: str = metric.protocol) -> Row:
            who = f"{task.variant.name}/{job.stem}.mp4", task.variant.name, job.item.prompt, str(job.seed.seed)
            return Row(*who, name, granularity, start_s, value, protocol, error)

        rows = [row(v.metric, v.granularity, v.start_s, v.value) for v in values.get(metric.name, ())]
        if metric.name in failed:
            rows.append(row(metric.reports[0], "", None, None, failed[metric.name]))
            errors += [failed[metric.name]] if rows[-1].failed else []
        path = rows_path(folder, task, job, metric.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_csv(rows, path)
    if errors:
        raise MeasureError("; ".join(dict.fromkeys(errors)))


def _values(task: Task, job: Job, metrics: Sequence[Metric]) -> tuple[dict, dict[str, str]]:
    """Values and errors, both by metric; a file that cannot be read is an error of every metric."""
    path = task.output.video_path(job.stem)
    try:
        if not is_finished(task.output, job):
            raise MeasureError("the video was not made")
        with open_video(path) as stream:
            info = VideoInfo(
                path.name, stream.fps, stream.height, stream.width, job.item.prompt, chunk_layout(task.plan),
            )
            measured = measure(stream.frames, info, metrics)
    except (ValueError, OSError) as error:
        return {}, dict.fromkeys((metric.name for metric in metrics), reason(error))
    return measured.values, measured.errors
