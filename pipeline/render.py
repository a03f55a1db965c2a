"""From jobs to files: stream each video into its writer, record it, go on after a failure."""
from __future__ import annotations

import logging
import platform
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib import metadata
from itertools import groupby
from typing import Any

import torch

from pipeline.build import RunPlan
from pipeline.engine import Engine, VideoRequest
from pipeline.length import video_length
from pipeline.loops import Length
from pipeline.noise import SampleSeed
from utils.config import ConfigError
from utils.files import BeingWrittenError
from utils.hashing import fingerprint, sha256_file
from utils.interrupt import StopRequest
from utils.outputs import ManifestError, OutputFolder, differences, reason, video_stem
from utils.profiling import StageClock, peak_memory_bytes, reset_peak_memory
from utils.progress import VideoProgress
from utils.prompts import PromptItem
from utils.video import VideoWriter

logger = logging.getLogger(__name__)

WAIT_S = 1.0  # between looks at what another process is making
MOST_VIDEOS = 100_000  # their names and fingerprints are made first: some seconds
PACKAGES = ("torch", "diffusers", "transformers", "av", "numpy")


@dataclass(frozen=True)
class Job:
    """One video to make, and the name that it will have."""

    item: PromptItem
    seed: SampleSeed
    stem: str
    identity: dict[str, Any]  # everything that decides the pixels, as plain data
    fingerprint: str          # of the identity

    @property
    def request(self) -> VideoRequest:
        return VideoRequest(self.item.text, self.seed, self.item.later)


@dataclass
class Summary:
    """How a run ended."""

    finished: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)    # stem -> why
    unlisted: dict[str, str] = field(default_factory=dict)  # there with their records, but not in the manifest: why
    elsewhere: list[str] = field(default_factory=list)      # made by another run meanwhile
    interrupted: bool = False

    @property
    def exit_status(self) -> int:
        return 130 if self.interrupted else 1 if self.failed or self.unlisted else 0


def check_number(num_prompts: int, num_samples: int) -> None:
    """Raise ConfigError for more videos than one run keeps a list of."""
    if num_prompts * num_samples > MOST_VIDEOS:
        raise ConfigError(
            f"{num_prompts} prompts with --num_samples {num_samples} are {num_prompts * num_samples} videos; one run "
            f"makes at most {MOST_VIDEOS}. Ask for fewer samples, or split the prompts or the seeds over several runs."
        )


def make_jobs(
    plan: RunPlan, items: Sequence[PromptItem], pixel_frames: int, *, seed: int, num_samples: int, with_index: bool,
) -> list[Job]:
    """One job per prompt and sample."""
    settings, jobs = plan.settings(), []
    for item in items:
        source = None if item.source is None else sha256_file(item.source)
        for sample in range(num_samples):
            identity = {
                "text": item.text, "source": source, "seed": seed, "sample": sample, "settings": settings,
                "pixel_frames": pixel_frames, **({"later": item.later} if item.later else {}),
            }
            stem = video_stem(item, item.index, sample, seed, with_index=with_index)
            jobs.append(Job(item, SampleSeed(seed, sample), stem, identity, fingerprint(identity)))
    return jobs


def is_finished(folder: OutputFolder, job: Job) -> bool:
    return folder.state(job.stem, job.fingerprint) == "finished"


def refuse_other_settings(
    folder: OutputFolder, jobs: Sequence[Job], *, otherwise: str = "redo them with --overwrite",
) -> None:
    """Raise ConfigError if a finished video of the same name was made with other settings.

    Before anything loads, before each video and before it takes its name: another run may have made it meanwhile.
    Args: otherwise: what else than another folder helps.
    """
    other = [job for job in jobs if folder.state(job.stem, job.fingerprint) == "other_settings"]
    if other:
        stem = other[0].stem
        raise ConfigError(
            f"{folder.folder} holds {len(other)} finished video(s) of the same name made with other settings, such as "
            f"{stem}.mp4: {differences(folder.record(stem) or {}, other[0].identity)} (all its settings: "
            f"{folder.sidecar_path(stem)}). Choose another --output_folder, or {otherwise}."
        )


def pending_jobs(folder: OutputFolder, jobs: Sequence[Job]) -> list[Job]:
    """The jobs that still have to run."""
    pending = [job for job in jobs if not is_finished(folder, job)]
    if len(pending) < len(jobs):
        logger.info("%d of %d videos are finished already and are skipped", len(jobs) - len(pending), len(jobs))
    return pending


def batches(jobs: Sequence[Job], size: int) -> list[list[Job]]:
    """Jobs in order, up to `size` at a time, whose prompts change at the same moments.

    A job that continues an image or video runs alone.
    """
    def kind(job: Job) -> object:
        return [time for time, _ in job.item.later] if job.item.source is None else id(job)

    alike = [list(group) for _, group in groupby(jobs, kind)]
    return [group[first:first + size] for group in alike for first in range(0, len(group), size)]


