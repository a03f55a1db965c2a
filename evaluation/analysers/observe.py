"""Everything that is read from a video's pixels, before anyone says what it should show.

T pixel frames, H height, W width, S slots (see tracks.py).
"""
from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from evaluation.analysers.behind import Behind, look_behind
from evaluation.analysers.motion import MotionWindows, name_motions
from evaluation.analysers.segment import grown, inner_edge, name_and_segment
from evaluation.analysers.shapes import describe
from evaluation.analysers.tracks import Tracks, follow

HALO_SHARE = 3 / 96        # of the height around a subject that may hold its soft edge
THUMBNAIL = 8              # cells a side of 96 pixels are averaged to compare frames


@dataclass(frozen=True)
class Observation:
    """What was seen. Colours and differences in 0..1, lengths in pixels."""

    fps: float
    height: int
    width: int
    tracks: Tracks
    behind: Behind
    motion: MotionWindows
    count: np.ndarray        # [T] shapes
    step: np.ndarray         # [T] mean absolute difference from the frame before, background only; NaN first
    change: np.ndarray       # [T] the same over the whole frame
    edge_speed: np.ndarray   # [T] pixels a second that the shapes' outlines move; NaN first
    sharpness: np.ndarray    # [T] slope of the shapes' edges / their contrast, 1 / pixels; NaN without shapes
    thumbnails: np.ndarray   # [T, P] float32, coarse pictures to compare frames far apart

    @property
    def num_frames(self) -> int:
        """Pixel frames."""
        return len(self.count)


def observe(frames: np.ndarray, fps: float = 16.0) -> Observation:
    """Look at uint8 frames [T, H, W, 3].

    Raises: ValueError for another shape or type, or fewer than two frames.
    """
    frames = np.asarray(frames)
    if frames.ndim != 4 or frames.shape[-1] != 3 or frames.dtype != np.uint8 or len(frames) < 2:
        raise ValueError(
            f"observe got {frames.dtype} {list(frames.shape)}; it needs at least two uint8 frames [T, H, W, 3]. "
            "Convert pixels in [-1, 1] first."
        )
    mask, found = name_and_segment(frames)
    height, width = frames.shape[1:3]
    owned = np.zeros(frames.shape[:3], bool)
    owned[found.frame[found.component], found.y, found.x] = True
    free = ~grown(owned | mask & _sparse(mask), max(1, round(HALO_SHARE * height)))
    shapes = describe(frames, found)
    tracks = follow(shapes, len(frames), height)
    behind = look_behind(frames, free)
    step, change = _steps(frames, free)
    return Observation(
        fps=float(fps), height=height, width=width, tracks=tracks, behind=behind,
        motion=name_motions(tracks, fps, height),
        count=np.bincount(shapes.frame, minlength=len(frames)),
        step=step, change=change, edge_speed=_edge_speed(owned, fps),
        sharpness=_sharpness(frames, owned, tracks, behind), thumbnails=_thumbnails(frames),
    )


def _sparse(mask: np.ndarray) -> np.ndarray:
    """Where specks of a subject's colour are no background: unless they cover much of the frame."""
    return (mask.mean((1, 2)) < 0.5)[:, None, None]


def _steps(frames: np.ndarray, free: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    step, change = np.full(len(frames), np.nan), np.full(len(frames), np.nan)
    for index in range(1, len(frames)):
        away = np.abs(frames[index].astype(np.int16) - frames[index - 1])
        apart = away[..., 0] + away[..., 1] + away[..., 2]
        both = free[index] & free[index - 1]
        change[index] = apart.mean() / (3 * 255)
        step[index] = apart[both].mean() / (3 * 255) if both.any() else change[index]
    return step, change


def _edge_speed(owned: np.ndarray, fps: float) -> np.ndarray:
    """Area that changes hands between two frames / the outline's length: what any motion, turning too, moves."""
    speed = np.full(len(owned), np.nan)
    outline = inner_edge(owned).sum((1, 2))
    moved = (owned[1:] ^ owned[:-1]).sum((1, 2))
    speed[1:] = moved / np.maximum((outline[1:] + outline[:-1]) / 2, 1) * fps
    return speed


def _sharpness(frames: np.ndarray, owned: np.ndarray, tracks: Tracks, behind: Behind) -> np.ndarray:
    """Mean slope of the colour along the outlines / the contrast between shapes and background."""
    sharpness = np.full(len(frames), np.nan)
    outline = inner_edge(owned)
    for index in np.flatnonzero(tracks.present.any(1)):
        here = np.argwhere(outline[index, 1:-1, 1:-1]) + 1
        y, x = here.T
        values = frames[index].astype(np.float32) / 255
        slope_x = (values[y, x + 1] - values[y, x - 1]) / 2
        slope_y = (values[y + 1, x] - values[y - 1, x]) / 2
        slope = np.sqrt((slope_x ** 2 + slope_y ** 2).sum(-1)).mean() if len(here) else np.nan
        contrast = np.linalg.norm(np.nanmean(tracks.rgb[index], 0) - behind.rgb[index])
        sharpness[index] = slope / max(contrast, 1e-3)
    return sharpness


def _thumbnails(frames: np.ndarray) -> np.ndarray:
    count, height, width, _ = frames.shape
    cell = max(1, round(THUMBNAIL * height / 96))
    rows, columns = height // cell, width // cell
    cut = frames[:, :rows * cell, :columns * cell].reshape(count, rows, cell, columns, cell, 3)
    return cut.sum(2, dtype=np.uint32).sum(3).reshape(count, -1).astype(np.float32) / (255 * cell ** 2)
