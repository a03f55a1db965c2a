"""Does the transformer hold for ten minutes: the same speed and memory at the end, no host waits, all values finite.

On a GPU every device-to-host synchronisation inside a pass is an error.
"""
from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Self

import torch

from benchmarks.clock import Clock
from benchmarks.cycles import Schedule, chunk_seconds
from benchmarks.subject import Stages, Subject
from benchmarks.summary import Speed, allocated_gib, cycle_means, read_memory, start_memory, summarise
from pipeline.build import RunPlan

EARLY_CHUNK = 40  # memory here is compared with that at the end


@dataclass(frozen=True, kw_only=True)
class Steadiness:
    """Times are milliseconds a chunk, medians over cycles."""

    speed: Speed
    first_minute_ms: float             # of the measured cycles
    last_minute_ms: float
    last_over_first: float
    early_allocated_gib: float | None  # after chunk EARLY_CHUNK, or the last
    final_allocated_gib: float | None

    @classmethod
    def of(
        cls, plan: RunPlan, schedule: Schedule, speed: Speed, stages: list[Stages], allocated: list[float | None],
        **more: Any,
    ) -> Self:
        """From the stages of every chunk and what was allocated after each."""
        first, last = first_and_last_minute(plan, schedule, stages)
        return cls(
            speed=speed, first_minute_ms=first, last_minute_ms=last, last_over_first=last / first,
            early_allocated_gib=allocated[min(EARLY_CHUNK, len(allocated) - 1)], final_allocated_gib=allocated[-1],
            **more,
        )


@dataclass(frozen=True, kw_only=True)
class Endurance(Steadiness):
    """Of the transformer alone."""

    all_finite: bool
    host_syncs_in_passes: int | None  # 0: one would have ended the run; None: only a GPU can tell


@contextmanager
def no_host_sync(device: torch.device) -> Iterator[None]:
    """Any device-to-host synchronisation inside is an error."""
    if device.type != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def endure(subject: Subject, schedule: Schedule, clock: Clock) -> Endurance:
    """Run the whole schedule after a warm-up."""
    plan = subject.plan
    subject.count("dit")
    start_memory(plan.device)
    subject.warm_up(schedule, clock)
    subject.start(schedule.latent_frames)
    stages: list[Stages] = []
    allocated: list[float | None] = []
    finite = torch.ones((), dtype=torch.bool, device=plan.device)
    for _ in schedule.windows:
        made = subject.advance(clock, lambda: no_host_sync(plan.device))
        finite &= made.latents.isfinite().all()
        stages.append(made.stage_ms)
        allocated.append(allocated_gib(plan.device))
    speed = summarise(plan, "dit", subject.setting.batch, schedule, stages, [], read_memory(plan.device))
    return Endurance.of(
        plan, schedule, speed, stages, allocated,
        all_finite=bool(finite), host_syncs_in_passes=0 if plan.device.type == "cuda" else None,
    )


def first_and_last_minute(plan: RunPlan, schedule: Schedule, stages: list[Stages]) -> tuple[float, float]:
    """Median cycle of the first measured minute of video, and of the last; of a short video the same cycles."""
    minute = 60 / chunk_seconds(plan)
    means = cycle_means(schedule, [sum(chunk.values()) for chunk in stages])
    begin, end = schedule.cycles[0].start, schedule.cycles[-1].stop
    first = [ms for cycle, ms in zip(schedule.cycles, means, strict=True) if cycle.stop <= begin + minute] or means[:1]
    last = [ms for cycle, ms in zip(schedule.cycles, means, strict=True) if cycle.start >= end - minute] or means[-1:]
    return statistics.median(first), statistics.median(last)
