"""Noise that depends on (seed, sample, chunk) alone, never on what was generated before or beside it."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wan.geometry import ChunkSpan


class NoiseSource(Protocol):
    """Where a chunk's noise comes from."""

    def draw(self, chunk: ChunkSpan, index: int) -> Tensor:
        """What pass 0 starts from, or what is mixed in before a later pass: [B, F, C, h, w], unit normal."""


@dataclass(frozen=True)
class SampleSeed:
    """One video: the user's seed, and which of its samples."""

    seed: int
    sample: int = 0

    def key(self, *parts: int) -> int:
        """A 63-bit number of seed, sample and `parts`; equal on every machine."""
        text = "/".join(str(n) for n in (self.seed, self.sample, *parts))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


@dataclass(frozen=True)
class SeededNoise:
    """Counter-based noise: every draw has a generator of its own, seeded by (seed, sample, chunk, draw).

    Drawn on the CPU in float32, so that every device sees the same numbers.
    """

    seeds: Sequence[SampleSeed]
    frame_shape: tuple[int, int, int]  # C, h, w
    device: torch.device

    def draw(self, chunk: ChunkSpan, index: int) -> Tensor:
        shape = (chunk.frames, *self.frame_shape)
        generators = [torch.Generator().manual_seed(seed.key(chunk.index, index)) for seed in self.seeds]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        if self.device.type != "cuda":
            return noise.to(self.device)
        return noise.pin_memory().to(self.device, non_blocking=True)  # from pinned memory: no host sync in the passes


class NoiseAhead:
    """Draws the noise of whole chunks. Where passes are replayed, that of the next one in a thread: drawing takes the
    host longer than a replay leaves it idle.
    """

    def __init__(self, passes: int, *, threaded: bool):
        self._passes = passes
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="noise") if threaded else None
        self._next: tuple[NoiseSource, ChunkSpan, Future[list[Tensor]]] | None = None

    def take(self, noise: NoiseSource, span: ChunkSpan) -> list[Tensor]:
        """The noise of every pass of `span`."""
        ahead, self._next = self._next, None
        if ahead is not None and ahead[0] is noise and ahead[1] == span:
            return ahead[2].result()
        return self._draw(noise, span)

    def prepare(self, noise: NoiseSource, span: ChunkSpan) -> None:
        """Begin to draw what is probably asked for next."""
        if self._thread is not None:
            self._next = noise, span, self._thread.submit(self._draw, noise, span)

    def wait(self) -> None:
        """Return when no drawing is going on: it allocates, which would disturb a recording."""
        if self._next is not None:
            self._next[2].result()

    def _draw(self, noise: NoiseSource, span: ChunkSpan) -> list[Tensor]:
        return [noise.draw(span, index) for index in range(self._passes)]
