"""Sinks that follow the video: running averages of the first slots and of what leaves the window.

Kept in float32, since rounding to half precision would drop what one chunk adds; the store holds them rounded.
Keys are time-free and every token meets one of its own row and column, so averaging commutes with RoPE.
A policy says which slots leave (`Plan.absorbed`); memory changes at `commit` alone.

B batch, S averaged slots, n slots that leave, H heads, D head dim.
"""
from __future__ import annotations

import torch
from torch import Tensor

from wan.kv_cache.policy import Plan
from wan.kv_cache.store import CacheShape, KVStore, take, write
from wan.rope import phase_dtype


class SinkAverage:
    """Averages [B, S, H, D] of keys and values; float64 beside a float64 store.

    Source: Reward Forcing, arXiv:2512.04678, EMA-Sink.
    """

    def __init__(self, shape: CacheShape, tokens: int):
        size = (shape.batch, tokens, shape.heads, shape.head_dim)
        self.keys = torch.zeros(size, device=shape.device, dtype=phase_dtype(shape.dtype))
        self.values = torch.zeros_like(self.keys)

    def copy_from(self, other: SinkAverage) -> None:
        """Take over another layer's averages."""
        self.keys.copy_(other.keys)
        self.values.copy_(other.values)

    def after(self, store: KVStore, plan: Plan) -> tuple[Tensor, Tensor]:
        """Keys and values [B, n, H, D] of the first slots once those that leave are averaged in; nothing changes."""
        count, gain = plan.absorbed.shape[1], 1 - plan.decay
        return tuple(
            mine[:, :count].lerp(take(stored, plan.absorbed).to(mine.dtype), gain)
            for mine, stored in ((self.keys, store.keys), (self.values, store.values))
        )

    def commit(self, store: KVStore, plan: Plan) -> None:
        """Average in what leaves, before the store lets go of it."""
        for mine, stored, new in zip(
            (self.keys, self.values), (store.keys, store.values), self.after(store, plan), strict=True,
        ):
            mine[:, :new.shape[1]] = new
            write(stored[:, :new.shape[1]], new)

    def begin(self, store: KVStore, first: int) -> None:
        """Averages of the slots from `first` on begin with what the store holds there."""
        stop = min(self.keys.shape[1], store.length)
        if first < stop:
            self.keys[:, first:stop] = store.keys[:, first:stop]
            self.values[:, first:stop] = store.values[:, first:stop]
