"""Speed over the length of a video, and over the size of the window."""
from __future__ import annotations

import gc
import logging
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.clock import Clock
from benchmarks.cycles import LEAST_CYCLES, latent_frames_of, schedule_of_cycles, schedule_of_seconds
from benchmarks.settings import Setting
from benchmarks.speed import measure
from benchmarks.subject import Subject
from benchmarks.summary import Speed, allocated_gib, cycle_means
from utils.config import ConfigError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LengthPoint:
    """A video of this length, from its first chunk to its last."""

    seconds: float
    chunks: int
    total_s: float                # time to make it, the filling of the window included
    fps: float                    # its pixel frames over that time, all videos of a batch
    cycle_ms: float | None        # a chunk's time, median over the last LEAST_CYCLES cycles; None: too short for one
    allocated_gib: float | None   # after its last chunk


@dataclass(frozen=True)
class WindowPoint:
    """One window size."""

    window_frames: int
    speed: Speed


@dataclass(frozen=True)
class WindowSweep:
    """All window sizes, and why the policy refuses some."""

    points: list[WindowPoint]
    refused: dict[int, str]


def sweep_lengths(
    subject: Subject, counted: str, lengths: Sequence[float], clock: Clock,
) -> list[LengthPoint]:
    """One warm run of the longest video: what is streamed does not depend on how much follows."""
    plan, lengths = subject.plan, sorted(lengths)
    chunks = [len(plan.geometry.chunks(latent_frames_of(plan, seconds))) for seconds in lengths]
    schedule = schedule_of_seconds(plan, lengths[-1])
    subject.count(counted)
    subject.warm_up(schedule, clock)
    subject.start(schedule.latent_frames)
    every_ms: list[float] = []
    allocated: dict[int, float | None] = {}
    for index, _ in enumerate(schedule.windows, 1):
        every_ms.append(sum(subject.advance(clock).stage_ms.values()))
        if index in chunks:
            allocated[index] = allocated_gib(plan.device)
            logger.info("%s: %d chunks made", counted, index)
    points = []
    means = cycle_means(schedule, every_ms)
    for seconds, count in zip(lengths, chunks, strict=True):
        total_s = sum(every_ms[:count]) / 1000
        pixel_frames = subject.setting.batch * plan.geometry.pixel_frames(latent_frames_of(plan, seconds))
        ended = [ms for cycle, ms in zip(schedule.cycles, means, strict=True) if cycle.stop <= count][-LEAST_CYCLES:]
        points.append(LengthPoint(
            seconds, count, total_s, pixel_frames / total_s, statistics.median(ended) if ended else None,
            allocated[count],
        ))
    return points


def sweep_windows(
    setting: Setting, device: torch.device, counted: str, windows: Sequence[int], cycles: int, clock: Clock,
) -> WindowSweep:
    """Every window size that the policy allows, each with a cache of its own.

    Raises:
        ConfigError: the policy allows none of them.
    """
    points, refused = [], {}
    for frames in sorted(windows):
        sized = replace(setting, overrides=(*setting.overrides, f"kv_cache.window_frames={frames}"))
        try:
            plan = sized.plan(device)
        except ConfigError as error:
            refused[frames] = str(error)
            continue
        gc.collect()  # the last size's cache, before the next is allocated
        speed = measure(Subject(sized, plan), counted, schedule_of_cycles(plan, cycles), clock, latencies=0)
        logger.info("%s: window of %d frames measured", counted, frames)
        points.append(WindowPoint(frames, speed))
    if not points:
        raise ConfigError(f"no window of {', '.join(map(str, sorted(windows)))} frames fits: {refused[min(windows)]}")
    return WindowSweep(points, refused)
