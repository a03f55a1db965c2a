"""Prune cycles: the unit of steady time, known before anything runs.

While a window fills, each chunk sees more than the one before. A cycle begins with a chunk that does not (something
was forgotten) and ends before the next such chunk. A rolling window forgets at every chunk: cycles of one chunk.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

from pipeline.build import RunPlan
from pipeline.length import asked_pixel_frames, video_length
from utils.config import ConfigError

LEAST_CYCLES = 12   # fewer say little about spread
WARM_CHUNKS = 4     # of the first whole cycles, which are not measured: until then a pipeline meets what it has not met


@dataclass(frozen=True)
class Cycle:
    """The chunks from one prune to the next."""

    start: int  # index of the chunk that prunes
    stop: int   # index of the next one that does

    @property
    def chunks(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True)
class Schedule:
    """What each chunk of a video will see, and which chunks are measured."""

    latent_frames: int            # of the whole video
    windows: tuple[int, ...]      # latent frames that each chunk attends to, itself included
    warm_up: int                  # chunks of the video that warms up: all window lengths, and the first cycles
    cycles: tuple[Cycle, ...]     # whole cycles after those

    @property
    def steady(self) -> range:
        """Indices of the chunks of all measured cycles."""
        return range(self.cycles[0].start, self.cycles[-1].stop)

    def first(self, cycles: int) -> Schedule:
        """The same video, ending with this measured cycle."""
        kept = self.cycles[:cycles]
        return replace(self, windows=self.windows[:kept[-1].stop], cycles=kept)


def prune_cycles(windows: Sequence[int]) -> list[Cycle]:
    """The whole cycles in a video whose chunks see `windows` frames."""
    prunes = [i for i in range(1, len(windows)) if windows[i] <= windows[i - 1]]
    return [Cycle(start, stop) for start, stop in pairwise(prunes)]


def warm_cycles(cycles: Sequence[Cycle]) -> int:
    """How many of the first ones hold WARM_CHUNKS chunks; more than there are if they do not."""
    chunks = accumulate(cycle.chunks for cycle in cycles)
    return next((count for count, known in enumerate(chunks, 1) if known >= WARM_CHUNKS), len(cycles) + 1)


def schedule_of_cycles(plan: RunPlan, cycles: int) -> Schedule:
    """A video just long enough for so many measured cycles.

    Raises:
        ConfigError: too few to say anything about spread, or a policy that never forgets.
    """
    if cycles < LEAST_CYCLES:
        raise ConfigError(f"--cycles {cycles} is too few to tell the spread. Ask for at least {LEAST_CYCLES}.")
    _refuse_endless(plan)
    g = plan.geometry
    most = plan.policy.sizes(g).window_tokens // g.frame_tokens * (WARM_CHUNKS + cycles + 2)  # a window grows or ends
    windows: list[int] = []
    for frames in plan.loop.windows(g.whole_chunks(most * g.chunk_frames)):
        windows.append(frames)
        found = prune_cycles(windows)
        if len(found) - warm_cycles(found) == cycles:
            return _schedule(plan, windows[:-1], found)
    raise ConfigError(f"{plan.policy} does not forget in {len(windows)} chunks, so there is no prune cycle to time.")


def schedule_of_seconds(plan: RunPlan, seconds: float, *, least_cycles: int = LEAST_CYCLES) -> Schedule:
    """A video of `seconds`, of which all whole cycles after the first ones are measured.

    Raises:
        ConfigError: it is shorter than `least_cycles` measured cycles, or the policy cannot go so far.
    """
    _refuse_endless(plan)
    windows = list(plan.loop.windows(latent_frames_of(plan, seconds)))
    cycles = prune_cycles(windows)
    if len(cycles) - warm_cycles(cycles) < least_cycles:
        enough = chunk_seconds(plan) * (len(schedule_of_cycles(plan, max(least_cycles, LEAST_CYCLES)).windows) + 1)
        raise ConfigError(
            f"{seconds:g} s hold {len(cycles)} prune cycles: the first ones, of {WARM_CHUNKS} chunks, warm up, and at "
            f"least {least_cycles} are measured. Ask for {enough:.0f} s or more."
        )
    return _schedule(plan, windows, cycles)


def chunk_seconds(plan: RunPlan) -> float:
    """Seconds of video that a chunk after the first decodes to."""
    g = plan.geometry
    return g.pixel_frames(g.chunk_frames, first=False) / g.fps


def latent_frames_of(plan: RunPlan, seconds: float) -> int:
    """Latent frames, in whole chunks, of a video of `seconds`."""
    pixel_frames = asked_pixel_frames(plan, latent_frames=0, seconds=seconds)
    return video_length(plan, pixel_frames, given_frames=0).latent_frames


def _schedule(plan: RunPlan, windows: Sequence[int], cycles: Sequence[Cycle]) -> Schedule:
    g = plan.geometry
    frames = len(windows) * g.chunk_frames - (g.chunk_frames - 1 if g.independent_first_frame else 0)
    warm = warm_cycles(cycles)
    return Schedule(frames, tuple(windows), cycles[warm - 1].stop, tuple(cycles[warm:]))


def _refuse_endless(plan: RunPlan) -> None:
    if plan.policy.max_frames is not None:
        raise ConfigError(
            f"kv_cache.policy={plan.config.kv_cache['policy']} never forgets, so there is no prune cycle to time. "
            "Choose a policy that does, such as --policy self_forcing or --policy deep_forcing."
        )
