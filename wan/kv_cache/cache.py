"""The life of the cache: begin -> extend (every pass, every layer) -> commit.

It owns stores, windows and votes, asks the policy once per chunk and layer, and is the only caller of
temporal rotation. Passes stage beyond the memory; only `commit` changes it, so a chunk that is aborted
or done again with other noise or another prompt leaves no trace.

B batch, L chunk tokens, H heads, D head dim.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

import wan.kv_cache.policies  # noqa: F401  (registers every policy)
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.policy import CacheSizes, CacheView, KVPolicy, Plan, Votes
from wan.kv_cache.store import KVStore
from wan.kv_cache.votes import QueryVotes
from wan.kv_cache.window import Window, WindowBuffer
from wan.rope import Phase, rotate_space, space_phase, time_phase


@dataclass(frozen=True, kw_only=True)
class CacheShape:
    """What the cache must know of the network."""

    layers: int
    heads: int
    head_dim: int
    batch: int
    device: torch.device
    dtype: torch.dtype


@dataclass
class _Moment:
    """What all layers share during one chunk."""

    chunk: ChunkSpan
    start: Tensor        # [] int64 chunk.start, on the device
    chunk_index: Tensor  # [] int64 chunk.index, on the device
    seen_frames: int
    seeds: Tensor
    space: Phase
    lookahead: bool
    time: dict[int, Phase] = field(default_factory=dict)

    def query_phase(self, query_position: int, frame_tokens: int, head_dim: int, dtype: torch.dtype) -> Phase:
        """Temporal rotation of the chunk's tokens; layers that agree on the position share it."""
        if query_position not in self.time:
            frames = torch.arange(query_position, query_position + self.chunk.frames, device=self.seeds.device)
            self.time[query_position] = time_phase(frames.repeat_interleave(frame_tokens), head_dim, dtype)
        return self.time[query_position]


class LayerCache:
    """One layer's memory. Attention calls `extend` and knows nothing else of the cache."""

    def __init__(self, layer: int, shape: CacheShape, sizes: CacheSizes, geometry: VideoGeometry, policy: KVPolicy):
        common = (shape.heads, shape.head_dim, shape.device, shape.dtype)
        self.store = KVStore(shape.batch, sizes.capacity_tokens, *common)
        self.window = WindowBuffer(shape.batch, sizes.window_tokens, *common)
        past_voters = sizes.vote_frames - geometry.chunk_frames
        self.votes = QueryVotes(shape.batch, past_voters, *common) if sizes.vote_frames else None
        self.plan: Plan | None = None
        self._most_frames = sizes.capacity_tokens // geometry.frame_tokens + 1
        self._layer, self._shape, self._frame_tokens, self._policy = layer, shape, geometry.frame_tokens, policy
        self._moment: _Moment | None = None

    def begin(self, moment: _Moment) -> None:
        """Start a chunk, or start it again."""
        self._moment, self.plan = moment, None

    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        """Show attention the remembered tokens and, behind them, this pass's own.

        Shapes: query, keys, values [B, L, H, D], normalised, without RoPE; L is whole frames.
        The first call of a chunk asks the policy; every call overwrites what the last one staged.
        """
        if self._moment is None:
            raise RuntimeError("no chunk has begun: call KVCache.begin(chunk) before the model's forward.")
        frames = (self._moment.chunk.frames, self._frame_tokens)
        query, keys = (rotate_space(x.unflatten(1, frames), self._moment.space) for x in (query, keys))
        if self.votes is not None:
            self.votes.stage(query)
        query, keys = query.flatten(1, 2), keys.flatten(1, 2)
        if not self._moment.lookahead:  # what is only looked at needs no room
            self.store.stage(keys, values)
        if self.plan is None:
            self.plan = self._checked_plan()
            self.window.load(self.store, self.plan)
        phase = self._moment.query_phase(
            self.plan.query_position, self._frame_tokens, self._shape.head_dim, self._shape.dtype
        )
        return self.window.extend(query, keys, values, phase)

    def view(self) -> CacheView:
        """What the policy may see now."""
        chunk, length = self._moment.chunk, self.store.length
        return CacheView(
            layer=self._layer, chunk_index=self._moment.chunk_index, start=self._moment.start,
            chunk_frames=chunk.frames, seen_frames=min(self._moment.seen_frames, self._most_frames), length=length,
            frame_tokens=self._frame_tokens,
            seeds=self._moment.seeds, origin=self.store.origin[:, :length], uses=self.store.uses[:, :length],
            scorer=self._score, lookahead=self._moment.lookahead,
        )

    def commit(self) -> None:
        """Turn what the last pass staged into memory."""
        born = self._moment.start + torch.arange(self._moment.chunk.frames, device=self.store.origin.device)
        self.store.commit(
            retain=self.plan.retain, chosen=self.plan.chosen, origin=born.repeat_interleave(self._frame_tokens)
        )
        if self.votes is not None:
            self.votes.commit()
        self._moment, self.plan = None, None

    def forget_newest(self, tokens: int) -> None:
        """Forget the last `tokens` slots, and every vote: those of the frames that stay are too old to be asked."""
        self.store.forget_newest(tokens)
        if self.votes is not None:
            self.votes.reset()

    def reset(self) -> None:
        """Forget everything."""
        self.store.reset()
        if self.votes is not None:
            self.votes.reset()
        self._moment, self.plan = None, None

    def copy_memory_of(self, other: LayerCache) -> None:
        """Take over the committed memory of `other`."""
        self.reset()
        self.store.copy_from(other.store)
        if self.votes is not None:
            self.votes.copy_from(other.votes)

    def _score(self, lo: int, hi: int, votes: Votes) -> Tensor:
        return self.votes.score(self.store.keys[:, lo:hi], self.store.origin[:, lo:hi], self._moment.start, votes)

    def _checked_plan(self) -> Plan:
        plan = self._policy.plan(self.view())
        attended = plan.attend.shape[1] + self._moment.chunk.frames * self._frame_tokens
        if attended > self.window.tokens or plan.attend.shape != plan.position.shape:
            raise ValueError(
                f"{type(self._policy).__name__} plans {attended} tokens (positions for {plan.position.shape[1]} of the "
                f"past), but asked for a window of {self.window.tokens}. Its sizes() and plan() disagree."
            )
        return plan


