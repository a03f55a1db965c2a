"""What breaks the flow of a video: leaps, returns to earlier pictures, and steps at chunk borders."""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.analysers.tracks import PATIENCE_FRAMES, Tracks

JUMP_HEIGHTS = 0.14       # of the frame's height from one frame to the next; the fastest bounce makes 0.12
LEAP = 3.0                # a step so many times the usual one is a cut
SMALLEST_LEAP = 0.004     # mean absolute difference; below, noise makes the steps
RETURN = 0.5              # an earlier frame nearer than this share of the step is where the picture leapt to
RETURN_SECONDS = 1.0      # how much earlier at least


@dataclass(frozen=True)
class ChunkLayout:
    """Pixel frames a chunk; the first chunk is shorter, as its first latent frame is a single pixel frame."""

    first_frames: int = 9
    chunk_frames: int = 12

    def borders(self, num_frames: int) -> np.ndarray:
        """The first pixel frame of every chunk but the first."""
        return np.arange(self.first_frames, num_frames, self.chunk_frames)


def jumps(tracks: Tracks, height: int) -> np.ndarray:
    """[T] how many shapes are further from where they were than any motion of this world takes them."""
    total = np.zeros(len(tracks.x))
    for slot in range(tracks.x.shape[1]):
        frames = np.flatnonzero(tracks.present[:, slot])
        gap = np.diff(frames)
        away = np.hypot(np.diff(tracks.x[frames, slot]), np.diff(tracks.y[frames, slot]))
        leapt = (gap <= PATIENCE_FRAMES + 1) & (away > JUMP_HEIGHTS * height * gap)
        np.add.at(total, frames[1:][leapt], 1)
    return total


def rollbacks(thumbnails: np.ndarray, fps: float) -> np.ndarray:
    """[T] 1 where a frame is cut off from the one before and resembles one of a second or more earlier.

    Shapes: thumbnails [T, P] in 0..1. Smooth returns, as every periodic motion makes, are none.
    The roll-backs of evaluation.metrics.returns are others: a stream knows no later step, so the usual one is that of
    the last two seconds, and earlier is two seconds back, as for its repetitions.
    """
    total = np.zeros(len(thumbnails))
    step = np.abs(np.diff(thumbnails, axis=0)).mean(1)
    usual = np.median(step)
    for index in np.flatnonzero(step > max(LEAP * usual, SMALLEST_LEAP)) + 1:
        past = thumbnails[:max(0, index - round(RETURN_SECONDS * fps))]
        if len(past) and np.abs(past - thumbnails[index]).mean(1).min() < RETURN * step[index - 1]:
            total[index] = 1
    return total


def border_steps(step: np.ndarray, chunks: ChunkLayout) -> tuple[float, float]:
    """Mean step within chunks, and at their borders; (NaN, NaN) where there is no border. Shapes: step [T]."""
    at_border = np.zeros(len(step), bool)
    at_border[chunks.borders(len(step))] = True
    known = ~np.isnan(step)
    if not (at_border & known).any() or not (~at_border & known).any():
        return float("nan"), float("nan")
    return float(step[known & ~at_border].mean()), float(step[known & at_border].mean())


def moving_sum(values: np.ndarray, frames: int) -> np.ndarray:
    """Sums over the `frames` frames around each one, the window shifted inwards at both ends. [T, ...]."""
    total = len(values)
    frames = min(frames, total)
    sums = np.concatenate([np.zeros_like(values[:1]), np.cumsum(values, 0)])
    start = np.clip(np.arange(total) - frames // 2, 0, total - frames)
    return sums[start + frames] - sums[start]
