"""One setting, built and running: a video made chunk by chunk, every stage between two marks.

Inside the passes the host never waits. After each chunk it waits for that chunk's end, as a viewer would.
"""
from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from benchmarks.clock import Clock
from benchmarks.cycles import Schedule
from benchmarks.decoders import COUNTED, FrameStream, OpenStream
from benchmarks.settings import Setting
from pipeline.build import RunPlan
from pipeline.chunkwise import ChunkwisePipeline
from pipeline.noise import SampleSeed, SeededNoise
from utils.config import ConfigError
from wan.geometry import ChunkSpan
from wan.model import CausalWanModel, TextContext, randomize
from wan.vae import WanVAE

Stages = dict[str, float]  # milliseconds by name, in order; their sum is the chunk's time
STAGES = ("denoise", "context", "decode", "copy")  # in order; without a decoder the first two


@dataclass(frozen=True)
class Made:
    """One chunk, and how long each of its stages took."""

    latents: Tensor
    stage_ms: Stages


def make_pipeline(plan: RunPlan, setting: Setting) -> ChunkwisePipeline:
    """The transformer with seeded random weights, equal in every dtype up to rounding, and an empty cache."""
    with torch.device(plan.device):
        model = CausalWanModel(plan.architecture, plan.attention_backend)
    randomize(model, seed=0)
    model = model.to(plan.dtype).eval().requires_grad_(False)
    plan.acceleration.prepare(model)
    vae = partial(WanVAE.random, plan.spec.vae, device=plan.device, dtype=plan.dtype, seed=0)
    branch = plan.branch and plan.branch.load(random=True, device=plan.device, dtype=plan.dtype)
    return plan.pipeline(model, setting.batch, vae, branch)


def refuse_other_pipelines(setting: Setting, plan: RunPlan) -> None:
    """Raise ConfigError unless the plan's video is made chunk by chunk, each in passes of its own."""
    if plan.config.pipeline != "chunkwise":
        raise ConfigError(
            f"{setting.policy}: its pipeline is {plan.config.pipeline}; what is measured here are the passes of a "
            "chunk. Choose a config whose pipeline is chunkwise, or the task stream, which measures every pipeline."
        )


class Subject:
    """What is measured: a pipeline, a prompt's embedding, noise, and the decoder of the moment.

    Raises:
        ConfigError: the passes of a chunk cannot be taken apart.
    """

    def __init__(self, setting: Setting, plan: RunPlan):
        refuse_other_pipelines(setting, plan)
        a, g = plan.architecture, plan.geometry
        self.setting, self.plan, self.pipeline = setting, plan, make_pipeline(plan, setting)
        seeds = [SampleSeed(0, sample) for sample in range(setting.batch)]
        self.noise = SeededNoise(seeds, (a.in_dim, g.latent_height, g.latent_width), plan.device)
        self._seeds = [seed.key() for seed in seeds]
        embedding = torch.randn(1, a.text_len, a.text_dim, generator=torch.Generator().manual_seed(1))
        embedding[:, a.text_len // 4:] = 0  # past the prompt's end
        self._embeddings = embedding.expand(setting.batch, -1, -1).contiguous()
        self._open: OpenStream | None = None
        self._decode: FrameStream | None = None
        self._spans: Iterator[ChunkSpan] = iter(())
        self.text: TextContext | None = None

    def count(self, counted: str) -> None:
        """Load the decoder of this line of the table, in place of the last one."""
        self._open = self._decode = None
        gc.collect()
        load = COUNTED[counted].load
        self._open = load(self.plan) if load else None

    def start(self, latent_frames: int) -> None:
        """Begin a video with an empty memory."""
        self.pipeline.cache.reset(self._seeds)
        with torch.inference_mode():
            self.text = self.pipeline.model.embed_text(self._embeddings)
        self._decode = self._open() if self._open else None
        if self.pipeline.packer is not None:
            self.pipeline.packer.start(None)
        self._spans = iter(self.plan.geometry.chunks(latent_frames))

    def advance(self, clock: Clock, guard: Callable[[], AbstractContextManager] = nullcontext) -> Made:
        """Make the next chunk; the passes run inside `guard`."""
        span = next(self._spans)
        marks = [clock.mark()]
        with guard():
            latents = self.pipeline.denoise(span, self.text, self.noise)
            marks.append(clock.mark())
            self.pipeline.remember(latents, self.text)
            marks.append(clock.mark())
        if self._decode is not None:
            frames = self._decode(latents)
            marks.append(clock.mark())
            frames.cpu()
            marks.append(clock.mark())
        clock.wait(marks[-1])
        times = [clock.ms(begin, end) for begin, end in pairwise(marks)]
        return Made(latents, dict(zip(STAGES, times, strict=False)))

    def denoise(self) -> Tensor:
        """The denoising passes alone of the next chunk, which stays in the making."""
        return self.pipeline.denoise(next(self._spans), self.text, self.noise)

    def pixels_like(self, latents: Tensor) -> Tensor | None:
        """Pixels of the size that these latents decode to, where the compressor reads pixels."""
        g, compression = self.plan.geometry, self.plan.policy.compression
        if not compression.reads_pixels:
            return None
        frames = g.pixel_frames(latents.shape[1], first=False)
        return torch.zeros(len(latents), frames, 3, g.height, g.width, device=latents.device)

    def first_frames(self, clock: Clock) -> tuple[float, int] | None:
        """Milliseconds from the call to the first chunk's frames on the host, and how many those are.

        Text encoding does not count: the prompt's embedding is known. None without a decoder.
        """
        if self._open is None:
            return None
        self._decode = None  # the last video's past, which a decoder would keep beside the new one's
        decode, frames = self._open(), self.plan.geometry.whole_chunks(1)
        begin = clock.mark()
        chunk = next(self.pipeline(self._embeddings, frames, self.noise, self._seeds))
        first = decode(chunk.latents).cpu()
        end = clock.mark()
        clock.wait(end)
        return clock.ms(begin, end), first.shape[1]

    def warm_up(self, schedule: Schedule, clock: Clock) -> None:
        """Make the beginning of a video: every window length, and whole cycles."""
        self.start(schedule.latent_frames)
        for _ in range(schedule.warm_up):
            self.advance(clock)
