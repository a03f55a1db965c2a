"""One pass over a video for all metrics, and the loop over videos that goes on after a failure."""
from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from evaluation.metrics.catalogue import ASKS, make_metrics
from evaluation.metrics.protocol import CannotMeasureError, Choices, Frame, Metric, TooShortError, Value, VideoInfo
from evaluation.metrics.table import LEFT_OUT, Row, append, read_table
from evaluation.metrics.videos import Video
from utils.video import open_video

logger = logging.getLogger(__name__)

FILE = "file"               # the row that says which file was measured: its bytes, and as protocol its hash
FRAME_SIZE = "frame_size"   # the row of a video whose size differs from the others of its method
HASH_DIGITS = 16


@dataclass
class Measured:
    """What came out of one video; every metric is in one of the two."""

    values: dict[str, list[Value]] = field(default_factory=dict)  # metric name -> values
    errors: dict[str, str] = field(default_factory=dict)          # metric name -> why there are none; see LEFT_OUT
    num_frames: int = 0


def measure(frames: Iterable[np.ndarray], video: VideoInfo, metrics: Sequence[Metric]) -> Measured:
    """Show every frame to every metric, once.

    Shapes: frames, each uint8 [H, W, 3]. A metric that fails costs its own values alone.
    Raises: whatever `frames` raises, such as ValueError for a damaged file.
    """
    measured, readers = Measured(), {}
    for metric in metrics:
        try:
            readers[metric.name] = metric.start(video)
        except Exception as error:
            measured.errors[metric.name] = _reason(error)
    for rgb in frames:
        frame = Frame(measured.num_frames, rgb)
        measured.num_frames += 1
        for name, reader in list(readers.items()):
            try:
                reader.add(frame)
            except Exception as error:
                measured.errors[name] = _reason(error)
                del readers[name]
    for name, reader in readers.items():
        try:
            values = list(reader.values())
            _check_finite(values)
            measured.values[name] = values
        except Exception as error:
            measured.errors[name] = _reason(error)
    return measured


def measure_videos(
    videos: Sequence[Video], names: Sequence[str], choices: Choices, table: Path, *, workers: int = 1,
) -> int:
    """Measure what the table lacks and add it, video by video; returns how many videos had an error.

    A video counts as measured if its file is unchanged and every chosen metric has values of its protocol. A metric
    that a group brought along is left out, with one line in the log, for videos of which it lacks what it asks; and
    every metric is for videos that are too short for it, which the table remembers.
    Arguments: names as `make_metrics` takes them; workers, processes that measure a video each.
    Raises: ConfigError, before any video is opened, for metrics that cannot be made.
    """
    metrics = make_metrics(names, choices)
    known: dict[str, list[Row]] = {}
    for row in read_table(table):
        known.setdefault(row.video, []).append(row)
    jobs, left_out = [], Counter()
    for video in videos:
        lacking = {
            name for name, (fact, _) in ASKS.items()
            if name not in names and not getattr(video, fact) and any(metric.name == name for metric in metrics)
        }
        left_out.update((name, ASKS[name][1]) for name in lacking)
        content, before = _content(video.path), known.get(video.name, [])
        unchanged = any(row.metric == FILE and row.protocol == content for row in before)
        todo = tuple(
            metric.name for metric in metrics
            if metric.name not in lacking and not (unchanged and _has(metric, before))
        )
        if todo:
            jobs.append(_Job(video, todo, content, stale=bool(before) and not unchanged))
    _log_counts(left_out, len(videos))
    if len(jobs) < len(videos):
        logger.info("%d of %d videos are measured already and are skipped", len(videos) - len(jobs), len(videos))
    failed, chosen = 0, {metric.reports[0]: metric.name for metric in metrics}  # by what an error's row says
    for number, (job, rows) in enumerate(_results(jobs, metrics, choices, min(workers, len(jobs))), 1):
        known_rows = set() if job.stale else {*known.get(job.video.name, ())}
        append(table, [row for row in rows if row not in known_rows], replacing={job.video.name} if job.stale else ())
        logger.info("[%d/%d] %s", number, len(jobs), job.video.name)
        for row in rows:
            if row.failed:
                logger.error("%s: %s: %s", job.video.name, chosen.get(row.metric, row.metric), row.error)
        failed += any(row.failed for row in rows)
    ours = {video.name: video for video in videos}
    rows = [row for row in read_table(table) if row.video in ours]
    log_left_out(rows, metrics, len(videos))
    return failed + _note_sizes(ours, rows, table)


def log_left_out(rows: Sequence[Row], metrics: Sequence[Metric], num_videos: int) -> None:
    """One line for each of `metrics` that is left out of some videos, and why; `rows` are those of the videos."""
    counts = Counter()
    for metric in metrics:
        counts.update((metric.name, row.error.removeprefix(LEFT_OUT)) for row in rows if _is_left_out(metric, row))
    _log_counts(counts, num_videos)


