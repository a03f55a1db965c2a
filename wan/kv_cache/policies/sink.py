"""Remember the first and the newest frames: naive frame sink, and Deep Sink."""
from __future__ import annotations

from dataclasses import dataclass

from wan.kv_cache.policy import CacheSizes, CacheView, KVPolicy, Plan, Positions, VideoGeometry, check_range, register


@register("sink")
@dataclass(frozen=True, kw_only=True)
class SinkWindow(KVPolicy):
    """Keep the first and the newest frames; re-time the first ones next to the newest.

    With few sink frames at `original` positions this is a naive sink (StreamingLLM, LongLive);
    with about half the window, re-timed, it is Deep Sink.

    Source: Deep Forcing, arXiv:2512.05081, section 3.1. `released` positions leave one chunk of gap
        between sink and tail, as the authors' code does; `contiguous` closes it (Eq. 5).
    """

    window_frames: int
    sink_frames: int
    positions: Positions = "released"

    def sizes(self, geometry: VideoGeometry) -> CacheSizes:
        sizes = CacheSizes.of_window(geometry, self.window_frames)
        check_range(
            "sink_frames", self.sink_frames, 0, self.window_frames - geometry.chunk_frames,
            f"sink and chunk ({geometry.chunk_frames} frames) share a window of {self.window_frames}",
        )
        return sizes

    def tail_frames(self, num_frames: int, has_forgotten: bool) -> int:
        return max(0, num_frames - self.sink_frames)

    def plan(self, view: CacheView) -> Plan:
        past_frames = min(view.num_frames, self.window_frames - view.chunk_frames)
        sink_frames = min(self.sink_frames, past_frames)
        return Plan.of(
            view, sink=view.first(sink_frames), tail=view.last(past_frames - sink_frames), positions=self.positions
        )
