"""The embedded model itself: it shows what the prompt names, and what each policy keeps of it for half a minute."""
from __future__ import annotations

import numpy as np
import torch
from conftest import ROOT

from evaluation.analysers import Analysis, analyse
from evaluation.study.scores import is_frozen, row_of
from pipeline.build import plan_run
from pipeline.engine import Engine, VideoRequest
from pipeline.length import video_length
from pipeline.noise import SampleSeed
from training.world import Clip, parse_caption
from utils.config import load_config
from wan.kv_cache.policy import build_policy, policy_fields

PROMPTS = (ROOT / "prompts" / "tiny.txt").read_text().splitlines()
FPS = 16


def watch(config: str, prompts: list[str], seconds: float) -> list[Analysis]:
    """Videos of the embedded model under one of configs/, read and held against their prompts."""
    settings = load_config(
        ROOT / "configs" / f"{config}.yaml", policy_fields=policy_fields(), build_policy=build_policy,
        overrides=["model=tiny"],
    )
    plan = plan_run(settings, checkpoint=None, use_ema=False, device=torch.device("cpu"), random_weights=False)
    engine = Engine(plan)
    engine.prepare(prompts)
    wanted = round(seconds * FPS) + 1
    latent_frames = video_length(plan, wanted, given_frames=0).latent_frames
    requests = [VideoRequest(prompt, SampleSeed(0)) for prompt in prompts]
    frames = np.concatenate([chunk.frames.numpy() for chunk in engine.stream(requests, latent_frames)], axis=1)
    return [
        analyse(video[:wanted], parse_caption(prompt), FPS) for video, prompt in zip(frames, prompts, strict=True)
    ]


def test_five_seconds_show_what_the_prompts_name() -> None:
    """Colour, background, shape and number, each in at least 80 % of the frames."""
    for prompt, seen in zip(PROMPTS[:3], watch("deep_forcing", PROMPTS[:3], 5), strict=True):
        holds = seen.video.holds
        assert all(holds[name] for name in ("colour", "background", "shape", "count")), (prompt, holds)


def test_sinks_hold_for_half_a_minute_where_rolling_drifts() -> None:
    """After 30 s Deep Sink and Deep Forcing still show what the prompt names; the rolling window has drifted more."""
    (rolling,), (sink,), (forcing,) = (
        watch(name, [PROMPTS[0]], 30) for name in ("self_forcing", "deep_sink", "deep_forcing")
    )
    said = parse_caption(PROMPTS[0])
    clip = Clip(0, "", PROMPTS[0], said, said, None)
    for held in (sink, forcing):
        late = held.between(25, 30)
        assert late["colour"] > 0.8 and late["background"] > 0.8
        assert not is_frozen([row_of(clip, held)])
        assert held.video.background_drift < 0.5 * rolling.video.background_drift
