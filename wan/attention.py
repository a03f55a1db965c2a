"""Attention layers: what projects to queries, keys and values. They know neither memory, nor RoPE, nor policy.

B batch, L chunk tokens, H heads, D head dim, C = H * D channels.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wan.backends import AttentionBackend


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

    def __init__(self, dim: int, num_heads: int, eps: float, backend: AttentionBackend):
        super().__init__(dim, num_heads, eps, backend)
        self.joint: nn.Module | None = None  # x [B, L, C] -> query, keys and values side by side; see `join`

    @torch.no_grad()
    def join(self) -> None:
        """Make one matrix product of three: q, k and v become views of joint parameters and keep names and values.

        For finished weights in their final dtype and place: what moves a module afterwards parts them again.
        """
        if self.joint is not None and not isinstance(self.joint, _Joint):
            return
        parts, joint = (self.q, self.k, self.v), {}
        for name in ("weight", "bias"):
            joint[name] = torch.cat([getattr(linear, name) for linear in parts])
            for linear, own in zip(parts, joint[name].chunk(3), strict=True):
                getattr(linear, name).data = own
        self.joint = _Joint(**joint)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, C] -> query, keys and values [B, L, H, D], the first two normalised."""
        if self.joint is None:
            query, keys, values = self.q(x), self.k(x), self.v(x)
        else:
            query, keys, values = self.joint(x).chunk(3, dim=-1)
        return self.heads(self.norm_q(query)), self.heads(self.norm_k(keys)), self.heads(values)


class _Joint(nn.Module):
    """Weights [3 C, C] and bias [3 C] of three layers as one; no part of a state dict."""

    def __init__(self, weight: Tensor, bias: Tensor):
        super().__init__()
        self.register_buffer("weight", weight, persistent=False)
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight, self.bias)


class CrossAttention(_Attention):
    """A chunk attends to the text, padding included, as the model was trained."""

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """Embedded text [B, T, C] -> keys and values [B, T, H, D]; done once per prompt."""
        return self.heads(self.norm_k(self.k(context))), self.heads(self.v(context))

    def query(self, x: Tensor) -> Tensor:
        """x [B, L, C] -> [B, L, H, D], normalised."""
        return self.heads(self.norm_q(self.q(x)))
