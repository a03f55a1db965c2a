"""From times of chunks to the numbers that are reported."""
from __future__ import annotations

import gc
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from benchmarks.cycles import Schedule
from benchmarks.decoders import COUNTED
from benchmarks.subject import Stages
from pipeline.build import RunPlan
from utils.profiling import peak_memory_bytes, reset_peak_memory


def finite_or_none(value: Tensor) -> float | None:
    """None for what a JSON cannot hold."""
    return value.item() if value.isfinite() else None


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A sample of numbers in a few."""

    count: int
    median: float
    lower_quartile: float
    upper_quartile: float
    p95: float
    mean: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        several = list(values) if len(values) > 1 else [*values] * 2  # of one value every quantile is that value
        quartiles = statistics.quantiles(several, n=4, method="inclusive")
        return cls(
            count=len(values), median=statistics.median(values), lower_quartile=quartiles[0],
            upper_quartile=quartiles[2], p95=statistics.quantiles(several, n=20, method="inclusive")[-1],
            mean=statistics.fmean(values), least=min(values), most=max(values),
        )


@dataclass(frozen=True)
class Memory:
    """Peaks since `start_memory`, warm-up included."""

    of: Literal["device", "process"]   # a CPU knows only what the whole process ever held
    peak_allocated_gib: float
    peak_reserved_gib: float | None


@dataclass(frozen=True, kw_only=True)
class Speed:
    """One line of the table. Times are milliseconds."""

    counted: str
    cycles: int
    chunks: int                           # of those cycles
    cycle_ms: Spread                      # a chunk's time, mean over a prune cycle
    chunk_ms: Spread
    fps: float                            # pixel frames a second, all videos of a batch, by the median cycle
    stage_ms: dict[str, float]            # means; their sum is the mean chunk
    ms_by_window_frames: dict[float, float]  # medians of the measured chunks, by latent frames that they attend to
    first_pixel_frames: int | None        # of a video's first chunk
    first_frames_ms: Spread | None        # from the call to those frames on the host; process warm, embeddings known
    memory: Memory
    window_frames: tuple[float, ...]      # of every chunk of the video, the filling included
    every_chunk_ms: tuple[float, ...]


def start_memory(device: torch.device) -> None:
    """Begin to watch for peaks, without what others left cached."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    reset_peak_memory(device)


def read_memory(device: torch.device) -> Memory:
    allocated = peak_memory_bytes(device) / 2**30
    if device.type != "cuda":
        return Memory("process", allocated, None)
    return Memory("device", allocated, torch.cuda.max_memory_reserved(device) / 2**30)


def allocated_gib(device: torch.device) -> float | None:
    """What is allocated now; a CPU cannot tell."""
    return torch.cuda.memory_allocated(device) / 2**30 if device.type == "cuda" else None


def cycle_means(schedule: Schedule, every_ms: Sequence[float]) -> list[float]:
    """A chunk's mean time in each measured cycle; `every_ms` begins with the video's first chunk."""
    return [statistics.fmean(every_ms[cycle.start:cycle.stop]) for cycle in schedule.cycles]


def summarise(
    plan: RunPlan, counted: str, batch: int, schedule: Schedule, stages: Sequence[Stages],
    first: Sequence[tuple[float, int]], memory: Memory,
) -> Speed:
    """The line of the table that the times of all chunks of a video, and latencies with their frames, give."""
    every_ms = [sum(chunk.values()) for chunk in stages]
    steady = [stages[i] for i in schedule.steady]
    cycles = Spread.of(cycle_means(schedule, every_ms))
    lengths = sorted({schedule.windows[i] for i in schedule.steady})
    return Speed(
        counted=COUNTED[counted].words, cycles=len(schedule.cycles), chunks=len(steady), cycle_ms=cycles,
        chunk_ms=Spread.of([every_ms[i] for i in schedule.steady]),
        fps=1000 * batch * plan.loop.chunk_pixel_frames / cycles.median,
        stage_ms={name: statistics.fmean(chunk[name] for chunk in steady) for name in steady[0]},
        ms_by_window_frames={
            frames: statistics.median(every_ms[i] for i in schedule.steady if schedule.windows[i] == frames)
            for frames in lengths
        },
        first_pixel_frames=first[0][1] if first else None,
        first_frames_ms=Spread.of([ms for ms, _ in first]) if first else None,
        memory=memory, window_frames=schedule.windows, every_chunk_ms=tuple(round(ms, 3) for ms in every_ms),
    )
