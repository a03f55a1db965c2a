"""Stage 1: the video autoencoder, on clips that are rendered once and cut at random.

First single frames, which are cheap; then clips: most batches are many short ones, every fourth a few whole
ones, since the causal decoder looks far back and must not drift when a stream goes on.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from torch import Tensor

from training.graphs import Graphs
from training.loop import Ema, copy_tensors, learning_rate, step_seed
from training.optim import Optimizers, kernels
from training.parts import make_vae
from training.settings import Settings
from training.world import render, sample
from wan.vae_passes import VaePasses, normalise_activate

POOL_CLIPS, RENDER_BATCH = 2048, 64


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    """Differences to the lower and to the right neighbour of [B, C, T, H, W]."""
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def reconstruction_loss(ours: Tensor, true: Tensor, edge_weight: float, gradient_weight: float) -> Tensor:
    """L1, heavier near edges, plus L1 of the spatial differences: without these, small shapes blur."""
    down, right = edges(true)
    strength = (F.pad(down.abs(), (0, 0, 0, 1)) + F.pad(right.abs(), (0, 1))).mean(dim=1, keepdim=True)
    near = F.max_pool3d(strength, (1, 5, 5), stride=1, padding=(0, 2, 2)).clamp(max=1.0)
    loss = ((ours - true).abs() * (1 + edge_weight * near)).mean()
    return loss + gradient_weight * sum((a - b).abs().mean() for a, b in zip(edges(ours), (down, right), strict=True))


class VaeStage:
    """Trains AutoencoderKLWan on whole clips at once; equal to its streaming passes."""

    name = "vae"

    def __init__(self, settings: Settings, latent_channels: int, device: torch.device):
        self._settings, self._device, self._channels = settings, device, latent_channels
        self.steps = settings.vae.steps
        torch.manual_seed(settings.seed)
        self.vae: AutoencoderKLWan = make_vae(settings.vae, latent_channels).to(device, working_dtype(device))
        fused = torch.compile(normalise_activate, dynamic=True) if device.type == "cuda" else normalise_activate
        self._passes = VaePasses(self.vae, fused)
        self._optimizers = Optimizers(
            self.vae, lr=settings.vae.lr, lr_rest=settings.vae.lr_rest, betas=(0.9, 0.99), is_matrix=kernels,
        )
        self.ema = Ema(self._optimizers.masters, settings.vae.ema)
        self._pool: Tensor | None = None
        self._stride: int = self.vae.config.scale_factor_spatial
        self._generator = torch.Generator(device)
        self._graphs = Graphs(device)

    def state(self) -> dict[str, Any]:
        return {"optimizers": self._optimizers.state(), "ema": self.ema.shadow}

    def load(self, state: dict[str, Any]) -> None:
        self._optimizers.load(state["optimizers"])
        copy_tensors(self.ema.shadow, state["ema"])

    def step(self, index: int) -> dict[str, Tensor]:
        s = self._settings.vae
        kind = "image" if index < s.image_steps else "whole" if index % 4 == 3 else "clip"
        batch, frames = {
            "image": (s.image_batch, 1), "clip": (s.batch, s.latent_frames),
            "whole": (s.whole_batch, s.whole_latent_frames),
        }[kind]
        self._generator.manual_seed(step_seed(self._settings.seed, self.name, index))
        true = self._crops(batch, 4 * frames - 3)
        noise = torch.randn(
            (batch, frames, self._channels, *(side // self._stride for side in true.shape[-2:])),
            generator=self._generator, device=self._device,
        ).transpose(1, 2)
        losses = self._graphs(kind, self._reconstruct, true, noise)
        self._optimizers.step(learning_rate(index, self.steps))
        self.ema.update(index)
        return {f"{name}_{kind}": value for name, value in losses.items()}

    def _reconstruct(self, true: Tensor, noise: Tensor) -> dict[str, Tensor]:
        s = self._settings.vae
        mean, log_variance = (x.float() for x in self._passes.encode(true.to(self.vae.dtype)))
        ours = self._passes.decode((mean + noise * (0.5 * log_variance).exp()).to(self.vae.dtype)).float()
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean()
        loss = reconstruction_loss(ours, true, s.edge_weight, s.gradient_weight)
        self._optimizers.backward(loss + s.kl_weight * kl)
        mse = F.mse_loss(ours.detach().clamp(-1, 1), true)
        return {"loss": loss.detach(), "kl": kl.detach(), "psnr_db": -10 * torch.log10(mse / 4)}

    def _crops(self, batch: int, frames: int) -> Tensor:
        """[B, 3, T, H, W] in [-1, 1] from random clips at random moments."""
        if self._pool is None:
            self._pool = render_pool(self._settings.seed, POOL_CLIPS, self._device)
        clips, length = self._pool.shape[:2]
        which = torch.randint(clips, (batch, 1), generator=self._generator, device=self._device)
        start = torch.randint(length - frames + 1, (batch, 1), generator=self._generator, device=self._device)
        picked = self._pool[which, start + torch.arange(frames, device=self._device)]
        return picked.permute(0, 2, 1, 3, 4).float() / 127.5 - 1


def working_dtype(device: torch.device) -> torch.dtype:
    """What weights and activations are while training; masters and losses are float32."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def render_pool(seed: int, clips: int, device: torch.device) -> Tensor:
    """uint8 [clips, T, 3, H, W], from seeds of their own."""
    parts = []
    for start in range(0, clips, RENDER_BATCH):
        scenes = [sample(5_000_000 + seed * 100_000 + i).scene for i in range(start, min(clips, start + RENDER_BATCH))]
        parts.append(((render(scenes, device=device) + 1) * 127.5).round().to(torch.uint8))
    return torch.cat(parts)
