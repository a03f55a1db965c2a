"""How a shape moves, read from its track alone: place, size and turn over some five seconds."""
from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from evaluation.analysers.shapes import SYMMETRY
from evaluation.analysers.tracks import Tracks
from training.world.vocabulary import KINDS, MOTIONS

WINDOW_SECONDS = 5.0
STRIDE_SECONDS = 1.0
SHORTEST_SECONDS = 2.0
MOST_MISSING = 0.3          # of a window's frames, filled by interpolation
STILL, UNKNOWN = len(MOTIONS), len(MOTIONS) + 1   # labels beyond MOTIONS

PULSE = 0.06                # deviation of the radius / mean; pulsing shapes have 0.12 and more
PULSE_CROSSINGS = 0.7       # of the mean radius, a second; pulsing shapes make 1.1 and more, one that resized once none
SPIN_TURNS = 0.08           # a second; spinning shapes make 0.12 and more
SPIN_STRAY_TURNS = 0.06     # deviation from an even turn
REST_SPEED = 0.045          # frame heights a second; drifting shapes move at 0.09 and more
SLOW_SPEED = 0.19           # drifting shapes move at 0.15 at most, all others at 0.24 and more
SWEEP_SPEED, SWEEP_WEIGHT = 0.20, 4.0   # sideways: bouncing shapes are slower, zigzagging ones faster


@dataclass(frozen=True)
class MotionWindows:
    """The motion of every slot in every window."""

    start: np.ndarray    # [W] first frame
    frames: int          # frames in a window
    label: np.ndarray    # [W, S] index into MOTIONS, or STILL, or UNKNOWN

    def nearest(self, num_frames: int) -> np.ndarray:
        """The window whose middle is nearest to each frame, of two the earlier one [T]."""
        middle = self.start + self.frames / 2
        return np.searchsorted((middle[1:] + middle[:-1]) / 2, np.arange(num_frames))


def name_motions(tracks: Tracks, fps: float, height: int) -> MotionWindows:
    """Label each slot over sliding windows; a video shorter than one window is a single one."""
    total, slots = tracks.x.shape
    frames = min(total, round(WINDOW_SECONDS * fps) + 1)
    starts = np.arange(0, total - frames + 1, max(1, round(STRIDE_SECONDS * fps)))
    label = np.full((len(starts), slots), UNKNOWN)
    for row, start in enumerate(starts):
        for slot in range(slots):
            label[row, slot] = _name(tracks, slot, slice(start, start + frames), fps, height)
    return MotionWindows(starts, frames, label)


def _name(tracks: Tracks, slot: int, window: slice, fps: float, height: int) -> int:
    present = tracks.present[window, slot]
    if present.mean() < 1 - MOST_MISSING or len(present) < SHORTEST_SECONDS * fps:
        return UNKNOWN
    x, y, radius = (
        _filled(values[window, slot] / height, present) for values in (tracks.x, tracks.y, tracks.radius)
    )
    if radius.std() / radius.mean() > PULSE and _crossings(radius) > PULSE_CROSSINGS * len(radius) / fps:
        return MOTIONS.index("pulse")
    speed = _speed(x, y, fps)
    rate, stray = _turning(tracks.kind[window, slot], tracks.turn[window, slot], fps)
    if abs(rate) > SPIN_TURNS and stray < SPIN_STRAY_TURNS and speed < SLOW_SPEED:
        return MOTIONS.index("spin")
    if speed < REST_SPEED:
        return STILL
    if speed < SLOW_SPEED:
        return MOTIONS.index("drift")
    return _name_path(x, y, fps)


def _filled(values: np.ndarray, present: np.ndarray) -> np.ndarray:
    return np.interp(np.arange(len(values)), np.flatnonzero(present), values[present])


def _crossings(values: np.ndarray) -> int:
    """How often `values` crosses its mean, wavering on the spot not counted."""
    away = values - values.mean()
    sides = np.sign(away[np.abs(away) > 0.3 * away.std()])
    return int((np.diff(sides) != 0).sum())


