"""Attention layers, and the kernels behind one protocol.

Self-attention asks its memory for a window and attends to it densely; it knows neither RoPE nor policy.

B batch, L chunk tokens, S seen tokens, H heads, D head dim, C = H * D channels.
"""
from __future__ import annotations

from typing import Protocol

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from wan.kv_cache.window import Window

# cuDNN is the fastest of torch's kernels on Hopper; each that refuses a shape or dtype leaves it to the next.
_CUDA_KERNELS = [
    SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH,
]


class AttentionBackend(Protocol):
    """Dense attention without a mask, scaled by 1 / sqrt(D)."""

    def __call__(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """query [B, L, H, D], keys and values [B, S, H, D] -> [B, L, H, D]."""


class Memory(Protocol):
    """What a layer's self-attention needs of its past: a LayerCache, or anything of this shape."""

    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        """Normalised [B, L, H, D] without RoPE -> what attention sees."""


def sdpa(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """torch's scaled dot-product attention; works on every device and dtype."""
    query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)
    with sdpa_kernel(_CUDA_KERNELS, set_priority=True):
        return F.scaled_dot_product_attention(query, keys, values).transpose(1, 2)


class _Attention(nn.Module):
    """Projections that self- and cross-attention share. q and k are RMS-normalised over all heads together."""

    def __init__(self, dim: int, num_heads: int, eps: float, backend: AttentionBackend):
        super().__init__()
        self.num_heads, self.backend = num_heads, backend
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(dim, eps=eps)
        self.norm_k = nn.RMSNorm(dim, eps=eps)

    def heads(self, x: Tensor) -> Tensor:
        """[B, L, C] -> [B, L, H, D]."""
        return x.unflatten(-1, (self.num_heads, -1))


class SelfAttention(_Attention):
    """A chunk attends to its memory and to itself."""

    def remember(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [B, L, H, D] of tokens [B, L, C]."""
        return self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))

    def forward(self, x: Tensor, memory: Memory) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        window = memory.extend(self.heads(self.norm_q(self.q(x))), *self.remember(x))
        return self.o(self.backend(window.query, window.keys, window.values).flatten(2))


class CrossAttention(_Attention):
    """A chunk attends to the text, padding included, as the model was trained."""

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [B, T, C] -> keys and values [B, T, H, D]; done once per prompt."""
        return self.heads(self.norm_k(self.k(context))), self.heads(self.v(context))

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """x [B, L, C] -> [B, L, C]."""
        return self.o(self.backend(self.heads(self.norm_q(self.q(x))), keys, values).flatten(2))
