"""What a run will be, before anything loads: how long its videos are, and all of it in words."""
from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from pipeline import memory
from pipeline.build import RunPlan, dtype_name
from utils.config import ConfigError
from wan.kv_cache.cache import CacheShape, KVCache

PREVIEW_CHUNKS = 24
MOST_PIXEL_FRAMES = 2**31 - 1


@dataclass(frozen=True)
class Length:
    """How long a video becomes."""

    pixel_frames: int   # what the file is cut to
    asked_frames: int   # fewest latent frames that hold them
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


def asked_pixel_frames(plan: RunPlan, *, latent_frames: int, seconds: float | None) -> int:
    """The length asked for, in pixel frames; `seconds` goes before `latent_frames`.

    Raises:
        ConfigError: nothing, no number, or more than a video file can count.
    """
    g = plan.geometry
    if seconds is None:
        flag, amount = f"--num_output_frames {latent_frames}", latent_frames * g.temporal_stride
    else:
        flag, amount = f"--seconds {seconds}", seconds * g.fps
    if not 0 < amount <= MOST_PIXEL_FRAMES:
        raise ConfigError(
            f"{flag} is no length that a video can have. Ask for more than 0, and at most "
            f"{MOST_PIXEL_FRAMES // g.fps} seconds: an mp4 counts its frames in 32 bits."
        )
    return g.pixel_frames(latent_frames) if seconds is None else g.pixel_frames_of_seconds(seconds)


def video_length(plan: RunPlan, pixel_frames: int, *, given_frames: int) -> Length:
    """The length of a video that begins with `given_frames` latent frames, rounded up to whole chunks.

    Raises:
        ConfigError: nothing is left to generate, or it is longer than the policy can go.
    """
    g, limit = plan.geometry, plan.policy.max_frames
    asked = g.latent_frames(pixel_frames)
    if asked <= given_frames:
        raise ConfigError(
            f"the length asked for is {asked} latent frames, and {given_frames} are given: nothing is left to "
            "generate. Ask for more with --num_output_frames or --seconds."
        )
    whole = g.whole_chunks(asked, prefilled=given_frames)
    if limit is not None and whole > limit:
        raise ConfigError(
            f"the video needs {whole} latent frames, but kv_cache.policy=full keeps every frame and has a window of "
            f"{limit} (local_attn_size: -1 is defined up to the length of a training clip). Choose a policy that "
            "forgets, such as --policy rolling or configs/deep_forcing.yaml, or pay for the memory with "
            f"--set kv_cache.policy=full --set kv_cache.window_frames={whole}."
        )
    return Length(pixel_frames, asked, whole)


def preview_windows(plan: RunPlan, length: Length) -> Iterator[int]:
    """Frames that attention sees in each chunk, by running the real policy on a cache of one token a frame."""
    g = plan.geometry
    unit = dataclasses.replace(
        g, height=g.spatial_stride * g.patch[0], width=g.spatial_stride * g.patch[1],
    )
    shape = CacheShape(layers=1, heads=1, head_dim=12, batch=1, device=torch.device("cpu"), dtype=torch.float32)
    cache = KVCache(shape, unit, plan.policy)
    for span in unit.chunks(length.latent_frames):
        cache.begin(span)
        token = torch.ones(1, span.frames, 1, 12)
        yield cache.layer(0).extend(token, token, token).keys.shape[1]
        cache.commit()


def describe(plan: RunPlan, length: Length, batch: int) -> str:
    """The resolved plan in words, for --dry_run."""
    g, sizes = plan.geometry, plan.policy.sizes(plan.geometry)
    windows = list(islice(preview_windows(plan, length), PREVIEW_CHUNKS + 1))
    shown = ", ".join(map(str, windows[:PREVIEW_CHUNKS])) + (", ..." if len(windows) > PREVIEW_CHUNKS else "")
    times = ", ".join(f"{time:g}" for time in plan.sampler.times)
    weights = "random weights" if plan.random_weights else plan.spec.checkpoint
    seconds = length.pixel_frames / g.fps
    lines = [
        f"model     {plan.spec.name}, {weights}, {dtype_name(plan.dtype)} on {plan.device}",
        f"video     {g.width}x{g.height} at {g.fps} FPS, {length.pixel_frames} pixel frames = {seconds:.2f} s, "
        f"{length.latent_frames} latent frames of {g.frame_tokens} tokens",
        f"sampling  chunks of {g.chunk_frames}; timesteps {times}; context pass at {plan.sampler.context_time:g}",
        f"decoder   {plan.decoder_name}{'' if plan.tiny_decoder is None else ', approximate'}",
        f"policy    {plan.policy}",
        f"speed     attention by {plan.acceleration.attention}, "
        f"{'compiled' if plan.acceleration.compile else 'not compiled'}, "
        f"{'CUDA graphs' if plan.acceleration.graphs else 'no CUDA graphs'}, "
        f"{'8-bit linear layers (approximate), ' if plan.acceleration.fp8 else ''}decoding on {plan.decoder_device} "
        f"{'beside the transformer' if plan.decodes_aside else 'between its chunks'}",
        f"window    {shown} frames, chunk by chunk; at most {sizes.window_tokens} tokens attended, "
        f"{sizes.capacity_tokens} stored",
        f"memory    {memory.words(plan, batch)}",
    ]
    if length.notice:
        lines.insert(2, f"          {length.notice}")
    return "\n".join(lines)
