"""One layer's memory: store, window, votes and archive, and the plan of the chunk in the making.

B batch, L chunk tokens, H heads, D head dim.
"""
from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from wan.compiler import Compiler, by_hand
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.archive import Archive
from wan.kv_cache.average import SinkAverage
from wan.kv_cache.policy import CacheSizes, CacheView, KVPolicy, Plan, Votes
from wan.kv_cache.store import CacheShape, KVStore, narrowed, write
from wan.kv_cache.votes import QueryVotes
from wan.kv_cache.window import Window, WindowBuffer
from wan.rope import FrameTurns, Turn, turn

Tensors = tuple[Tensor, Tensor]  # keys and values of the same slots


@dataclass(frozen=True)
class Moment:
    """What all layers share during one chunk."""

    chunk: ChunkSpan
    start: Tensor        # [] int64 chunk.start, on the device
    chunk_index: Tensor  # [] int64 chunk.index, on the device
    seen_frames: int     # as a CacheView counts them
    seeds: Tensor
    lookahead: bool
    turns: dict[int, Turn] = field(default_factory=dict)  # see WindowBuffer.load


@dataclass(frozen=True)
class LayerState:
    """What of a layer's memory lives on the host; what is remembered is in buffers that stay where they are."""

    length: int         # slots in use
    known_frames: int   # remembered frames that vote
    known_packets: int  # compressed chunks, as far as they are counted
    plan: Plan | None   # of the chunk in the making
    sums: Tensor | None  # staged votes


def query_sums(query: Tensor, space: Turn, voting_frames: int) -> Tensor | None:
    """Sums [B, voting_frames, H, D] of a query [B, L, H, D] over each frame; None if no frame votes."""
    if not voting_frames:
        return None
    return turn(query, space).unflatten(1, (voting_frames, -1)).sum(dim=2, dtype=space.cos.dtype)


def stage(
    query: Tensor, keys: Tensor, values: Tensor, space: Turn, slots: Tensors, voting_frames: int,
) -> Tensor | None:
    """Write a pass's keys, time-free, and values [B, L, H, D] to `slots`; returns the query's sums."""
    write(slots[0], turn(keys, space))
    write(slots[1], values)
    return query_sums(query, space, voting_frames)


def show(query: Tensor, keys: Tensor, values: Tensor, by: Turn, slots: Tensors) -> Tensor:
    """Write the same in window time to a window's `slots`; returns the query in window time and their dtype."""
    write(slots[0], turn(keys, by))
    write(slots[1], values)
    return narrowed(turn(query, by), slots[0].dtype)


@by_hand("wan.kv_cache.staging_triton")
def stage_and_show(
    query: Tensor, keys: Tensor, values: Tensor, space: Turn, by: Turn, stored: Tensors, seen: Tensors,
    voting_frames: int,
) -> tuple[Tensor | None, Tensor]:
    """Both at once: the sums, and the query in window time."""
    return stage(query, keys, values, space, stored, voting_frames), show(query, keys, values, by, seen)


