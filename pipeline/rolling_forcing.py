"""Joint denoising of a rolling window: every chunk in it at a noise level of its own, cleanest first.

A chunk enters the window as noise and leaves it clean after as many passes as there are noise levels; each pass is
one forward of the whole window, whose chunks see each other in both directions. A finished chunk becomes memory.

Source: Rolling Forcing, arXiv:2509.25161, and the authors' code; the memory is policies/anchored.py.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from pipeline.chunkwise import Chunk, ChunkwisePipeline
from pipeline.noise import NoiseSource
from pipeline.timeline import PromptTrack
from wan.geometry import ChunkSpan
from wan.model import TextContext


def windows(spans: Sequence[ChunkSpan], levels: int) -> Iterator[list[ChunkSpan]]:
    """The chunks of each window, oldest first: it fills, rolls, and empties. In window w, chunk b is at pass w - b."""
    for window in range(len(spans) + levels - 1):
        yield list(spans[max(0, window - levels + 1):window + 1])


def joint_span(inside: Sequence[ChunkSpan]) -> ChunkSpan:
    """The chunks of a window as one."""
    return ChunkSpan(inside[0].index, inside[0].start, sum(span.frames for span in inside))


class RollingForcingPipeline(ChunkwisePipeline):
    """Streams chunks as they leave the window; the first one after as many forwards as there are noise levels."""

    def generate(self, spans: Sequence[ChunkSpan], track: PromptTrack, noise: NoiseSource) -> Iterator[Chunk]:
        """As ChunkwisePipeline's. The window reads the prompt of its newest chunk."""
        levels = self.sampler.num_passes
        noisy: list[Tensor] = []  # of the window's chunks, oldest first
        for window, inside in enumerate(windows(spans, levels)):
            passes = [min(window, levels - 1) - place for place in range(len(inside))]
            text = track.text
            if window < len(spans):
                text = track.text_at(inside[-1].start)
                noisy.append(noise.draw(inside[-1], 0))
            clean = self.denoise_jointly(inside, passes, noisy, text)
            if passes[0] == levels - 1:
                span, latents = inside[0], clean[0]
                self.cache.begin(span)
                self.remember(latents, text)
                track.note(span, latents)
                yield Chunk(span, latents)
            noisy = [
                self.sampler.renoise(x0, noise.draw(span, index + 1), index + 1)
                for span, index, x0 in zip(inside, passes, clean, strict=True) if index + 1 < levels
            ]

    @torch.inference_mode()
    def denoise_jointly(
        self, inside: Sequence[ChunkSpan], passes: Sequence[int], noisy: Sequence[Tensor], text: TextContext,
    ) -> list[Tensor]:
        """One forward of the window; memory is untouched. Returns the x0 [B, F, C, h, w] of each chunk in it.

        Args:
            inside: its chunks, oldest first. passes: which of the sampler's passes each is at.
            noisy: its latents [B, F, C, h, w], each at its noise level.
        """
        self.cache.begin(joint_span(inside), lookahead=True)
        clean = self._run(("jointly", *passes), partial(self._denoise_jointly, passes), noisy, text)
        return list(clean.split([span.frames for span in inside], dim=1))

    def _denoise_jointly(self, passes: Sequence[int], *noisy: Tensor, text: TextContext) -> Tensor:
        times = [self._times(x, self.sampler.times[index]) for index, x in zip(passes, noisy, strict=True)]
        flow = self.model(torch.cat(noisy, dim=1), torch.cat(times, dim=1), text, self.cache)
        parts = flow.split([x.shape[1] for x in noisy], dim=1)
        return torch.cat([self.sampler.clean(*part) for part in zip(noisy, parts, passes, strict=True)], dim=1)
