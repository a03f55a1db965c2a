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
