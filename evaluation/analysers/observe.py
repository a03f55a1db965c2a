"""Everything that is read from a video's pixels, before anyone says what it should show.

T pixel frames, H height, W width, S slots (see tracks.py).
"""
from __future__ import annotations

from dataclasses import dataclass, fields, replace

import numpy as np

from evaluation.analysers.behind import Behind, look_behind
from evaluation.analysers.motion import MotionWindows, name_motions
from evaluation.analysers.segment import blocks, grown, inner_edge, name_and_segment
from evaluation.analysers.shapes import Shapes, describe
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
    height, width = frames.shape[1:3]
    shapes, owned, free = _shapes(frames)
    outline = inner_edge(owned)
    tracks = follow(shapes, len(frames), height)
    behind = look_behind(frames, free)
    return Observation(
        fps=float(fps), height=height, width=width, tracks=tracks, behind=behind,
        motion=name_motions(tracks, fps, height),
        count=np.bincount(shapes.frame, minlength=len(frames)),
        step=_steps(frames, free), edge_speed=_edge_speed(owned, outline, fps),
        sharpness=_sharpness(frames, outline, tracks, behind), thumbnails=_thumbnails(frames),
    )


def _shapes(frames: np.ndarray) -> tuple[Shapes, np.ndarray, np.ndarray]:
    """All shapes, which pixels are theirs, and which are background [T, H, W]: block by block."""
    parts, owned, free = [], np.zeros(frames.shape[:3], bool), np.empty(frames.shape[:3], bool)
    for block in blocks(len(frames)):
        mask, found = name_and_segment(frames[block])
        owned[block].reshape(-1)[found.at] = True
        free[block] = ~grown(owned[block] | mask & _sparse(mask), max(1, round(HALO_SHARE * frames.shape[1])))
        part = describe(frames[block], found)
        parts.append(replace(part, frame=part.frame + block.start))
    joined = [np.concatenate([getattr(part, field.name) for part in parts]) for field in fields(Shapes)]
    return Shapes(*joined), owned, free


def _sparse(mask: np.ndarray) -> np.ndarray:
    """Where specks of a subject's colour are no background: unless they cover much of the frame."""
    return (mask.mean((1, 2)) < 0.5)[:, None, None]


def _steps(frames: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Mean absolute difference from the frame before, of the background; of the whole frame where there is none. [T]"""
    step = np.full(len(frames), np.nan)
    for block in blocks(len(frames) - 1):
        before, now = frames[:-1][block], frames[1:][block]
        away = (np.maximum(before, now) - np.minimum(before, now)).reshape(len(now), -1, 3).astype(np.float32)
        both = (free[:-1][block] & free[1:][block]).reshape(len(now), 1, -1)
        seen = (both.astype(np.float32) @ away).mean((1, 2)) / 255
        count = both.sum((1, 2))
        step[1:][block] = np.where(count > 0, seen / np.maximum(count, 1), away.mean((1, 2)) / 255)
    return step


def _edge_speed(owned: np.ndarray, outline: np.ndarray, fps: float) -> np.ndarray:
    """Area that changes hands between two frames / the outline's length: what any motion, turning too, moves."""
    speed = np.full(len(owned), np.nan)
    length = outline.sum((1, 2))
    moved = (owned[1:] ^ owned[:-1]).sum((1, 2))
    speed[1:] = moved / np.maximum((length[1:] + length[:-1]) / 2, 1) * fps
    return speed


def _sharpness(frames: np.ndarray, outline: np.ndarray, tracks: Tracks, behind: Behind) -> np.ndarray:
    """Mean slope of the colour along the outlines / the contrast between shapes and background."""
    count, height, width = outline.shape
    inner = np.zeros_like(outline)
    inner[:, 1:-1, 1:-1] = outline[:, 1:-1, 1:-1]
    here, pixels = np.flatnonzero(inner), frames.reshape(-1, 3)
    squares = sum(
        ((pixels.take(here + away, 0).astype(np.int32) - pixels.take(here - away, 0)) ** 2).sum(1)
        for away in (1, width)
    )
    frame = here // (height * width)
    slope = np.bincount(frame, np.sqrt(squares), count) / (2 * 255)
    length, shapes = np.bincount(frame, minlength=count), tracks.present.sum(1)
    sharpness, known = np.full(count, np.nan), (shapes > 0) & (length > 0)
    rgb = np.nansum(tracks.rgb, 1)[known] / shapes[known, None]
    contrast = np.linalg.norm(rgb - behind.rgb[known], axis=1)
    sharpness[known] = slope[known] / length[known] / np.maximum(contrast, 1e-3)
    return sharpness


def _thumbnails(frames: np.ndarray) -> np.ndarray:
    count, height, width, _ = frames.shape
    cell = max(1, round(THUMBNAIL * height / 96))
    rows, columns = height // cell, width // cell
    sums = []
    for block in blocks(count):
        cut = frames[block, :rows * cell, :columns * cell].astype(np.float32)
        lines = np.einsum("tyrx->tyx", cut.reshape(len(cut), rows, cell, -1))
        sums.append(np.einsum("txrc->txc", lines.reshape(len(cut), -1, cell, 3)).reshape(len(cut), -1))
    return np.concatenate(sums) / (255 * cell ** 2)
