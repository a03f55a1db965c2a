"""Noise that depends on (seed, sample, chunk) alone, never on what was generated before or beside it."""
from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from wan.geometry import ChunkSpan


class NoiseSource(Protocol):
    """Where a chunk's noise comes from. All [B, F, C, h, w], unit normal."""

    def initial(self, chunk: ChunkSpan) -> Tensor:
        """What the first pass starts from."""

    def fresh(self, chunk: ChunkSpan, index: int) -> Tensor:
        """What is mixed in before pass `index` >= 1."""


def draw(noise: NoiseSource, chunk: ChunkSpan, index: int) -> Tensor:
    """What pass `index` needs: what it starts from, or what is mixed in before it."""
    return noise.fresh(chunk, index) if index else noise.initial(chunk)


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

    def initial(self, chunk: ChunkSpan) -> Tensor:
        return self._draw(chunk, 0)

    def fresh(self, chunk: ChunkSpan, index: int) -> Tensor:
        return self._draw(chunk, index)

    def _draw(self, chunk: ChunkSpan, draw: int) -> Tensor:
        shape = (chunk.frames, *self.frame_shape)
        generators = [torch.Generator().manual_seed(seed.key(chunk.index, draw)) for seed in self.seeds]
        noise = torch.stack([torch.randn(shape, generator=generator) for generator in generators])
        if self.device.type != "cuda":
            return noise.to(self.device)
        return noise.pin_memory().to(self.device, non_blocking=True)  # from pinned memory: no host sync in the passes
