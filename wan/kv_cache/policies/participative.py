"""Remember the first frames, the newest ones, and the tokens that recent queries attend to."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from wan.kv_cache.policy import (
    CacheSizes,
    CacheView,
    KVPolicy,
    Plan,
    Positions,
    VideoGeometry,
    Votes,
    check_range,
    register,
)


@register("participative")
@dataclass(frozen=True, kw_only=True)
class ParticipativeCompression(KVPolicy):
    """Deep Sink with Participative Compression: when the window is full, prune it to a budget.

    The sink (first frames) and the recent frames stay; of the tokens between them only the top-C that the
    recent frames' queries score highest survive, everything else is forgotten for good. Then the window
    grows chunk by chunk until it is full again. Each layer and each sample ranks its own tokens.

    Source: Deep Forcing, arXiv:2512.05081, section 3.2 and Algorithm 1; `released` positions, `both` votes and
        the limit on re-use as in the authors' code. `selection: random` is the baseline of Appendix D.
    """

    window_frames: int
    sink_frames: int
    budget_frames: int  # after pruning, the chunk included
    recent_frames: int  # newest frames, the chunk included; their queries vote
    positions: Positions = "released"
    votes: Votes = "both"
    selection: Literal["participation", "random"] = "participation"
    topc_max_reuse: int = 7  # a token chosen this often is not chosen again; 0 is no limit

    @property
    def top_frames(self) -> int:
        """Top-C, counted in frames."""
        return self.budget_frames - self.sink_frames - self.recent_frames

    @property
    def notice(self) -> str | None:
        if self.top_frames > 0:
            return None
        return (
            f"nothing is chosen by participation: kv_cache.sink_frames={self.sink_frames} and recent_frames="
            f"{self.recent_frames} are the whole budget_frames={self.budget_frames}. Raise it to choose tokens."
        )

    def sizes(self, geometry: VideoGeometry) -> CacheSizes:
        chunk = geometry.chunk_frames
        sizes = CacheSizes.of_window(geometry, self.window_frames, vote_frames=self.recent_frames)
        check_range(
            "recent_frames", self.recent_frames, chunk, self.window_frames,
            f"the chunk's own {chunk} frames are recent, and recent frames must fit the window of {self.window_frames}",
        )
        if self.votes == "past" and self.recent_frames == chunk:
            raise ValueError(
                f"kv_cache.votes=past has no voters: recent_frames={self.recent_frames} are all of the chunk. "
                f"Raise recent_frames to at least {chunk + 1}, or set votes to both or denoising."
            )
        check_range(
            "budget_frames", self.budget_frames, self.recent_frames, self.window_frames,
            f"pruning must leave at least the {self.recent_frames} recent frames and at most the window",
        )
        kept = self.sink_frames + self.recent_frames
        if kept > self.budget_frames:
            raise ValueError(
                f"kv_cache.sink_frames={self.sink_frames} and recent_frames={self.recent_frames} need {kept} frames, "
                f"which exceeds budget_frames={self.budget_frames}. "
                f"Lower sink_frames to 0..{self.budget_frames - self.recent_frames}, or raise budget_frames."
            )
        check_range(
            "sink_frames", self.sink_frames, 0, self.budget_frames - self.recent_frames,
            f"sink and recent frames ({self.recent_frames}) share a budget of {self.budget_frames}",
        )
        check_range("topc_max_reuse", self.topc_max_reuse, 0, 1 << 30, "0 is no limit")
        return sizes

    def tail_frames(self, num_frames: int, has_forgotten: bool, chunk_frames: int) -> int:
        return max(0, num_frames - self.sink_frames - (self.top_frames if has_forgotten else 0))

    def plan(self, view: CacheView) -> Plan:
        sink_frames = min(self.sink_frames, view.num_frames)
        sink = view.first(sink_frames)
        if view.num_frames + view.span_frames <= self.window_frames:
            tail_begins = sink_frames + (self.top_frames if view.has_forgotten else 0)
            return Plan.of(
                view, sink=sink, top=view.span(sink_frames, tail_begins),
                tail=view.last(view.num_frames - tail_begins), positions=self.positions,
            )
        recent_past = view.last(self.recent_frames - view.span_frames)
        top = self._top(view, sink.shape[1], view.length - recent_past.shape[1])
        return Plan.of(view, sink=sink, top=top, tail=recent_past, positions=self.positions, chosen=top)

    def _top(self, view: CacheView, lo: int, hi: int) -> Tensor:
        """Slots [B, C] of the best candidates from `lo` to `hi`, ascending.

        How many survive depends on the configuration alone: if too few tokens are eligible, refused ones
        fill up, oldest first. Ties go to the older token.
        """
        score = view.random(lo, hi) if self.selection == "random" else view.participation(lo, hi, self.votes)
        if self.topc_max_reuse:
            score = score.masked_fill(view.uses[:, lo:hi] >= self.topc_max_reuse, float("-inf"))
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :self.top_frames * view.frame_tokens]
        return lo + best.sort(dim=1).values  # store order, so windows stay chronological
