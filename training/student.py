"""Stage 3: the few-step student, by distribution matching on its own rollouts (Self Forcing in miniature).

Source: Self Forcing, arXiv:2506.08009, Algorithm 1; DMD2, arXiv:2405.14867.
"""
from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.sampler import FewStepSampler
from training.data import LatentClips
from training.loop import Ema, Optimizers, copy_tensors, learning_rate
from training.memory import RolloutMemory, Rotation
from training.parts import CaptionEncoder
from training.settings import Settings
from training.teacher import TeacherForcedFlow, draw_sigmas
from wan.geometry import VideoGeometry
from wan.model import CausalWanModel


class StudentStage:
    """Student, critic and frozen teacher start from the same weights."""

    name = "student"

    def __init__(self, settings: Settings, teacher: CausalWanModel, geometry: VideoGeometry, sampler: FewStepSampler,
                 captions: CaptionEncoder, clips: LatentClips, device: torch.device):
        self._settings, self._device, self._geometry, self._sampler = settings, device, geometry, sampler
        self.steps = settings.student.steps
        self._captions, self._clips = captions.to(device).requires_grad_(False), clips
        architecture, frames = teacher.config, settings.data.latent_frames
        self._flow = TeacherForcedFlow(geometry, architecture, frames, device)
        self._rotation = Rotation(geometry, architecture.head_dim, device)
        self.model = teacher.to(device)
        self._teacher = self._flow.attach(copy.deepcopy(teacher)).requires_grad_(False)
        self._critic = self._flow.attach(copy.deepcopy(teacher))
        s = settings.student
        self._optimizers = Optimizers(self.model, lr=s.lr, lr_rest=s.lr, betas=(0.0, 0.95))
        self._critic_optimizers = Optimizers(self._critic, lr=s.lr_critic, lr_rest=s.lr_critic, betas=(0.0, 0.95))
        self.ema = Ema(self._optimizers.masters, s.ema)
        self._generator = torch.Generator(device).manual_seed(settings.seed + 2)
        self._dice = torch.Generator().manual_seed(settings.seed + 2)  # on the host: which pass a rollout leaves at
        self._nothing = captions.tokens([""]).to(device)
        if device.type == "cuda":
            for network in (self.model, self._teacher, self._critic):
                for block in network.blocks:
                    block.compile(dynamic=False)

    def state(self) -> dict[str, Any]:
        return {
            "optimizers": self._optimizers.state(), "critic": self._critic_optimizers.state(), "ema": self.ema.shadow,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._optimizers.load(state["optimizers"])
        self._critic_optimizers.load(state["critic"])
        copy_tensors(self.ema.shadow, state["ema"])

    def step(self, index: int) -> dict[str, Tensor]:
        s = self._settings.student
        _, ids = self._clips.draw(s.batch, self._generator)
        embeddings = self._captions(ids)
        video = self._rollout(embeddings)
        loss = self._matching_loss(video, embeddings)
        loss.backward()
        factor = learning_rate(index, self.steps, warmup=10, decay_from=0.4)
        self._optimizers.step(factor)
        self.ema.update(index)
        critic = torch.stack([self._critic_update(video.detach(), embeddings, factor) for _ in range(s.critic_updates)])
        return {"matching": loss, "critic": critic.mean()}

    def _rollout(self, embeddings: Tensor) -> Tensor:
        """A clip [B, F, C, h, w] from the student's own memory; gradient through the last pass of each chunk alone."""
        text = self.model.embed_text(embeddings)
        memory = RolloutMemory(self._rotation, len(self.model.blocks), self._device)
        leave = int(torch.randint(self._sampler.num_passes, (1,), generator=self._dice))
        parts = []
        for span in self._geometry.chunks(self._settings.data.latent_frames):
            memory.begin(span)
            shape = (len(embeddings), span.frames, *self._clips.latents.shape[2:])
            x = torch.randn(shape, generator=self._generator, device=self._device)
            for index in range(leave + 1):
                with torch.set_grad_enabled(index == leave):
                    flow = self.model(x, self._times(x, self._sampler.times[index]), text, memory).float()
                    x0 = x - self._sampler.sigmas[index] * flow
                if index < leave:
                    x = self._sampler.renoise(
                        x0, torch.randn(shape, generator=self._generator, device=self._device), index + 1,
                    )
            with torch.no_grad():
                self.model(x0.detach(), self._times(x, self._sampler.context_time), text, memory)
            memory.commit()
            parts.append(x0)
        return torch.cat(parts, dim=1)

    def _matching_loss(self, video: Tensor, embeddings: Tensor) -> Tensor:
        """Pull the video from where the critic says it is towards where the guided teacher says it should be."""
        with torch.no_grad():
            clean = video.detach()
            noisy, sigma = self._noised(clean, low=0.02)
            level = sigma[..., None, None, None]
            none = self._captions(self._nothing).expand_as(embeddings)
            conditional = self._clean(self._teacher, clean, noisy, sigma, embeddings, level)
            unconditional = self._clean(self._teacher, clean, noisy, sigma, none, level)
            real = unconditional + self._settings.student.guidance * (conditional - unconditional)
            fake = self._clean(self._critic, clean, noisy, sigma, embeddings, level)
            scale = (clean - real).abs().mean(dim=(2, 3, 4), keepdim=True).clamp_min(1e-3)
            target = clean - (fake - real) / scale
        return 0.5 * F.mse_loss(video, target)

    def _critic_update(self, video: Tensor, embeddings: Tensor, factor: float) -> Tensor:
        noisy, sigma = self._noised(video, low=0.0)
        level = sigma[..., None, None, None]
        flow = self._flow(self._critic, video, torch.zeros_like(sigma), noisy, sigma, embeddings)
        loss = F.mse_loss(flow, (noisy - (1 - level) * video) / level - video)
        loss.backward()
        self._critic_optimizers.step(factor)
        return loss.detach()

    def _noised(self, video: Tensor, low: float) -> tuple[Tensor, Tensor]:
        chunks = video.shape[1] // self._geometry.chunk_frames
        sigma = self._flow.per_frame(
            draw_sigmas((len(video), chunks), self._generator, self._device).clamp(max(low, 0.01), 0.98)
        )
        noise = torch.randn(video.shape, generator=self._generator, device=self._device)
        level = sigma[..., None, None, None]
        return (1 - level) * video + level * noise, sigma

    def _clean(
        self, network: CausalWanModel, context: Tensor, noisy: Tensor, sigma: Tensor, embeddings: Tensor, level: Tensor,
    ) -> Tensor:
        return noisy - level * self._flow(network, context, torch.zeros_like(sigma), noisy, sigma, embeddings)

    @staticmethod
    def _times(x: Tensor, time: float) -> Tensor:
        return torch.full(x.shape[:2], time, device=x.device)


