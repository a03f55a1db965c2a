"""A clip made by a network in training, chunk by chunk from its own memory, as inference makes it.

Source: Self Forcing, arXiv:2506.08009, Algorithm 1.
"""
from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.sampler import FewStepSampler
from training.memory import RolloutMemory
from wan.geometry import VideoGeometry
from wan.model import CausalWanModel, TextContext


def self_rollout(
    model: CausalWanModel, sampler: FewStepSampler, geometry: VideoGeometry, memory: RolloutMemory, text: TextContext,
    noise: Tensor, after_context: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """A clip [B, F, C, h, w]; gradient through the last pass of each chunk alone, and through what memory carries.

    Args:
        noise: [passes, B, F, C, h, w], one draw a pass; as many passes are made of each chunk.
        after_context: is given each chunk's clean latents, without gradient, before they become memory; not the
            last ones, which nothing sees.
    """
    leave, parts = len(noise) - 1, []
    for span in geometry.chunks(noise.shape[2]):
        memory.begin(span)
        fresh = noise[:, :, span.start:span.stop]
        x = fresh[0]
        for index in range(leave + 1):
            with torch.set_grad_enabled(index == leave and torch.is_grad_enabled()):
                flow = model(x, _times(x, sampler.times[index]), text, memory).float()
                x0 = x - sampler.sigmas[index] * flow
            if index < leave:
                x = sampler.renoise(x0, fresh[index + 1], index + 1)
        with torch.no_grad():
            model(x0.detach(), _times(x, sampler.context_time), text, memory)
        if after_context is not None and span.stop < noise.shape[2]:
            after_context(x0.detach())
        memory.commit()
        parts.append(x0)
    return torch.cat(parts, dim=1)


def _times(x: Tensor, time: float) -> Tensor:
    return torch.full(x.shape[:2], time, device=x.device)
