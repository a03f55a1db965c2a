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
    """How a network reads a noisy clip."""

    def attach(self, model: CausalWanModel) -> CausalWanModel:
        """Give the model the attention that the layout needs."""

    def __call__(
        self, model: CausalWanModel, context: Tensor, noisy: Tensor, sigma: Tensor, embeddings: Tensor,
    ) -> Tensor:
        """Flow [B, F, C, h, w] of `noisy` at the levels sigma [B, F]; the clean context is what came before."""


class DistributionMatching:
    """Pulls a video from where the critic says it is towards where the guided teacher says it should be."""

    def __init__(self, teacher: CausalWanModel, critic: CausalWanModel, *, guidance: float, lr: float):
        self._guidance, self._teacher, self._critic = guidance, teacher.requires_grad_(False), critic
        self.optimizers = Optimizers(self._critic, lr=lr, lr_rest=lr, betas=(0.0, 0.95))

    def compile(self) -> None:
        for network in (self._teacher, self._critic):
            for block in network.blocks:
                block.compile(dynamic=False)

    def state(self) -> dict[str, Any]:
        return self.optimizers.state()

    def load(self, state: dict[str, Any]) -> None:
        self.optimizers.load(state)

    def loss(
        self, flow: Flow, video: Tensor, embeddings: Tensor, nothing: Tensor, noise: Tensor, sigma: Tensor,
    ) -> Tensor:
        """Half the squared distance to the target, which carries no gradient.

        Shapes: video, noise [B, F, C, h, w]; embeddings [B, T, text_dim]; nothing [1 or B, T, text_dim]; sigma [B, F].
        """
        with torch.no_grad():
            clean = video.detach()
            noisy = mix(clean, noise, sigma)
            conditional = _clean(flow, self._teacher, clean, noisy, sigma, embeddings)
            unconditional = _clean(flow, self._teacher, clean, noisy, sigma, nothing.expand_as(embeddings))
            real = unconditional + self._guidance * (conditional - unconditional)
            fake = _clean(flow, self._critic, clean, noisy, sigma, embeddings)
            scale = (clean - real).abs().mean(dim=(2, 3, 4), keepdim=True).clamp_min(1e-3)
            target = clean - (fake - real) / scale
        return 0.5 * F.mse_loss(video, target)

    def critic_loss(self, flow: Flow, video: Tensor, embeddings: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
        """The critic's flow-matching loss on a generated video."""
        flow.attach(self._critic)
        return F.mse_loss(flow(self._critic, video, mix(video, noise, sigma), sigma, embeddings), noise - video)


def _clean(
    flow: Flow, network: CausalWanModel, context: Tensor, noisy: Tensor, sigma: Tensor, embeddings: Tensor,
) -> Tensor:
    return noisy - sigma[..., None, None, None] * flow(flow.attach(network), context, noisy, sigma, embeddings)
