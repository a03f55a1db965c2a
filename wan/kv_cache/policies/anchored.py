"""Remember the first frames as an anchor and the newest ones: the memory behind joint denoising."""
from __future__ import annotations

from dataclasses import dataclass, replace

from wan.kv_cache.policy import CacheSizes, CacheView, KVPolicy, Plan, VideoGeometry, check_range, register


@register("anchored")
@dataclass(frozen=True, kw_only=True)
class AnchoredWindow(KVPolicy):
    """Noisy frames see the anchor, re-timed next to the newest frames; clean ones see the newest frames alone.

    A look ahead (the jointly denoised window) attends to the first `anchor_frames` and to as many of the newest as
    the window has room for; wherever these begin, the anchor ends. A chunk that becomes memory attends to the newest
    frames where they were born, and the anchor is kept for later.

    Source: Rolling Forcing, arXiv:2509.25161, and the authors' code: 21 frames of attention, 3 of them anchor.
    """

    window_frames: int
    anchor_frames: int

    def sizes(self, geometry: VideoGeometry) -> CacheSizes:
        sizes = CacheSizes.of_window(geometry, self.window_frames, hidden_frames=self.anchor_frames)
        check_range(
            "anchor_frames", self.anchor_frames, 0, self.window_frames - geometry.chunk_frames,
            f"the anchor and {geometry.chunk_frames} frames in the making share a window of {self.window_frames}",
        )
        return sizes

    def tail_frames(self, num_frames: int, has_forgotten: bool, chunk_frames: int) -> int:
        return max(0, num_frames - self.anchor_frames)

    def plan(self, view: CacheView) -> Plan:
        room = self.window_frames - view.span_frames
        anchor = min(self.anchor_frames, view.num_frames)
        if view.lookahead:
            return Plan.of(
                view, sink=view.first(anchor), tail=view.last(min(view.num_frames - anchor, room - anchor)),
                positions="contiguous",
            )
        tail = min(view.num_frames, room)
        apart = view.num_frames - tail
        seen = Plan.of(view, sink=view.first(0), tail=view.last(tail), positions="original")
        kept = Plan.of(view, sink=view.first(min(anchor, apart)), tail=view.last(tail), positions="original")
        return replace(kept, attend=seen.attend, position=seen.position, query_position=seen.query_position)
