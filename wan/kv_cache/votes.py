"""Who votes on what is kept: per-frame sums of queries, and the score they give a remembered token.

All tokens of a frame share one temporal phase, so the sum over a frame's queries can be taken before
the temporal rotation; participation is linear in the query, so nothing else of the queries is needed.

B batch, F frames, H heads, D head dim, N candidates.
"""
from __future__ import annotations

import torch
from torch import Tensor

from wan.compiler import Compiler
from wan.kv_cache.policy import Votes
from wan.kv_cache.store import CacheShape
from wan.rope import Turn, phase_dtype, time_turn, turn


class QueryVotes:
    """Time-free query sums [B, F, H, D] of the newest remembered frames and of the chunk.

    `past_frames`: how many remembered frames vote. Each pass sets `staged`, the sums of the chunk's queries, height and
    width rotated, so those of the context pass are what `commit` remembers; float32 (float64 for float64 queries).
    """

    def __init__(self, shape: CacheShape, past_frames: int, compiler: Compiler):
        size = (shape.batch, past_frames, shape.heads, shape.head_dim)
        self._past = torch.zeros(size, device=shape.device, dtype=phase_dtype(shape.dtype))
        self.staged = self._past[:, :0]
        self.known_frames = 0  # remembered frames that vote; a host int that decides shapes
        self._participation = compiler(participation, dynamic=True)
        self._turn, self._asked = compiler(time_turn, dynamic=True), compiler(asked, dynamic=True)

    def reset(self) -> None:
        """Forget every vote."""
        self.known_frames = 0
        self.staged = self._past[:, :0]

    def copy_from(self, other: QueryVotes) -> None:
        """Take over another layer's remembered votes."""
        self._past.copy_(other._past)
        self.known_frames = other.known_frames

    def commit(self) -> None:
        """Remember the staged sums; the oldest make room."""
        new_frames = self.staged.shape[1]
        self.known_frames = min(self._past.shape[1], self.known_frames + new_frames)
        self._past.copy_(torch.cat([self._past, self.staged], dim=1)[:, new_frames:])

    def score(self, keys: Tensor, origin: Tensor, start: Tensor, votes: Votes, heads: int | None = None) -> Tensor:
        """Participation of candidate keys: mean over heads of the summed, scaled query-key products.

        Shapes: keys [B, N, H, D] time-free; origin [B, N], their latent frames; start [], the chunk's first.
        Args: heads: only the first so many; None is all.
        Returns: [B, N] in the sums' dtype. Positions are true frame indices, counted from `start`.
        Source: Deep Forcing, arXiv:2512.05081, section 3.2; scores as in the authors' code (raw, no softmax).
        """
        past = self._past[:, self._past.shape[1] - self.known_frames:]
        sums = {"past": past, "denoising": self.staged, "both": torch.cat([past, self.staged], dim=1)}[votes]
        first = 0 if votes == "denoising" else -past.shape[1]
        frame = torch.arange(first, first + sums.shape[1], device=keys.device)
        sums, keys = sums[..., :heads, :], keys[..., :heads, :]
        heads, head_dim = keys.shape[-2:]
        query = self._asked(sums, frame)
        by = self._turn(origin - start, head_dim, sums.dtype)
        return self._participation(keys, by, query) / (head_dim**0.5 * heads)


def asked(sums: Tensor, frame: Tensor) -> Tensor:
    """The sums [B, F, H, D] of frames at times [F], turned and added up: one query [B, H, D] for all of them."""
    by = time_turn(frame, sums.shape[-1], sums.dtype)
    time = by.cos.shape[-1]
    return torch.cat([turn(sums[..., :time], by), sums[..., time:]], dim=-1).sum(dim=1)


def participation(keys: Tensor, by: Turn, query: Tensor) -> Tensor:
    """Products of keys [B, N, H, D], their first channels turned, with one query [B, H, D], summed over H and D."""
    time, keys, query = by.cos.shape[-1], keys.to(query.dtype), query.unsqueeze(1)
    moving = turn(keys[..., :time], by) * query[..., :time]
    still = keys[..., time:] * query[..., time:]
    return moving.sum(dim=(-2, -1)) + still.sum(dim=(-2, -1))
