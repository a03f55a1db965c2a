"""What happens from one frame to the next: flicker, steps at chunk borders, and standing still."""
from __future__ import annotations

import numpy as np

from evaluation.analysers.stability import border_steps
from evaluation.metrics.protocol import NO_CHUNKS, CannotMeasureError, Frame, Metric, TooShortError, Value, VideoInfo
from evaluation.metrics.series import of_frames

STILL_LEVELS = 1.0   # no cell changes by more, of 255: a re-encoded still picture stays below
STILL_S = 0.5        # shorter rests are part of a motion


class Flicker(Metric):
    """`temporal_flickering`: 1 - mean |difference of consecutive frames| / 255, as VBench's dimension of this name."""

    name = "flicker"
    reports = ("temporal_flickering",)
    gives = ("temporal_flickering@second", "temporal_flickering@whole")
    protocol = "1 - mean |difference of luma of consecutive frames| / 255, all videos (VBench: static ones, RGB)"

    def start(self, video: VideoInfo) -> FlickerReader:
        return FlickerReader(video)


class FlickerReader:
    def __init__(self, video: VideoInfo):
        self.fps = video.fps
        self.before: np.ndarray | None = None
        self.series: list[float] = []

    def add(self, frame: Frame) -> None:
        step = np.nan if self.before is None else 1 - float(np.abs(frame.luma - self.before).mean()) / 255
        self.series.append(step)
        self.before = frame.luma

    def values(self) -> list[Value]:
        return of_frames("temporal_flickering", self.series, self.fps, drift=False)


class Borders(Metric):
    """`border_flicker`: how much larger the step at a chunk's border is than within chunks, in levels of 255."""

    name = "borders"
    reports = ("border_flicker",)
    gives = ("border_flicker@whole",)
    protocol = "mean step of cell means at chunk borders - mean step within chunks, levels of 255"

    def start(self, video: VideoInfo) -> BordersReader:
        if video.chunks is None:
            raise CannotMeasureError(NO_CHUNKS)
        return BordersReader(video)


class BordersReader:
    def __init__(self, video: VideoInfo):
        self.chunks = video.chunks
        self.before: np.ndarray | None = None
        self.steps: list[float] = []

    def add(self, frame: Frame) -> None:
        now = frame.cells
        self.steps.append(np.nan if self.before is None else float(np.abs(now - self.before).mean()))
        self.before = now

    def values(self) -> list[Value]:
        within, at_border = border_steps(np.array(self.steps), self.chunks)
        if np.isnan(within) or np.isnan(at_border):
            raise TooShortError("too short: a chunk border and frames within chunks are needed")
        return [Value("border_flicker", "whole", None, at_border - within)]


class Frozen(Metric):
    """`frozen`: share of the time in which the picture stands still for half a second or longer."""

    name = "frozen"
    reports = ("frozen",)
    shares = ("frozen",)
    gives = ("frozen@second", "frozen@whole")
    protocol = "share of frames in rests of 0.5 s or longer, in which no cell changes by more than 1 level of 255"

    def start(self, video: VideoInfo) -> FrozenReader:
        return FrozenReader(video)


class FrozenReader:
    """A rest is held against its first frame, so that slow motion does not pass for one."""

    def __init__(self, video: VideoInfo):
        self.fps = video.fps
        self.anchor: np.ndarray | None = None
        self.rest_frames = 0
        self.still: list[float] = []

    def add(self, frame: Frame) -> None:
        now = frame.cells
        if self.anchor is not None and np.abs(now - self.anchor).max() <= STILL_LEVELS:
            self.rest_frames += 1
        else:
            self.anchor, self.rest_frames = now, 0
        self.still.append(0.0)
        if self.rest_frames >= STILL_S * self.fps:
            self.still[-1 - self.rest_frames:] = [1.0] * (self.rest_frames + 1)

    def values(self) -> list[Value]:
        if len(self.still) < 2:
            raise TooShortError("a single frame neither moves nor stands still")
        return of_frames("frozen", self.still, self.fps, drift=False)
