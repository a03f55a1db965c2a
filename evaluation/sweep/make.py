"""The videos of a sweep that are missing: `<folder>/videos/<variant>/<prompt>.mp4`, each with its record."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from evaluation.study.settings import config_path
from evaluation.study.sources import plan_method
from evaluation.sweep.settings import Sweep, Variant, chosen_of, items_of, variants_of
from evaluation.sweep.work import Unit
from pipeline.build import RunPlan
from pipeline.engine import Engine
from pipeline.length import asked_pixel_frames, check_timelines, video_length
from pipeline.loops import ChunkwiseLoop
from pipeline.memory import fit_memory
from pipeline.render import Job, check_number, is_finished, make_jobs, refuse_other_settings, render
from utils.config import REPOSITORY, ConfigError
from utils.outputs import OutputFolder
from utils.prompts import PromptItem

VIDEOS = "videos"


class UnfinishedError(ValueError):
    """Videos that could not be made; the message says why."""


@dataclass(frozen=True)
class Task:
    """All videos of one variant."""

    variant: Variant
    plan: RunPlan
    pixel_frames: int
    jobs: list[Job]
    output: OutputFolder


def make_tasks(
    sweep: Sweep, folder: Path, *, device: torch.device, random_weights: bool, only: Sequence[str] = (),
) -> list[Task]:
    """Every variant that `only` needs (see `chosen_of`), checked before anything is computed.

    Raises:
        ConfigError: a variant that cannot be run, or finished videos that were made with other settings.
        PromptError, CheckpointError: files that cannot be used.
    """
    items, wanted = items_of(sweep), set().union(*chosen_of(sweep, only))
    variants = [variant for variant in variants_of(sweep) if variant.name in wanted]
    if not variants:
        raise ConfigError(f"--only {' '.join(only)}: that is no method. Name methods, tables or ablations, too.")
    check_number(len(items), len(sweep.seeds) * len(variants))
    made = [_task(sweep, variant, items, folder, device, random_weights) for variant in variants]
    for task in made:
        refuse_other_settings(task.output, task.jobs, otherwise=f"delete {task.output.folder} to have them redone")
    return made


def _task(
    sweep: Sweep, variant: Variant, items: Sequence[PromptItem], folder: Path, device: torch.device,
    random_weights: bool,
) -> Task:
    plan = plan_method(
        f"method {variant.name}", config_path(variant.method), [*variant.method.set, *variant.overrides],
        model=sweep.model, device=device, random_weights=random_weights, use_ema=sweep.use_ema,
        checkpoint=None if sweep.checkpoint is None else REPOSITORY / sweep.checkpoint,
    )
    try:
        pixel_frames = asked_pixel_frames(plan, latent_frames=0, seconds=variant.seconds)
        check_timelines(plan, items, video_length(plan, pixel_frames, given_frames=0), given_frames=0)
        plan = fit_memory(plan, "auto", sweep.batch_size)
    except ConfigError as error:
        raise ConfigError(f"method {variant.name}: {error}") from error
    jobs = [
        job for seed in sweep.seeds
        for job in make_jobs(plan, items, pixel_frames, seed=seed, num_samples=1, with_index=False)
    ]
    return Task(variant, plan, pixel_frames, jobs, OutputFolder(folder / VIDEOS / variant.name, overwrite=False))


def memories_without_effect(tasks: Sequence[Task]) -> list[str]:
    """Variants that differ in their memories, at lengths at which no memory forgets a frame: it cannot show."""
    found = []
    for seconds in dict.fromkeys(task.variant.seconds for task in tasks):
        alike = [t for t in tasks if t.variant.seconds == seconds and isinstance(t.plan.loop, ChunkwiseLoop)]
        if len({task.plan.policy for task in alike}) > 1 and not any(map(_forgets, alike)):
            found += [task.variant.name for task in alike]
    return found


def _forgets(task: Task) -> bool:
    """Whether the video is longer than what its policy remembers as it is."""
    g, sizes = task.plan.geometry, task.plan.policy.sizes(task.plan.geometry)
    whole_tokens = min(sizes.window_tokens, sizes.capacity_tokens - g.chunk_frames * g.frame_tokens)
    frames = video_length(task.plan, task.pixel_frames, given_frames=0).latent_frames
    return frames * g.frame_tokens > whole_tokens


class Maker:
    """Makes batches of videos; keeps the networks of the variant that was made last."""

    def __init__(self, batch_size: int):
        self._batch_size = batch_size
        self._engine: tuple[str, Engine] | None = None

    def units(self, task: Task) -> list[Unit]:
        """One unit a batch. Batches are cut from all jobs, so that all workers and later runs cut alike."""
        size = self._batch_size
        parts = [task.jobs[start:start + size] for start in range(0, len(task.jobs), size)]
        return [
            Unit(
                f"make.{task.variant.name}.{index}",
                lambda part=part: all(is_finished(task.output, job) for job in part),
                lambda part=part: self._make(task, part),
            )
            for index, part in enumerate(parts)
        ]

    def release(self) -> None:
        """Let the networks go."""
        self._engine = None

    def _make(self, task: Task, jobs: Sequence[Job]) -> None:
        summary = render(
            self._engine_of(task), task.output, [job for job in jobs if not is_finished(task.output, job)],
            task.pixel_frames, batch_size=self._batch_size,
        )
        if summary.interrupted:
            raise KeyboardInterrupt
        if summary.failed:
            raise UnfinishedError("; ".join(f"{stem}: {why}" for stem, why in summary.failed.items()))

    def _engine_of(self, task: Task) -> Engine:
        name = task.variant.name
        if self._engine is None or self._engine[0] != name:
            self._engine = None  # free the old networks before the new ones are allocated
            engine = Engine(task.plan)
            engine.prepare([text for job in task.jobs for text in job.item.texts])
            self._engine = name, engine
        return self._engine[1]
