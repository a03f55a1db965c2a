"""The networks of one run, and videos as streams of chunks: latents and frames, as they are made.

File writer, server and notebook use the same generator, `Engine.stream`.
"""
from __future__ import annotations

import gc
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from pipeline.build import RunPlan
from pipeline.chunkwise import ChunkwisePipeline
from pipeline.decoder import OnceDecoder
from pipeline.noise import SampleSeed, SeededNoise
from pipeline.overlap import DecoderLane, Decoding, FrameChunk, handed_out
from pipeline.timeline import PromptSwitch, switch_frames
from utils.files import user_cache_dir
from utils.hashing import fingerprint
from utils.profiling import StageClock
from utils.prompts import IMAGE_SUFFIXES
from utils.timelines import Later
from utils.video import fit_to, read_image, read_video
from wan.checkpoint import load_transformer
from wan.compressor import HighResolutionBranch
from wan.lora import read_lora
from wan.model import CausalWanModel, randomize
from wan.prompt_tokens import PromptTokens
from wan.stream import StreamDecoder
from wan.text_encoder import EmbeddingCache, TextEncoder, embed_prompts, filled_up, up_to_its_end
from wan.tiny_vae import TinyVAE
from wan.vae import WanVAE


@dataclass(frozen=True)
class VideoRequest:
    """One video: what to show, and with which noise."""

    text: str
    seed: SampleSeed
    later: Later = ()  # prompts that follow, each with the second at which it begins


class Engine:
    """Loads each network once, in the order that needs the least memory: text, then transformer and VAE."""

    def __init__(self, plan: RunPlan):
        self.plan = plan
        self._embeddings: dict[str, Tensor] = {}  # of the prompts that `prepare` was given, up to their ends
        self._model: CausalWanModel | None = None
        self._pipeline: tuple[int, ChunkwisePipeline] | None = None
        self._vae: WanVAE | None = None
        self._decoder: WanVAE | TinyVAE | None = None
        self._stream: StreamDecoder | None = None  # of the newest video
        self._branch: HighResolutionBranch | None = None
        self._lane = DecoderLane(plan.device, plan.decoder_device, aside=plan.decodes_aside)

    def prepare(self, texts: Sequence[str]) -> None:
        """Embed every prompt (the encoder leaves the device again), then load transformer and decoder."""
        plan = self.plan
        self._embeddings = _embed(plan, texts)
        with torch.device("meta"):
            model = CausalWanModel(plan.architecture, plan.attention_backend)
        if plan.random_weights:
            model = model.to_empty(device=plan.device).to(plan.dtype)
            randomize(model, seed=0)
        else:
            spec = plan.spec
            lora = None if spec.lora is None else read_lora(spec.lora, alpha=spec.lora_alpha)
            load_transformer(
                model, spec.checkpoint, use_ema=plan.use_ema, device=plan.device, dtype=plan.dtype,
                change=None if lora is None else lora.merged,
            )
        self._decoder = self._wan_vae() if plan.tiny_decoder is None else self._tiny_vae()
        if plan.branch is not None:
            self._branch = plan.branch.load(random=plan.random_weights, device=plan.device, dtype=plan.dtype)
        self._model = model.eval().requires_grad_(False)
        plan.acceleration.prepare(self._model)

    def source_latents(self, source: Path, pixel_frames: int) -> Tensor:
        """Latents [1, F, C, h, w] of an image or a video, scaled and cut to the run's size and frame rate.

        A video keeps its last frames, a number that the VAE's stride leaves whole (1, 5, 9, ...); of one that is
        longer than the `pixel_frames` wanted in all, just enough to show it.
        """
        g = self.plan.geometry
        if source.suffix.lower() in IMAGE_SUFFIXES:
            frames = read_image(source)
        else:
            frames = read_video(source, pixel_frames + g.temporal_stride, last=True, fps=g.fps)
            frames = frames[(len(frames) - 1) % g.temporal_stride:]
        frames = torch.from_numpy(fit_to(frames, g.height, g.width))
        pixels = frames.permute(0, 3, 1, 2).unsqueeze(0).float() / 127.5 - 1
        return self._wan_vae().encode(pixels)

    def stream(
        self, requests: Sequence[VideoRequest], latent_frames: int, clock: StageClock | None = None,
        initial: Tensor | None = None,
    ) -> Iterator[FrameChunk]:
        """Generate a batch of videos, chunk by chunk; memory does not grow with their length.

        Args:
            latent_frames: of each video, whole chunks, given frames included.
            clock: adds up the stages `dit` and `vae`, from latents to frames on the host. Where both share a device
                side by side, each counts the time of its own stream, which the other slows: their sum is more than
                what passes.
            initial: latents [B, F0, C, h, w] to continue, from `source_latents`.
        Yields: chunks in order; where the decoder works aside, all but the first when the next is on its way.
        Raises:
            ValueError: the prompts of the batch do not change at the same moments.
            RuntimeError: another video has begun since: they share a memory and cannot take turns.
            FloatingPointError: the networks made something that is no number; all chunks before it were handed out.
        """
        begun = self._begun(requests, latent_frames, clock or StageClock(self.plan.device), initial)
        return handed_out(begun, behind=self._lane.is_aside)

    def _begun(
        self, requests: Sequence[VideoRequest], latent_frames: int, clock: StageClock, initial: Tensor | None,
    ) -> Iterator[Decoding]:
        """Queue the work of one chunk after the other."""
        pipeline = self.pipeline_for(len(requests))
        embeddings = self._embedded([request.text for request in requests])
        g, seeds = self.plan.geometry, [request.seed for request in requests]
        noise = SeededNoise(seeds, (self.plan.architecture.in_dim, g.latent_height, g.latent_width), self.plan.device)
        stream = self._new_stream()
        decoder = OnceDecoder(stream, clock)
        chunks = pipeline(
            embeddings, latent_frames, noise, [seed.key() for seed in seeds], initial_latent=initial,
            switches=self._switches(requests, latent_frames, 0 if initial is None else initial.shape[1]),
            decode=lambda latents: decoder.decode(latents),
        )
        while self._stream is stream:
            with clock.stage("dit"):
                chunk = next(chunks)
            if chunk.restarts:
                stream = self._new_stream()
                decoder = OnceDecoder(stream, clock)
            yield self._lane.begin(chunk, decoder, clock)
            if chunk.span.stop == latent_frames:  # not asked for more, the loop does not remember the last one
                return
        raise RuntimeError("another video has begun since. Finish one before the next, or make an Engine for each.")

    def _new_stream(self) -> StreamDecoder:
        """For a video that is the only one from here on: what was remembered of the last one goes."""
        last, self._stream = self._stream, self._decoder.stream()
        if last is not None:
            last.close()
        return self._stream

    def _switches(self, requests: Sequence[VideoRequest], latent_frames: int, given_frames: int) -> list[PromptSwitch]:
        """The later prompts of a batch, all of whose videos change prompts at the same moments."""
        times = [time for time, _ in requests[0].later]
        if any([time for time, _ in request.later] != times for request in requests):
            raise ValueError("the videos of one batch change their prompts together: give them the same times.")
        g, starts = self.plan.geometry, self.plan.loop.starts(latent_frames, given_frames)
        frames = switch_frames(g, times, starts, g.pixel_frames(latent_frames))
        return [
            PromptSwitch(frame, self._embedded([request.later[i][1] for request in requests]))
            for i, frame in enumerate(frames)
        ]

    def _embedded(self, texts: Sequence[str]) -> Tensor:
        """[B, T, text_dim]."""
        return torch.stack([filled_up(self._embeddings[text], self.plan.architecture.text_len) for text in texts])

    def release(self) -> None:
        """Free the cache after a failure, so that the next video starts from a clean device."""
        if self.plan.device.type == "cuda":
            for device in {self.plan.device, self.plan.decoder_device}:
                torch.cuda.synchronize(device)  # nothing may be replayed while its memory goes
        self._pipeline = None
        gc.collect()
        torch.cuda.empty_cache()  # does nothing where there is none

    def _wan_vae(self) -> WanVAE:
        """Encodes, and decodes where no tiny decoder does; loaded when it is first needed."""
        if self._vae is None:
            plan = self.plan
            load = partial(WanVAE.random, seed=0) if plan.random_weights else WanVAE.load
            self._vae = load(plan.spec.vae, device=plan.decoder_device, dtype=plan.dtype)
            plan.acceleration.accelerate_decoder(self._vae, plan.decoder_latents)
        return self._vae

    def _tiny_vae(self) -> TinyVAE:
        plan, tiny = self.plan, self.plan.tiny_decoder
        if plan.random_weights:
            decoder = TinyVAE.random(plan.architecture.out_dim, device=plan.decoder_device, dtype=plan.dtype, seed=0)
        else:
            decoder = TinyVAE.load(tiny.path, kind=tiny.kind, device=plan.decoder_device, dtype=plan.dtype)
        return plan.acceleration.accelerate_decoder(decoder, plan.decoder_latents)

    def pipeline_for(self, batch: int) -> ChunkwisePipeline:
        """The loop for so many videos at once, its memory included; kept until another number is asked for."""
        if self._pipeline is None or self._pipeline[0] != batch:
            self._pipeline = None  # free the old cache before the new one is allocated
            self._pipeline = (batch, self.plan.pipeline(self._model, batch, self._wan_vae, self._branch))
        return self._pipeline[1]


