"""Remember the newest frames: Self Forcing's rolling cache, and its full one, which ends before it forgets."""
from __future__ import annotations

from dataclasses import dataclass

from wan.kv_cache.policy import CacheSizes, CacheView, KVPolicy, Plan, VideoGeometry, register


@register("rolling")
@dataclass(frozen=True, kw_only=True)
class RollingWindow(KVPolicy):
    """Keep and see the newest `window_frames`, the chunk included; forget the rest.

    Source: Self Forcing, arXiv:2506.08009, section 3.4 (`local_attn_size`).
    """

    window_frames: int

    def sizes(self, geometry: VideoGeometry) -> CacheSizes:
        return CacheSizes.of_window(geometry, self.window_frames)

    def tail_frames(self, num_frames: int, has_forgotten: bool, chunk_frames: int) -> int:
        return num_frames

    def plan(self, view: CacheView) -> Plan:
        past_frames = min(view.num_frames, self.window_frames - view.span_frames)
        return Plan.of(view, sink=view.first(0), tail=view.last(past_frames), positions="original")


@register("full")
@dataclass(frozen=True, kw_only=True)
class FullHistory(RollingWindow):
    """Keep and see every frame at its true position.

    The video ends where the window does: past `window_frames` there is nothing that could be forgotten.

    Source: Self Forcing, arXiv:2506.08009, with `local_attn_size: -1`.
    """

    @property
    def max_frames(self) -> int | None:
        return self.window_frames
