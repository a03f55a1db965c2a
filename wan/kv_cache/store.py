"""Remembered keys and values of one layer.

The store knows slots, not time and not policy: it stages, appends, forgets and resets.
Keys are time-free: height and width RoPE applied, temporal RoPE not (see rope.py).

B batch, N slots, A chosen slots, L new tokens, H heads, D head dim.
"""
from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What a cache must know of the network that it serves."""

    layers: int
    heads: int
    head_dim: int
    batch: int
    device: torch.device
    dtype: torch.dtype
    store_dtype: torch.dtype | None = None   # of what is remembered; None: `dtype`
    window_dtype: torch.dtype | None = None  # of what attention reads; None: `dtype`


def take(buffer: Tensor, slots: Tensor) -> Tensor:
    """Rows of `buffer` [B, N, ...] at `slots` [B, A], each sample its own: [B, A, ...]. No host sync."""
    return _select(buffer, rows_of(slots, buffer.shape[1]))


def rows_of(slots: Tensor, capacity: int) -> Tensor:
    """Where slots [B, A] are when the samples of a buffer [B, capacity, ...] lie behind one another."""
    return slots + torch.arange(len(slots), device=slots.device).unsqueeze(1) * capacity


def _select(buffer: Tensor, rows: Tensor) -> Tensor:
    return buffer.flatten(0, 1).index_select(0, rows.flatten()).unflatten(0, rows.shape)


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`; what 8-bit floats cannot hold becomes the largest they can."""
    if dtype.itemsize < x.dtype.itemsize and dtype.itemsize == 1:
        x = x.clamp(*(sign * torch.finfo(dtype).max for sign in (-1, 1)))
    return x.to(dtype)


def write(slots: Tensor, x: Tensor) -> None:
    """Copy x to `slots`, in their dtype."""
    slots.copy_(narrowed(x, slots.dtype))


class KVStore:
    """Slots of one layer. New tokens are staged beyond `length`; only `commit` makes them memory."""

    keys: Tensor    # [B, N, H, D], time-free
    values: Tensor  # [B, N, H, D]
    origin: Tensor  # [B, N] int32, latent frame the token was born in
    uses: Tensor    # [B, N] int32, how often the token was chosen
    length: int     # slots in use; a host int, so no one needs .item()

    def __init__(self, shape: CacheShape, capacity: int):
        size = (shape.batch, capacity, shape.heads, shape.head_dim)
        self.keys = torch.zeros(size, device=shape.device, dtype=shape.store_dtype or shape.dtype)
        self.values = torch.zeros_like(self.keys)
        self.origin = torch.zeros(size[:2], device=shape.device, dtype=torch.int32)
        self.uses = torch.zeros_like(self.origin)
        self.reset()

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def reset(self) -> None:
        """Forget everything; the buffers stay where they are."""
        self.length = 0

    def copy_from(self, other: KVStore) -> None:
        """Take over another store's memory."""
        self.length = other.length
        for mine, theirs in zip(self._columns(), other._columns(), strict=True):
            mine[:, :self.length].copy_(theirs[:, :self.length])

    def slots(self, new: int) -> tuple[Tensor, Tensor]:
        """Where the chunk's `new` keys and values [B, L, H, D] are staged: beyond `length`."""
        return self.keys[:, self.length:self.length + new], self.values[:, self.length:self.length + new]

    def commit(self, *, retain: Tensor, chosen: Tensor | None, origin: Tensor, still: int = 0) -> None:
        """Keep `retain`, count `chosen`, append the staged tokens.

        Shapes: retain [B, R] ascending slots below `length`; chosen [B, C] slots or None;
            origin [L], the latent frames of the staged tokens.
        Args: still: the first so many of `retain` are slots 0, 1, ...; nothing of theirs is moved.
        """
        new = origin.shape[0]
        stop = self.length + new
        self.origin[:, self.length:stop] = origin
        self.uses[:, self.length:stop] = 0
        if chosen is not None:
            self.uses.scatter_add_(1, chosen, torch.ones_like(chosen, dtype=torch.int32))
        kept = retain.shape[1]
        if kept < self.length:
            staged = torch.arange(self.length, stop, device=retain.device).expand(retain.shape[0], -1)
            moved = rows_of(torch.cat([retain[:, still:], staged], dim=1), self.capacity)
            for buffer in self._columns():
                buffer[:, still:kept + new] = _select(buffer, moved)
        self.length = kept + new

    def _columns(self) -> tuple[Tensor, ...]:
        return self.keys, self.values, self.origin, self.uses
