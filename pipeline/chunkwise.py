"""The chunk-wise loop of Self Forcing: denoise a chunk, yield it, remember it clean.

Source: Self Forcing, arXiv:2506.08009, Algorithm 2; Deep Forcing changes the cache's policy alone.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from pipeline.noise import NoiseAhead, NoiseSource
from pipeline.packets import Decode, Packer
from pipeline.passes import PassRunner
from pipeline.sampler import FewStepSampler
from pipeline.timeline import OnSwitch, PromptSwitch, PromptTrack
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.cache import KVCache
from wan.model import CausalWanModel, TextContext
from wan.recorder import Recorder, Replay


@dataclass(frozen=True)
class Chunk:
    """Finished latent frames."""

    span: ChunkSpan
    latents: Tensor                  # [B, F, C, h, w] clean, in the dtype of the noise
    given: bool = False              # an image or a clip to continue, not generated
    restarts: bool = False           # a new stream of the decoder begins with this chunk
    shown_frames: int | None = None  # only so many of its pixel frames are shown; None is all


class ChunkwisePipeline:
    """Streams a batch of videos as latent chunks; memory does not grow with their length."""

    def __init__(
        self, model: CausalWanModel, sampler: FewStepSampler, geometry: VideoGeometry, cache: KVCache,
        on_switch: OnSwitch = "keep", recorder: Recorder | None = None,
    ):
        """Args: `recorder` makes CUDA graphs of the passes; None: they run as they are."""
        self.model, self.sampler, self.geometry, self.cache = model, sampler, geometry, cache
        self.on_switch = on_switch
        self._noise = NoiseAhead(sampler.num_passes, threaded=recorder is not None)
        self._run = PassRunner(cache, None if recorder is None else partial(self._record, recorder))
        self.packer: Packer | None = None  # compresses chunks, for policies that keep packets

    def __call__(
        self, embeddings: Tensor, num_frames: int, noise: NoiseSource, seeds: list[int],
        initial_latent: Tensor | None = None, switches: Sequence[PromptSwitch] = (),
        decode: Decode | None = None,
    ) -> Iterator[Chunk]:
        """Generate from an empty memory.

        Shapes: embeddings [B, T, text_dim]; initial_latent [B, F0, C, h, w], normalised, or None.
        Args:
            num_frames: latent frames in all, the given ones included; whole chunks after the given ones.
            seeds: one per sample, for policies that choose at random.
            switches: later prompts, in order; `on_switch` says what becomes of the memory.
            decode: makes the pixels of the chunks, in order, and gives those of the newest again; for a policy that
                compresses them. None: the compressor decodes by itself.
        Yields: given chunks, then generated ones, in order, each as soon as it is known; what it leaves in memory
            is made when the next is asked for.
        Raises:
            ValueError: lengths or shapes that do not fit the geometry or the model.
        """
        given_frames = 0 if initial_latent is None else self._checked(initial_latent, len(seeds)).shape[1]
        spans = self.geometry.chunks(num_frames, prefilled=given_frames)
        self.cache.reset(seeds)
        if self.packer is not None:
            self.packer.start(decode)
        track = self.prompt_track(embeddings, switches)
        if initial_latent is not None:
            yield from self.given(self.geometry.prefill_chunks(given_frames), initial_latent, track)
        yield from self.generate(spans, track, noise)

    def generate(self, spans: Sequence[ChunkSpan], track: PromptTrack, noise: NoiseSource) -> Iterator[Chunk]:
        """The chunks of `spans`, which follow what is remembered."""
        for span in spans:
            text = track.text_at(span.start)
            latents = self.denoise(span, text, noise)
            yield Chunk(span, latents)  # before the context pass, which whoever shows them need not wait for
            self.remember(latents, text)
            track.note(span, latents)

    def given(self, spans: Sequence[ChunkSpan], initial_latent: Tensor | None, track: PromptTrack) -> Iterator[Chunk]:
        """The chunks `spans` of latents [B, F0, C, h, w], known beforehand; they enter memory by context passes."""
        for span in spans:
            latents = initial_latent[:, span.start:span.stop].to(self.model.device)
            self.cache.begin(span)
            self.remember(latents, track.text, given=True)
            track.note(span, latents)
            yield Chunk(span, latents, given=True)

    def prompt_track(self, embeddings: Tensor, switches: Sequence[PromptSwitch]) -> PromptTrack:
        """The prompts of one rollout, the first of them embedded."""
        return PromptTrack(
            self.model, self.cache, self._see_clean, embeddings, switches, self.on_switch, self.packer,
        )

    @torch.inference_mode()
    def denoise(self, span: ChunkSpan, text: TextContext, noise: NoiseSource) -> Tensor:
        """Begin the chunk and run its denoising passes; memory is untouched. Returns x0 [B, F, C, h, w]."""
        self.cache.begin(span)
        latents = self._run("denoise", self._denoise, self._noise.take(noise, span), text)
        self._noise.prepare(noise, replace(span, index=span.index + 1, start=span.stop))
        return latents

    @torch.inference_mode()
    def remember(self, latents: Tensor, text: TextContext, *, given: bool = False) -> None:
        """The context pass: clean keys and values of the chunk that has begun become memory.

        Args: given: by whom, if not the network: such latents are seen at time 0, whatever the context noise.
        """
        time = 0.0 if given else self.sampler.context_time
        self._run(("see clean", time), partial(self._see_clean, time=time), [latents], text)
        packet = None if self.packer is None else self.packer.compress(latents)  # its past is not the cache's
        self._run("commit", self._commit, [] if packet is None else [packet], text)

    def _denoise(self, *noise: Tensor, text: TextContext) -> Tensor:
        """All denoising passes; the first noise is what they start from, the others are mixed in."""
        x = noise[0]
        for index, time in enumerate(self.sampler.times):
            x0 = self.sampler.clean(x, self.model(x, self._times(x, time), text, self.cache), index)
            if index + 1 < self.sampler.num_passes:
                x = self.sampler.renoise(x0, noise[index + 1], index + 1)
        return x0

    def _see_clean(self, latents: Tensor, text: TextContext, time: float = 0.0) -> None:
        self.model.remember(latents, self._times(latents, time), text, self.cache)

    def _commit(self, *packet: Tensor, text: TextContext) -> None:
        """`packet`: tokens of the chunk that has been seen clean, if it leaves any."""
        for tokens in packet:
            self.packer.write(tokens, text)
        self.cache.commit()

    def _checked(self, initial_latent: Tensor, batch: int) -> Tensor:
        """The same. Raises ValueError if it is no clip of the model's own latents."""
        g, shape = self.geometry, list(initial_latent.shape)
        wanted = [self.model.config.in_dim, g.latent_height, g.latent_width]
        if len(shape) != 5 or shape[0] != batch or shape[2:] != wanted:
            raise ValueError(
                f"initial_latent is {shape}; expected [{batch}, frames, {', '.join(map(str, wanted))}]: one clip for "
                "each video of the batch, encoded at the run's own size."
            )
        return initial_latent

    def _record(self, recorder: Recorder, function: Callable[[], None]) -> Replay:
        self._noise.wait()
        return recorder(function)

    def _times(self, x: Tensor, time: float) -> Tensor:
        return torch.full(x.shape[:2], time, device=x.device)
