"""One pass over a video for all metrics, and the loop over videos that goes on after a failure."""
from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
from collections import Counter, deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from evaluation.metrics.catalogue import ASKS, make_metrics
from evaluation.metrics.protocol import CannotMeasureError, Choices, Frame, Metric, TooShortError, Value, VideoInfo
from evaluation.metrics.table import LEFT_OUT, Row, append, read_table, rounded
from evaluation.metrics.videos import Video
from evaluation.vbench import is_imported
from utils.outputs import reason
from utils.video import open_video

logger = logging.getLogger(__name__)

FILE = "file"               # the row that says which file was measured: its bytes, and as protocol its hash
FRAME_SIZE = "frame_size"   # the row of a video whose size differs from the others of its method
HASH_DIGITS = 16
KILLED = "the process that measured it was killed, perhaps for want of memory. Free some, and give the command again"


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
            measured.errors[metric.name] = _why(error)
    for rgb in frames:
        frame = Frame(measured.num_frames, rgb)
        measured.num_frames += 1
        for name, reader in list(readers.items()):
            try:
                reader.add(frame)
            except Exception as error:
                measured.errors[name] = _why(error)
                del readers[name]
    for name, reader in readers.items():
        try:
            values = list(reader.values())
            _check_finite(values)
            measured.values[name] = values
        except Exception as error:
            measured.errors[name] = _why(error)
    return measured


def measure_videos(
    videos: Sequence[Video], names: Sequence[str], choices: Choices, table: Path, *, workers: int = 1,
) -> int:
    """Measure what the table lacks and add it, video by video; returns how many videos had an error.

    A video counts as measured if its file is unchanged and every chosen metric has values of its protocol. A metric
    that a group brought along is left out, with one line in the log, for videos of which it lacks what it asks; and
    every metric is for videos that are too short for it, which the table remembers.
    Args: names as `make_metrics` takes them; workers, processes that measure a video each.
    Raises: ConfigError, before any video is opened, for metrics that cannot be made.
    """
    metrics = make_metrics(names, choices)
    known: dict[str, list[Row]] = {video.name: [] for video in videos}
    for row in read_table(table):
        if row.video in known:
            known[row.video].append(row)
    jobs, unreadable, left_out = [], [], Counter()
    for video in videos:
        lacking = {
            name for name, (fact, _) in ASKS.items()
            if name not in names and not getattr(video, fact) and any(metric.name == name for metric in metrics)
        }
        left_out.update((name, ASKS[name][1]) for name in lacking)
        try:
            content = _content(video.path)
        except OSError as error:
            unreadable.append(_row(video, FILE, "", None, None, "", _why(error)))
            continue
        before = known[video.name]
        unchanged = _measured_content(before) == content
        todo = tuple(
            metric.name for metric in metrics
            if metric.name not in lacking and not (unchanged and _has(metric, before))
        )
        if todo:
            jobs.append(_Job(video, todo, content))
    _log_counts(left_out, len(videos))
    skipped = len(videos) - len(jobs) - len(unreadable)
    if skipped:
        logger.info("%d of %d videos are measured already and are skipped", skipped, len(videos))
    failed, chosen = 0, {metric.reports[0]: metric.name for metric in metrics}  # by what an error's row says
    for number, (job, rows) in enumerate(_results(jobs, metrics, choices, min(workers, len(jobs))), 1):
        before = known[job.video.name]
        if job.outdated(before):
            append(table, rows, outdated=job.outdated)
            if any(map(is_imported, before)):
                logger.warning("%s: another file now; VBench rated the old one. Let it rate this", job.video.name)
        else:
            append(table, _news(rows, before))
        logger.info("[%d/%d] %s", number, len(jobs), job.video.name)
        for row in rows:
            if row.failed:
                logger.error("%s: %s: %s", job.video.name, chosen.get(row.metric, row.metric), row.error)
        failed += any(row.failed for row in rows)
    ours = {video.name: video for video in videos}
    rows = [row for row in read_table(table) if row.video in ours]
    log_left_out(rows, metrics, len(videos))
    notes = unreadable + _odd_sizes(ours, rows)
    for row in notes:
        logger.error("%s: %s", row.video, row.error)
    if set(notes) != {row for row in rows if _is_note(row)}:
        append(table, notes, outdated=lambda now: [row for row in now if row.video in ours and _is_note(row)])
    return failed + len(notes)


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

    def outdated(self, rows: Sequence[Row]) -> list[Row]:
        """What was measured of this video when it was another file; what VBench said of it stays."""
        ours = [row for row in rows if row.video == self.video.name]
        if _measured_content(ours) in (None, self.content):
            return []
        return [row for row in ours if not is_imported(row)]


def _results(
    jobs: Sequence[_Job], metrics: Sequence[Metric], choices: Choices, workers: int,
) -> Iterator[tuple[_Job, list[Row]]]:
    """Jobs and their rows, in the order in which they are done.

    Of those at work when a process is killed each is tried again by itself, and is an error if that is killed too.
    """
    if workers <= 1:
        for job in jobs:
            yield job, _measure_file(job, metrics)
        return
    making, left = ([metric.name for metric in metrics], choices), deque(jobs)
    while left:
        for job in (yield from _side_by_side(left, making, workers)):
            if (yield from _side_by_side(deque([job]), making, 1)):
                yield job, [_row(job.video, FILE, "", None, None, job.content, KILLED)]


