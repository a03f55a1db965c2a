"""Going back: pictures that come again, and leaps to an earlier picture.

A loop repeats what was seen; a roll-back is a cut to something seen before. Motion that is periodic by itself
(an orbit, a bounce) comes back smoothly, and so is no roll-back, but may well be a repetition: compare methods.
"""
from __future__ import annotations

from collections import deque
from statistics import median

import numpy as np

from evaluation.analysers.stability import LEAP, RETURN, SMALLEST_LEAP
from evaluation.metrics.protocol import Frame, Metric, TooShortError, Value, VideoInfo
from evaluation.metrics.series import means

EARLIER_S = 2.0        # what lies further back than this is earlier
QUERIES_PER_S = 4.0
MOVED_S = 0.25         # how far the picture moves in this time is the yardstick of a likeness
ALIKE = 0.4            # nearer to an earlier picture than this share of the yardstick: the same picture again
LEAST_MOVED = 0.5      # levels of 255; below, everything looks alike and nothing can be said
MEMORY = 4096          # pictures kept; when full, every other one goes, so memory does not grow with the video
USUAL_S = 2.0          # the steps of this time say what a usual one is


class Returns(Metric):
    """`repetition`: share of the time that shows an earlier picture again. `rollbacks`: leaps back, a minute."""

    name = "returns"
    reports = ("repetition", "rollbacks")
    shares = ("repetition",)
    gives = ("repetition@second", "repetition@whole", "rollbacks@whole")
    protocol = "cell means; again: nearer to one 2 s or more before than 0.4 of a quarter second's motion"

    def start(self, video: VideoInfo) -> ReturnsReader:
        return ReturnsReader(video)


class Memory:
    """Earlier pictures, thinned out evenly when there are too many."""

    def __init__(self, size: int = MEMORY):
        self.size = size
        self.pictures: np.ndarray | None = None  # [size, P] float32
        self.count = 0
        self.every = 1
        self.seen = 0

    def add(self, picture: np.ndarray) -> None:
        """Keep one picture [P]."""
        self.seen += 1
        if (self.seen - 1) % self.every:
            return
        if self.pictures is None:
            self.pictures = np.empty((self.size, len(picture)), np.float32)
        if self.count == self.size:
            self.count = (self.size + 1) // 2
            self.pictures[:self.count] = self.pictures[::2].copy()
            self.every *= 2
            if (self.seen - 1) % self.every:
                return
        self.pictures[self.count] = picture
        self.count += 1

    def nearest(self, picture: np.ndarray) -> float:
        """Mean absolute difference from the most similar one; infinite while empty."""
        if not self.count:
            return float("inf")
        return float(np.abs(self.pictures[:self.count] - picture).mean(axis=1).min())


class ReturnsReader:
    def __init__(self, video: VideoInfo):
        self.fps = video.fps
        self.query_every = max(1, round(video.fps / QUERIES_PER_S))
        self.moved_frames = max(1, round(MOVED_S * video.fps))
        self.recent: deque[np.ndarray] = deque(maxlen=max(2, round(EARLIER_S * video.fps)))
        self.steps: deque[float] = deque(maxlen=max(2, round(USUAL_S * video.fps)))
        self.memory = Memory()
        self.again: list[float] = []
        self.rollbacks = 0

    def add(self, frame: Frame) -> None:
        now = frame.cells.reshape(-1)
        again = np.nan
        if self.recent:
            step = float(np.abs(now - self.recent[-1]).mean())
            usual = median(self.steps) if self.steps else np.inf
            if step > max(LEAP * usual, 255 * SMALLEST_LEAP) and self.memory.nearest(now) < RETURN * step:
                self.rollbacks += 1
            self.steps.append(step)
        if frame.index % self.query_every == 0 and len(self.recent) > self.moved_frames:
            moved = float(np.abs(now - self.recent[-self.moved_frames]).mean())
            again = float(moved >= LEAST_MOVED and self.memory.nearest(now) < ALIKE * moved)
        self.again.append(again)
        if len(self.recent) == self.recent.maxlen:
            self.memory.add(self.recent[0])
        self.recent.append(now)

    def values(self) -> list[Value]:
        seconds = len(self.again) / self.fps
        if seconds <= EARLIER_S:
            raise TooShortError(f"too short to show anything again: more than {EARLIER_S:g} s are needed")
        found = [
            Value("repetition", "whole", None, float(np.nanmean(self.again))),
            Value("rollbacks", "whole", None, 60 * self.rollbacks / seconds),
        ]
        return found + [Value("repetition", "second", s, value) for s, value in means(self.again, self.fps, 1.0)]
