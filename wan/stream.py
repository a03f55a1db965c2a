"""Videos decoded as streams: latent chunks in, pixels out, whatever the decoder.

B batch, F latent frames, C latent channels, T pixel frames.
"""
from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from wan.checkpoint import load_strictly


class Past(dict[nn.Module, Tensor]):
    """What each layer has to remember of a video's earlier frames; empty before the first."""


class VideoDecoder(ABC):
    """What makes pixels of a few latent frames at a time."""

    part_frames = 1       # latent frames a call, at most
    device: torch.device  # of its weights

    @property
    @abstractmethod
    def latent_channels(self) -> int:
        """C."""

    @abstractmethod
    def decode_part(self, latents: Tensor, past: Past) -> Tensor:
        """[B, C, F, h, w] normalised -> pixels [B, 3, T, H, W] in [-1, 1]; `past` is advanced."""

    def stream(self) -> StreamDecoder:
        """Start decoding a video. Any number of streams can share a decoder without touching each other."""
        return StreamDecoder(self)


class StreamDecoder:
    """Decodes one video chunk by chunk; any split of the latents gives the same pixels.

    Bit for bit if the decoder takes one latent frame at a time, else up to rounding.
    """

    def __init__(self, decoder: VideoDecoder) -> None:
        self._decoder = decoder
        self._past = Past()
        self._shape: torch.Size | None = None  # of one latent frame with its batch, once known
        self._broken = False

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """Decode the next latent frames.

        Args:
            latents: [B, F, C, h, w], normalised; B, h and w as in the first call.
        Returns: pixels [B, T, 3, H, W] in [-1, 1], float32, on the decoder's device. T is 1 + s (F - 1) in the
            first call, s F later.
        Raises:
            ValueError: another shape than before, or no frame.
            RuntimeError: closed, or an earlier call failed half-way, so that its past is between two frames.
        """
        if self._broken:
            raise RuntimeError(
                "this stream was closed, or failed in a frame, and cannot go on. Start a new one with vae.stream()."
            )
        channels = self._decoder.latent_channels
        if latents.ndim != 5 or latents.shape[2] != channels or not latents.shape[1]:
            raise ValueError(
                f"latents are {list(latents.shape)}; expected [batch, frames, {channels}, height, width] "
                "with a frame or more."
            )
        shape = latents[:, 0].shape
        if self._shape not in (None, shape):
            raise ValueError(
                f"latent frames were {list(self._shape)} and are now {list(shape)}. "
                "Start a new stream for another video."
            )
        self._broken = True
        parts = latents.transpose(1, 2).split(self._decoder.part_frames, dim=2)
        with _current(self._decoder.device):
            pixels = [self._decoder.decode_part(part, self._past) for part in parts]
        self._shape, self._broken = shape, False
        return torch.cat(pixels, dim=2).transpose(1, 2)

    def close(self) -> None:
        """Forget the video, though somebody may still hold the stream; it cannot go on."""
        self._past.clear()
        self._broken = True


def _current(device: torch.device) -> AbstractContextManager:
    """Where kernels written by hand are launched, which do not look where their tensors are."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def load_random(module: nn.Module, seed: int, *, device: torch.device | str, dtype: torch.dtype) -> None:
    """Seeded random weights of a plausible scale, for benchmarks and tests; never a fallback for missing ones.

    Scales of norms (`gamma`) are 1 and other vectors 0.
    """
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for name, parameter in module.named_parameters():
        tensors[name] = torch.full(parameter.shape, float(name.endswith("gamma")))
        if parameter.ndim > 1 and not name.endswith("gamma"):
            tensors[name] = torch.randn(parameter.shape, generator=generator) * parameter[0].numel() ** -0.5
    load_strictly(module, tensors, source=Path("random weights"), device=device, dtype=dtype)


def to_uint8(pixels: Tensor) -> Tensor:
    """Pixels [B, T, 3, H, W] in [-1, 1] -> uint8 [B, T, H, W, 3], rounded, on the same device."""
    return ((pixels.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).movedim(2, -1).contiguous()
