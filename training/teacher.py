"""Stage 2: the causal flow-matching teacher, by teacher forcing, with its text encoder."""
from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.sampler import TABLE_STEPS
from training.data import LatentClips
from training.graphs import Graphs
from training.loop import Ema, copy_tensors, learning_rate, step_seed
from training.memory import ChunkCausalAttention, Rotation, WholeClip, dense
from training.optim import Optimizers
from training.parts import CaptionEncoder, make_transformer
from training.settings import Settings
from training.vae import working_dtype
from wan.geometry import VideoGeometry
from wan.model import CausalWanModel, WanConfig

SHIFT = 5.0


def draw_sigmas(shape: tuple[int, ...], generator: torch.Generator, device: torch.device) -> Tensor:
    """Noise levels in (0, 1], shifted towards noise as the sampler's schedule is."""
    u = torch.rand(shape, generator=generator, device=device).clamp_min(1e-3)
    return SHIFT * u / (1 + (SHIFT - 1) * u)


def mix(clean: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`clean` [B, F, C, h, w] with noise at the levels sigma [B, F]."""
    level = sigma[..., None, None, None]
    return (1 - level) * clean + level * noise


class TeacherForcedFlow:
    """Flow of every chunk of a clip at once, each given the clean chunks before it."""

    def __init__(self, geometry: VideoGeometry, architecture: WanConfig, frames: int, device: torch.device):
        self._chunk_frames, self._frames = geometry.chunk_frames, frames
        rotation = Rotation(geometry, architecture.head_dim, device)
        self._memory = WholeClip(rotation, torch.arange(frames, device=device).repeat(2))
        tokens = geometry.frame_tokens
        self._backend = ChunkCausalAttention(geometry.chunk_frames * tokens, 2 * frames * tokens, device)

    def attach(self, model: CausalWanModel) -> CausalWanModel:
        """Give the model's self-attention the layout's mask; cross-attention stays dense."""
        for block in model.blocks:
            block.self_attn.backend = self._backend
        return model

    def __call__(
        self, model: CausalWanModel, context: Tensor, noisy: Tensor, sigma: Tensor, embeddings: Tensor,
    ) -> Tensor:
        """Flow [B, F, C, h, w] of `noisy` at the levels sigma [B, F]; the clean context is what came before."""
        t = TABLE_STEPS * torch.cat([torch.zeros_like(sigma), sigma], dim=1)
        return model(
            torch.cat([context, noisy], dim=1), t, model.embed_text(embeddings), self._memory,
        )[:, self._frames:].float()

    def per_frame(self, per_chunk: Tensor) -> Tensor:
        """[B, chunks] -> [B, F]."""
        return per_chunk.repeat_interleave(self._chunk_frames, dim=1)


class OpeningFlow:
    """Flow of the first chunk alone: nothing is before it."""

    def __init__(self, geometry: VideoGeometry, architecture: WanConfig, device: torch.device):
        frames = torch.arange(geometry.chunk_frames, device=device)
        self._memory = WholeClip(Rotation(geometry, architecture.head_dim, device), frames)

    def attach(self, model: CausalWanModel) -> CausalWanModel:
        """A chunk sees all of itself."""
        for block in model.blocks:
            block.self_attn.backend = dense
        return model

    def __call__(
        self, model: CausalWanModel, context: Tensor, noisy: Tensor, sigma: Tensor, embeddings: Tensor,
    ) -> Tensor:
        """Flow [B, F, C, h, w] of `noisy` at the levels sigma [B, F]; there is no context to look at."""
        return model(noisy, TABLE_STEPS * sigma, model.embed_text(embeddings), self._memory).float()


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
        self._opening = OpeningFlow(geometry, architecture, device)
        self._generator = torch.Generator(device)
        self._graphs = Graphs(device)
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
        s = self._settings.teacher
        self._generator.manual_seed(step_seed(self._settings.seed, self.name, index))
        if index < s.first_chunk_steps:
            losses = self._graphs("openings", self._openings_alone, *self._draw(self._openings, s.first_chunk_batch))
        else:
            losses = self._graphs(
                "clips", self._clips_and_openings, *self._draw(self._clips, s.batch),
                *self._draw(self._openings, s.first_chunk_share),
            )
        self._optimizers.step(learning_rate(index, self.steps))
        self.ema.update(index)
        return losses

    def _draw(self, clips: LatentClips, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Clean latents, noise, caption ids (some dropped), and a level per chunk as sigmas [B, F]."""
        clean, ids = clips.draw(batch, self._generator)
        dropped = torch.rand((batch, 1), generator=self._generator, device=self._device)
        dropped = dropped < self._settings.teacher.caption_drop
        chunks = clean.shape[1] // self._geometry.chunk_frames
        sigma = self._flow.per_frame(draw_sigmas((batch, chunks), self._generator, self._device))
        noise = torch.randn(clean.shape, generator=self._generator, device=self._device)
        return clean, noise, torch.where(dropped, self._nothing, ids), sigma

    def _openings_alone(self, *opening: Tensor) -> dict[str, Tensor]:
        loss = self._opening_loss(*opening)
        self._optimizers.backward(loss)
        return {"opening": loss}

    def _clips_and_openings(
        self, clean: Tensor, noise: Tensor, ids: Tensor, sigma: Tensor, *opening: Tensor,
    ) -> dict[str, Tensor]:
        self._flow.attach(self.model)
        flow = self._flow(self.model, clean, mix(clean, noise, sigma), sigma, self.captions(ids))
        clip, beside = F.mse_loss(flow, noise - clean), self._opening_loss(*opening)
        self._optimizers.backward(clip + 0.5 * beside)
        return {"clip": clip, "opening": beside}

    def _opening_loss(self, clean: Tensor, noise: Tensor, ids: Tensor, sigma: Tensor) -> Tensor:
        self._opening.attach(self.model)
        flow = self._opening(self.model, clean, mix(clean, noise, sigma), sigma, self.captions(ids))
        return F.mse_loss(flow, noise - clean)
