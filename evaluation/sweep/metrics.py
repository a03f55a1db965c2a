"""From one video file and its prompt to rows of the tidy table; each group of metrics decodes the file once.

A row is one number: (metric, granularity, start_s, value) with the protocol that it was measured by.
Granularity: `whole` one number a video, `second` one a second from start_s on, `first5s` and `last5s` means over
the first and the last five seconds.
"""
from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from evaluation.analysers import ChunkLayout, analyse
from evaluation.study.scores import pace_name, paces, row_of
from training.world import Clip, parse_caption
from utils.video import read_video


@dataclass(frozen=True)
class Shown:
    """A finished video and what it was to show."""

    path: Path
    prompt: str
    fps: float
    chunks: ChunkLayout


@dataclass(frozen=True)
class Value:
    """One number. NaN is written as an empty value: nothing can be said."""

    metric: str
    granularity: str
    start_s: float
    value: float
    protocol: str


Measure = Callable[[Shown], list[Value]]


def world(shown: Shown) -> list[Value]:
    """What the analysers see in a video of the embedded model, held against what its caption says.

    Raises: ValueError for a prompt that is no caption of that world, or a video that cannot be read.
    """
    protocol = "evaluation.analysers, every frame of the decoded file"
    said = parse_caption(shown.prompt)
    analysis = analyse(read_video(shown.path), said, shown.fps, shown.chunks)
    row = row_of(Clip(0, "", shown.prompt, said, said, None), analysis)
    seconds = row["pixel_frames"] / row["fps"]
    values = []

    def note(metric: str, granularity: str, start_s: float, value: float | bool | None) -> None:
        values.append(Value(metric, granularity, start_s, math.nan if value is None else float(value), protocol))

    for name, value in row["video"].items():
        if isinstance(value, dict):  # share of frames, and whether a property holds
            for inner, number in value.items():
                note(f"{name}_{inner}", "whole", 0.0, number)
        else:
            note(name, "whole", 0.0, value)
    first, last = paces(row)
    note("pace_ratio", "whole", 0.0, last / first if first else None)
    for window, start in (("first", 0.0), ("last", max(0.0, seconds - 5))):
        for name, value in row["windows"][window].items():
            note(name, f"{window}5s", start, value)
    for name, curve in row["curves"].items():
        for second, value in enumerate(curve):
            note(name, "second", float(second), value)
    for second, value in enumerate(row["curves"][pace_name(row)]):
        note("pace", "second", float(second), value)
    return values


GROUPS: dict[str, Measure] = {"world": world}
