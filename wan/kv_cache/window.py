"""The buffers that attention reads: remembered tokens in window time, then the chunk itself.

Loaded once per chunk; passes overwrite the chunk's slots alone, so addresses and shapes hold still.

B batch, A attended tokens, L chunk tokens, H heads, D head dim.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from wan.compiler import Compiler, by_hand
from wan.kv_cache.archive import Archive
from wan.kv_cache.average import SinkAverage
from wan.kv_cache.policy import Plan
from wan.kv_cache.store import CacheShape, KVStore, take, write
from wan.rope import Turn, time_turn, turn


@dataclass(frozen=True)
class Window:
    """What one attention call needs, all in window time."""

    query: Tensor   # [B, L, H, D]
    keys: Tensor    # [B, A + L, H, D]
    values: Tensor  # [B, A + L, H, D]


class WindowBuffer:
    """Rotated keys and gathered values; of one layer, or of the layer whose turn it is."""

    def __init__(self, shape: CacheShape, tokens: int, compiler: Compiler):
        size = (shape.batch, tokens, shape.heads, shape.head_dim)
        self._keys = torch.zeros(size, device=shape.device, dtype=shape.window_dtype or shape.dtype)
        self._values = torch.zeros_like(self._keys)
        self._dtype = shape.dtype
        self._gather, self._turn = compiler(gather_turned, dynamic=True), compiler(time_turn, dynamic=True)

    @property
    def tokens(self) -> int:
        """The most tokens that attention can see."""
        return self._keys.shape[1]

    def load(
        self, store: KVStore, plan: Plan, archive: Archive | None, average: SinkAverage | None,
        turns: dict[int, Turn],
    ) -> None:
        """Gather what the plan attends to and rotate it to its window time; nothing that is remembered changes.

        Packets follow the store's tokens; attention does not mind the order.
        Args: turns: rotations that layers of this chunk have made; used and added to where they share their times.
        """
        turns = turns if plan.same_times else {}
        past = plan.attend.shape[1]
        if past:
            self._load(store.keys, store.values, plan.attend, plan.position, 0, turns)
        if plan.packets is not None:
            slots, position = archive.tokens_of(plan)
            self._load(archive.keys.flatten(1, 2), archive.values.flatten(1, 2), slots, position, past, turns)
        if plan.absorbed is not None:
            first = slice(plan.absorbed.shape[1])
            by = Turn(turns[0].cos[:, first], turns[0].sin[:, first])
            self._load(*average.after(store, plan), plan.attend[:, first], plan.position[:, first], 0, {0: by})

    def _load(
        self, keys: Tensor, values: Tensor, slots: Tensor, position: Tensor, begin: int, turns: dict[int, Turn],
    ) -> None:
        stop = begin + slots.shape[1]
        if begin not in turns:
            turns[begin] = self._turn(position, self._keys.shape[-1], self._dtype)
        self._gather(keys, values, slots, turns[begin], self._keys[:, begin:stop], self._values[:, begin:stop])

    def slots(self, past: int, new: int) -> tuple[Tensor, Tensor]:
        """Where the chunk's `new` keys and values go: behind `past` attended tokens."""
        return self._keys[:, past:past + new], self._values[:, past:past + new]

    def seen(self, query: Tensor, tokens: int) -> Window:
        """The first `tokens` of the window, for a query in window time."""
        return Window(query=query, keys=self._keys[:, :tokens], values=self._values[:, :tokens])


@by_hand("wan.kv_cache.staging_triton")
def gather_turned(
    keys: Tensor, values: Tensor, slots: Tensor, by: Turn, window_keys: Tensor, window_values: Tensor,
) -> None:
    """Copy the rows [B, A] of a store into a window, the keys' first channels turned.

    Shapes: keys, values [B, N, H, D]; by [B, A, 1, time channels], or [1, 1, 1, 0], which turns none;
        window_keys, window_values [B, A, H, D], written.
    """
    time = by.cos.shape[-1]
    rows = take(keys, slots)
    write(window_keys[..., :time], turn(rows[..., :time].to(by.cos.dtype), by))  # rounded once, whatever the dtypes
    write(window_keys[..., time:], rows[..., time:])
    write(window_values, take(values, slots))