def _side_by_side(
    left: deque[_Job], making: tuple[Sequence[str], Choices], workers: int,
) -> Generator[tuple[_Job, list[Row]], None, list[_Job]]:
    """Take jobs until none is left or a process is killed; returns those that were at work then."""
    at_work: dict[Future, _Job] = {}
    with ProcessPoolExecutor(
        workers, multiprocessing.get_context("spawn"), initializer=_prepare, initargs=making,
    ) as pool:
        try:
            while left or at_work:
                while left and len(at_work) < workers:
                    at_work[pool.submit(_work, left[0])] = left[0]
                    left.popleft()
                for future in wait(at_work, return_when=FIRST_COMPLETED).done:
                    rows = future.result()
                    yield at_work.pop(future), rows
        except BrokenProcessPool:
            logger.warning("a process was killed that measured one of: %s", ", ".join(
                job.video.name for job in at_work.values()))
    return [*at_work.values()]


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
        size_bytes = video.path.stat().st_size
    except (ValueError, OSError) as error:
        return [_row(video, FILE, "", None, None, content, _why(error))]
    about = {
        FILE: size_bytes, "seconds": measured.num_frames / info.fps, "frames": measured.num_frames,
        "fps": info.fps, "height": info.height, "width": info.width,
    }
    rows = [_row(video, name, "whole", None, float(value), content) for name, value in about.items()]
    for metric in metrics:
        values = sorted(measured.values.get(metric.name, ()), key=lambda value: _is_last(metric, value))
        rows += [
            _row(video, value.metric, value.granularity, value.start_s, value.value, metric.protocol)
            for value in values
        ]
        if metric.name in measured.errors:
            rows.append(_row(video, metric.reports[0], "", None, None, metric.protocol, measured.errors[metric.name]))
    return rows


def _row(video: Video, metric: str, granularity: str, start_s, value, protocol: str, error: str = "") -> Row:
    start_s, value = (None if number is None else rounded(number) for number in (start_s, value))
    return Row(
        video.name, video.method, video.prompt or "", video.seed, metric, granularity, start_s, value, protocol, error
    )


def _news(rows: Sequence[Row], before: Sequence[Row]) -> list[Row]:
    """Those of `rows` that the table lacks, or that take back an error of it."""
    said, failed = set(before), {(row.metric, row.protocol) for row in before if row.error}
    return [row for row in rows if row not in said or (not row.error and (row.metric, row.protocol) in failed)]


def _measured_content(rows: Sequence[Row]) -> str | None:
    """Of which file these rows of one video are."""
    return next((row.protocol for row in reversed(rows) if row.metric == FILE and row.protocol), None)


def _has(metric: Metric, rows: Sequence[Row]) -> bool:
    return any(
        _is_left_out(metric, row) or (row.protocol == metric.protocol and _is_last(metric, row) and not row.error)
        for row in rows
    )


def _is_last(metric: Metric, value: Value | Row) -> bool:
    """The value that every video has comes after the metric's others: where it is, none was lost to a torn end."""
    return (value.metric, value.granularity) == (metric.reports[0], "whole")


def _is_left_out(metric: Metric, row: Row) -> bool:
    return row.left_out and (row.metric, row.protocol) == (metric.reports[0], metric.protocol)


def _is_note(row: Row) -> bool:
    """Rows that every run says anew."""
    return row.metric == FRAME_SIZE or (row.metric == FILE and not row.protocol)


def _odd_sizes(ours: Mapping[str, Video], rows: Sequence[Row]) -> list[Row]:
    """A row for each video whose size is not that of most of its method; for all of them where no size leads."""
    sizes: dict[str, dict[str, float]] = {}
    for row in rows:
        if row.metric in ("height", "width"):
            sizes.setdefault(row.video, {})[row.metric] = row.value
    shown = {name: f"{size['height']:.0f}x{size['width']:.0f}" for name, size in sizes.items()}
    odd = []
    for method in dict.fromkeys(video.method for video in ours.values()):
        of_method = {name: size for name, size in shown.items() if ours[name].method == method}
        counts = Counter(of_method.values())
        usual = sorted(size for size, count in counts.items() if count == max(counts.values()))
        share = "most" if len(usual) == 1 else "other"
        odd += [
            _row(ours[name], FRAME_SIZE, "", None, None, "", f"{size}, but {share} videos of {method} are "
                 f"{' or '.join(other for other in usual if other != size)}: compare only videos of one size")
            for name, size in of_method.items() if [size] != usual
        ]
    return odd


def _check_finite(values: Sequence[Value]) -> None:
    for value in values:
        if not math.isfinite(value.value):
            raise CannotMeasureError(f"{value.metric} ({value.granularity}) came out as {value.value}")


def _content(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256 {hashlib.file_digest(file, 'sha256').hexdigest()[:HASH_DIGITS]}"


def _why(error: Exception) -> str:
    """One line."""
    text = " ".join(reason(error).split()) or type(error).__name__
    return f"{LEFT_OUT}{text}" if isinstance(error, TooShortError) else text
