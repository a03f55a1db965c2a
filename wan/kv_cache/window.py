"""The buffers that attention reads: remembered tokens in window time, then the chunk itself.

Loaded once per chunk; passes overwrite the chunk's slots alone, so addresses and shapes hold still.

B batch, A attended tokens, L chunk tokens, H heads, D head dim.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wan.kv_cache.policy import Plan
from wan.kv_cache.store import KVStore, take
from wan.rope import Phase, rotate_time, time_phase


@dataclass(frozen=True)
class Window:
    """What one attention call needs, all in window time."""

    query: Tensor   # [B, L, H, D]
    keys: Tensor    # [B, A + L, H, D]
    values: Tensor  # [B, A + L, H, D]


class WindowBuffer:
    """Rotated keys and gathered values of one layer."""

    def __init__(
        self, batch: int, tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype,
    ):
        self._keys = torch.zeros(batch, tokens, heads, head_dim, device=device, dtype=dtype)
        self._values = torch.zeros_like(self._keys)
        self._past = 0

    @property
    def tokens(self) -> int:
        """The most tokens that attention can see."""
        return self._keys.shape[1]

    def load(self, store: KVStore, plan: Plan) -> None:
        """Gather what the plan attends to and rotate it to its window time; the store is only read."""
        self._past = plan.attend.shape[1]
        phase = time_phase(plan.position, self._keys.shape[-1], self._keys.dtype)
        self._keys[:, :self._past] = rotate_time(take(store.keys, plan.attend), phase)
        self._values[:, :self._past] = take(store.values, plan.attend)

    def extend(self, query: Tensor, keys: Tensor, values: Tensor, phase: Phase) -> Window:
        """Put the chunk's time-free [B, L, H, D] behind the past, rotated by `phase`."""
        stop = self._past + keys.shape[1]
        self._keys[:, self._past:stop] = rotate_time(keys, phase)
        self._values[:, self._past:stop] = values
        return Window(query=rotate_time(query, phase), keys=self._keys[:, :stop], values=self._values[:, :stop])
