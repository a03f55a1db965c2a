"""How long a video becomes: what was asked for, rounded up to what can be made, and whether its prompts fit in."""
from __future__ import annotations

import logging
from collections.abc import Sequence

from pipeline.build import RunPlan
from pipeline.loops import Length
from pipeline.timeline import switch_frames
from utils.config import ConfigError
from utils.prompts import PromptItem
from utils.timelines import TimelineError
from wan.kv_cache.policy import KVPolicy

logger = logging.getLogger(__name__)

MOST_PIXEL_FRAMES = 2**31 - 1


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
    g, limit = plan.geometry, plan.loop.max_frames
    asked = g.latent_frames(pixel_frames)
    if asked <= given_frames:
        raise ConfigError(
            f"the source alone fills the {asked} latent frames asked for ({pixel_frames / g.fps:.1f} s): nothing is "
            "left to generate. The length counts the source: ask for more, with --num_output_frames or --seconds."
        )
    try:
        whole = plan.loop.latent_frames(pixel_frames, given_frames)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if limit is not None and whole > limit:
        raise ConfigError(
            f"the video needs {whole} latent frames, but kv_cache.policy={plan.config.kv_cache['policy']} goes no "
            f"further than {limit} (local_attn_size: -1: the length of a training clip). Choose a policy that "
            "forgets, such as --policy rolling or configs/deep_forcing.yaml, or pay for the memory with "
            f"--set kv_cache.policy=full --set kv_cache.window_frames={whole}."
        )
    return Length(pixel_frames, asked, given_frames, whole)


def check_timelines(plan: RunPlan, items: Sequence[PromptItem], length: Length, *, given_frames: int) -> None:
    """Raise ConfigError if a later prompt of an item begins after its video's end, or shares a chunk with another.

    Says in one line how early a joint window lets it show.
    """
    starts = plan.loop.starts(length.latent_frames, given_frames) if any(item.later for item in items) else []
    for item in items:
        try:
            switch_frames(plan.geometry, [time for time, _ in item.later], starts, length.pixel_frames)
        except TimelineError as error:
            raise ConfigError(f"{item.prompt:.40}: {error}") from error
    policy = type(plan.policy)
    if starts and plan.loop.on_switch in ("recache", "flush_recent") and policy.tail_frames is KVPolicy.tail_frames:
        logger.warning(
            "on_switch=%s changes nothing: policy %s does not say which of its frames are newest and whole "
            "(tail_frames)", plan.loop.on_switch, policy.__name__,
        )
    ahead = plan.loop.joint_chunks - 1
    if starts and ahead:
        g = plan.geometry
        early_s = g.pixel_frames(ahead * g.chunk_frames, first=False) / g.fps
        first_s = min(item.later[0][0] for item in items if item.later)
        whole = f", that of {first_s:g} s from the beginning on" if first_s <= early_s else ""
        logger.info(
            "pipeline %s denoises %d chunks jointly, with the prompt of the newest: a later one may show up to %g s "
            "early%s", plan.config.pipeline, ahead + 1, early_s, whole,
        )
