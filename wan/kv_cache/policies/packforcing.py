"""Remember the first and the newest frames as they are, and everything between them in a few tokens a chunk."""
from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Literal

import torch
from torch import Tensor

from wan.kv_cache.policy import (
    ArchiveSizes,
    CacheSizes,
    CacheView,
    Compression,
    Compressor,
    KVPolicy,
    Plan,
    VideoGeometry,
    check_range,
    register,
)


@register("packforcing")
@dataclass(frozen=True, kw_only=True)
class PackForcing(KVPolicy):
    """Three partitions: sink, packets of the chunks between, recent frames; a chunk sees the packets it asks for most.

    Every chunk past the sink leaves a packet as it is made. While the chunk is recent its frames are seen; when they
    leave, its packet takes their place, in the archive. Of the archive each layer and sample shows the `top_chunks`
    whose keys have the most affinity to the chunk's queries of the first pass; the others stay for later chunks.

    Source: PackForcing, arXiv:2603.25730. `packed`: what is seen moves up, in whole chunks, to close the holes that
        unseen packets leave (figure 2c); `original`: nothing moves. `mid_span`: window time of a packet: of the
        chunk that it stands for (`block`, the paper), of its own frames (`tokens`), or as little as makes the whole
        window span `squeeze_frames` (`squeeze`), so that a network sees no distance that training never showed it.
    """

    sink_frames: int                        # first frames, whole chunks
    recent_frames: int                      # newest frames before the chunk, whole chunks
    top_chunks: int                         # most packets that a chunk sees
    archive_chunks: int = 128               # most packets kept, the oldest make room; 0 is no limit
    offload: bool = False                   # keep the archive in host memory, where there is a GPU
    time_reduction: int = 2                 # frames that a token of a packet stands for
    space_reduction: int = 4                # rows, and columns, of tokens that it stands for
    selection: Literal["affinity", "newest"] = "affinity"
    score_heads: Literal["half", "all"] = "half"
    positions: Literal["packed", "original"] = "packed"
    mid_span: Literal["block", "tokens", "squeeze"] = "block"
    squeeze_frames: int = 21
    compressor: Compressor = "lr"
    compressed_kv: Literal["forward", "project"] = "forward"
    lr_frames: Literal["paper", "cover"] = "paper"
    compressor_weights: str = ""            # file of a trained compressor; empty: the model's own

    @property
    def compression(self) -> Compression:
        return Compression(self.compressor, self.compressed_kv, self.lr_frames, self.compressor_weights)

    def sizes(self, geometry: VideoGeometry) -> CacheSizes:
        chunk = geometry.chunk_frames
        check_range("sink_frames", self.sink_frames, 0, 1 << 20, "first frames that are kept as they are")
        check_range("top_chunks", self.top_chunks, 0, 1 << 20, "packets that a chunk sees")
        for name, frames, least in (("sink_frames", self.sink_frames, 0), ("recent_frames", self.recent_frames, 1)):
            if frames < least * chunk or frames % chunk:
                raise ValueError(
                    f"kv_cache.{name}={frames} must be whole chunks of {chunk} frames{', at least one' * least}: "
                    f"a chunk is seen whole or as a packet. Use {chunk * max(least, round(frames / chunk))}."
                )
        if self.positions == "original" and self.mid_span != "block":
            raise ValueError(
                f"kv_cache.mid_span={self.mid_span} has no effect with positions=original, where packets stay where "
                "their chunks were. Set mid_span=block, or positions=packed."
            )
        least = self.top_chunks + self.recent_frames // chunk
        if self.archive_chunks and self.archive_chunks < least:
            raise ValueError(
                f"kv_cache.archive_chunks={self.archive_chunks} cannot hold the {self.top_chunks} packets that are "
                f"seen and the {self.recent_frames // chunk} of chunks that are still recent. "
                f"Raise it to at least {least}, or to 0 for no limit."
            )
        whole = self.sink_frames + self.recent_frames + chunk
        if self.mid_span == "squeeze" and self.squeeze_frames <= whole:
            raise ValueError(
                f"kv_cache.squeeze_frames={self.squeeze_frames} leaves no time for packets: sink, recent frames and "
                f"chunk alone span {whole}. Raise it, or set mid_span to block or tokens."
            )
        counted = least + 1  # so that enough are known of when the recent chunks and the newest are forgotten
        if self.archive_chunks:
            counted = min(counted, self.archive_chunks)
        grid = geometry.packet_grid(time=self.time_reduction, space=self.space_reduction)
        return CacheSizes(
            window_tokens=whole * geometry.frame_tokens + self.top_chunks * grid.tokens,
            capacity_tokens=(whole + chunk) * geometry.frame_tokens,
            vote_frames=chunk,
            archive=ArchiveSizes(grid, self.archive_chunks, counted, self.offload),
        )

    def tail_frames(self, num_frames: int, has_forgotten: bool, chunk_frames: int) -> int:
        return max(0, num_frames - self._sink_ends(num_frames, chunk_frames))

    def _sink_ends(self, num_frames: int, chunk_frames: int) -> int:
        """One past its last frame, where a chunk ends: earlier if the first frames, say an image, were no whole one."""
        odd = num_frames % chunk_frames
        return max(0, self.sink_frames - (chunk_frames - odd if odd else 0))

    def plan(self, view: CacheView) -> Plan:
        sink_ends = self._sink_ends(view.num_frames, view.chunk_frames)
        sink = min(sink_ends, view.num_frames)
        tail = min(self.recent_frames, view.num_frames - sink)
        shown = max(0, min(self.top_chunks, view.packets.known - tail // view.chunk_frames))
        step = self._step(view, sink + tail + view.span_frames, shown)
        query_position = sink + ceil(shown * step) + tail
        slots = torch.cat([view.first(sink), view.last(tail)], dim=1)
        packets = self._choose(view, shown, tail)
        if self.positions == "packed":
            position, begin = _packed(view, slots, sink, tail, query_position, step, shown)
        else:
            shift = query_position - view.start
            position = shift + torch.take_along_dim(view.origin, slots, dim=1).long()
            begin = (shift + view.packets.start[packets]).double()
        inside = view.packets.centres * (step / view.chunk_frames)
        return Plan(
            retain=slots, attend=slots, position=position, query_position=query_position,
            packets=packets if shown else None, packet_position=begin.expand_as(packets).unsqueeze(-1) + inside,
            still=sink * view.frame_tokens, same_times=self.positions == "packed",
            archive=self.top_chunks > 0 and view.seen_frames >= sink_ends and view.span_frames == view.chunk_frames,
        )

    def _step(self, view: CacheView, whole_frames: int, shown: int) -> float:
        """Window time of one packet, in latent frames."""
        if self.mid_span == "block" or self.positions == "original":
            return view.chunk_frames
        if self.mid_span == "tokens":
            return len(view.packets.centres)
        return min(view.chunk_frames, (self.squeeze_frames - whole_frames) / max(1, shown))

    def _choose(self, view: CacheView, shown: int, tail: int) -> Tensor:
        """Places [B, shown] of the packets that are seen, oldest first; those of chunks in the tail are not asked."""
        start, batch = view.packets.start, len(view.seeds)
        if self.selection == "affinity":
            score = view.packets.affinity(0.5 if self.score_heads == "half" else 1.0)
        else:
            score = start.double().expand(batch, -1)
        waiting = start >= view.start - tail
        score = score.masked_fill(waiting, float("-inf"))
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :shown]
        return best.gather(1, start[best].sort(dim=1).indices)


def _packed(
    view: CacheView, slots: Tensor, sink: int, tail: int, query_position: int, step: float, shown: int,
) -> tuple[Tensor, Tensor]:
    """Window time without holes: of the tokens in `slots` [B, A], and where each of `shown` packets begins [shown].

    Sinks count from 0; recent frames, and before them the packets, `step` apart, end where the chunk begins.
    """
    frames = torch.arange(sink + tail, device=slots.device)
    frames = torch.where(frames < sink, frames, frames + query_position - sink - tail)
    back = torch.arange(shown, 0, -1, device=slots.device, dtype=torch.float64)
    return frames.repeat_interleave(view.frame_tokens).expand_as(slots), query_position - tail - step * back
