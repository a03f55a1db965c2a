"""Latent clips and captions: rendered, encoded once, kept on the device."""
from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor

from training.parts import CaptionEncoder
from training.world import render, sample
from wan.vae_passes import VaePasses


@dataclass
class LatentClips:
    """Clips of one length: latents [N, F, C, h, w] bf16 and caption ids [N, T]."""

    latents: Tensor
    ids: Tensor

    def draw(self, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """A random batch: float32 latents and ids."""
        which = torch.randint(len(self.ids), (batch,), generator=generator, device=self.ids.device)
        return self.latents[which].float(), self.ids[which]


@torch.no_grad()
def encode(vae: AutoencoderKLWan, pixels: Tensor) -> Tensor:
    """Pixels [B, T, 3, H, W] -> latents [B, F, C, h, w], not normalised; the posterior's mean."""
    return VaePasses(vae).encode(pixels.transpose(1, 2).to(vae.dtype))[0].transpose(1, 2)


def make_clips(
    vae: AutoencoderKLWan, captions: CaptionEncoder, *, first_seed: int, clips: int, latent_frames: int, batch: int,
    device: torch.device,
) -> LatentClips:
    """Render and encode the clips of `clips` consecutive training seeds."""
    latents, ids = [], []
    for start in range(first_seed, first_seed + clips, batch):
        drawn = [sample(seed) for seed in range(start, min(start + batch, first_seed + clips))]
        pixels = render([clip.scene for clip in drawn], num_frames=4 * latent_frames - 3, device=device)
        latents.append(encode(vae, pixels).to(torch.bfloat16))
        ids.append(captions.tokens([clip.caption for clip in drawn]))
    return LatentClips(torch.cat(latents), torch.cat(ids).to(device))


def statistics(clips: LatentClips) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every latent channel, float32 [C]."""
    some = clips.latents[:4096].float()
    return some.mean(dim=(0, 1, 3, 4)), some.std(dim=(0, 1, 3, 4))


def normalise(clips: LatentClips, mean: Tensor, std: Tensor) -> LatentClips:
    """Latents with zero mean and unit deviation per channel, in place, part by part."""
    for part in clips.latents.split(1024):
        part.copy_((part.float() - mean[:, None, None]) / std[:, None, None])
    return clips
