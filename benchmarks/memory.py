"""What remembering costs: choosing, building windows, compressing; and whether time and bytes hold over a video.

A whole video is timed chunk by chunk. Then, in the middle of its last chunk, each part is done again for all layers, in
turns with the others: parts are pure or overwrite what they wrote, so the video would go on as if nothing had happened.
"""
from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from benchmarks.clock import Clock
from benchmarks.cycles import Schedule
from benchmarks.endurance import first_and_last_minute
from benchmarks.subject import Stages, Subject
from benchmarks.summary import Spread, allocated_gib
from wan.kv_cache.archive import Archive
from wan.kv_cache.layer import LayerCache
from wan.recorder import CudaRecorder
from wan.rope import Turn

TURNS = 20  # times that each part is done


@dataclass(frozen=True, kw_only=True)
class MemoryCost:
    """Times are milliseconds of a chunk, all layers together; shares are of the median chunk."""

    context_tokens: tuple[int, ...]      # that each chunk of the video attends to, itself included
    chunk_ms: Spread                     # of the measured chunks
    last_over_first: float               # median chunk of the last minute over that of the first
    part_ms: dict[str, Spread]           # selection, gather (a window whose keys are not turned), window, packet
    share: dict[str, float]              # selection, window, rotation (window less gather), packet
    nbytes: dict[str, int]               # keys and values: attended, window, archive
    archive_bytes: dict[int, int]        # by chunk, as it grows
    archive_on_host: bool                # its keys and values are in host memory
    allocated_gib: float | None          # at the end


def measure_memory(subject: Subject, schedule: Schedule, clock: Clock) -> MemoryCost:
    """Make the whole video of the schedule after a warm-up, and take its last chunk apart."""
    plan = subject.plan
    layers = [subject.pipeline.cache.layer(index) for index in range(plan.architecture.num_layers)]
    subject.count("dit")
    subject.warm_up(schedule, clock)
    subject.start(schedule.latent_frames)
    stages: list[Stages] = []
    archive: dict[int, int] = {}
    last = len(schedule.windows) - 1
    for index in range(last):
        stages.append(subject.advance(clock).stage_ms)
        _note_growth(archive, index, layers)
    latents = subject.denoise()
    _note_growth(archive, last, layers)
    parts = memory_parts(subject, layers, latents)
    times: dict[str, list[float]] = {name: [] for name in parts}
    for _ in range(TURNS):
        for name, part in parts.items():
            begin = clock.mark()
            part()
            end = clock.mark()
            clock.wait(end)
            times[name].append(clock.ms(begin, end))
    nbytes = kv_bytes(layers)
    chunk_ms = Spread.of([sum(stages[i].values()) for i in schedule.steady if i < last])
    first, final = first_and_last_minute(plan, schedule.first(len(schedule.cycles) - 1), stages)
    medians = {name: statistics.median(ms) for name, ms in times.items()}
    medians["rotation"] = medians["window"] - medians["gather"]
    tokens = plan.geometry.frame_tokens
    return MemoryCost(
        context_tokens=tuple(round(frames * tokens) for frames in schedule.windows), chunk_ms=chunk_ms,
        last_over_first=final / first, part_ms={name: Spread.of(ms) for name, ms in times.items()},
        share={name: ms / chunk_ms.median for name, ms in medians.items() if name != "gather"},
        nbytes=nbytes, archive_bytes=archive, archive_on_host=any(x.is_on_host for x in _archives(layers)),
        allocated_gib=allocated_gib(plan.device),
    )


def kv_bytes(layers: Sequence[LayerCache]) -> dict[str, int]:
    """Bytes of keys and values.

    `attended`: what the chunk in the making sees of the past, where it is stored; `window`: the rotated copies,
    with room for the chunk itself; `archive`: all packets that there is room for, seen or not.
    """
    store = layers[0].store
    token = store.keys[:, :1].nbytes + store.values[:, :1].nbytes
    windows = {id(layer.window): layer.window for layer in layers}.values()  # they may share one
    return {
        "attended": token * sum(layer.past_tokens for layer in layers if layer.plan is not None),
        "window": sum(x.nbytes for window in windows for x in window.slots(0, window.tokens)),
        "archive": sum(x.nbytes for archive in _archives(layers) for x in (archive.keys, archive.values, archive.sums)),
    }


def _archives(layers: Sequence[LayerCache]) -> list[Archive]:
    return [layer.archive for layer in layers if layer.archive is not None]


def _note_growth(archive_bytes: dict[int, int], chunk: int, layers: Sequence[LayerCache]) -> None:
    """Add the archive's size while `chunk` is made, if it is a new one."""
    nbytes = kv_bytes(layers)["archive"]
    if nbytes not in archive_bytes.values():
        archive_bytes[chunk] = nbytes


def memory_parts(
    subject: Subject, layers: Sequence[LayerCache], latents: torch.Tensor,
) -> Mapping[str, Callable[[], None]]:
    """What can be done again in the middle of a chunk, recorded as graphs where the pipeline is."""
    plan, packer = subject.plan, subject.pipeline.packer
    nothing = torch.ones(1, 1, 1, 0, device=plan.device)  # a rotation of no channels, whatever the window's length
    still = dict.fromkeys((0, layers[0].plan.attend.shape[1]), Turn(nothing, nothing))  # of what a window is made of

    def selection() -> None:
        for layer in layers:
            plan.policy.plan(layer.view())

    def gather() -> None:
        for layer in layers:
            alike = replace(layer.plan, same_times=True)  # so that it takes the rotations that are there
            layer.window.load(layer.store, alike, layer.archive, layer.average, still)

    def window() -> None:
        made = {}
        for layer in layers:
            layer.window.load(layer.store, layer.plan, layer.archive, layer.average, made)

    parts = {"selection": selection, "gather": gather, "window": window}  # the last leaves the window as it was
    if packer is not None:
        pixels = subject.pixels_like(latents)
        parts["packet"] = lambda: packer.write(packer.embed(latents, pixels), subject.text)
    with torch.inference_mode():
        for part in parts.values():
            part()  # compiled now
        if plan.acceleration.graphs:
            record = CudaRecorder()
            parts |= {name: record(parts[name]) for name in ("selection", "gather", "window")}
    return {name: torch.inference_mode()(part) for name, part in parts.items()}


def kv_lines(cost: MemoryCost) -> list[str]:
    """Keys and values in three lines, and how the archive grew."""
    where = ", in host memory but for the sums of its keys" if cost.archive_on_host else ""
    words = {
        "attended": "attended: sink, packets and recent frames, where they are stored",
        "window": "window: their rotated copies, and room for the chunk",
        "archive": f"archive{where}: all packets that there is room for",
    }
    lines = [f"{cost.nbytes[name] / 1e9:8.3f} GB  {text}" for name, text in words.items()]
    least, *growths = cost.archive_bytes.values()
    if growths:
        lines.append(
            f"archive: {least / 1e9:.3f} GB at first, {growths[-1] / 1e9:.3f} GB at the end, "
            f"{growths[-1] / least:.1f} times as much; growths: {len(growths)}, at chunk "
            + ", ".join(map(str, list(cost.archive_bytes)[1:]))
        )
    return lines
