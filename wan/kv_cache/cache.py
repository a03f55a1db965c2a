"""The life of the cache: begin -> extend (every pass, every layer) -> commit.

Here is what all layers share during a video: the chunk in the making, seeds, frames seen. One LayerCache each does
the rest. Passes stage beyond the memory; only `commit` changes it, so a chunk that is aborted or done again with
other noise or another prompt leaves no trace.
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch

from wan.compiler import Compiler, plain
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.layer import LayerCache, LayerState, Moment
from wan.kv_cache.policy import KVPolicy
from wan.kv_cache.store import CacheShape
from wan.kv_cache.window import WindowBuffer
from wan.rope import FrameTurns, space_turn


@dataclass(frozen=True)
class CacheState:
    """What of the memory lives on the host."""

    layers: list[LayerState]
    is_over: bool  # no chunk is in the making


class KVCache:
    """Memory of all layers for one batch of videos.

    Args:
        shared_window: one window for all layers, filled again at every pass, in place of one for each: less memory,
            more time.
    """

    def __init__(
        self, shape: CacheShape, geometry: VideoGeometry, policy: KVPolicy, *, compiler: Compiler = plain,
        shared_window: bool = False,
    ):
        window, packets, sizes = None, None, policy.sizes(geometry)
        head = shape.head_dim, shape.dtype, shape.device
        if shared_window:
            window = WindowBuffer(shape, sizes.window_tokens, compiler)
        if sizes.archive is not None:
            grid = sizes.archive.grid
            centres = torch.tensor(grid.centres, device=shape.device, dtype=torch.float64)
            packets = FrameTurns(space_turn(grid.rows, grid.columns, *head, covers=grid.space), centres)
        turns = FrameTurns(space_turn(geometry.rows, geometry.columns, *head))
        self._layers = [
            LayerCache(i, shape, geometry, policy, sizes, turns, packets, window, compiler) for i in range(shape.layers)
        ]
        self._chunk_frames = geometry.chunk_frames
        self._seeds = torch.zeros(shape.batch, device=shape.device, dtype=torch.int64)
        self._start = torch.zeros((), device=shape.device, dtype=torch.int64)
        self._chunk_index = torch.zeros_like(self._start)
        self._moment: Moment | None = None  # of the chunk in the making
        self._policy, self._frame_tokens = policy, geometry.frame_tokens
        room_tokens = sizes.capacity_tokens - geometry.chunk_frames * geometry.frame_tokens  # beside the next chunk
        self.most_frames = min(sizes.window_tokens, room_tokens) // geometry.frame_tokens  # that one pass may remember
        self._counted_frames = sizes.capacity_tokens // geometry.frame_tokens + 1  # more look like this many
        self.seen_frames = 0

    def layer(self, index: int) -> LayerCache:
        return self._layers[index]

    @property
    def is_planned(self) -> bool:
        """Whether a pass of the chunk in the making has gone through the layers."""
        return self._layers[-1].plan is not None

    @property
    def archives(self) -> bool:
        """Whether the chunk in the making leaves a packet; known after its first pass."""
        return self._layers[0].plan is not None and self._layers[0].plan.archive

    def reset(self, seeds: Sequence[int]) -> None:
        """Forget everything; what follows equals a fresh process. `seeds`: one int per sample."""
        if len(seeds) != len(self._seeds):
            raise ValueError(f"{len(seeds)} seeds for a cache of batch {len(self._seeds)}; give one per sample.")
        self._seeds.copy_(torch.tensor(list(seeds), dtype=torch.int64))
        self.forget_all()

    def forget_all(self) -> None:
        """Forget everything but the seeds."""
        self._moment, self.seen_frames = None, 0
        for layer in self._layers:
            layer.reset()

    def forget_newest(self) -> int:
        """Forget the newest frames, all but sinks and what stands compressed for frames before them.

        Returns: how many frames that was.
        """
        remembered = self._layers[0].store.length // self._frame_tokens
        frames = self._policy.tail_frames(remembered, self.seen_frames > remembered, self._chunk_frames)
        if not 0 <= frames <= remembered:
            raise ValueError(
                f"{type(self._policy).__name__}.tail_frames says {frames} of {remembered} remembered frames. Return "
                "how many of the newest are whole and no sinks."
            )
        for layer in self._layers:
            layer.forget_newest(frames * self._frame_tokens, frames // self._chunk_frames)
        self._moment, self.seen_frames = None, self.seen_frames - frames
        return frames

    def spans_again(self, start: int, frames: int) -> list[ChunkSpan]:
        """How `frames` frames from `start` on are remembered again: jointly, or by chunks if these leave packets."""
        if not frames:
            return []
        size = frames if self._layers[0].archive is None else self._chunk_frames
        edges = [start, *range(start + (frames - 1) % size + 1, start + frames + 1, size)]
        return [ChunkSpan(0, begin, end - begin) for begin, end in pairwise(edges)]

    def copy_memory_of(self, other: KVCache) -> None:
        """Take over what `other` remembers, so that both go on from one state; shapes agree, dtypes need not."""
        self._seeds.copy_(other._seeds)
        self._moment, self.seen_frames = None, other.seen_frames
        for mine, theirs in zip(self._layers, other._layers, strict=True):
            mine.copy_memory_of(theirs)

    def begin(self, chunk: ChunkSpan, *, lookahead: bool = False) -> None:
        """Start a chunk. Beginning again before `commit` drops what was staged.

        With `lookahead` the span may be longer than a chunk; it sees the memory and can never become part of it.
        """
        self._start.fill_(chunk.start)
        self._chunk_index.fill_(chunk.index)
        self._moment = Moment(
            chunk=chunk, start=self._start, chunk_index=self._chunk_index,
            seen_frames=min(self.seen_frames, self._counted_frames), seeds=self._seeds, lookahead=lookahead,
        )
        for layer in self._layers:
            if layer.archive is not None:
                layer.archive.make_room(self.seen_frames // self._chunk_frames + 1)
            layer.begin(self._moment)

    def commit(self) -> None:
        """Remember the chunk as its last pass left it: all layers or none.

        Raises:
            RuntimeError: no chunk was begun, a layer has not seen it, or it was a look ahead.
        """
        if self._moment is not None and self._moment.lookahead:
            raise RuntimeError("a look ahead cannot be remembered: begin(chunk) without lookahead, forward, commit().")
        if self._moment is None or any(layer.plan is None for layer in self._layers):
            raise RuntimeError("commit needs a chunk that every layer has seen: begin(chunk), forward, commit().")
        for layer in self._layers:
            layer.commit()
        self._end()

    def shapes(self) -> tuple[Any, ...]:
        """All host numbers that shapes of the chunk that has begun, and addresses of the memory, can depend on."""
        return self._moment.chunk.frames, self._moment.seen_frames, self._moment.lookahead, *(
            (state.length, state.known_frames, state.known_packets, layer.archive and layer.archive.places,
             state.plan is not None)
            for layer, state in zip(self._layers, self.state.layers, strict=True)
        )

    @property
    def state(self) -> CacheState:
        return CacheState([layer.state for layer in self._layers], is_over=self._moment is None)

    def follow(self, state: CacheState) -> None:
        """The device did, from the same `shapes`, what once led to `state`: now the host knows as well."""
        for layer, known in zip(self._layers, state.layers, strict=True):
            layer.state = known
        if state.is_over and self._moment is not None:
            self._end()

    def _end(self) -> None:
        """The host's part of a commit: the chunk is over."""
        self.seen_frames += self._moment.chunk.frames
        self._moment = None
        for layer in self._layers:
            layer.end()
