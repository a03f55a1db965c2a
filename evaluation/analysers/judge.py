"""Does the video show what it should: an observation held against a truth, per frame and per video.

T pixel frames. A property that the truth leaves unsaid is None throughout, but for
colours: those that have no name should stay what they were in the first seconds.
"""
from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, fields

import numpy as np

from evaluation.analysers.behind import colour_distance
from evaluation.analysers.motion import UNKNOWN
from evaluation.analysers.observe import Observation, observe
from evaluation.analysers.palette import BEHIND, BEHIND_KEPT, SUBJECT_KEPT, SUBJECTS
from evaluation.analysers.stability import ChunkLayout, border_steps, jumps, moving_sum, rollbacks
from training.world.truth import Truth
from training.world.vocabulary import KINDS, MOTIONS, PATTERNS

HOLDS = 0.8               # of the frames, for a property to count for a video
REFERENCE_SECONDS = 5.0   # what a video looked like at first; everything later is compared with it
PROPERTIES = ("colour", "shape", "pair", "count", "background", "pattern", "motion")


@dataclass(frozen=True)
class PerFrame:
    """One value a pixel frame, float64 [T]; NaN where nothing can be said. Rights are 0 or 1."""

    colour: np.ndarray             # every named colour is there; if none is named, the subjects keep their own
    shape: np.ndarray              # every named kind is there
    pair: np.ndarray               # every named kind is there in its colour
    count: np.ndarray              # as many shapes as named
    background: np.ndarray         # the background's colour is the named one; if none is named, it keeps its own
    pattern: np.ndarray            # and so its pattern
    motion: np.ndarray             # the shapes move as named, in the five seconds around
    survival: np.ndarray           # share of the named shapes for which there is any shape
    duplicates: np.ndarray         # shapes beyond the named number
    jumps: np.ndarray              # shapes that leapt since the frame before
    rollbacks: np.ndarray          # 1 where the picture leaps back to an earlier one
    speed: np.ndarray              # pixels a second, of the shapes' centres
    edge_speed: np.ndarray         # pixels a second, of their outlines: what spinning and pulsing move, too
    colour_error: np.ndarray       # mean absolute RGB difference of the subjects from their first five seconds
    background_drift: np.ndarray   # the same of the background's colours, over five seconds around
    sharpness: np.ndarray          # 1 / pixels
    step: np.ndarray               # mean absolute difference of the background from the frame before


@dataclass(frozen=True)
class PerVideo:
    """One number a video: means over its frames, and what is only defined over all of them."""

    rate: dict[str, float | None]     # share of the frames in which each property holds
    holds: dict[str, bool | None]     # whether that is at least HOLDS
    survival: float
    duplicates: float                 # mean surplus shapes a frame
    jumps: int
    rollbacks: int
    speed: float                      # pixels a second
    edge_speed: float
    colour_error: float               # in the last five seconds
    background_drift: float           # the last five seconds against the first
    sharpness: float
    sharpness_ratio: float            # the last five seconds / the first
    flicker: float                    # mean step at chunk borders minus mean step within chunks, 0..1
    flicker_ratio: float              # one / the other


@dataclass(frozen=True)
class Analysis:
    """What one video shows of what it should."""

    fps: float
    num_frames: int
    frames: PerFrame
    video: PerVideo

    def between(self, start_s: float, end_s: float) -> dict[str, float]:
        """The mean of every per-frame value over a window in seconds; NaN where nothing can be said.

        Raises: ValueError for a window without frames.
        """
        window = slice(max(0, round(start_s * self.fps)), round(end_s * self.fps))
        if window.start >= min(window.stop, self.num_frames):
            raise ValueError(
                f"no frame between {start_s} and {end_s} s in a video of {self.num_frames / self.fps:.2f} s. "
                "Ask within it."
            )
        return {name: _mean(values[window]) for name, values in _items(self.frames)}


