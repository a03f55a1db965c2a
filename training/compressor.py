"""PackForcing's compressor, alone or with the network, by distribution matching on rollouts that remember packets.

A rollout keeps sink and recent chunks as they are and everything between as packets, as inference does. Each packet is
made once, with gradient, of latents that carry none, and every later chunk that sees it sends its gradient there.

Source: PackForcing, arXiv:2603.25730, sections 4.4 and 5; how gradients reach the compressor is open there.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pipeline.packets import Packer
from pipeline.sampler import FewStepSampler
from training.graphs import Graphs
from training.loop import Ema, copy_tensors, learning_rate, step_seed
from training.matching import DistributionMatching, Flow
from training.memory import PackedRollout, PacketRotation, Rotation
from training.optim import Optimizers
from training.rollout import self_rollout
from training.settings import CompressorSettings
from training.teacher import draw_sigmas
from wan.compressor import BranchSizes, HighResolutionBranch
from wan.geometry import VideoGeometry
from wan.kv_cache.policy import Compression
from wan.model import CausalWanModel, WanConfig
from wan.vae import WanVAE


def make_branch(settings: CompressorSettings, architecture: WanConfig, seed: int) -> HighResolutionBranch:
    """A fresh HR branch, which adds nothing yet."""
    space = settings.space_reduction * architecture.patch_size[1]
    sizes = BranchSizes(architecture.in_dim, architecture.dim, settings.time_reduction, space)
    return HighResolutionBranch(sizes, settings.channels).initialise(seed)


class CompressorStage:
    """The same for every size: networks, prompts as embeddings, and a VAE that is never trained."""

    name = "compressor"

    def __init__(
        self, settings: CompressorSettings, seed: int, *, student: CausalWanModel, branch: HighResolutionBranch,
        teacher: CausalWanModel, critic: CausalWanModel, flow: Flow, vae: WanVAE, embeddings: Tensor, nothing: Tensor,
        geometry: VideoGeometry, sampler: FewStepSampler, device: torch.device,
    ):
        """Args:
            student, branch: what runs; the branch is trained, with `settings.joint` the student as well.
            teacher, critic: start from the same weights; `flow` is how they read a clip.
            embeddings, nothing: of the prompts [N, T, text_dim], and of no prompt [1, T, text_dim].
        Raises:
            ValueError: a clip that is no whole chunks, or in which no packet is ever seen.
        """
        s, self._seed, self._device = settings, seed, device
        self._settings, self._geometry, self._sampler, self._vae = settings, geometry, sampler, vae
        self._check_clip()
        self.steps, self.model, self.branch = s.steps, student.to(device), branch.to(device, student.dtype)
        self._embeddings, self._nothing = embeddings.to(device), nothing.to(device)
        self._flow = flow
        self._matching = DistributionMatching(
            teacher.to(device), critic.to(device), guidance=s.guidance, lr=s.lr_critic,
        )
        trained = {"branch": self.branch, "model": self.model} if s.joint else {"branch": self.branch}
        self.model.requires_grad_(s.joint)
        lr = s.lr if s.joint else s.lr_branch
        self._optimizers = Optimizers(nn.ModuleDict(trained), lr=lr, lr_rest=lr, betas=(0.0, 0.95))
        self.ema = Ema(self._optimizers.masters, s.ema)
        self._grid = geometry.packet_grid(time=s.time_reduction, space=s.space_reduction)
        self._compression = Compression("dual", s.stream, s.lr_frames, "")
        head_dim = student.config.head_dim
        self._rotation = Rotation(geometry, head_dim, device)
        self._packet_rotation = PacketRotation(self._grid, head_dim, device)
        self._generator, self._graphs = torch.Generator(device), Graphs(device)
        if device.type == "cuda":
            self._matching.compile()

    def state(self) -> dict[str, Any]:
        return {"optimizers": self._optimizers.state(), "critic": self._matching.state(), "ema": self.ema.shadow}

    def load(self, state: dict[str, Any]) -> None:
        self._optimizers.load(state["optimizers"])
        self._matching.load(state["critic"])
        copy_tensors(self.ema.shadow, state["ema"])

    def step(self, index: int) -> dict[str, Tensor]:
        s, g, seed = self._settings, self._geometry, step_seed(self._seed, self.name, index)
        self._generator.manual_seed(seed)
        which = torch.randint(len(self._embeddings), (s.batch,), generator=self._generator, device=self._device)
        embeddings = self._embeddings[which]
        leave = seed % self._sampler.num_passes  # the pass at which this rollout leaves every chunk
        clip = (s.batch, s.latent_frames, self.model.config.in_dim, g.latent_height, g.latent_width)
        made = self._graphs(
            f"leave at {leave}", self._update, embeddings, self._nothing, self._noise(leave + 1, *clip),
            self._noise(*clip), self._sigma(low=0.02),
        )
        factor = learning_rate(index, self.steps)
        self._optimizers.step(factor)
        self.ema.update(index)
        critic = {}
        for _ in range(s.critic_updates):
            critic = self._graphs(
                "critic", self._update_critic, made["video"], embeddings, self._noise(*clip), self._sigma(low=0.01),
            )
            self._matching.optimizers.step(factor)
        return {"matching": made["matching"], **critic}

    def weights(self, part: str) -> dict[str, Tensor]:
        """Averaged weights of `branch`, or of `model` where it was trained."""
        return {
            name.removeprefix(f"{part}."): value for name, value in self.ema.shadow.items() if name.startswith(part)
        }

    def rollout(self, embeddings: Tensor, noise: Tensor) -> Tensor:
        """A clip [B, F, C, h, w]; gradient through the last pass of each chunk, and through every packet it sees.

        Shapes: noise [passes, B, F, C, h, w], one draw a pass.
        """
        s, text = self._settings, self.model.embed_text(embeddings)
        chunk = self._geometry.chunk_frames
        memory = PackedRollout(
            self._rotation, self._packet_rotation, len(self.model.blocks), self._device,
            sink_chunks=s.sink_frames // chunk, recent_chunks=s.recent_frames // chunk,
        )
        packer = Packer(
            self.model, memory, self._grid, self._compression, self._sampler.context_time, vae=self._vae,
            branch=self.branch,
        )
        packer.start(None)
        return self_rollout(
            self.model, self._sampler, self._geometry, memory, text, noise,
            after_context=lambda latents: packer.remember(latents, text),
        )

    def _update(
        self, embeddings: Tensor, nothing: Tensor, rollout_noise: Tensor, noise: Tensor, sigma: Tensor,
    ) -> dict[str, Tensor]:
        video = self.rollout(embeddings, rollout_noise)
        loss = self._matching.loss(self._flow, video, embeddings, nothing, noise, sigma)
        self._optimizers.backward(loss)
        return {"matching": loss, "video": video}

    def _update_critic(self, video: Tensor, embeddings: Tensor, noise: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        loss = self._matching.critic_loss(self._flow, video, embeddings, noise, sigma)
        self._matching.optimizers.backward(loss)
        return {"critic": loss}

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device)

    def _sigma(self, low: float) -> Tensor:
        """A level per chunk, as [B, F]; the ends say nothing."""
        chunk = self._geometry.chunk_frames
        shape = (self._settings.batch, self._settings.latent_frames // chunk)
        return draw_sigmas(shape, self._generator, self._device).clamp(low, 0.98).repeat_interleave(chunk, dim=1)

    def _check_clip(self) -> None:
        s, chunk = self._settings, self._geometry.chunk_frames
        uneven = [name for name in ("latent_frames", "sink_frames", "recent_frames") if getattr(s, name) % chunk]
        if uneven:
            raise ValueError(f"compressor.{uneven[0]}={getattr(s, uneven[0])} must be whole chunks of {chunk} frames.")
        shortest = s.sink_frames + s.recent_frames + 2 * chunk
        if s.latent_frames < shortest or s.recent_frames < chunk:
            raise ValueError(
                f"compressor.latent_frames={s.latent_frames} is too short for any packet to be seen. "
                f"Use at least {shortest}, and recent_frames of at least {chunk}."
            )
