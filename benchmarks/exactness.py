"""Do two pipelines compute the same? Chunk by chunk from one state, so that differences cannot grow.

The reference makes the video. Every other pipeline starts each compared chunk from the reference's memory and noise.
What is exact is a float32 twin of the reference: the error of both against it says whether one is worse than the
other. Free-running, each follows its own memory instead: how far videos drift apart.
"""
from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.cycles import latent_frames_of
from benchmarks.subject import Subject
from benchmarks.summary import finite_or_none
from pipeline.build import RunPlan
from wan.geometry import ChunkSpan
from wan.kv_cache.cache import KVCache

REFERENCE, EXACT = "reference", "float32"


@dataclass(frozen=True, kw_only=True)
class Difference:
    """How far the latents of one pipeline are from those of another, in one chunk."""

    chunk: int
    relative_error: float | None  # norm of the difference over the norm of what it is measured against; None: no number
    max_error: float | None       # None: no number
    finite: bool                  # all latents of both are
    top_c_overlap: float | None   # share of the chosen tokens that are the same, mean over layers; None: nothing chosen


@dataclass(frozen=True)
class Differences:
    """All compared chunks of a pair; errors are those of the chunks that have one, None if none has."""

    chunks: list[Difference]
    relative_error_median: float | None
    relative_error_max: float | None
    all_finite: bool

    @classmethod
    def of(cls, chunks: list[Difference]) -> Differences:
        errors = [chunk.relative_error for chunk in chunks if chunk.relative_error is not None]
        median = statistics.median(errors) if errors else None
        return cls(chunks, median, max(errors, default=None), all(chunk.finite for chunk in chunks))


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
    remembering = subjects if free_running else [REFERENCE]
    tokens = {name: Tokens(subjects[name].plan, subjects[name].setting.batch) for name in remembering}
    for span in reference.plan.geometry.chunks(frames):
        compared = is_compared(span.index, every)
        running = subjects if compared or free_running else {REFERENCE: reference}
        latents = {}
        for name, subject in running.items():
            if not free_running and subject is not reference:
                subject.pipeline.cache.copy_memory_of(reference.pipeline.cache)
            latents[name] = subject.pipeline.denoise(span, subject.text, reference.noise)
        if compared:
            chosen = {
                name: tokens[name if free_running else REFERENCE].chosen_by(subject.pipeline.cache)
                for name, subject in subjects.items()
            }
            for a, b in pairs:
                rows[a, b].append(difference(
                    span.index, latents[a], latents[b], top_c_overlap(chosen[a], chosen[b]),
                ))
        for name in remembering:
            tokens[name].commit(subjects[name].pipeline.cache, span)
            subjects[name].pipeline.remember(latents[name], subjects[name].text)
    return {f"{a} against {b}": Differences.of(chunks) for (a, b), chunks in rows.items()}


def difference(chunk: int, ours: Tensor, other: Tensor, overlap: float | None) -> Difference:
    """`ours` measured against `other`."""
    return Difference(
        chunk=chunk, relative_error=finite_or_none((ours.double() - other.double()).norm() / other.double().norm()),
        max_error=finite_or_none((ours - other).abs().max()), top_c_overlap=overlap,
        finite=bool(ours.isfinite().all() and other.isfinite().all()),
    )


class Tokens:
    """Which tokens of the video a memory holds, layer by layer and slot by slot: frame * frame_tokens + place.

    Two memories that have forgotten different tokens hold different ones in the same slot.
    """

    def __init__(self, plan: RunPlan, batch: int):
        nothing = torch.zeros(batch, 0, dtype=torch.int64, device=plan.device)
        self._held = [nothing] * plan.architecture.num_layers  # [B, slots in use] each
        self._frame_tokens = plan.geometry.frame_tokens

    def chosen_by(self, cache: KVCache) -> list[Tensor | None]:
        """Tokens [B, C] of each layer that `cache` counts as chosen by the chunk in the making; None: no choice."""
        slots = [cache.layer(index).plan.chosen for index in range(len(self._held))]
        return [
            None if chosen is None else held.take_along_dim(chosen, dim=1)
            for held, chosen in zip(self._held, slots, strict=True)
        ]

    def commit(self, cache: KVCache, chunk: ChunkSpan) -> None:
        """Follow what `cache` is about to forget and to append."""
        for index, held in enumerate(self._held):
            kept = held.take_along_dim(cache.layer(index).plan.retain, dim=1)
            first, stop = chunk.start * self._frame_tokens, chunk.stop * self._frame_tokens
            born = torch.arange(first, stop, device=kept.device).expand(len(kept), -1)
            self._held[index] = torch.cat([kept, born], dim=1)


def top_c_overlap(ours: Sequence[Tensor | None], other: Sequence[Tensor | None]) -> float | None:
    """Share of our chosen tokens that the other chose too; mean over layers and samples."""
    shares = []
    for a, b in zip(ours, other, strict=True):
        if a is not None and b is not None and a.shape[1]:
            shares += [torch.isin(mine, theirs).float().mean().item() for mine, theirs in zip(a, b, strict=True)]
    return statistics.fmean(shares) if shares else None