def render(
    engine: Engine, folder: OutputFolder, jobs: Sequence[Job], pixel_frames: int, *, batch_size: int,
) -> Summary:
    """Make every video. A failure costs that video alone; Ctrl-C stops at the next chunk.

    A video that another process is making is left to it, and waited for at the end: made here if that one fails.
    """
    summary, queue, told = Summary(), deque(batches(jobs, batch_size)), set()
    with StopRequest() as stop:
        while queue and not summary.interrupted:
            batch = [job for job in queue.popleft() if not is_finished(folder, job)]  # another run may have made it
            if not batch:
                continue
            whole, why = False, None
            try:
                number = len(summary.finished) + len(summary.failed) + 1
                label = f"{number}/{len(jobs)} {batch[0].stem}" if len(jobs) > 1 else batch[0].stem
                whole = _render_batch(engine, folder, batch, pixel_frames, stop, told, summary.unlisted, label)
            except BeingWrittenError as error:
                if str(error) not in told:
                    logger.info("%s. This run goes on with the others, and looks again", error)
                    told.add(str(error))
                queue.extend([job] for job in batch)
                time.sleep(WAIT_S)
            except Exception as error:
                why = reason(error)
                trace = logger.isEnabledFor(logging.DEBUG)
                logger.error("%s failed: %s", ", ".join(job.stem for job in batch), why, exc_info=trace)
            if why is not None:
                engine.release()  # not earlier: while the error is alive, so are the tensors of its frames
                if len(batch) == 1:
                    _note_failure(folder, batch[0], why, summary)
                else:
                    logger.info("these %d videos are tried again one by one", len(batch))
                    queue.extendleft([job] for job in reversed(batch))
            if whole:
                summary.finished += [job.stem for job in batch]
            summary.interrupted = stop.requested
    for job in jobs:
        if job.stem in summary.failed and is_finished(folder, job):  # another run was making it
            del summary.failed[job.stem]
    made = {*summary.finished, *summary.failed}
    summary.elsewhere = [job.stem for job in jobs if job.stem not in made and is_finished(folder, job)]
    return summary


def _note_failure(folder: OutputFolder, job: Job, why: str, summary: Summary) -> None:
    summary.failed[job.stem] = why
    try:
        folder.fail(job.stem, {"prompt": job.item.prompt, "error": why, "fingerprint": job.fingerprint})
    except OSError as full:
        logger.error("the manifest could not be written either: %s", reason(full))


def _render_batch(
    engine: Engine, folder: OutputFolder, batch: Sequence[Job], pixel_frames: int, stop: StopRequest, told: set[str],
    unlisted: dict[str, str], label: str,
) -> bool:
    """Make the videos of one batch; returns whether they are whole.

    `told` are the notices given so far; `unlisted` takes in the videos that the manifest could not; `label` stands
    beside the progress.
    """
    for job in batch:
        folder.start(job.stem)
    refuse_other_settings(folder, batch)
    plan, clock = engine.plan, StageClock(engine.plan.device)
    reset_peak_memory(plan.device)
    source = batch[0].item.source
    initial = None if source is None else engine.source_latents(source, pixel_frames)
    given_frames = 0 if initial is None else initial.shape[1]
    length = video_length(plan, pixel_frames, given_frames=given_frames)
    if length.notice and length.notice not in told:
        logger.info("%s", length.notice)
        told.add(length.notice)
    chunks = len(plan.loop.starts(length.latent_frames, given_frames))
    if source is not None:
        shown = plan.geometry.pixel_frames(given_frames)
        new_s = (length.pixel_frames - shown) / plan.geometry.fps
        logger.info("%s: continues %s, of which it shows %d frame(s); %.1f s are new", label, source.name, shown, new_s)
    left, whole = length.pixel_frames, True
    with ExitStack() as stack:
        progress = stack.enter_context(VideoProgress(label, num_chunks=chunks, fps=plan.geometry.fps))
        paths = [folder.video_path(job.stem) for job in batch]
        writers = [stack.enter_context(VideoWriter(path, fps=plan.geometry.fps)) for path in paths]
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
        if whole:  # whoever was about to record a video when this one began has done so by now
            refuse_other_settings(folder, batch)
        kept = [] if whole else [writer.keep_partial() for writer in writers]
    for job, writer in zip(batch, writers, strict=True):
        record = _record(plan, job, length, writer.frames_written, clock)
        try:
            (folder.finish if whole else folder.partial)(job.stem, record)
        except ManifestError as error:
            unlisted[job.stem] = reason(error)
    for path in kept:
        logger.warning("kept what was made: %s", path)
    return whole


def _record(plan: RunPlan, job: Job, length: Length, pixel_frames: int, clock: StageClock) -> dict[str, Any]:
    """What stands in the JSON beside a video."""
    on_gpu = plan.device.type == "cuda"
    return {
        "fingerprint": job.fingerprint,
        "prompt": job.item.prompt,
        "extended_prompt": job.item.extended,
        "later_prompts": [{"time": time, "prompt": prompt} for time, prompt in job.item.later],
        "prompt_index": job.item.index,
        "source": job.item.source,
        "seed": job.seed.seed,
        "sample": job.seed.sample,
        "pixel_frames": pixel_frames,
        "latent_frames": length.latent_frames,
        "seconds": pixel_frames / plan.geometry.fps,
        "model": plan.spec.name,
        "checkpoint": None if plan.random_weights else plan.spec.checkpoint,
        "lora": None if plan.random_weights else plan.spec.lora,
        "decoder": plan.decoder_name,
        "settings": plan.settings(),
        "stage_ms": {name: round(ms, 1) for name, ms in clock.totals_ms().items()},
        "peak_memory_bytes": peak_memory_bytes(plan.device),
        "device": torch.cuda.get_device_name(plan.device) if on_gpu else platform.processor() or platform.machine(),
        "versions": {"python": platform.python_version(), **{name: metadata.version(name) for name in PACKAGES}},
    }
