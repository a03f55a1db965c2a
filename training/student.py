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
from training.loop import SNAPSHOTS, Ema, copy_tensors, learning_rate, step_seed
from training.matching import DistributionMatching, Flow
from training.memory import RolloutMemory, Rotation
from training.optim import Optimizers
from training.parts import CaptionEncoder
from training.rollout import self_rollout
from training.settings import Settings
from training.teacher import OpeningFlow, TeacherForcedFlow, draw_sigmas
from wan.geometry import VideoGeometry
from wan.model import CausalWanModel


class StudentStage:
    """Student, critic and frozen teacher start from the same weights; openings are trained beside clips."""

    name = "student"

    def __init__(self, settings: Settings, teacher: CausalWanModel, geometry: VideoGeometry, sampler: FewStepSampler,
                 captions: CaptionEncoder, clips: LatentClips, openings: LatentClips, device: torch.device):
        self._settings, self._device, self._geometry, self._sampler = settings, device, geometry, sampler
        self.steps = settings.student.steps
        self._captions = captions.to(device).requires_grad_(False)
        self._clips, self._openings = clips, openings
        architecture, frames = teacher.config, settings.data.latent_frames
        self._flow = TeacherForcedFlow(geometry, architecture, frames, device)
        self._opening = OpeningFlow(geometry, architecture, device)
        self._rotation = Rotation(geometry, architecture.head_dim, device)
        self.model = teacher.to(device)
        s = settings.student
        self._matching = DistributionMatching(
            copy.deepcopy(teacher), copy.deepcopy(teacher), guidance=s.guidance, lr=s.lr_critic,
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
            SNAPSHOTS: self.snapshots,
        }

    def load(self, state: dict[str, Any]) -> None:
        self._optimizers.load(state["optimizers"])
        self._matching.load(state["critic"])
        copy_tensors(self.ema.shadow, state["ema"])
        self.snapshots = dict(state[SNAPSHOTS])

    def step(self, index: int) -> dict[str, Tensor]:
        s, seed = self._settings.student, step_seed(self._settings.seed, self.name, index)
        self._generator.manual_seed(seed)
        leave = seed % self._sampler.num_passes  # the pass at which this rollout leaves every chunk
        clip, opening = self._draw(self._clips, s.batch), self._draw(self._openings, s.first_chunk_share)
        with torch.no_grad():
            nothing = self._captions(self._nothing)
        made = self._graphs(
            f"leave at {leave}", self._update, nothing, *self._noises(*clip, leave), *self._noises(*opening, leave),
        )
        factor = learning_rate(index, self.steps, decay_from=0.4)
        self._optimizers.step(factor)
        self.ema.update(index)
        if (index + 1) % s.snapshot_every == 0 or index + 1 == self.steps:
            self.snapshots[str(index + 1)] = {name: t.bfloat16() for name, t in self.ema.shadow.items()}
        for _ in range(s.critic_updates):
            critic = self._graphs(
                "critic", self._update_critic,
                made["video"], clip[1], self._noise(made["video"]), self._sigma(made["video"], low=0.01),
                made["chunk"], opening[1], self._noise(made["chunk"]), self._sigma(made["chunk"], low=0.01),
            )
            self._matching.optimizers.step(factor)
        return {"matching": made["matching"], "opening": made["opening"], **critic}

    def _draw(self, clips: LatentClips, batch: int) -> tuple[Tensor, Tensor]:
        """Latents, of which only the shape is used, and their captions' embeddings."""
        like, ids = clips.draw(batch, self._generator)
        with torch.no_grad():
            return like, self._captions(ids)

    def _noises(self, like: Tensor, embeddings: Tensor, leave: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Embeddings, a draw for each pass of the rollout, and noise and levels by which it is judged."""
        passes = torch.stack([self._noise(like) for _ in range(leave + 1)])
        return embeddings, passes, self._noise(like), self._sigma(like, low=0.02)

    def _noise(self, like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=self._generator, device=self._device)

    def _sigma(self, like: Tensor, low: float) -> Tensor:
        """A level per chunk, as [B, F]; the ends say nothing."""
        chunks = like.shape[1] // self._geometry.chunk_frames
        levels = draw_sigmas((len(like), chunks), self._generator, self._device)
        return self._flow.per_frame(levels.clamp(low, 0.98))

    def _update(self, nothing: Tensor, *inputs: Tensor) -> dict[str, Tensor]:
        """`inputs`: what `_noises` gives, for clips and then for openings."""
        video, matching = self._rollout(self._flow, nothing, *inputs[:4])
        chunk, opening = self._rollout(self._opening, nothing, *inputs[4:])
        self._optimizers.backward(matching + 0.5 * opening)
        return {"matching": matching, "opening": opening, "video": video, "chunk": chunk}

    def _rollout(
        self, flow: Flow, nothing: Tensor, embeddings: Tensor, passes: Tensor, noise: Tensor, sigma: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """What the student makes of the captions, and its loss."""
        memory = RolloutMemory(self._rotation, len(self.model.blocks), self._device)
        text = self.model.embed_text(embeddings)
        video = self_rollout(self.model, self._sampler, self._geometry, memory, text, passes)
        return video, self._matching.loss(flow, video, embeddings, nothing, noise, sigma)

    def _update_critic(self, *inputs: Tensor) -> dict[str, Tensor]:
        """`inputs`: video, embeddings, noise and levels, for clips and then for openings."""
        clip = self._matching.critic_loss(self._flow, *inputs[:4])
        opening = self._matching.critic_loss(self._opening, *inputs[4:])
        self._matching.optimizers.backward(clip + 0.5 * opening)
        return {"critic": clip, "critic_opening": opening}