def _log_counts(counts: Counter[tuple[str, str]], num_videos: int) -> None:
    for (name, why), count in counts.items():
        logger.info("left out for %d of %d videos: %s: %s", count, num_videos, name, why)


@dataclass(frozen=True)
class _Job:
    """One video to measure."""

    video: Video
    metrics: tuple[str, ...]
    content: str
    stale: bool  # the table has rows of another file of this name


def _results(
    jobs: Sequence[_Job], metrics: Sequence[Metric], choices: Choices, workers: int,
) -> Iterator[tuple[_Job, list[Row]]]:
    """Jobs and their rows, in the order in which they are done."""
    if workers <= 1:
        for job in jobs:
            yield job, _measure_file(job, metrics)
        return
    names = [metric.name for metric in metrics]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_prepare, initargs=(names, choices)) as pool:
        waiting = {pool.submit(_work, job): job for job in jobs}
        for future in as_completed(waiting):
            yield waiting[future], future.result()


_METRICS: list[Metric] = []  # of a worker process, made once


def _prepare(names: Sequence[str], choices: Choices) -> None:
    """One thread a worker: the videos are what runs side by side."""
    torch.set_num_threads(1)
    _METRICS.extend(make_metrics(names, choices))


def _work(job: _Job) -> list[Row]:
    return _measure_file(job, _METRICS)


def _measure_file(job: _Job, made: Sequence[Metric]) -> list[Row]:
    """The rows of one video; a file that cannot be decoded is one row with the error."""
    video, content = job.video, job.content
    metrics = [metric for metric in made if metric.name in job.metrics]
    try:
        with open_video(video.path) as stream:
            info = VideoInfo(video.name, stream.fps, stream.height, stream.width, video.prompt, video.chunks)
            measured = measure(stream.frames, info, metrics)
    except (ValueError, OSError) as error:
        return [_row(video, FILE, "", None, None, content, _reason(error))]
    about = {
        FILE: video.path.stat().st_size, "seconds": measured.num_frames / info.fps, "frames": measured.num_frames,
        "fps": info.fps, "height": info.height, "width": info.width,
    }
    rows = [_row(video, name, "whole", None, float(value), content) for name, value in about.items()]
    for metric in metrics:
        rows += [
            _row(video, value.metric, value.granularity, value.start_s, value.value, metric.protocol)
            for value in measured.values.get(metric.name, ())
        ]
        if metric.name in measured.errors:
            rows.append(_row(video, metric.reports[0], "", None, None, metric.protocol, measured.errors[metric.name]))
    return rows


def _row(video: Video, metric: str, granularity: str, start_s, value, protocol: str, error: str = "") -> Row:
    return Row(
        video.name, video.method, video.prompt or "", video.seed, metric, granularity, start_s, value, protocol, error
    )


def _has(metric: Metric, rows: Sequence[Row]) -> bool:
    good = {row.metric for row in rows if row.protocol == metric.protocol and not row.error}
    return set(metric.reports) <= good or any(_is_left_out(metric, row) for row in rows)


def _is_left_out(metric: Metric, row: Row) -> bool:
    return row.left_out and (row.metric, row.protocol) == (metric.reports[0], metric.protocol)


def _note_sizes(ours: Mapping[str, Video], rows: Sequence[Row], table: Path) -> int:
    """Note each video whose size is not the usual one of its method; returns how many there are."""
    sizes: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.metric in ("height", "width"):
            sizes.setdefault(row.video, {})[row.metric] = row.value
    shown = {name: f"{size['height']:.0f}x{size['width']:.0f}" for name, size in sizes.items()}
    odd = []
    for method in {video.method for video in ours.values()}:
        of_method = {name: size for name, size in shown.items() if ours[name].method == method}
        usual = Counter(of_method.values()).most_common(1)
        odd += [
            _row(ours[name], FRAME_SIZE, "", None, None, "",
                 f"{size}, but most videos of {method} are {usual[0][0]}: compare only videos of one size")
            for name, size in of_method.items() if size != usual[0][0]
        ]
    noted = {row.video for row in rows if row.metric == FRAME_SIZE}
    new = [row for row in odd if row.video not in noted]
    for row in odd:
        logger.error("%s: %s", row.video, row.error)
    if new:
        append(table, new)
    return len(odd)


def _check_finite(values: Sequence[Value]) -> None:
    for value in values:
        if not math.isfinite(value.value):
            raise CannotMeasureError(f"{value.metric} ({value.granularity}) came out as {value.value}")


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:HASH_DIGITS]}"


def _reason(error: Exception) -> str:
    """One line of why."""
    text = " ".join(str(error).split())
    if isinstance(error, TooShortError):
        return f"{LEFT_OUT}{text}"
    return text if isinstance(error, ValueError | OSError) and text else f"{type(error).__name__}: {text}"
