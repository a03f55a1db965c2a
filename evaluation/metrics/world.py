"""What the analysers see in a video of the embedded model, held against what its caption says.

Unlike other metrics this one keeps the frames: they are small, and shapes are followed through the whole video.
"""
from __future__ import annotations

import math
from dataclasses import fields

import numpy as np

from evaluation.analysers import PROPERTIES, PerFrame, PerVideo, analyse
from evaluation.metrics.protocol import NO_CHUNKS, CannotMeasureError, Frame, Metric, TooShortError, Value, VideoInfo
from evaluation.study.scores import pace_name, row_of, speed_ratio
from training.world import CaptionError, Clip, Truth, parse_caption

MOST_PIXELS = 96 * 160 * 16 * 3600  # an hour of the embedded model's videos; larger ones are not of its world
SHARES = ("rate", "holds")          # of each property: share of frames in which it is right, and whether that is enough


class WorldMetric(Metric):
    """Numbers of evaluation.analysers, called world_*: per second every per-frame value, per video what PerVideo holds.

    `rate_<property>` and `holds_<property>` are shares; `pace` is the speed at which the caption's motion shows, and
    `pace_ratio` that of the last five seconds over that of the first. What a caption leaves unsaid has no row.
    """

    name = "world"
    reports = ("world_background_drift", "world_survival", "world_jumps")
    gives = tuple(f"world_{value}" for value in (
        *(f"{name}@second" for name in (*(field.name for field in fields(PerFrame)), "pace")),
        *(f"{field.name}@whole" for field in fields(PerVideo) if field.name not in SHARES), "pace_ratio@whole",
        *(f"{share}_{name}@whole" for share in SHARES for name in PROPERTIES),
    ))
    shares = ("world_survival", *(f"world_{part}{name}" for part in ("", "rate_", "holds_") for name in PROPERTIES))
    protocol = "evaluation.analysers on every frame of the decoded file, against the caption"

    def start(self, video: VideoInfo) -> WorldReader:
        if video.chunks is None:
            raise CannotMeasureError(NO_CHUNKS)
        try:
            return WorldReader(video, parse_caption(video.prompt or ""))
        except CaptionError as error:
            raise CannotMeasureError(f"the prompt is no caption of the embedded model's world: {error}") from error


class WorldReader:
    def __init__(self, video: VideoInfo, said: Truth):
        self.video, self.said = video, said
        self.frames: list[np.ndarray] = []

    def add(self, frame: Frame) -> None:
        if (frame.index + 1) * self.video.height * self.video.width > MOST_PIXELS:
            raise CannotMeasureError(f"{frame.index} frames of {self.video.height}x{self.video.width} are too many")
        self.frames.append(frame.rgb)

    def values(self) -> list[Value]:
        if len(self.frames) < 2:
            raise TooShortError("a single frame shows no motion: two frames or more are needed")
        video, said = self.video, self.said
        analysis = analyse(np.stack(self.frames), said, video.fps, video.chunks)
        row = row_of(Clip(0, "", video.prompt, said, said, None), analysis)
        whole = {field.name: row["video"][field.name] for field in fields(PerVideo) if field.name not in SHARES}
        for share in SHARES:
            whole |= {f"{share}_{name}": value for name, value in row["video"][share].items()}
        whole["pace_ratio"] = speed_ratio([row])
        curves = {field.name: row["curves"][field.name] for field in fields(PerFrame)}
        curves["pace"] = curves[pace_name(row)]
        return [
            Value(f"world_{name}", "whole", None, float(value)) for name, value in whole.items() if is_known(value)
        ] + [
            Value(f"world_{name}", "second", float(second), float(value))
            for name, curve in curves.items() for second, value in enumerate(curve) if is_known(value)
        ]


def is_known(value: float | bool | None) -> bool:
    return value is not None and math.isfinite(value)
