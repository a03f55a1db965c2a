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
from pipeline.rolling_forcing import RollingForcingPipeline, joint_span, windows
from pipeline.sampler import FewStepSampler
from pipeline.timeline import OnSwitch
from utils.outputs import reason
from wan.geometry import ChunkSpan, VideoGeometry
from wan.kv_cache.cache import KVCache
from wan.kv_cache.layer import LayerCache
from wan.kv_cache.policy import KVPolicy, Plan
from wan.kv_cache.store import CacheShape
from wan.model import CausalWanModel
from wan.recorder import Recorder


@dataclass(frozen=True)
class Look:
    """One span of frames that is denoised, frames counted from where the memory begins."""

    span: ChunkSpan
    remembered: ChunkSpan | None  # what becomes memory then: the span itself, its first chunk, or nothing yet
    lookahead: bool = False       # it is denoised jointly and does not become memory as a whole
    given: bool = False           # nothing is denoised: the span is known and enters the memory
    restarts: bool = False        # the memory is emptied before
    begins: int = 0               # latent frame of the video that frame 0 of the span's count is


@dataclass(frozen=True)
class Length:
    """How long a video becomes."""

    pixel_frames: int   # what the file is cut to
    asked_frames: int   # fewest latent frames that hold them
    given_frames: int   # latent frames that are known beforehand
    latent_frames: int  # whole chunks, given frames included

    @property
    def notice(self) -> str | None:
        """One line if more is computed than was asked for."""
        if self.latent_frames == self.asked_frames:
            return None
        return (
            f"{self.asked_frames} latent frames are rounded up to {self.latent_frames}, whole chunks; "
            f"the file is cut to {self.pixel_frames} pixel frames"
        )


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
        looks = self.looks(latent_frames, given_frames)
        return [look.begins + look.remembered.start for look in looks if look.remembered and not look.given]

    @property
    def joint_chunks(self) -> int:
        """Chunks that are denoised in one pass; all of them read the prompt of the newest."""
        return 1

    @property
    def needs_pixels(self) -> bool:
        """Whether what is made next depends on pixels of what was made before."""
        return self.policy.compression is not None and self.policy.compression.reads_pixels

    @property
    def chunk_pixel_frames(self) -> float:
        """Pixel frames that a chunk shows on average, wherever the video neither begins nor ends."""
        return self.geometry.pixel_frames(self.geometry.chunk_frames, first=False)

    @abstractmethod
    def looks(self, latent_frames: int, given_frames: int = 0) -> Iterator[Look]:
        """What is denoised and what becomes memory, in order; `given_frames` do first."""

    def _given(self, frames: int) -> Iterator[Look]:
        """The looks that put so many given frames into memory."""
        return (Look(span, remembered=span, given=True) for span in self.geometry.prefill_chunks(frames))

    def walk(
        self, latent_frames: int, *, given_frames: int = 0, side: int = 1, draw: Callable[..., Tensor] = torch.ones,
    ) -> Iterator[tuple[Look, LayerCache]]:
        """Run the policy on a cache of one layer and frames of `side` x `side` tokens, without a network.

        Args:
            draw: gives queries, keys and values for a shape.
        Yields: what is denoised, and the layer while its plan is in place.
        Raises: ValueError for a policy that fails, or plans to keep slots out of order or to show some that go.
        """
        g = self.geometry
        unit = dataclasses.replace(
            g, height=side * g.spatial_stride * g.patch[0], width=side * g.spatial_stride * g.patch[1],
        )
        shape = CacheShape(layers=1, heads=1, head_dim=12, batch=1, device=torch.device("cpu"), dtype=torch.float32)
        cache = KVCache(shape, unit, self.policy)

        def run(span: ChunkSpan, *, lookahead: bool = False) -> LayerCache:
            cache.begin(span, lookahead=lookahead)
            try:
                cache.layer(0).extend(*(draw(1, span.frames * unit.frame_tokens, 1, 12) for _ in range(3)))
            except Exception as error:
                name = type(self.policy).__name__
                raise ValueError(f"{name}, at latent frame {span.start}: {reason(error)}") from error
            _check_order(self.policy, cache.layer(0).plan)
            return cache.layer(0)

        for look in self.looks(latent_frames, given_frames):
            if look.restarts:
                cache.reset([0])
            if not look.given:
                yield look, run(look.span, lookahead=look.lookahead)
            if look.remembered is not None:
                if look.given or look.lookahead:
                    run(look.remembered)
                cache.commit()

    def windows(self, latent_frames: int, given_frames: int = 0) -> Iterator[float]:
        """Frames' worth of tokens that attention sees of each span that is denoised."""
        archive = self.policy.sizes(self.geometry).archive
        side = 1 if archive is None else archive.grid.space
        for look, layer in self.walk(latent_frames, given_frames=given_frames, side=side):
            frames = layer.plan.attend.shape[1] // side**2 + look.span.frames
            packets = 0 if layer.plan.packets is None else layer.plan.packets.shape[1]
            yield frames + packets * archive.grid.tokens / self.geometry.frame_tokens if packets else frames

    def pipeline(
        self, model: CausalWanModel, cache: KVCache, encode: Encode, recorder: Recorder | None = None,
    ) -> ChunkwisePipeline:
        """What runs it; with a `recorder` its passes become CUDA graphs."""
        return ChunkwisePipeline(model, self.sampler, self.geometry, cache, self.on_switch, recorder)


