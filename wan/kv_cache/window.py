"""The buffers that attention reads: remembered tokens in window time, then the chunk itself.

Loaded once per chunk; passes overwrite the chunk's slots alone, so addresses and shapes hold still.

B batch, A attended tokens, L chunk tokens, H heads, D head dim.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wan.kv_cache.archive import Archive
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

    past: int  # tokens shown that are not the chunk's own

    def __init__(
        self, batch: int, tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype,
    ):
        self._keys = torch.zeros(batch, tokens, heads, head_dim, device=device, dtype=dtype)
        self._values = torch.zeros_like(self._keys)
        self.past = 0

    @property
    def nbytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @property
    def tokens(self) -> int:
        """The most tokens that attention can see."""
        return self._keys.shape[1]

    def load(self, store: KVStore, plan: Plan, archive: Archive | None = None) -> None:
        """Gather what the plan attends to and rotate it to its window time; store and archive are only read.

        Packets follow the store's tokens; attention does not mind the order.
        """
        self.past = 0
        self._append(take(store.keys, plan.attend), take(store.values, plan.attend), plan.position)
        if plan.packets is not None:
            tokens = archive.grid.tokens // archive.grid.frames
            self._append(
                take(archive.keys, plan.packets).flatten(1, 2), take(archive.values, plan.packets).flatten(1, 2),
                plan.packet_position.flatten(1, 2).repeat_interleave(tokens, dim=1),
            )

    def _append(self, keys: Tensor, values: Tensor, position: Tensor) -> None:
        stop = self.past + keys.shape[1]
        self._keys[:, self.past:stop] = rotate_time(
            keys, time_phase(position, self._keys.shape[-1], self._keys.dtype)
        )
        self._values[:, self.past:stop] = values
        self.past = stop

    def extend(self, query: Tensor, keys: Tensor, values: Tensor, phase: Phase) -> Window:
        """Put the chunk's time-free [B, L, H, D] behind the past, rotated by `phase`."""
        stop = self.past + keys.shape[1]
        self._keys[:, self.past:stop] = rotate_time(keys, phase)
        self._values[:, self.past:stop] = values
        return Window(query=rotate_time(query, phase), keys=self._keys[:, :stop], values=self._values[:, :stop])
