"""Prune cycles: the unit of steady time, known before anything runs.

While a window fills, each chunk sees more than the one before. A cycle begins with a chunk that does not (something
was forgotten) and ends before the next such chunk. A rolling window forgets at every chunk: cycles of one chunk, and so
does a joint one, while enough chunks follow to keep it full. A clip begins with an empty memory: it is a cycle.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
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
    windows: tuple[float, ...]    # latent frames that each chunk attends to when it is finished, itself included
    warm_up: int                  # chunks of the video that warms up: all window lengths, and the first cycles
    warm_up_frames: int           # latent frames of that video
    cycles: tuple[Cycle, ...]     # whole cycles after those

    @property
    def steady(self) -> range:
        """Indices of the chunks of all measured cycles."""
        return range(self.cycles[0].start, self.cycles[-1].stop)

    def first(self, cycles: int) -> Schedule:
        """The same video, ending with this measured cycle."""
        kept = self.cycles[:cycles]
        return replace(self, windows=self.windows[:kept[-1].stop], cycles=kept)


def prune_cycles(windows: Sequence[float]) -> list[Cycle]:
    """The whole cycles in a video whose chunks see `windows` frames."""
    prunes = [i for i in range(1, len(windows)) if windows[i] <= windows[i - 1]]
    return [Cycle(start, stop) for start, stop in pairwise(prunes)]


def warm_chunks(plan: RunPlan) -> int:
    """WARM_CHUNKS, and as many as a joint window looks ahead: it sees all it can so much sooner than the clean pass."""
    return WARM_CHUNKS + plan.loop.joint_chunks - 1


def warm_cycles(plan: RunPlan, cycles: Sequence[Cycle]) -> int:
    """How many of the first ones hold `warm_chunks`; more than there are if they do not."""
    chunks = accumulate(cycle.chunks for cycle in cycles)
    return next((count for count, known in enumerate(chunks, 1) if known >= warm_chunks(plan)), len(cycles) + 1)


def schedule_of_cycles(plan: RunPlan, cycles: int) -> Schedule:
    """A video just long enough for so many measured cycles.

    Raises:
        ConfigError: too few to say anything about spread, or a policy that never forgets.
    """
    if cycles < LEAST_CYCLES:
        raise ConfigError(f"--cycles {cycles} is too few to tell the spread. Ask for at least {LEAST_CYCLES}.")
    _refuse_endless(plan)
    g = plan.geometry
    longest = plan.policy.sizes(g).window_tokens // g.frame_tokens  # chunks of a cycle: a window grows or ends
    most = longest * (warm_chunks(plan) + cycles + 2)
    chunks: list[Seen] = []
    for seen in seen_chunks(plan, g.whole_chunks(most * g.chunk_frames)):
        chunks.append(seen)
        found = prune_cycles([chunk.window for chunk in chunks])
        if len(found) - warm_cycles(plan, found) == cycles:
            return _schedule(plan, chunks[:-1], found)
    raise ConfigError(f"{plan.policy} does not forget in {len(chunks)} chunks, so there is no prune cycle to time.")


def schedule_of_seconds(plan: RunPlan, seconds: float, *, least_cycles: int = LEAST_CYCLES) -> Schedule:
    """A video of `seconds`, of which all whole cycles after the first ones are measured.

    Raises:
        ConfigError: it is shorter than `least_cycles` measured cycles, or the policy cannot go so far.
    """
    _refuse_endless(plan)
    chunks = list(seen_chunks(plan, latent_frames_of(plan, seconds)))
    cycles = prune_cycles([chunk.window for chunk in chunks])
    if len(cycles) - warm_cycles(plan, cycles) < least_cycles:
        enough = chunk_seconds(plan) * (len(schedule_of_cycles(plan, max(least_cycles, LEAST_CYCLES)).windows) + 1)
        raise ConfigError(
            f"{seconds:g} s hold {len(cycles)} prune cycles: the first ones, of {warm_chunks(plan)} chunks, warm up, "
            f"and at least {least_cycles} are measured. Ask for {enough:.0f} s or more."
        )
    return _schedule(plan, chunks, cycles)


@dataclass(frozen=True)
class Seen:
    """One chunk as it is handed out."""

    window: float  # latent frames that it attends to when it is finished, itself included
    stop: int      # one past its last latent frame in the video


def seen_chunks(plan: RunPlan, latent_frames: int) -> Iterator[Seen]:
    """The chunks of a video's first `latent_frames`, more of which follow: a joint window stays full.

    A clip's given chunks are only remembered, in a memory that keeps every frame: they see the clip so far.
    """
    longer = latent_frames + (plan.loop.joint_chunks - 1) * plan.geometry.chunk_frames
    windows = plan.loop.windows(longer)
    for look in plan.loop.looks(longer):
        window = look.span.stop if look.given else next(windows)
        if look.remembered is not None and look.begins + look.remembered.stop <= latent_frames:
            yield Seen(window, look.begins + look.remembered.stop)


def chunk_seconds(plan: RunPlan) -> float:
    """Seconds of video that a chunk after the first shows on average."""
    return plan.loop.chunk_pixel_frames / plan.geometry.fps


def latent_frames_of(plan: RunPlan, seconds: float) -> int:
    """Latent frames, in whole chunks, of a video of `seconds`."""
    pixel_frames = asked_pixel_frames(plan, latent_frames=0, seconds=seconds)
    return video_length(plan, pixel_frames, given_frames=0).latent_frames


def _schedule(plan: RunPlan, chunks: Sequence[Seen], cycles: Sequence[Cycle]) -> Schedule:
    warm = warm_cycles(plan, cycles)
    warm_up = cycles[warm - 1].stop
    return Schedule(
        chunks[-1].stop, tuple(chunk.window for chunk in chunks), warm_up, chunks[warm_up - 1].stop,
        tuple(cycles[warm:]),
    )


def _refuse_endless(plan: RunPlan) -> None:
    if plan.loop.max_frames is not None:
        raise ConfigError(
            f"kv_cache.policy={plan.config.kv_cache['policy']} never forgets, so there is no prune cycle to time. "
            "Choose a policy that does, such as --policy self_forcing or --policy deep_forcing."
        )
