"""Do two pipelines compute the same? Chunk by chunk from one state, so that differences cannot grow.

The reference makes the video. Every other pipeline starts each compared chunk from the reference's memory and noise.
What is exact is a float32 twin of the reference: the error of both against it says whether one is worse than the
other. Free-running, each follows its own memory instead: how far videos drift apart.
"""
from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cycles import latent_frames_of
from benchmarks.subject import Subject
from pipeline.chunkwise import ChunkwisePipeline

REFERENCE, EXACT = "reference", "exact"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far the latents of one pipeline are from those of another, in one chunk."""

    chunk: int
    relative_error: float        # norm of the difference over the norm of what it is measured against
    max_error: float
    finite: bool
    top_c_overlap: float | None  # share of the chosen tokens that are the same, mean over layers; None: nothing chosen


@dataclass(frozen=True)
class Differences:
    """All compared chunks of a pair."""

    chunks: list[Difference]
    relative_error_median: float
    relative_error_max: float
    all_finite: bool

    @classmethod
    def of(cls, chunks: list[Difference]) -> Differences:
        errors = [chunk.relative_error for chunk in chunks]
        return cls(chunks, statistics.median(errors), max(errors), all(chunk.finite for chunk in chunks))


def is_compared(index: int, every: int) -> bool:
    """Of every so many chunks the first, and the last, the one before: with cycles of two, one of them prunes."""
    return index % every in (0, every - 1)


def compare_latents(
    reference: Subject, others: Mapping[str, Subject], *, seconds: float, every: int, free_running: bool = False,
) -> dict[str, Differences]:
    """Differences of every pair, named `<one> against <other>`.

    Args:
        others: by name; against EXACT, if it is there, all are measured, and against the reference all but EXACT.
        every: compare two of so many chunks; 1 is all.
        free_running: the others remember what they made themselves.
    """
    frames = latent_frames_of(reference.plan, seconds)
    subjects = {REFERENCE: reference, **others}
    for subject in subjects.values():
        subject.start(frames)
    pairs = [(a, b) for b in (EXACT, REFERENCE) for a in subjects if b in subjects and a not in (b, EXACT)]
    rows: dict[tuple[str, str], list[Difference]] = {pair: [] for pair in pairs}
    for span in reference.plan.geometry.chunks(frames):
        compared = is_compared(span.index, every)
        running = subjects if compared or free_running else {REFERENCE: reference}
        latents = {}
        for name, subject in running.items():
            if not free_running and subject is not reference:
                subject.pipeline.cache.copy_memory_of(reference.pipeline.cache)
            latents[name] = subject.pipeline.denoise(span, subject.text, reference.noise)
        if compared:
            for a, b in pairs:
                rows[a, b].append(difference(
                    span.index, latents[a], latents[b], top_c_overlap(subjects[a].pipeline, subjects[b].pipeline),
                ))
        for name in subjects if free_running else [REFERENCE]:
            subjects[name].pipeline.remember(latents[name], subjects[name].text)
    return {f"{a} against {b}": Differences.of(chunks) for (a, b), chunks in rows.items()}


def difference(chunk: int, ours: Tensor, other: Tensor, overlap: float | None) -> Difference:
    """`ours` measured against `other`."""
    return Difference(
        chunk=chunk, relative_error=((ours.double() - other.double()).norm() / other.double().norm()).item(),
        max_error=(ours - other).abs().max().item(), top_c_overlap=overlap,
        finite=bool(ours.isfinite().all() and other.isfinite().all()),
    )


def top_c_overlap(ours: ChunkwisePipeline, other: ChunkwisePipeline) -> float | None:
    """Share of our chosen tokens that the other chose too, mean over layers and samples."""
    shares = []
    for index in range(ours.model.config.num_layers):
        a, b = (pipeline.cache.layer(index).plan.chosen for pipeline in (ours, other))
        if a is not None and b is not None and a.shape[1]:
            shares += [torch.isin(mine, theirs).float().mean().item() for mine, theirs in zip(a, b, strict=True)]
    return statistics.fmean(shares) if shares else None