def analyse(frames: np.ndarray, truth: Truth, fps: float = 16.0, chunks: ChunkLayout = ChunkLayout()) -> Analysis:
    """Read uint8 `frames` [T, H, W, 3] and hold them against `truth`. Raises ValueError as `observe` does."""
    return judge(observe(frames, fps), truth, chunks)


def judge(seen: Observation, truth: Truth, chunks: ChunkLayout = ChunkLayout()) -> Analysis:
    """Hold what was seen against what should be: one observation may be judged by many truths."""
    frames = _per_frame(seen, truth)
    return Analysis(seen.fps, seen.num_frames, frames, _per_video(seen, frames, chunks))


def curves(analysis: Analysis) -> dict[str, np.ndarray]:
    """Every per-frame value averaged over each whole second: name -> [seconds]; NaN where nothing can be said."""
    seconds = max(1, int(analysis.num_frames / analysis.fps))
    windows = [analysis.between(second, second + 1) for second in range(seconds)]
    return {name: np.array([window[name] for window in windows]) for name, _ in _items(analysis.frames)}


def chance(said: list[Truth], true: list[Truth]) -> dict[str, float]:
    """The share of mismatched (caption, video) pairs that are right all the same, per property.

    Every caption meets every other video, so this is the expectation of a shuffle.
    """
    hits: dict[str, list[bool]] = {name: [] for name in PROPERTIES}
    for i, caption in enumerate(said):
        for j, scene in enumerate(true):
            if i != j:
                for name, right in _agrees(caption, scene).items():
                    if right is not None:
                        hits[name].append(right)
    return {name: float(np.mean(values)) if values else float("nan") for name, values in hits.items()}


def _agrees(caption: Truth, scene: Truth) -> dict[str, bool | None]:
    def same(name: str) -> bool | None:
        wanted = getattr(caption, name)
        return None if wanted is None else wanted == getattr(scene, name)

    return {
        "colour": caption.colours <= scene.colours if caption.colours else None, "shape": caption.kinds <= scene.kinds,
        "pair": caption.pairs <= scene.pairs,
        "count": len(caption.objects) == len(scene.objects),
        "background": same("background"), "pattern": same("pattern"), "motion": same("motion"),
    }


def _per_frame(seen: Observation, truth: Truth) -> PerFrame:
    named, total = len(truth.objects), seen.num_frames
    kinds, colours, pairs = _found(seen)
    nothing = np.full(total, np.nan)
    colour_error, drift = _colour_error(seen, named), _background_drift(seen)
    colour = [truth.colours <= found for found in colours] if truth.colours else colour_error < SUBJECT_KEPT
    if truth.background is None:
        behind = drift < BEHIND_KEPT
    else:
        behind = seen.behind.name == len(SUBJECTS) + BEHIND.index(truth.background)
    pattern = nothing if truth.pattern is None else seen.behind.pattern == PATTERNS.index(truth.pattern)
    columns = {
        "colour": colour,
        "shape": [truth.kinds <= found for found in kinds],
        "pair": [truth.pairs <= found for found in pairs],
        "count": seen.count == named,
        "background": behind, "pattern": pattern,
        "motion": nothing if truth.motion is None else _motion_right(seen, truth.motion, named),
        "survival": np.minimum(seen.count, named) / named,
        "duplicates": np.maximum(seen.count - named, 0),
        "jumps": jumps(seen.tracks, seen.height),
        "rollbacks": rollbacks(seen.thumbnails, seen.fps),
        "speed": _speed(seen), "edge_speed": seen.edge_speed,
        "colour_error": colour_error, "background_drift": drift,
        "sharpness": seen.sharpness, "step": seen.step,
    }
    return PerFrame(**{name: np.asarray(values, np.float64) for name, values in columns.items()})


def _found(seen: Observation) -> tuple[list[Counter], list[Counter], list[Counter]]:
    """The kinds, colours and pairs in every frame."""
    kinds, colours, pairs = [], [], []
    for present, kind, colour in zip(seen.tracks.present, seen.tracks.kind, seen.tracks.colour, strict=True):
        items = [(KINDS[k], SUBJECTS[c]) for k, c in zip(kind[present], colour[present], strict=True)]
        kinds.append(Counter(k for k, _ in items))
        colours.append(Counter(c for _, c in items))
        pairs.append(Counter(items))
    return kinds, colours, pairs


