"""Long video by generating again: clips of a fixed length, each of which begins with the end of the one before.

A clip starts from an empty memory. The overlap's first latent frame is the encoded pixel frame at which the clip
before stops being shown, the others are that clip's own last latents; they enter by context passes. Of every clip the
pixel frames that the next one shows again are left out, of the last one too.

Source: CausVid, arXiv:2412.07772, and the authors' long-video inference.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from math import ceil

import torch
from torch import Tensor

from pipeline.chunkwise import Chunk, ChunkwisePipeline
from pipeline.noise import NoiseSource
from pipeline.packets import Decode
from pipeline.sampler import FewStepSampler
from pipeline.timeline import OnSwitch, PromptSwitch
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.cache import KVCache
from wan.model import CausalWanModel
from wan.recorder import Recorder


@dataclass(frozen=True)
class Clips:
    """How a video is laid out in clips of `clip_frames` that share `overlap_frames` with the next.

    A latent frame of the video is counted as if it were one stream, so the overlap counts once. A video of N latent
    frames shows, of its last clip, what is not in the part that a next clip would show again.
    Raises:
        ValueError: lengths that are not whole chunks.
    """

    geometry: VideoGeometry
    clip_frames: int
    overlap_frames: int

    def __post_init__(self) -> None:
        chunk = self.geometry.chunk_frames
        if self.geometry.independent_first_frame:
            raise ValueError(
                "pipeline=causvid_overlap makes clips of whole chunks. Set independent_first_frame: false."
            )
        if self.clip_frames % chunk or self.clip_frames < 2 * chunk:
            raise ValueError(
                f"kv_cache.window_frames={self.clip_frames}: clips are whole chunks of {chunk} latent frames, two at "
                f"least. Such as --set kv_cache.window_frames={max(2, self.clip_frames // chunk) * chunk}"
            )
        if not 0 < self.overlap_frames < self.clip_frames or self.overlap_frames % chunk:
            raise ValueError(
                f"overlap_frames={self.overlap_frames} of clips of {self.clip_frames} latent frames must be whole "
                f"chunks of {chunk}, at least one, and leave at least one. Such as --set overlap_frames={chunk}"
            )

    @property
    def step_frames(self) -> int:
        """Latent frames from the start of one clip to the start of the next."""
        return self.clip_frames - self.overlap_frames

    @property
    def shown_pixel_frames(self) -> int:
        """Pixel frames that a clip shows at most."""
        return self.geometry.pixel_frames(self.clip_frames) - self.geometry.pixel_frames(self.overlap_frames)

    def latent_frames(self, pixel_frames: int) -> int:
        """Fewest latent frames, whole chunks, of a video that shows `pixel_frames`; a later clip adds at least one."""
        frames = self.geometry.whole_chunks(self.geometry.latent_frames(pixel_frames))
        *before, last = self.lengths(frames)
        shown = len(before) * self.shown_pixel_frames + min(self.geometry.pixel_frames(last), self.shown_pixel_frames)
        return frames if shown >= pixel_frames else frames + self.geometry.chunk_frames

    def lengths(self, latent_frames: int) -> list[int]:
        """Latent frames of each clip, the overlap included; only the last one may be shorter."""
        count = max(1, ceil((latent_frames - self.overlap_frames) / self.step_frames))
        return [self.clip_frames] * (count - 1) + [latent_frames - (count - 1) * self.step_frames]

    def spans(self, latent_frames: int) -> Iterator[tuple[list[ChunkSpan], list[ChunkSpan]]]:
        """Of each clip the given and the generated chunks; frames count from the clip's start, chunks through all."""
        index = 0
        for number, frames in enumerate(self.lengths(latent_frames)):
            overlap = self.overlap_frames if number else 0
            parts = self.geometry.prefill_chunks(overlap), self.geometry.chunks(frames, prefilled=overlap)
            yield tuple([ChunkSpan(index + s.index, s.start, s.frames) for s in part] for part in parts)
            index += sum(map(len, parts))


class CausVidOverlapPipeline(ChunkwisePipeline):
    """Streams clips chunk by chunk; needs the pixels of each clip's last chunk to begin the next clip.

    `encode` turns pixels [B, 1, 3, H, W] in [-1, 1] into latents [B, 1, C, h, w].
    """

    def __init__(
        self, model: CausalWanModel, sampler: FewStepSampler, geometry: VideoGeometry, cache: KVCache,
        on_switch: OnSwitch, clips: Clips, encode: Callable[[Tensor], Tensor], recorder: Recorder | None = None,
    ):
        super().__init__(model, sampler, geometry, cache, on_switch, recorder)
        self.clips, self.encode = clips, encode

    def __call__(
        self, embeddings: Tensor, num_frames: int, noise: NoiseSource, seeds: list[int],
        initial_latent: Tensor | None = None, switches: Sequence[PromptSwitch] = (),
        decode: Decode | None = None,
    ) -> Iterator[Chunk]:
        """As ChunkwisePipeline, without given frames; each chunk says how its pixels are shown.

        Raises:
            RuntimeError: a second clip is asked for, and there is no `decode`.
        """
        if initial_latent is not None:
            raise ValueError("clips have a fixed length, so the first one cannot begin with given frames.")
        track = self.prompt_track(embeddings, switches)
        g, shown_frames = self.geometry, self.clips.shown_pixel_frames
        newest: list[Tensor] = []    # the clip's latents so far
        last: Tensor | None = None   # [B, 1, 3, H, W], the pixel frame that the next clip begins with
        for number, (given, generated) in enumerate(self.clips.spans(num_frames)):
            begins = number * self.clips.step_frames
            overlap = self._overlap(newest, last) if number else None
            self.cache.reset(seeds)
            track.restart(begins)
            newest, last = [], None
            chunks = chain(self.given(given, overlap, track), self.generate(generated, track, noise))
            # Not asked for more, a clip's last chunk is not remembered: the next clip's memory begins empty.
            for chunk in islice(chunks, len(given) + len(generated)):
                newest.append(chunk.latents)
                span, before = chunk.span, g.pixel_frames(chunk.span.start)
                left = shown_frames - before  # pixel frames that the clip still shows
                yield replace(
                    chunk, span=replace(span, start=begins + span.start), restarts=span.start == 0,
                    shown_frames=max(0, left),
                )
                if decode is not None and 0 <= left < g.pixel_frames(span.stop) - before:
                    last = decode(chunk.latents)[:, left:left + 1]

    @torch.inference_mode()
    def _overlap(self, newest: Sequence[Tensor], last: Tensor | None) -> Tensor:
        """Latents [B, overlap, C, h, w] that the next clip begins with."""
        if last is None:
            raise RuntimeError("the next clip begins with a pixel frame of this one: decode each chunk as it comes.")
        own = torch.cat(list(newest), dim=1)[:, -self.clips.overlap_frames:]
        return torch.cat([self.encode(last.clamp(-1, 1)).to(own), own[:, 1:]], dim=1)
