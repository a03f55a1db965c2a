"""The rows of a sweep that are missing: `<folder>/rows/<variant>/<prompt>.<metric>.json`, each written whole."""
from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from evaluation.study.sources import chunk_layout
from evaluation.sweep.make import Task
from evaluation.sweep.metrics import GROUPS, Shown
from evaluation.sweep.work import Unit
from pipeline.render import Job, is_finished, reason
from utils.config import ConfigError
from utils.files import write_atomically

ROWS = "rows"


def check_metrics(groups: Sequence[str]) -> None:
    """Raise ConfigError for a group of metrics that is not known."""
    for group in groups:
        if group not in GROUPS:
            raise ConfigError(f"metrics: {group!r} is unknown. Use some of: {', '.join(GROUPS)}.")


def rows_path(folder: Path, task: Task, job: Job, group: str) -> Path:
    return folder / ROWS / task.variant.name / f"{job.stem}.{group}.json"


def measure_units(folder: Path, task: Task, groups: Sequence[str]) -> list[Unit]:
    """One unit a video and group."""
    return [
        Unit(
            f"measure.{task.variant.name}.{job.stem}.{group}",
            lambda job=job, group=group: _is_measured(folder, task, job, group),
            lambda job=job, group=group: _measure(folder, task, job, group),
        )
        for job in task.jobs for group in groups
    ]


def read_rows(folder: Path, task: Task, job: Job, group: str) -> list[dict] | None:
    """Rows of one video; None if they are missing, damaged, or of a video made otherwise."""
    try:
        saved = json.loads(rows_path(folder, task, job, group).read_bytes())
    except (OSError, ValueError):
        return None
    return saved["rows"] if saved.get("fingerprint") == job.fingerprint else None


def _is_measured(folder: Path, task: Task, job: Job, group: str) -> bool:
    rows = read_rows(folder, task, job, group)
    return rows is not None and not any(row["error"] for row in rows)


def _measure(folder: Path, task: Task, job: Job, group: str) -> None:
    """Measure one video; what is wrong with it becomes a row that says so, and is raised."""
    who = {
        "video": task.relative(job), "method": task.variant.name, "prompt": job.item.prompt, "seed": job.seed.seed,
    }
    nothing = {"metric": group, "granularity": "", "start_s": None, "value": None, "protocol": ""}
    failure = None
    try:
        if not is_finished(task.output, job):
            raise ValueError("the video was not made")
        shown = Shown(task.output.video_path(job.stem), job.item.text, task.plan.geometry.fps, chunk_layout(task.plan))
        rows = [who | asdict(value) | {"error": ""} for value in GROUPS[group](shown)]
        for row in rows:
            row["value"] = row["value"] if math.isfinite(row["value"]) else None
    except Exception as error:
        failure = error
        rows = [who | nothing | {"error": reason(error)}]
    path = rows_path(folder, task, job, group)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps({"fingerprint": job.fingerprint, "rows": rows}).encode())
    if failure is not None:
        raise failure
