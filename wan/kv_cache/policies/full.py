"""Remember everything, up to the length that the window was made for."""
from __future__ import annotations

from dataclasses import dataclass

from wan.kv_cache.policy import CacheSizes, CacheView, KVPolicy, Plan, VideoGeometry, register


@register("full")
@dataclass(frozen=True, kw_only=True)
class FullHistory(KVPolicy):
    """Keep and see every frame at its true position.

    The video ends where the window does: past `window_frames` there is nothing that could be forgotten.

    Source: Self Forcing, arXiv:2506.08009, with `local_attn_size: -1`.
    """

    window_frames: int

    @property
    def max_frames(self) -> int | None:
        return self.window_frames

    def sizes(self, geometry: VideoGeometry) -> CacheSizes:
        return CacheSizes.of_window(geometry, self.window_frames)

    def tail_frames(self, num_frames: int, has_forgotten: bool) -> int:
        return num_frames

    def plan(self, view: CacheView) -> Plan:
        return Plan.of(view, sink=view.first(0), tail=view.last(view.num_frames), positions="original")
