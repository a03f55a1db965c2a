"""Which loop makes the latents, and what it means for length, chunks and windows: all on the host, before any weights.

`chunkwise` finishes one chunk after another; `rolling_forcing` denoises a window of them jointly; `causvid_overlap`
generates clips of a fixed length that overlap.
"""
from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.causvid import CausVidOverlapPipeline, Clips
from pipeline.chunkwise import ChunkwisePipeline
from pipeline.rolling_forcing import RollingForcingPipeline
from pipeline.sampler import FewStepSampler
from pipeline.timeline import OnSwitch
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.cache import CacheShape, KVCache
from wan.kv_cache.policy import KVPolicy
from wan.model import CausalWanModel

Encode = Callable[[Tensor], Tensor]  # pixels [B, 1, 3, H, W] in [-1, 1] -> latents [B, 1, C, h, w]


@dataclass(frozen=True, kw_only=True)
class Loop(ABC):
    """One way to make a video's latents from a model and a memory.

    Raises:
        ValueError: when made, if policy, sampler and geometry do not suit it.
    """

    geometry: VideoGeometry
    policy: KVPolicy
    sampler: FewStepSampler
    on_switch: OnSwitch

    def __post_init__(self) -> None:
        self.policy.sizes(self.geometry)

    @property
    def max_frames(self) -> int | None:
        """The longest video in latent frames; None is any length."""
        return self.policy.max_frames

    def latent_frames(self, pixel_frames: int, given_frames: int) -> int:
        """Latent frames to be made for `pixel_frames`, given ones included."""
        g = self.geometry
        return g.whole_chunks(g.latent_frames(pixel_frames), prefilled=given_frames)

    def starts(self, latent_frames: int, given_frames: int) -> list[int]:
        """Latent frame that each generated chunk begins with, in order."""
        return [span.start for span in self.geometry.chunks(latent_frames, prefilled=given_frames)]

    @abstractmethod
    def windows(self, latent_frames: int) -> Iterator[int]:
        """Frames that attention sees in each denoising window, by running the policy on one token a frame."""

    @abstractmethod
    def pipeline(self, model: CausalWanModel, cache: KVCache, encode: Encode) -> ChunkwisePipeline:
        """What runs it."""

    def _probe(self) -> tuple[KVCache, VideoGeometry]:
        """A cache of one token a frame."""
        g = self.geometry
        unit = dataclasses.replace(g, height=g.spatial_stride * g.patch[0], width=g.spatial_stride * g.patch[1])
        shape = CacheShape(layers=1, heads=1, head_dim=12, batch=1, device=torch.device("cpu"), dtype=torch.float32)
        return KVCache(shape, unit, self.policy), unit


def _look(cache: KVCache, span: ChunkSpan, *, lookahead: bool = False) -> int:
    """Begin `span` and run one pass of one token a frame; returns the frames it sees."""
    cache.begin(span, lookahead=lookahead)
    token = torch.ones(1, span.frames, 1, 12)
    return cache.layer(0).extend(token, token, token).keys.shape[1]


class ChunkwiseLoop(Loop):
    """Chunk after chunk: Self Forcing, and every cache policy on top of it."""

    def windows(self, latent_frames: int) -> Iterator[int]:
        cache, unit = self._probe()
        for span in unit.chunks(latent_frames):
            yield _look(cache, span)
            cache.commit()

    def pipeline(self, model: CausalWanModel, cache: KVCache, encode: Encode) -> ChunkwisePipeline:
        return ChunkwisePipeline(model, self.sampler, self.geometry, cache, self.on_switch)


class RollingForcingLoop(Loop):
    """A rolling window of chunks, denoised jointly."""

    def __post_init__(self) -> None:
        super().__post_init__()
        joint = self.sampler.num_passes * self.geometry.chunk_frames
        try:
            self.policy.sizes(dataclasses.replace(self.geometry, chunk_frames=joint))
        except ValueError as error:
            raise ValueError(
                f"pipeline=rolling_forcing denoises {joint} frames jointly ({self.sampler.num_passes} steps in "
                f"denoising_step_list, chunks of {self.geometry.chunk_frames}), which its cache must hold: {error}"
            ) from error

    def windows(self, latent_frames: int) -> Iterator[int]:
        cache, unit = self._probe()
        spans, levels = list(unit.chunks(latent_frames)), self.sampler.num_passes
        for window in range(len(spans) + levels - 1):
            inside = spans[max(0, window - levels + 1):window + 1]
            joint = ChunkSpan(inside[0].index, inside[0].start, sum(span.frames for span in inside))
            yield _look(cache, joint, lookahead=True)
            if window >= levels - 1:
                _look(cache, inside[0])
                cache.commit()

    def pipeline(self, model: CausalWanModel, cache: KVCache, encode: Encode) -> ChunkwisePipeline:
        return RollingForcingPipeline(model, self.sampler, self.geometry, cache, self.on_switch)


@dataclass(frozen=True, kw_only=True)
class CausVidOverlapLoop(Loop):
    """Clips as long as the policy goes, overlapping."""

    overlap_frames: int

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.policy.max_frames is None:
            raise ValueError(
                "pipeline=causvid_overlap begins a new clip when the window is full, so its cache must keep every "
                "frame: kv_cache.policy=full. With a policy that forgets, use pipeline=chunkwise."
            )
        _ = self.clips  # its lengths are checked

    @property
    def clips(self) -> Clips:
        return Clips(self.geometry, self.policy.max_frames, self.overlap_frames)

    @property
    def max_frames(self) -> int | None:
        return None

    def latent_frames(self, pixel_frames: int, given_frames: int) -> int:
        if given_frames:
            raise ValueError(
                "pipeline=causvid_overlap makes clips of a fixed length and cannot continue an image or a video. "
                "Leave --i2v out, or use pipeline=chunkwise."
            )
        return self.clips.latent_frames(pixel_frames)

    def starts(self, latent_frames: int, given_frames: int) -> list[int]:
        step = self.clips.step_frames
        return [
            number * step + span.start
            for number, (_, generated) in enumerate(self.clips.spans(latent_frames)) for span in generated
        ]

    def windows(self, latent_frames: int) -> Iterator[int]:
        cache, unit = self._probe()
        for given, generated in Clips(unit, self.clips.clip_frames, self.overlap_frames).spans(latent_frames):
            cache.reset([0])
            for span in [*given, *generated]:
                seen = _look(cache, span)
                if span in generated:
                    yield seen
                cache.commit()

    def pipeline(self, model: CausalWanModel, cache: KVCache, encode: Encode) -> ChunkwisePipeline:
        return CausVidOverlapPipeline(
            model, self.sampler, self.geometry, cache, self.on_switch, self.clips, encode,
        )


NAMES = ("chunkwise", "rolling_forcing", "causvid_overlap")


def make_loop(
    name: str, *, geometry: VideoGeometry, policy: KVPolicy, sampler: FewStepSampler, on_switch: OnSwitch,
    overlap_frames: int,
) -> Loop:
    """The loop `name`, one of NAMES; `overlap_frames` is for causvid_overlap.

    Raises:
        ValueError: policy, sampler and geometry do not suit it.
    """
    common = {"geometry": geometry, "policy": policy, "sampler": sampler, "on_switch": on_switch}
    if name == "causvid_overlap":
        return CausVidOverlapLoop(**common, overlap_frames=overlap_frames)
    return {"chunkwise": ChunkwiseLoop, "rolling_forcing": RollingForcingLoop}[name](**common)
