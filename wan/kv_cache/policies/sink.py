"""Remember the first and the newest frames: naive frame sink, Deep Sink, and a sink that is a running average."""
from __future__ import annotations

from dataclasses import dataclass, replace

from wan.kv_cache.policy import CacheSizes, CacheView, KVPolicy, Plan, Positions, VideoGeometry, check_range, register


@register("sink")
@dataclass(frozen=True, kw_only=True)
class SinkWindow(KVPolicy):
    """Keep the first and the newest frames; re-time the first ones next to the newest.

    With few sink frames at `original` positions this is a naive sink (StreamingLLM, LongLive);
    with about half the window, re-timed, it is Deep Sink.

    Source: Deep Forcing, arXiv:2512.05081, section 3.1. `released` positions leave one chunk of gap
        between sink and tail, as the authors' code does; `contiguous` closes it (Eq. 5).
        `sink_decay` below 1: what leaves the window is averaged into the sink, which keeps so much of itself, and
        the chunk for whose sake it leaves sees the result: Reward Forcing, arXiv:2512.04678 (EMA-Sink, 0.999).
    """

    window_frames: int
    sink_frames: int
    positions: Positions = "released"
    sink_decay: float = 1.0

    def sizes(self, geometry: VideoGeometry) -> CacheSizes:
        averaged = self.sink_frames if self.sink_decay < 1 else 0
        sizes = CacheSizes.of_window(geometry, self.window_frames, averaged_frames=averaged)
        check_range(
            "sink_frames", self.sink_frames, 0, self.window_frames - geometry.chunk_frames,
            f"sink and chunk ({geometry.chunk_frames} frames) share a window of {self.window_frames}",
        )
        if not 0 < self.sink_decay <= 1:
            raise ValueError(
                f"kv_cache.sink_decay={self.sink_decay} is not above 0 and at most 1: it is the share of itself that "
                "the sink keeps. Use 0.999 for Reward Forcing's, 1 for first frames that never change."
            )
        if self.sink_decay < 1 and self.sink_frames != geometry.chunk_frames:
            raise ValueError(
                f"kv_cache.sink_decay={self.sink_decay} averages each frame that leaves into one of the sink, and "
                f"{geometry.chunk_frames} leave with every chunk, but sink_frames={self.sink_frames}. "
                f"Set sink_frames: {geometry.chunk_frames}, or sink_decay: 1."
            )
        return sizes

    def tail_frames(self, num_frames: int, has_forgotten: bool, chunk_frames: int) -> int:
        return max(0, num_frames - self.sink_frames)

    def plan(self, view: CacheView) -> Plan:
        past_frames = min(view.num_frames, self.window_frames - view.span_frames)
        sink_frames = min(self.sink_frames, past_frames)
        tail = view.last(past_frames - sink_frames)
        plan = Plan.of(view, sink=view.first(sink_frames), tail=tail, positions=self.positions)
        leaving = view.num_frames - past_frames
        if self.sink_decay == 1 or not leaving:
            return plan
        return replace(plan, absorbed=view.span(sink_frames, sink_frames + leaving), decay=self.sink_decay)
