"""Stage 3: the few-step student, by distribution matching on its own rollouts (Self Forcing in miniature).

Source: Self Forcing, arXiv:2506.08009, Algorithm 1; DMD2, arXiv:2405.14867.
"""
from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

from pipeline.sampler import FewStepSampler
from training.data import LatentClips
from training.graphs import Graphs
from training.loop import Ema, copy_tensors, learning_rate, step_seed
from training.matching import DistributionMatching
from training.memory import RolloutMemory, Rotation
from training.optim import Optimizers
from training.parts import CaptionEncoder
from training.rollout import self_rollout
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
        s = settings.student
        self._matching = DistributionMatching(
            self._flow, copy.deepcopy(teacher), copy.deepcopy(teacher), guidance=s.guidance, lr=s.lr_critic,
        )
        self._optimizers = Optimizers(self.model, lr=s.lr, lr_rest=s.lr, betas=(0.0, 0.95))
        self.ema = Ema(self._optimizers.masters, s.ema)
        self.snapshots: dict[str, dict[str, Tensor]] = {}  # step -> averages in bf16
        self._generator, self._graphs = torch.Generator(device), Graphs(device)
        self._nothing = captions.tokens([""]).to(device)
        if device.type == "cuda":
            self._matching.compile()

    def state(self) -> dict[str, Any]:
        return {
            "optimizers": self._optimizers.state(), "critic": self._matching.state(), "ema": self.ema.shadow,
            "snapshots": self.snapshots,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._optimizers.load(state["optimizers"])
        self._matching.load(state["critic"])
        copy_tensors(self.ema.shadow, state["ema"])
        self.snapshots = dict(state["snapshots"])

    def step(self, index: int) -> dict[str, Tensor]:
        s, seed = self._settings.student, step_seed(self._settings.seed, self.name, index)
        self._generator.manual_seed(seed)
        clean, ids = self._clips.draw(s.batch, self._generator)
        with torch.no_grad():
            embeddings, nothing = self._captions(ids), self._captions(self._nothing).expand(s.batch, -1, -1)
        leave = seed % self._sampler.num_passes  # the pass at which this rollout leaves every chunk
        noise = torch.stack([self._noise(clean) for _ in range(leave + 1)])
        made = self._graphs(
            f"leave at {leave}", self._update, embeddings, nothing, noise, self._noise(clean),
            self._sigma(s.batch, low=0.02),
        )
        factor = learning_rate(index, self.steps, decay_from=0.4)
        self._optimizers.step(factor)
        self.ema.update(index)
        if (index + 1) % s.snapshot_every == 0:
            self.snapshots[str(index + 1)] = {name: t.bfloat16() for name, t in self.ema.shadow.items()}
        for _ in range(s.critic_updates):
            critic = self._graphs(
                "critic", self._matching.update_critic, made["video"], embeddings, self._noise(clean),
                self._sigma(s.batch, low=0.01),
            )
            self._matching.optimizers.step(factor)
        return {"matching": made["matching"], **critic}

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator, device=self._device)

    def _sigma(self, batch: int, low: float) -> Tensor:
        """A level per chunk, as [B, F]; the ends say nothing."""
        chunks = self._settings.data.latent_frames // self._geometry.chunk_frames
        return self._flow.per_frame(draw_sigmas((batch, chunks), self._generator, self._device).clamp(low, 0.98))

    def _update(
        self, embeddings: Tensor, nothing: Tensor, rollout_noise: Tensor, noise: Tensor, sigma: Tensor,
    ) -> dict[str, Tensor]:
        memory = RolloutMemory(self._rotation, len(self.model.blocks), self._device)
        text = self.model.embed_text(embeddings)
        video = self_rollout(self.model, self._sampler, self._geometry, memory, text, rollout_noise)
        loss = self._matching.loss(video, embeddings, nothing, noise, sigma)
        self._optimizers.backward(loss)
        return {"matching": loss, "video": video}
