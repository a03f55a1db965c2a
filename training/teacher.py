"""Stage 2: the causal flow-matching teacher, by teacher forcing, with its text encoder."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.sampler import TABLE_STEPS
from training.data import LatentClips
from training.loop import Ema, Optimizers, copy_tensors, learning_rate
from training.memory import ChunkCausalAttention, RolloutMemory, Rotation, TeacherForcing, dense
from training.parts import CaptionEncoder, make_transformer
from training.settings import Settings
from training.vae import working_dtype
from wan.geometry import ChunkSpan, VideoGeometry
from wan.model import CausalWanModel, WanConfig

SHIFT = 5.0


def draw_sigmas(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Noise levels in (0, 1], shifted towards noise as the sampler's schedule is."""
    u = torch.rand(shape, generator=generator, device=device).clamp_min(1e-3)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


class TeacherForcedFlow:
    """Flow of every chunk of a clip at once, each given the clean chunks before it."""

    def __init__(self, geometry: VideoGeometry, architecture: WanConfig, frames: int, device: torch.device):
        self._chunk_frames, self._frames = geometry.chunk_frames, frames
        rotation = Rotation(geometry, architecture.head_dim, device)
        self._memory = TeacherForcing(rotation, frames, device)
        self._backend = ChunkCausalAttention(geometry.chunk_frames * geometry.frame_tokens)

    def attach(self, model: CausalWanModel) -> CausalWanModel:
        """Give the model's self-attention the layout's mask; cross-attention stays dense."""
        for block in model.blocks:
            block.self_attn.backend = self._backend
        return model

    def __call__(
        self, model: CausalWanModel, context: Tensor, context_sigma: Tensor, noisy: Tensor, sigma: Tensor,
        embeddings: Tensor,
    ) -> Tensor:
        """Flow [B, F, C, h, w] of `noisy`; sigmas [B, F]; the context is what the chunks before look like."""
        t = TABLE_STEPS * torch.cat([context_sigma, sigma], dim=1)
        return model(
            torch.cat([context, noisy], dim=1), t, model.embed_text(embeddings), self._memory,
        )[:, self._frames:].float()

    def per_frame(self, per_chunk: Tensor) -> Tensor:
        """[B, chunks] -> [B, F]."""
        return per_chunk.repeat_interleave(self._chunk_frames, dim=1)


class TeacherStage:
    """First the opening chunk alone, where the caption decides all; then whole clips, with opening chunks beside."""

    name = "teacher"

    def __init__(self, settings: Settings, architecture: WanConfig, geometry: VideoGeometry, captions: CaptionEncoder,
                 clips: LatentClips, openings: LatentClips, device: torch.device):
        self._settings, self._device, self._geometry = settings, device, geometry
        self.steps = settings.teacher.first_chunk_steps + settings.teacher.steps
        dtype = working_dtype(device)
        self.model = make_transformer(architecture, settings.seed).to(device, dtype)
        self.captions = captions.to(device, dtype)
        self._clips, self._openings = clips, openings
        self._flow = TeacherForcedFlow(geometry, architecture, settings.data.latent_frames, device)
        self._rotation = Rotation(geometry, architecture.head_dim, device)
        self._generator = torch.Generator(device).manual_seed(settings.seed + 1)
        self._nothing = captions.tokens([""]).to(device)
        both = nn.ModuleDict({"model": self.model, "captions": self.captions})
        self._optimizers = Optimizers(both, lr=settings.teacher.lr, lr_rest=settings.teacher.lr_rest)
        self.ema = Ema(self._optimizers.masters, settings.teacher.ema)
        if device.type == "cuda":
            for block in self.model.blocks:
                block.compile(dynamic=False)

    def state(self) -> dict[str, Any]:
        return {"optimizers": self._optimizers.state(), "ema": self.ema.shadow}

    def load(self, state: dict[str, Any]) -> None:
        self._optimizers.load(state["optimizers"])
        copy_tensors(self.ema.shadow, state["ema"])

    def step(self, index: int) -> dict[str, Tensor]:
        s, losses = self._settings.teacher, {}
        alone = index < s.first_chunk_steps
        losses["opening"] = self._opening_loss(s.first_chunk_batch if alone else s.first_chunk_share)
        if not alone:
            losses["clip"] = self._clip_loss(s.batch)
        total = losses["opening"] if alone else losses["clip"] + 0.5 * losses["opening"]
        total.backward()
        self._optimizers.step(learning_rate(index, self.steps))
        self.ema.update(index)
        return losses

    def _embed(self, ids: Tensor) -> Tensor:
        drop = (
            torch.rand(len(ids), 1, generator=self._generator, device=self._device)
            < self._settings.teacher.caption_drop
        )
        return self.captions(torch.where(drop, self._nothing, ids))

    def _opening_loss(self, batch: int) -> Tensor:
        clean, ids = self._openings.draw(batch, self._generator)
        self._dense()
        sigma = draw_sigmas((batch, 1), self._generator, self._device).expand(-1, clean.shape[1])
        noise = torch.randn(clean.shape, generator=self._generator, device=self._device)
        memory = RolloutMemory(self._rotation, len(self.model.blocks), self._device)
        memory.begin(ChunkSpan(0, 0, clean.shape[1]))
        level = sigma[..., None, None, None]
        text = self.model.embed_text(self._embed(ids))
        flow = self.model((1 - level) * clean + level * noise, TABLE_STEPS * sigma, text, memory)
        return F.mse_loss(flow.float(), noise - clean)

    def _clip_loss(self, batch: int) -> Tensor:
        s = self._settings.teacher
        clean, ids = self._clips.draw(batch, self._generator)
        chunks = clean.shape[1] // self._geometry.chunk_frames
        sigma = self._flow.per_frame(draw_sigmas((batch, chunks), self._generator, self._device))
        noise = torch.randn(clean.shape, generator=self._generator, device=self._device)
        level = sigma[..., None, None, None]
        dirty = torch.rand(batch, 1, generator=self._generator, device=self._device) < s.noisy_context_share
        amount = (
            dirty * s.noisy_context_max * torch.rand(batch, 1, generator=self._generator, device=self._device)
        )[..., None, None, None]
        context = clean + amount * torch.randn(clean.shape, generator=self._generator, device=self._device)
        self._flow.attach(self.model)
        flow = self._flow(
            self.model, context, torch.zeros_like(sigma), (1 - level) * clean + level * noise, sigma, self._embed(ids),
        )
        return F.mse_loss(flow, noise - clean)

    def _dense(self) -> None:
        for block in self.model.blocks:
            block.self_attn.backend = dense
