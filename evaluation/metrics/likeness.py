"""CLIP score per 10 s window (does the video still show what the prompt says?) and aesthetic quality."""
from __future__ import annotations

import numpy as np

from evaluation.metrics.networks import AestheticHead, Batches, ClipImagesAndText, aesthetic, clip_b32
from evaluation.metrics.protocol import (
    NO_PROMPT,
    CannotMeasureError,
    Choices,
    Frame,
    Metric,
    TooShortError,
    Value,
    VideoInfo,
)
from evaluation.metrics.series import WINDOW_S, clips, means, of_frames

WINDOW_FRAMES = 8  # looked at in each window, each in the middle of its eighth


class ClipScore(Metric):
    """`clip_score`: 100 x cosine of picture and prompt, of each 10 s window; `whole` is the mean of the windows.

    Source: PackForcing, CLIP score per 10 s. The papers do not state which CLIP; ViT-B/32 fits their numbers best.
    """

    name = "clip_score"
    reports = ("clip_score",)
    gives = ("clip_score@window10s", "clip_score@whole")
    protocol = "100 x cosine, CLIP ViT-B/32 in transformers, 8 middle frames a 10 s window, " \
               "prompt as written, cut at 77 tokens"

    def __init__(self, network: ClipImagesAndText):
        self.network = network

    def start(self, video: VideoInfo) -> ClipScoreReader:
        if not video.prompt:
            raise CannotMeasureError(NO_PROMPT)
        return ClipScoreReader(self.network, video)


class ClipScoreReader:
    def __init__(self, network: ClipImagesAndText, video: VideoInfo):
        self.text = network.text(video.prompt)
        self.batches = Batches(network)
        self.fps = video.fps
        self.scores: list[float] = []
        self.looked_at: list[int] = []
        self.frames = 0

    def add(self, frame: Frame) -> None:
        self.frames = frame.index + 1
        if frame.index == middle_frame(len(self.looked_at), self.fps):
            self.looked_at.append(frame.index)
            self.scores += [100 * float(feature @ self.text) for feature in self.batches.add(frame.rgb)]

    def values(self) -> list[Value]:
        self.scores += [100 * float(feature @ self.text) for feature in self.batches.rest()]
        if not self.scores:
            raise TooShortError("too short: the first frame looked at is at 0.6 s")
        series = np.full(self.frames, np.nan)
        series[self.looked_at] = self.scores
        found = means(series, self.fps, WINDOW_S)
        overall = Value("clip_score", "whole", None, float(np.mean([value for _, value in found])))
        return [overall, *(Value("clip_score", "window10s", start, value) for start, value in found)]


class Aesthetic(Metric):
    """`aesthetic_quality` in 0..1 of frames, seconds, 2 s clips; `aesthetic_quality_drift`: |first - last|.

    Source: VBench (CLIP ViT-L/14 and the LAION linear head, / 10); the drift over 5 s after Self Forcing's successors.
    """

    name = "aesthetic_quality"
    reports = ("aesthetic_quality", "aesthetic_quality_drift")
    gives = tuple(f"aesthetic_quality{value}" for value in (
        "@second", "@clip2s", "@whole", "_drift@first_last_5s", "_drift@first_last_15pct"))
    protocol = "CLIP ViT-L/14 in transformers + LAION linear head / 10; drift: |first - last|"

    def __init__(self, network: AestheticHead):
        self.network = network

    def start(self, video: VideoInfo) -> AestheticReader:
        return AestheticReader(self.network, video)


class AestheticReader:
    def __init__(self, network: AestheticHead, video: VideoInfo):
        self.batches, self.fps = Batches(network), video.fps
        self.series: list[float] = []

    def add(self, frame: Frame) -> None:
        self.series += [float(rating) for rating in self.batches.add(frame.rgb)]

    def values(self) -> list[Value]:
        self.series += [float(rating) for rating in self.batches.rest()]
        spans = clips(len(self.series), self.fps)
        by_clip = float(np.mean([np.mean(self.series[start:stop]) for start, stop in spans]))
        found = of_frames("aesthetic_quality", self.series, self.fps, drift=True)
        return [*found, Value("aesthetic_quality", "clip2s", None, by_clip)]


def middle_frame(number: int, fps: float) -> int:
    """The frame in the middle of the `number`-th eighth of a window, counted over all windows."""
    return int((number + 0.5) * WINDOW_S * fps / WINDOW_FRAMES)


def clip_score(choices: Choices) -> ClipScore:
    return ClipScore(clip_b32(choices))


def aesthetic_quality(choices: Choices) -> Aesthetic:
    return Aesthetic(aesthetic(choices))
