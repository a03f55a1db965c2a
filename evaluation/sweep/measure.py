"""The rows of a sweep that are missing: `<folder>/rows/<variant>/<prompt>.<metric>.csv`, each written whole."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from evaluation.metrics.measuring import FILE, content_of, measure_file
from evaluation.metrics.protocol import Metric
from evaluation.metrics.table import Row, read_table, write_csv
from evaluation.metrics.videos import Video
from evaluation.study.sources import chunk_layout
from evaluation.sweep.make import Task
from evaluation.sweep.work import Unit
from pipeline.render import Job, is_finished

ROWS = "rows"


class MeasureError(ValueError):
    """Metrics that gave no values; the message says why."""


def measure_units(folder: Path, task: Task, metrics: Sequence[Metric]) -> list[Unit]:
    """One unit a video: it is decoded once for all metrics that lack rows."""
    return [
        Unit(
            f"measure.{task.variant.name}.{job.stem}",
            lambda job=job: not _missing(folder, task, job, metrics),
            lambda job=job: _measure(folder, task, job, metrics),
        )
        for job in task.jobs
    ]


def read_rows(folder: Path, task: Task, job: Job, metrics: Sequence[Metric]) -> list[Row]:
    """What is known of one video, errors included."""
    return [row for metric in metrics for row in read_table(rows_path(folder, task, job, metric))]


def rows_path(folder: Path, task: Task, job: Job, metric: Metric) -> Path:
    return folder / ROWS / task.variant.name / f"{job.stem}.{metric.name}.csv"


def _missing(folder: Path, task: Task, job: Job, metrics: Sequence[Metric]) -> list[Metric]:
    """Metrics without rows, or whose rows are an error, or were made by another protocol."""
    def is_there(metric: Metric) -> bool:
        rows = [row for row in read_table(rows_path(folder, task, job, metric)) if row.metric != FILE]
        return bool(rows) and all(row.protocol == metric.protocol and not row.error for row in rows)

    return [metric for metric in metrics if not is_there(metric)]


def _measure(folder: Path, task: Task, job: Job, metrics: Sequence[Metric]) -> None:
    """Measure one video; what is wrong with it becomes a row that says so, and is raised."""
    path = task.output.video_path(job.stem)
    video = Video(path, task.variant.name, job.item.text, str(job.seed.seed), chunk_layout(task.plan))
    errors = []
    for metric in (missing := _missing(folder, task, job, metrics)):
        rows_path(folder, task, job, metric).parent.mkdir(parents=True, exist_ok=True)
    if not is_finished(task.output, job):
        error = "the video was not made"
        found = [Row(video.name, video.method, video.prompt, video.seed, FILE, "", None, None, "", error)]
    else:
        found = measure_file(video, missing, content_of(path))
    for metric in missing:
        rows = [row for row in found if row.protocol == metric.protocol or (row.metric == FILE and row.error)]
        write_csv(rows, rows_path(folder, task, job, metric))
        errors += [row.error for row in rows if row.error]
    if errors:
        raise MeasureError("; ".join(dict.fromkeys(errors)))