class LayerCache:
    """One layer's memory. Attention calls `extend` and knows nothing else of the cache."""

    def __init__(
        self, layer: int, shape: CacheShape, geometry: VideoGeometry, policy: KVPolicy, sizes: CacheSizes,
        turns: FrameTurns, packets: FrameTurns | None, window: WindowBuffer | None, compiler: Compiler,
    ):
        self.store = KVStore(shape, sizes.capacity_tokens)
        self._window_is_shared = window is not None
        self.window = window or WindowBuffer(shape, sizes.window_tokens, compiler)
        past_voters = sizes.vote_frames - geometry.chunk_frames
        self.votes = QueryVotes(shape, past_voters, compiler) if sizes.vote_frames else None
        self.archive = Archive(shape, sizes.archive, packets) if sizes.archive else None
        self._parts = [part for part in (self.store, self.votes, self.archive) if part is not None]
        self.average = SinkAverage(shape, sizes.averaged_tokens) if sizes.averaged_tokens else None
        self.plan: Plan | None = None
        self._rows, self._packet_tokens = geometry.rows, sizes.archive.grid.tokens if sizes.archive else 0
        self._layer, self._policy, self._turns = layer, policy, turns
        self._frame_tokens, self._chunk_frames = geometry.frame_tokens, geometry.chunk_frames
        self._sum, self._stage, self._show, self._both = map(compiler, (query_sums, stage, show, stage_and_show))
        self._moment: Moment | None = None

    def begin(self, moment: Moment) -> None:
        """Start a chunk, or start it again."""
        self._moment, self.plan = moment, None
        if self.archive is not None:
            self.archive.is_staged = False  # what is, belongs to a chunk that is made again

    def extend(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        """Show attention the remembered tokens and, behind them, this pass's own.

        Shapes: query, keys, values [B, L, H, D], normalised, without RoPE; L is whole frames.
        The first call of a chunk asks the policy; every call overwrites what the last one staged.
        """
        if self._moment is None:
            raise RuntimeError("no chunk has begun: call KVCache.begin(chunk) before the model's forward.")
        frames, new, is_first = self._moment.chunk.frames, keys.shape[1], self.plan is None
        space, voting = self._turns.space(frames), frames if self.votes else 0
        if is_first and self._moment.lookahead:  # never remembered, so nothing is staged
            self._vote(self._sum(query, space, voting))
        elif is_first:
            self._vote(self._stage(query, keys, values, space, self.store.slots(new), voting))
        if is_first:
            self.plan = self._checked_plan()
        self._load_window(is_first)
        past = self.past_tokens
        by, seen = self._turns.window(frames, self.plan.query_position), self.window.slots(past, new)
        if is_first or self._moment.lookahead:
            query = self._show(query, keys, values, by, seen)
        else:
            sums, query = self._both(query, keys, values, space, by, self.store.slots(new), seen, voting)
            self._vote(sums)
        return self.window.seen(query, past + new)

    def _load_window(self, is_first: bool) -> None:
        """Once a chunk, or before every pass if all layers share the window; then each makes its rotations anew."""
        if is_first or self._window_is_shared:
            made = {} if self._window_is_shared else self._moment.turns
            self.window.load(self.store, self.plan, self.archive, self.average, made)

    def extend_packet(self, query: Tensor, keys: Tensor, values: Tensor) -> Window:
        """Stage the chunk's packet [B, P, H, D] and show it behind what the chunk remembers, after the last pass."""
        self.archive.stage(keys, values)
        self._load_window(is_first=False)
        past, new = self.past_tokens, keys.shape[1]
        by = self.archive.turns.window(self.archive.grid.frames, self.plan.query_position)
        return self.window.seen(self._show(query, keys, values, by, self.window.slots(past, new)), past + new)

    def stage_packet(self, keys: Tensor, values: Tensor) -> None:
        """Stage the chunk's packet [B, P, H, D]; nothing is attended to."""
        self.archive.stage(keys, values)

    @property
    def past_tokens(self) -> int:
        """Remembered tokens, packets included, that the chunk in the making sees."""
        return self.plan.past_tokens(self._packet_tokens)

    def _vote(self, sums: Tensor | None) -> None:
        if self.votes is not None:
            self.votes.staged = sums

    def view(self) -> CacheView:
        """What the policy may see now."""
        moment, store, length = self._moment, self.store, self.store.length
        return CacheView(
            layer=self._layer, chunk_index=moment.chunk_index, start=moment.start, span_frames=moment.chunk.frames,
            chunk_frames=self._chunk_frames, seen_frames=moment.seen_frames, length=length,
            frame_tokens=self._frame_tokens, seeds=moment.seeds, origin=store.origin[:, :length],
            uses=store.uses[:, :length], participation=self._score, lookahead=moment.lookahead,
            packets=self.archive and self.archive.view(moment.start, self.votes),
        )

    def commit(self) -> None:
        """Turn what the last pass staged into memory."""
        born = self._moment.start + torch.arange(self._moment.chunk.frames, device=self.store.origin.device)
        if self.plan.archive:
            if not self.archive.is_staged:
                space = self._turns.space(self._moment.chunk.frames)
                self.archive.pool(*self.store.slots(len(space.cos)), self._rows, space)
            self.archive.commit(self._moment.start)
        if self.plan.absorbed is not None:
            self.average.commit(self.store, self.plan)
        self.store.commit(
            retain=self.plan.retain, chosen=self.plan.chosen, origin=born.repeat_interleave(self._frame_tokens),
            still=self.plan.still,
        )
        if self.average is not None:
            self.average.begin(self.store, self.plan.retain.shape[1])
        if self.votes is not None:
            self.votes.commit()

    @property
    def state(self) -> LayerState:
        return LayerState(
            self.store.length, self.votes.known_frames if self.votes else 0,
            self.archive.known if self.archive else 0, self.plan, self.votes.staged if self.votes else None,
        )

    @state.setter
    def state(self, state: LayerState) -> None:
        """Set the host's part after the device's was brought about in another way, as a replayed graph does."""
        self.store.length, self.plan = state.length, state.plan
        if self.votes is not None:
            self.votes.known_frames, self.votes.staged = state.known_frames, state.sums
        if self.archive is not None:
            self.archive.known = state.known_packets

    def end(self) -> None:
        """No chunk is in the making any more."""
        self._moment, self.plan = None, None

    def forget_newest(self, tokens: int, packets: int) -> None:
        """Forget the last `tokens` slots and `packets`, and every vote: of what stays they are too old to be asked."""
        self.store.length -= tokens
        if self.archive is not None:
            self.archive.forget_newest(packets)
        if self.votes is not None:
            self.votes.reset()

    def reset(self) -> None:
        """Forget everything."""
        for part in self._parts:
            part.reset()
        self.end()

    def copy_memory_of(self, other: LayerCache) -> None:
        """Take over the committed memory of `other`."""
        self.reset()
        for mine, theirs in zip(self._parts, other._parts, strict=True):
            mine.copy_from(theirs)
        if self.average is not None:
            self.average.copy_from(other.average)

    def _score(self, lo: int, hi: int, votes: Votes) -> Tensor:
        return self.votes.score(self.store.keys[:, lo:hi], self.store.origin[:, lo:hi], self._moment.start, votes)

    def _checked_plan(self) -> Plan:
        plan = self._policy.plan(self.view())
        attended = plan.past_tokens(self._packet_tokens) + self._moment.chunk.frames * self._frame_tokens
        if attended > self.window.tokens or plan.attend.shape != plan.position.shape:
            raise ValueError(
                f"{type(self._policy).__name__} plans {attended} tokens (positions for {plan.position.shape[1]} of the "
                f"past), but asked for a window of {self.window.tokens}. Its sizes() and plan() disagree."
            )
        return plan