def _speed(x: np.ndarray, y: np.ndarray, fps: float) -> float:
    """Mean speed after averaging over a third of a second, so that pixel noise is no movement."""
    width = max(1, round(fps / 3))
    kernel = np.ones(width) / width
    x, y = np.convolve(x, kernel, "valid"), np.convolve(y, kernel, "valid")
    return float(np.hypot(np.diff(x), np.diff(y)).mean() * fps)


def _turning(kinds: np.ndarray, turns: np.ndarray, fps: float) -> tuple[float, float]:
    """Turns a second of a polygon, and the deviation from turning evenly, in turns; 0, 0 for round shapes."""
    kind = np.bincount(kinds[kinds >= 0], minlength=len(KINDS)).argmax()
    order = SYMMETRY.get(KINDS[kind])
    mine = kinds == kind
    if order is None or mine.mean() < 1 - MOST_MISSING:
        return 0.0, 0.0
    time = np.flatnonzero(mine) / fps
    turn = np.unwrap(turns[mine], period=1 / order)
    slope, offset = np.polyfit(time, turn, 1)
    return float(slope), float(np.std(turn - slope * time - offset))


def _name_path(x: np.ndarray, y: np.ndarray, fps: float) -> int:
    """Orbit, bounce or zigzag: whose vertical course fits best, seen together with the sideways one."""
    seconds = len(y) / fps
    fits = {name: _misfit(y, _family(name, len(y), fps)) for name in ("orbit", "bounce", "zigzag")}
    sideways = np.abs(np.diff(np.convolve(x, np.ones(5) / 5, "valid"))).mean() * fps
    circle = _misfit(x, _family("orbit", len(x), fps))
    scores = {
        "orbit": fits["orbit"] + circle,
        "bounce": 2 * fits["bounce"] + SWEEP_WEIGHT * max(0.0, sideways - SWEEP_SPEED) / max(seconds, 1.0),
        "zigzag": 2 * fits["zigzag"] + SWEEP_WEIGHT * max(0.0, SWEEP_SPEED - sideways) / max(seconds, 1.0),
    }
    return MOTIONS.index(min(scores, key=scores.get))


def _misfit(values: np.ndarray, family: np.ndarray) -> float:
    """Share of the variance that the best member of `family` [M, K, L] of orthonormal bases leaves."""
    centred = values - values.mean()
    total = (centred ** 2).sum()
    explained = ((family @ centred) ** 2).sum(1).max()
    return float(1 - explained / max(total, 1e-12))


@functools.cache
def _family(name: str, length: int, fps: float) -> np.ndarray:
    """Orthonormal bases [M, K, length] of all courses that a motion's vertical coordinate may take."""
    time = np.arange(length) / fps
    slow = np.stack([np.ones(length), np.linspace(-1, 1, length)])
    bases = []
    if name == "orbit":
        for period in np.arange(2.3, 5.0, 0.1):
            bases.append([np.cos(2 * np.pi * time / period), np.sin(2 * np.pi * time / period)])
    else:
        longest, shortest = (1.65, 0.85) if name == "bounce" else (1.35, 0.65)
        for period in np.geomspace(shortest, longest, 36):
            for phase in np.arange(0, 1, 1 / 24):
                u = (time / period + phase) % 1
                bases.append([4 * u * (1 - u) if name == "bounce" else 1 - 4 * np.abs(u - 0.5)])
    return np.stack([_orthonormal(np.array(basis), slow) for basis in bases])


def _orthonormal(basis: np.ndarray, slow: np.ndarray) -> np.ndarray:
    """Rows spanning `basis` and the slow trend, the constant left out. [K + 1, length]."""
    q, _ = np.linalg.qr(np.concatenate([slow, basis]).T)
    return q.T[1:]
