"""From jobs to files: stream each video into its writer, record it, go on after a failure."""
from __future__ import annotations

import logging
import platform
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

import torch

from pipeline.build import Length, RunPlan
from pipeline.engine import Engine, VideoRequest
from pipeline.noise import SampleSeed
from utils.config import ConfigError
from utils.hashing import fingerprint, sha256_file
from utils.interrupt import StopRequest
from utils.outputs import OutputFolder, video_stem
from utils.profiling import StageClock, peak_memory_bytes, reset_peak_memory
from utils.progress import VideoProgress
from utils.prompts import PromptItem
from utils.video import VideoWriter

logger = logging.getLogger(__name__)

PACKAGES = ("torch", "diffusers", "transformers", "av", "numpy")


@dataclass(frozen=True)
class Job:
    """One video to make, and the name and fingerprint that it will have."""

    item: PromptItem
    seed: SampleSeed
    stem: str
    fingerprint: str

    @property
    def request(self) -> VideoRequest:
        return VideoRequest(self.item.text, self.seed, self.item.source)


@dataclass
class Summary:
    """How a run ended."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)  # stem -> why
    interrupted: bool = False

    @property
    def exit_status(self) -> int:
        return 130 if self.interrupted else 1 if self.failed else 0


@dataclass(frozen=True)
class LengthRequest:
    """The length as the user gave it; what it means depends on how many frames are given."""

    latent_frames: int
    seconds: float | None

    def resolve(self, plan: RunPlan, given_frames: int = 0) -> Length:
        return Length.resolve(plan, latent_frames=self.latent_frames, seconds=self.seconds, given_frames=given_frames)


def make_jobs(
    plan: RunPlan, items: Sequence[PromptItem], length: LengthRequest, *, seed: int, num_samples: int, with_index: bool,
) -> list[Job]:
    """One job per prompt and sample. The fingerprint covers everything that decides the pixels."""
    settings, jobs = plan.settings(), []
    for item in items:
        source = None if item.source is None else sha256_file(item.source)
        for sample in range(num_samples):
            identity = {
                "text": item.text, "source": source, "seed": seed, "sample": sample, "settings": settings,
                "latent_frames": length.latent_frames, "seconds": length.seconds,
            }
            stem = video_stem(item, item.index, sample, seed, with_index=with_index)
            jobs.append(Job(item, SampleSeed(seed, sample), stem, fingerprint(identity)))
    return jobs


def pending_jobs(folder: OutputFolder, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that still have to run.

    Raises:
        ConfigError: a finished video of the same name was made with other settings.
    """
    states = {job.stem: folder.state(job.stem, job.fingerprint) for job in jobs}
    other = [stem for stem, state in states.items() if state == "other_settings"]
    if other:
        raise ConfigError(
            f"{folder.folder} holds {len(other)} finished video(s) of the same name made with other settings, such as {other[0]}.mp4 "
            f"(its settings: {folder.sidecar_path(other[0])}). Choose another --output_folder, or redo them with --overwrite."
        )
    done = sum(state == "finished" for state in states.values())
    if done:
        logger.info("%d of %d videos are finished already and are skipped", done, len(jobs))
    return [job for job in jobs if states[job.stem] != "finished"]


def batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Jobs in order, up to `size` at a time; a job that continues an image or video runs alone."""
    grouped: list[list[Job]] = []
    for job in jobs:
        joins = grouped and len(grouped[-1]) < size and job.item.source is None and grouped[-1][-1].item.source is None
        if joins:
            grouped[-1].append(job)
        else:
            grouped.append([job])
    return grouped


def render(engine: Engine, folder: OutputFolder, jobs: Sequence[Job], length: LengthRequest, *, batch_size: int) -> Summary:
    """Make every video. A failure costs that batch alone; Ctrl-C stops at the next chunk."""
    summary = Summary()
    with StopRequest() as stop:
        for batch in batches(jobs, batch_size):
            try:
                complete = _render_batch(engine, folder, batch, length, stop)
            except Exception as error:
                logger.error("%s failed: %s", ", ".join(job.stem for job in batch), error, exc_info=logger.isEnabledFor(logging.DEBUG))
                summary.failed |= {job.stem: f"{type(error).__name__}: {error}" for job in batch}
                _note_failure(folder, batch, error)
                engine.release()
                continue
            if complete:
                summary.finished += [job.stem for job in batch]
            if stop.requested:
                summary.interrupted = True
                break
    return summary


def _note_failure(folder: OutputFolder, batch: Sequence[Job], error: Exception) -> None:
    for job in batch:
        try:
            folder.fail(job.stem, {"prompt": job.item.prompt, "error": f"{type(error).__name__}: {error}", "fingerprint": job.fingerprint})
        except OSError as full:
            logger.error("the manifest could not be written either: %s", full)


def _render_batch(engine: Engine, folder: OutputFolder, batch: Sequence[Job], request: LengthRequest, stop: StopRequest) -> bool:
    """Make the videos of one batch; returns whether they are whole."""
    plan, clock = engine.plan, StageClock(engine.plan.device)
    reset_peak_memory(plan.device)
    source = batch[0].item.source
    initial = None if source is None else engine.source_latents(source)
    length = request.resolve(plan, 0 if initial is None else initial.shape[1])
    chunks = len(list(plan.geometry.chunks(length.latent_frames, prefilled=0 if initial is None else initial.shape[1])))
    left, whole = length.pixel_frames, True
    with ExitStack() as stack:
        for job in batch:
            folder.start(job.stem)
        writers = [stack.enter_context(VideoWriter(folder.video_path(job.stem), fps=plan.geometry.fps)) for job in batch]
        progress = stack.enter_context(VideoProgress(batch[0].stem, num_chunks=chunks, fps=plan.geometry.fps))
        for chunk in engine.stream([job.request for job in batch], length.latent_frames, clock, initial):
            frames = chunk.frames[:, :left]
            left -= frames.shape[1]
            for writer, video in zip(writers, frames, strict=True):
                writer.write(video)
            if not chunk.given:
                progress.update(frames.shape[1])
            if stop.requested and left > 0:
                whole = False
                break
        kept = [writer.keep_partial() for writer in writers] if not whole else []
    for job, writer in zip(batch, writers, strict=True):
        record = _record(plan, job, length, writer.frames_written, clock)
        if whole:
            folder.finish(job.stem, record)
        else:
            folder.partial(job.stem, record)
    for path in kept:
        logger.warning("kept what was made: %s", path)
    return whole


def _record(plan: RunPlan, job: Job, length: Length, pixel_frames: int, clock: StageClock) -> dict[str, Any]:
    """What stands in the JSON beside a video."""
    return {
        "fingerprint": job.fingerprint,
        "prompt": job.item.prompt,
        "extended_prompt": job.item.extended,
        "prompt_index": job.item.index,
        "source": job.item.source,
        "seed": job.seed.seed,
        "sample": job.seed.sample,
        "pixel_frames": pixel_frames,
        "latent_frames": length.latent_frames,
        "seconds": pixel_frames / plan.geometry.fps,
        "model": plan.spec.name,
        "checkpoint": plan.spec.checkpoint,
        "settings": plan.settings(),
        "stage_ms": {name: round(ms, 1) for name, ms in clock.totals_ms().items()},
        "peak_memory_bytes": peak_memory_bytes(plan.device),
        "device": torch.cuda.get_device_name(plan.device) if plan.device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    }