def _motion_right(seen: Observation, motion: str, named: int) -> np.ndarray:
    """Per frame, by the window whose middle is nearest: all shapes that last, `named` at most, move so.

    A shape that is missing costs the count and the survival, not the motion of those that are there.
    """
    windows, right = seen.motion, []
    for start, labels in zip(windows.start, windows.label, strict=True):
        present = seen.tracks.present[start:start + windows.frames].sum(0)
        longest = np.argsort(-present, kind="stable")[:named]
        known = labels[longest][labels[longest] != UNKNOWN]
        right.append(bool(len(known)) and bool((known == MOTIONS.index(motion)).all()))
    return np.array(right)[windows.nearest(seen.num_frames)]


def _speed(seen: Observation) -> np.ndarray:
    """Mean over the shapes of their centres' speed, by central differences: pixel noise cancels better."""
    x, y = seen.tracks.x, seen.tracks.y
    pace = np.full(x.shape, np.nan)
    pace[1:-1] = np.hypot(x[2:] - x[:-2], y[2:] - y[:-2]) / 2 * seen.fps
    return np.array([_mean(row) for row in pace])


def _colour_error(seen: Observation, named: int) -> np.ndarray:
    """Mean absolute RGB difference of each first subject from the shape now nearest in colour; NaN without shapes."""
    first = slice(0, _reference(seen))
    present = seen.tracks.present[first].sum(0)
    slots = [slot for slot in np.argsort(-present, kind="stable")[:named] if present[slot]]
    error = np.full(seen.num_frames, np.nan)
    if not slots:
        return error
    reference = np.nanmean(seen.tracks.rgb[first][:, slots], 0)                       # [n, 3]
    for index in np.flatnonzero(seen.tracks.present.any(1)):
        now = seen.tracks.rgb[index][seen.tracks.present[index]]
        error[index] = np.abs(reference[:, None] - now[None]).mean(-1).min(1).mean()
    return error


def _background_drift(seen: Observation) -> np.ndarray:
    reference = _reference(seen)
    around = moving_sum(seen.behind.histogram, reference)
    return colour_distance(around, seen.behind.histogram[:reference].sum(0))


def _reference(seen: Observation) -> int:
    return min(seen.num_frames, max(2, round(REFERENCE_SECONDS * seen.fps)))


def _per_video(seen: Observation, frames: PerFrame, chunks: ChunkLayout) -> PerVideo:
    reference = _reference(seen)
    first, last = slice(0, reference), slice(seen.num_frames - reference, None)
    rate = {name: _mean(getattr(frames, name)) for name in PROPERTIES}
    within, border = border_steps(seen.step, chunks)
    return PerVideo(
        rate={name: None if np.isnan(value) else value for name, value in rate.items()},
        holds={name: None if np.isnan(value) else value >= HOLDS for name, value in rate.items()},
        survival=_mean(frames.survival), duplicates=_mean(frames.duplicates),
        jumps=int(frames.jumps.sum()), rollbacks=int(frames.rollbacks.sum()),
        speed=_mean(frames.speed), edge_speed=_mean(frames.edge_speed),
        colour_error=_mean(frames.colour_error[last]), background_drift=float(frames.background_drift[-1]),
        sharpness=_mean(frames.sharpness),
        sharpness_ratio=_ratio(_mean(frames.sharpness[last]), _mean(frames.sharpness[first])),
        flicker=border - within, flicker_ratio=_ratio(border, within),
    )


def _mean(values: np.ndarray) -> float:
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else float("nan")


def _ratio(a: float, b: float) -> float:
    return a / b if b > 1e-9 else float("nan")


def _items(frames: PerFrame) -> list[tuple[str, np.ndarray]]:
    return [(field.name, getattr(frames, field.name)) for field in fields(frames)]
