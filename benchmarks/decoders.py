"""What is counted beside the transformer: how latents become uint8 frames. One entry per decoder, weights random.

A decoder is loaded once and opened once a video; what it opens turns latents [B, F, C, h, w] into uint8 frames
[B, T, H, W, 3] on the device and remembers the video's past.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from pipeline.build import RunPlan
from wan.stream import StreamDecoder, to_uint8
from wan.tiny_vae import TinyVAE
from wan.vae import WanVAE

FrameStream = Callable[[Tensor], Tensor]
OpenStream = Callable[[], FrameStream]


@dataclass(frozen=True)
class Counted:
    """One line of the table."""

    words: str                                     # what its time contains
    load: Callable[[RunPlan], OpenStream] | None   # None: latents are not decoded


class Streaming(Protocol):
    """What WanVAE and TinyVAE share."""

    def stream(self) -> StreamDecoder: ...


def _opener(vae: Streaming) -> OpenStream:
    def open_stream() -> FrameStream:
        decoder = vae.stream()
        return lambda latents: to_uint8(decoder.decode(latents))

    return open_stream


def load_wan_vae(plan: RunPlan) -> OpenStream:
    vae = WanVAE.random(plan.spec.vae, device=plan.device, dtype=plan.dtype, seed=0)
    return _opener(plan.acceleration.accelerate_decoder(vae, plan.decoder_latents))


def load_tiny_vae(plan: RunPlan) -> OpenStream:
    vae = TinyVAE.random(plan.architecture.out_dim, device=plan.device, dtype=plan.dtype, seed=0)
    return _opener(plan.acceleration.accelerate_decoder(vae, plan.decoder_latents))


COUNTED = {
    "dit": Counted("transformer: every denoising pass and the context pass", None),
    "wan_vae": Counted("transformer, Wan VAE, uint8 frames on the host", load_wan_vae),
    "tiny_vae": Counted("transformer, tiny VAE (TAEHV, approximate), uint8 frames on the host", load_tiny_vae),
}
