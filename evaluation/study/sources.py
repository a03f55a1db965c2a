"""What makes a study's videos: the model under a policy, the renderer, the autoencoder.

B videos of a batch, T pixel frames, H height, W width.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from evaluation.analysers import ChunkLayout
from evaluation.study.settings import Study, config_path
from pipeline.build import RunPlan, plan_run
from pipeline.engine import Engine, VideoRequest
from pipeline.length import video_length
from pipeline.memory import fit_memory
from pipeline.noise import SampleSeed
from training.world import Clip, World, render, to_frames
from utils.config import REPOSITORY, Config, ConfigError, load_config
from wan.kv_cache.policy import build_policy, policy_fields
from wan.stream import to_uint8
from wan.vae import WanVAE

BLOCK_FRAMES = 96   # rendered at a time


@dataclass(frozen=True)
class Made:
    """Finished videos of one batch."""

    frames: np.ndarray                # uint8 [B, T, H, W, 3]
    extra: list[dict[str, float]]     # what is known of each besides its frames


class Source(Protocol):
    """One row of the tables."""

    plan: RunPlan

    def settings(self) -> dict[str, Any]:
        """Everything that decides the pixels besides the caption; plain data."""

    def videos(self, batches: Sequence[Sequence[Clip]]) -> Iterator[Made]:
        """The videos of each batch, in order; networks are loaded by the first and dropped after the last."""


@dataclass(frozen=True)
class Rollout:
    """The model, its cache under a policy. A caption's noise depends on the study's seed and the caption's own."""

    plan: RunPlan
    pixel_frames: int
    seed: int

    def settings(self) -> dict[str, Any]:
        return {"pixel_frames": self.pixel_frames, "seed": self.seed, **self.plan.settings()}

    def videos(self, batches: Sequence[Sequence[Clip]]) -> Iterator[Made]:
        length = video_length(self.plan, self.pixel_frames, given_frames=0)
        engine = Engine(self.plan)
        engine.prepare([clip.caption for batch in batches for clip in batch])
        for batch in batches:
            g = self.plan.geometry
            frames = np.empty((len(batch), self.pixel_frames, g.height, g.width, 3), np.uint8)
            requests = [VideoRequest(clip.caption, SampleSeed(self.seed, clip.seed)) for clip in batch]
            done = 0
            for chunk in engine.stream(requests, length.latent_frames):
                new = chunk.frames[:, :self.pixel_frames - done].numpy()
                frames[:, done:done + new.shape[1]] = new
                done += new.shape[1]
            yield Made(frames, [{} for _ in batch])


@dataclass(frozen=True)
class Rendered:
    """The true video of every caption: what a perfect model would show."""

    plan: RunPlan
    pixel_frames: int

    def settings(self) -> dict[str, Any]:
        g = self.plan.geometry
        return {"pixel_frames": self.pixel_frames, "height": g.height, "width": g.width, "fps": g.fps}

    def videos(self, batches: Sequence[Sequence[Clip]]) -> Iterator[Made]:
        world, device = world_of(self.plan), self.plan.device
        for batch in batches:
            parts = []
            for start in range(0, self.pixel_frames, BLOCK_FRAMES):
                count = min(BLOCK_FRAMES, self.pixel_frames - start)
                pixels = render(
                    [clip.scene for clip in batch], world=world, start_frame=start, num_frames=count, device=device,
                )
                parts.append(to_frames(pixels).cpu().numpy())
            yield Made(np.concatenate(parts, axis=1), [{} for _ in batch])


@dataclass(frozen=True)
class Reconstructed:
    """The true video through the autoencoder, decoded as a stream: the most that the model can show."""

    plan: RunPlan
    pixel_frames: int

    def settings(self) -> dict[str, Any]:
        made = self.plan.settings()
        return {
            "pixel_frames": self.pixel_frames, "vae": self.plan.weights["vae"], "dtype": made["config"]["dtype"],
            **Rendered(self.plan, self.pixel_frames).settings(),
        }

    def videos(self, batches: Sequence[Sequence[Clip]]) -> Iterator[Made]:
        plan, world = self.plan, world_of(self.plan)
        vae = load_vae(plan)
        for batch in batches:
            true = render(
                [clip.scene for clip in batch], world=world, num_frames=self.pixel_frames, device=plan.device,
            )
            latents, decoder = vae.encode(true), vae.stream()
            shown = torch.cat([to_uint8(decoder.decode(frame)) for frame in latents.split(1, dim=1)], dim=1)
            error = (shown.float() - to_frames(true).float()).square().mean(dim=(2, 3, 4))      # [B, T]
            extra = [
                {"psnr": psnr(row.mean().item()), "psnr_last_frame": psnr(row[-1].item())} for row in error.cpu()
            ]
            yield Made(shown.cpu().numpy(), extra)


def psnr(squared_error: float) -> float:
    """Decibels of a mean squared error in levels of 255; below half a level's rounding it is capped at 60 dB."""
    return float(min(60.0, 10 * np.log10(255 ** 2 / max(squared_error, 1e-9))))


def load_vae(plan: RunPlan) -> WanVAE:
    """The run's autoencoder."""
    if plan.random_weights:
        return WanVAE.random(plan.spec.vae, device=plan.device, dtype=plan.dtype, seed=0)
    return WanVAE.load(plan.spec.vae, device=plan.device, dtype=plan.dtype)


def world_of(plan: RunPlan) -> World:
    """The world in the model's frame."""
    return World(plan.geometry.height, plan.geometry.width, plan.geometry.fps)


def chunk_layout(plan: RunPlan) -> ChunkLayout:
    """Pixel frames of the first chunk and of every later one."""
    g = plan.geometry
    first = 1 if g.independent_first_frame else g.chunk_frames
    return ChunkLayout(g.pixel_frames(first), g.pixel_frames(g.chunk_frames, first=False))


def make_sources(study: Study, *, device: torch.device, random_weights: bool) -> dict[str, Source]:
    """Every reference and method of the study, checked before anything is computed.

    Raises:
        ConfigError: a method's config, or a model, that cannot be used; files that are missing.
    """
    common = {"model": study.model, "device": device, "random_weights": random_weights}
    reference = plan_method("references", REPOSITORY / "configs" / "base.yaml", [], **common)
    pixel_frames = round(study.seconds * reference.geometry.fps) + 1
    kinds = {"rendered": Rendered, "reconstructed": Reconstructed}
    sources: dict[str, Source] = {name: kinds[name](reference, pixel_frames) for name in study.references}
    for name, method in study.methods.items():
        plan = plan_method(f"method {name}", config_path(method), method.set, **common)
        try:
            video_length(plan, pixel_frames, given_frames=0)
            plan = fit_memory(plan, "auto", study.batch_size)
        except ConfigError as error:
            raise ConfigError(f"method {name}: {error}") from error
        sources[name] = Rollout(plan, pixel_frames, study.seed)
    return sources


def plan_method(
    who: str, path: Path, overrides: Sequence[str], *, model: str, device: torch.device, random_weights: bool,
    checkpoint: Path | None = None, use_ema: bool = False,
) -> RunPlan:
    """The run of a method's YAML with its overrides on `model`.

    Raises: ConfigError or CheckpointError as `load_config` and `plan_run` do; `who` begins the former's message.
    """
    try:
        config: Config = load_config(
            path, policy_fields=policy_fields(), build_policy=build_policy, overrides=[f"model={model}", *overrides],
        )
        return plan_run(config, checkpoint=checkpoint, use_ema=use_ema, device=device, random_weights=random_weights)
    except ConfigError as error:
        raise ConfigError(f"{who}: {error}") from error