class KVCache:
    """Memory of all layers for one batch of videos."""

    def __init__(self, shape: CacheShape, geometry: VideoGeometry, policy: KVPolicy):
        sizes = policy.sizes(geometry)
        self._layers = [LayerCache(i, shape, sizes, geometry, policy) for i in range(shape.layers)]
        self._space = space_phase(geometry.rows, geometry.columns, shape.head_dim, shape.dtype, shape.device)
        self._seeds = torch.zeros(shape.batch, device=shape.device, dtype=torch.int64)
        self._start = torch.zeros((), device=shape.device, dtype=torch.int64)
        self._chunk_index = torch.zeros_like(self._start)
        self._chunk: ChunkSpan | None = None
        self._lookahead = False
        self._policy, self._frame_tokens = policy, geometry.frame_tokens
        room_tokens = sizes.capacity_tokens - geometry.chunk_frames * geometry.frame_tokens  # beside the next chunk
        self.most_frames = min(sizes.window_tokens, room_tokens) // geometry.frame_tokens  # that one pass may remember
        self.seen_frames = 0

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]

    def reset(self, seeds: Sequence[int]) -> None:
        """Forget everything; what follows equals a fresh process. `seeds`: one int per sample."""
        if len(seeds) != len(self._seeds):
            raise ValueError(f"{len(seeds)} seeds for a cache of batch {len(self._seeds)}; give one per sample.")
        self._seeds.copy_(torch.tensor(list(seeds), dtype=torch.int64))
        self.forget_all()

    def forget_all(self) -> None:
        """Forget everything but the seeds."""
        self._chunk, self.seen_frames = None, 0
        for layer in self._layers:
            layer.reset()

    def forget_newest(self) -> int:
        """Forget the newest frames, all but sinks and what was compressed; returns how many frames that was."""
        remembered = self._layers[0].store.length // self._frame_tokens
        frames = self._policy.tail_frames(remembered, self.seen_frames > remembered)
        for layer in self._layers:
            layer.forget_newest(frames * self._frame_tokens)
        self._chunk, self.seen_frames = None, self.seen_frames - frames
        return frames

    def copy_memory_of(self, other: KVCache) -> None:
        """Take over what `other` remembers, so that both go on from one state; shapes agree, dtypes need not."""
        self._seeds.copy_(other._seeds)
        self._chunk, self.seen_frames = None, other.seen_frames
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.copy_memory_of(theirs)

    def begin(self, chunk: ChunkSpan, *, lookahead: bool = False) -> None:
        """Start a chunk. Beginning again before `commit` drops what was staged.

        With `lookahead` the span may be longer than a chunk; it sees the memory and can never become part of it.
        """
        self._chunk, self._lookahead = chunk, lookahead
        self._start.fill_(chunk.start)
        self._chunk_index.fill_(chunk.index)
        moment = _Moment(
            chunk=chunk, start=self._start, chunk_index=self._chunk_index, seen_frames=self.seen_frames,
            seeds=self._seeds, space=self._space, lookahead=lookahead,
        )
        for layer in self._layers:
            layer.begin(moment)

    def commit(self) -> None:
        """Remember the chunk as its last pass left it: all layers or none.

        Raises:
            RuntimeError: no chunk was begun, a layer has not seen it, or it was a look ahead.
        """
        if self._lookahead:
            raise RuntimeError("a look ahead cannot be remembered: begin(chunk) without lookahead, forward, commit().")
        if self._chunk is None or any(layer.plan is None for layer in self._layers):
            raise RuntimeError("commit needs a chunk that every layer has seen: begin(chunk), forward, commit().")
        for layer in self._layers:
            layer.commit()
        self.seen_frames += self._chunk.frames
        self._chunk = None
