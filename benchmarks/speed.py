"""How fast one setting is, or two settings in one run.

Two take turns cycle by cycle, A B, B A, A B: what drifts (clocks, heat, neighbours) drifts for both, and because the
order changes, a steady drift is as often for as against. The ratio of neighbouring cycles tells more than two runs do.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.clock import Clock
from benchmarks.cycles import Schedule
from benchmarks.subject import Stages, Subject
from benchmarks.summary import Memory, Speed, Spread, cycle_means, read_memory, start_memory, summarise


@dataclass(frozen=True)
class Comparison:
    """Two settings that took turns; their peak memory is that of both together."""

    first: Speed
    second: Speed
    second_over_first: Spread  # ratio of neighbouring cycles' times a pixel frame; below 1 the second is faster


def measure(subject: Subject, counted: str, schedule: Schedule, clock: Clock, latencies: int) -> Speed:
    """One line of the table for one setting."""
    subject.count(counted)
    start_memory(subject.plan.device)
    first = _prepare(subject, schedule, clock, latencies)
    stages = [subject.advance(clock).stage_ms for _ in schedule.windows]
    return _speed(subject, counted, schedule, stages, first, read_memory(subject.plan.device))


def compare(
    pair: tuple[Subject, Subject], counted: str, schedules: tuple[Schedule, Schedule], clock: Clock, latencies: int,
) -> Comparison:
    """The same line for two settings that take turns."""
    cycles = min(len(schedule.cycles) for schedule in schedules)
    schedules = (schedules[0].first(cycles), schedules[1].first(cycles))
    for subject in pair:
        subject.count(counted)
    start_memory(pair[0].plan.device)
    firsts = [_prepare(subject, schedule, clock, latencies)
              for subject, schedule in zip(pair, schedules, strict=True)]
    stages: tuple[list[Stages], list[Stages]] = ([], [])
    for turn in range(1 + cycles):  # the first fills the windows
        for side in (0, 1) if turn % 2 else (1, 0):
            subject, schedule, made = pair[side], schedules[side], stages[side]
            stop = schedule.cycles[turn - 1].stop if turn else schedule.cycles[0].start
            made += [subject.advance(clock).stage_ms for _ in range(len(made), stop)]
    memory = read_memory(pair[0].plan.device)
    first, second = (
        _speed(subject, counted, schedule, made, latency, memory)
        for subject, schedule, made, latency in zip(pair, schedules, stages, firsts, strict=True)
    )
    means = [
        cycle_means(schedule, [sum(chunk.values()) for chunk in made])
        for schedule, made in zip(schedules, stages, strict=True)
    ]
    shown = [subject.setting.batch * subject.plan.loop.chunk_pixel_frames for subject in pair]
    ratios = [b / a * (shown[0] / shown[1]) for a, b in zip(*means, strict=True)]
    return Comparison(first, second, Spread.of(ratios))


def _prepare(subject: Subject, schedule: Schedule, clock: Clock, latencies: int) -> list[tuple[float, int]]:
    """Warm up, take the time to the first frames, and begin the video that is measured."""
    subject.warm_up(schedule, clock)
    first = [subject.first_frames(clock) for _ in range(latencies)]
    subject.start(schedule.latent_frames)
    return [latency for latency in first if latency is not None]


def _speed(
    subject: Subject, counted: str, schedule: Schedule, stages: Sequence[Stages], first: list[tuple[float, int]],
    memory: Memory,
) -> Speed:
    return summarise(subject.plan, counted, subject.setting.batch, schedule, stages, first, memory)
