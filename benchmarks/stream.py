"""A whole video as a consumer sees it: the engine's own chunks, decoded beside the transformer where it does that.

A chunk's time is what passes between two chunks of finished frames on the host, so this measures any pipeline. The
chunks that begin a clip anew are handed out as well: their time is that of encoding the overlap and remembering it.
"""
from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from itertools import islice
from pathlib import Path

from benchmarks.cycles import Schedule
from benchmarks.decoders import COUNTED
from benchmarks.endurance import Steadiness
from benchmarks.summary import allocated_gib, read_memory, start_memory, summarise
from pipeline.build import RunPlan
from pipeline.decoder import TinyDecoder
from pipeline.engine import Engine, VideoRequest
from pipeline.noise import SampleSeed
from pipeline.overlap import FrameChunk
from utils.video import VideoWriter

PROMPT = "a prompt"  # weights are random, its embedding too
REMEDY = "Make room on its disk, name a --video on another one, or do without --video"


def measure_stream(
    plan: RunPlan, counted: str, batch: int, schedule: Schedule, latencies: int, kept: Path | None = None,
) -> Steadiness:
    """Build the engine, warm it up, time the first frames of `latencies` videos, then one whole video.

    Args:
        counted: a line of the table that decodes.
        kept: the .mp4 that the video, the first of a batch, is written to while it is made.
    """
    tiny = TinyDecoder("taehv", None) if counted == "tiny_vae" else None
    engine, g = Engine(replace(plan, tiny_decoder=tiny)), plan.geometry
    start_memory(plan.device)
    engine.prepare([PROMPT])
    requests = [VideoRequest(PROMPT, SampleSeed(0, sample)) for sample in range(batch)]

    def video(latent_frames: int) -> Iterator[FrameChunk]:
        return engine.stream(requests, latent_frames)

    more = plan.loop.joint_chunks * g.chunk_frames  # a chunk to be decoded beside, and those of a joint window
    for _ in video(schedule.warm_up_frames + more):
        pass
    first = []
    for _ in range(latencies):
        begin = time.perf_counter()
        chunks = video(g.whole_chunks(more))
        frames = next(chunks).frames.shape[1]
        first.append((1000 * (time.perf_counter() - begin), frames))
        chunks.close()
    with ExitStack() as stack:
        writer = stack.enter_context(VideoWriter(kept, fps=g.fps, remedy=REMEDY)) if kept else None
        stages, allocated, begin = [], [], time.perf_counter()
        for chunk in islice(video(schedule.latent_frames + more), len(schedule.windows)):
            if writer is not None:
                writer.write(chunk.frames[0])
            now = time.perf_counter()
            stages.append({"between": 1000 * (now - begin)})
            allocated.append(allocated_gib(plan.device))
            begin = now
    speed = replace(
        summarise(plan, counted, batch, schedule, stages, first, read_memory(plan.device)),
        counted=COUNTED[counted].words + ", as the engine streams them",
    )
    return Steadiness.of(plan, schedule, speed, stages, allocated)
