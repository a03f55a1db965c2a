"""Distribution matching: what a frozen teacher and a learning critic say of a generated video.

Source: DMD2, arXiv:2405.14867; Self Forcing, arXiv:2506.08009, Algorithm 1.
"""
from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from training.optim import Optimizers
from training.teacher import mix
from wan.model import CausalWanModel


class Flow(Protocol):
    """How a network reads a whole noisy clip."""

    def attach(self, model: CausalWanModel) -> CausalWanModel:
        """Give the model the attention that the layout needs."""

    def __call__(
        self, model: CausalWanModel, context: Tensor, noisy: Tensor, sigma: Tensor, embeddings: Tensor,
    ) -> Tensor:
        """Flow [B, F, C, h, w] of `noisy` at the levels sigma [B, F]; the clean context is what came before."""


class DistributionMatching:
    """Pulls a video from where the critic says it is towards where the guided teacher says it should be."""

    def __init__(self, flow: Flow, teacher: CausalWanModel, critic: CausalWanModel, *, guidance: float, lr: float):
        self._flow, self._guidance = flow, guidance
        self._teacher = flow.attach(teacher).requires_grad_(False)
        self._critic = flow.attach(critic)
        self.optimizers = Optimizers(self._critic, lr=lr, lr_rest=lr, betas=(0.0, 0.95))

    def compile(self) -> None:
        for network in (self._teacher, self._critic):
            for block in network.blocks:
                block.compile(dynamic=False)

    def state(self) -> dict[str, Any]:
        return self.optimizers.state()

    def load(self, state: dict[str, Any]) -> None:
        self.optimizers.load(state)

    def loss(self, video: Tensor, embeddings: Tensor, nothing: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """Half the squared distance to the target, which carries no gradient.

        Shapes: video, noise [B, F, C, h, w]; embeddings, nothing [B, T, text_dim]; sigma [B, F].
        """
        with torch.no_grad():
            clean = video.detach()
            noisy = mix(clean, noise, sigma)
            conditional = self._clean(self._teacher, clean, noisy, sigma, embeddings)
            unconditional = self._clean(self._teacher, clean, noisy, sigma, nothing)
            real = unconditional + self._guidance * (conditional - unconditional)
            fake = self._clean(self._critic, clean, noisy, sigma, embeddings)
            scale = (clean - real).abs().mean(dim=(2, 3, 4), keepdim=True).clamp_min(1e-3)
            target = clean - (fake - real) / scale
        return 0.5 * F.mse_loss(video, target)

    def update_critic(self, video: Tensor, embeddings: Tensor, noise: Tensor, sigma: Tensor) -> dict[str, Tensor]:
        """Gradients of the critic's flow-matching loss on a generated video."""
        flow = self._flow(self._critic, video, mix(video, noise, sigma), sigma, embeddings)
        loss = F.mse_loss(flow, noise - video)
        self.optimizers.backward(loss)
        return {"critic": loss}

    def _clean(
        self, network: CausalWanModel, context: Tensor, noisy: Tensor, sigma: Tensor, embeddings: Tensor,
    ) -> Tensor:
        flow = self._flow(network, context, noisy, sigma, embeddings)
        return noisy - sigma[..., None, None, None] * flow
