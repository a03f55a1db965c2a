"""Frames that are made while the transformer goes on are the same ones, in order, and none is handed out unchecked."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
import torch
from test_graphs import TapeRecorder

from benchmarks.settings import Setting
from pipeline.chunkwise import Chunk, ChunkwisePipeline
from pipeline.engine import Engine, VideoRequest
from pipeline.noise import SampleSeed
from pipeline.overlap import DecoderLane, Decoding, FrameChunk, handed_out
from utils.config import ConfigError
from utils.profiling import StageClock
from wan.geometry import ChunkSpan
from wan.stream import StreamDecoder

CPU = torch.device("cpu")
PROMPTS = ["a red circle", "a blue square"]


@dataclass
class Log:
    """What happened, in order."""

    said: list[str] = field(default_factory=list)

    def begun(self, chunks: int, *, bad: int | None = None, breaks: int | None = None) -> Iterator[Decoding]:
        for index in range(chunks):
            if index == breaks:
                raise MemoryError("no room")
            self.said.append(f"begin {index}")
            chunk = Chunk(ChunkSpan(index, 3 * index, 3 * index + 3), torch.zeros(1))
            yield Decoding(chunk, torch.zeros(1), torch.tensor([index != bad, True]), None)

    def take(self, chunks: Iterator[FrameChunk]) -> None:
        for chunk in chunks:
            self.said.append(f"out {chunk.span.index}")


def test_each_waits_for_the_next_to_begin_but_the_first() -> None:
    """The first frames are out at once; afterwards the device always has the next chunk's work."""
    aside, between = Log(), Log()
    aside.take(handed_out(aside.begun(4), behind=True))
    between.take(handed_out(between.begun(3), behind=False))
    assert aside.said == ["begin 0", "out 0", "begin 1", "begin 2", "out 1", "begin 3", "out 2", "out 3"]
    assert between.said == ["begin 0", "out 0", "begin 1", "out 1", "begin 2", "out 2"]


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("where", [0, 1, 3, 4])
def test_what_is_good_is_handed_out_and_what_is_bad_is_not(where: int, behind: bool) -> None:
    """A chunk that is no number, or cannot be made: the same chunks are out either way, then comes the error."""
    for error, kind in (({"bad": where}, FloatingPointError), ({"breaks": where}, MemoryError)):
        log = Log()
        with pytest.raises(kind):
            log.take(handed_out(log.begun(5, **error), behind=behind))
        assert [said for said in log.said if said.startswith("out")] == [f"out {index}" for index in range(where)]


class LateLane(DecoderLane):
    """A lane as late as one on a GPU can be: it decodes when the frames are asked for."""

    is_aside = True

    def begin(self, chunk: Chunk, decoder: StreamDecoder, clock: StageClock) -> Decoding:
        def finished() -> FrameChunk:
            return DecoderLane.begin(self, chunk, decoder, clock).finished()

        late = Decoding(chunk, chunk.latents, chunk.latents, None)
        object.__setattr__(late, "finished", finished)
        return late


@pytest.fixture(scope="module")
def engine() -> Engine:
    short = ("kv_cache.window_frames=6", "denoising_step_list=[1000,500]")
    engine = Engine(Setting(policy="self_forcing", model="tiny", resolution="32x32", overrides=short).plan(CPU))
    engine.prepare(PROMPTS)
    return engine


def video(engine: Engine, text: str, frames: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    chunks = list(engine.stream([VideoRequest(text, SampleSeed(3))], frames))
    return torch.cat([c.latents for c in chunks], dim=1), torch.cat([c.frames for c in chunks], dim=1)


@pytest.mark.parametrize("replayed", [False, True])
def test_late_frames_are_the_same(engine: Engine, replayed: bool) -> None:
    """Nothing that later passes do reaches the latents that the decoder has not read yet; two videos, bit for bit."""
    engine.release()
    expected = [video(engine, text) for text in PROMPTS]
    if replayed:
        own = engine.pipeline_for(1)
        fast = ChunkwisePipeline(own.model, own.sampler, own.geometry, own.cache, recorder=TapeRecorder())
        engine._pipeline = 1, fast
    lane, engine._lane = engine._lane, LateLane(CPU, CPU, aside=False)
    try:
        made = [video(engine, text) for text in PROMPTS]
    finally:
        engine._lane = lane
        engine.release()
    for ours, theirs in zip(made, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_new_video_ends_the_last_ones_decoding(engine: Engine) -> None:
    """Also one that was left in the middle and is still held: its past takes no memory beside the new one's."""
    held = engine.stream([VideoRequest(PROMPTS[0], SampleSeed(0))], 6)
    next(held)
    left = engine._stream
    assert left._past
    next(engine.stream([VideoRequest(PROMPTS[1], SampleSeed(0))], 6))
    assert not left._past and engine._stream._past


def test_an_older_video_is_refused_and_the_newer_one_goes_on_unharmed(engine: Engine) -> None:
    """They share a memory: wherever the older one was left, it does nothing to it any more."""
    expected = video(engine, PROMPTS[1])
    for left_after in (1, 2, 3):
        older = engine.stream([VideoRequest(PROMPTS[0], SampleSeed(0))], 12)
        for _ in range(left_after):
            next(older)
        newer = engine.stream([VideoRequest(PROMPTS[1], SampleSeed(3))], 12)
        made = [next(newer)]
        with pytest.raises(RuntimeError, match="another video has begun since"):
            next(older)
        made += newer
        assert torch.equal(torch.cat([c.latents for c in made], dim=1), expected[0])
        assert torch.equal(torch.cat([c.frames for c in made], dim=1), expected[1])


def test_a_processor_makes_frames_between_chunks(engine: Engine) -> None:
    """No stream, no thread, nothing held back; overlap asked for where it cannot be is an error."""
    assert not engine._lane.is_aside and not engine.plan.decodes_aside
    clock = StageClock(CPU)
    chunks = engine.stream([VideoRequest(PROMPTS[0], SampleSeed(0))], 6, clock)
    first = next(chunks)
    assert first.span.index == 0 and set(clock.totals_ms()) == {"dit", "vae"}
    assert engine.pipeline_for(1).cache.seen_frames == 0  # the context pass comes after
    next(chunks)
    assert engine.pipeline_for(1).cache.seen_frames == 3
    assert next(chunks, None) is None and engine.pipeline_for(1).cache.seen_frames == 3  # nothing follows the last one
    with pytest.raises(ConfigError, match="overlap=on needs a CUDA device"):
        Setting(model="tiny", overlap="on").plan(CPU)