def _embed(plan: RunPlan, texts: Sequence[str]) -> dict[str, Tensor]:
    """Each text's embedding [t, text_dim] on the CPU: kept on disk by content; seeded noise when weights are random."""
    spec, text_len = plan.spec, plan.architecture.text_len
    if plan.random_weights:
        return {text: _random_embedding(plan, text) for text in texts}
    identity = fingerprint([plan.weights["text_encoder"], plan.weights["tokenizer"], str(plan.dtype)])
    cache = EmbeddingCache(user_cache_dir() / "embeddings", identity, text_len)
    words = _words(plan)

    def load() -> TextEncoder:
        device = torch.device("cpu") if plan.memory.encoder_on_host else plan.device
        return TextEncoder.load(spec.text_encoder, words=words, device=device, dtype=plan.dtype)

    return embed_prompts(texts, cache, words, load)


def warn_of_words(plan: RunPlan, texts: Sequence[str]) -> None:
    """Say, as `Engine.prepare` does, what the model cannot read of each text; no network is loaded."""
    if not plan.random_weights:
        words = _words(plan)
        for text in dict.fromkeys(texts):
            words.warn(text)


def _words(plan: RunPlan) -> PromptTokens:
    return PromptTokens.load(plan.spec.tokenizer, plan.architecture.text_len, plan.spec.understands)


def _random_embedding(plan: RunPlan, text: str) -> Tensor:
    """Seeded by the prompt itself, zero past a plausible length."""
    a = plan.architecture
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "little")
    embedding = torch.randn(a.text_len, a.text_dim, generator=torch.Generator().manual_seed(seed))
    embedding[max(1, min(a.text_len, len(text) // 4)):] = 0
    return up_to_its_end(embedding.to(plan.dtype))