class ChunkwiseLoop(Loop):
    """Chunk after chunk: Self Forcing, and every cache policy on top of it."""

    def looks(self, latent_frames: int, given_frames: int = 0) -> Iterator[Look]:
        yield from self._given(given_frames)
        for span in self.geometry.chunks(latent_frames, prefilled=given_frames):
            yield Look(span, remembered=span)


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

    @property
    def joint_chunks(self) -> int:
        return self.sampler.num_passes

    def looks(self, latent_frames: int, given_frames: int = 0) -> Iterator[Look]:
        yield from self._given(given_frames)
        spans, levels = self.geometry.chunks(latent_frames, prefilled=given_frames), self.sampler.num_passes
        for window, inside in enumerate(windows(spans, levels)):
            yield Look(joint_span(inside), remembered=inside[0] if window >= levels - 1 else None, lookahead=True)

    def pipeline(
        self, model: CausalWanModel, cache: KVCache, encode: Encode, recorder: Recorder | None = None,
    ) -> ChunkwisePipeline:
        return RollingForcingPipeline(model, self.sampler, self.geometry, cache, self.on_switch, recorder)


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

    @property
    def needs_pixels(self) -> bool:
        return True

    @property
    def chunk_pixel_frames(self) -> float:
        return self.clips.shown_pixel_frames * self.geometry.chunk_frames / self.clips.clip_frames

    def latent_frames(self, pixel_frames: int, given_frames: int) -> int:
        if given_frames:
            raise ValueError(
                "pipeline=causvid_overlap makes clips of a fixed length and cannot continue an image or a video. "
                "Leave --i2v out, or use pipeline=chunkwise."
            )
        return self.clips.latent_frames(pixel_frames)

    def looks(self, latent_frames: int, given_frames: int = 0) -> Iterator[Look]:
        for number, (given, generated) in enumerate(self.clips.spans(latent_frames)):
            for span in [*given, *generated]:
                yield Look(
                    span, remembered=span, given=span in given, restarts=span.start == 0,
                    begins=number * self.clips.step_frames,
                )

    def pipeline(
        self, model: CausalWanModel, cache: KVCache, encode: Encode, recorder: Recorder | None = None,
    ) -> ChunkwisePipeline:
        return CausVidOverlapPipeline(
            model, self.sampler, self.geometry, cache, self.on_switch, self.clips, encode, recorder,
        )


def _check_order(policy: KVPolicy, plan: Plan) -> None:
    """Raise ValueError for a plan that breaks what `Plan` asks of its slots; on a GPU nobody looks."""
    name, retain = type(policy).__name__, plan.retain[0]
    if (retain.diff() <= 0).any():
        raise ValueError(f"{name} plans `retain` out of order. Slots that survive must ascend, each once: sort them.")
    if not torch.isin(plan.attend[0], retain).all():
        raise ValueError(f"{name} plans to see slots that it does not keep: `attend` must be part of `retain`.")


def make_loop(
    name: str, *, geometry: VideoGeometry, policy: KVPolicy, sampler: FewStepSampler, on_switch: OnSwitch,
    overlap_frames: int,
) -> Loop:
    """The loop `name`, one of utils.config_schema.LOOPS; `overlap_frames` is for causvid_overlap.

    Raises:
        ValueError: policy, sampler and geometry do not suit it.
    """
    common = {"geometry": geometry, "policy": policy, "sampler": sampler, "on_switch": on_switch}
    if name == "causvid_overlap":
        return CausVidOverlapLoop(**common, overlap_frames=overlap_frames)
    return {"chunkwise": ChunkwiseLoop, "rolling_forcing": RollingForcingLoop}[name](**common)
