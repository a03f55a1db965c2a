"""From a finished video and its caption to one row of plain numbers, and from rows to shares.

A video is held against what its caption *says*: what was left unsaid cannot be wrong. Such properties are None.
"""
from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

import numpy as np

from evaluation.analysers import PROPERTIES, Analysis, ChunkLayout, analyse, curves
from evaluation.analysers.judge import REFERENCE_SECONDS
from training.world import Clip

DIGITS = 6
FROZEN = 0.7            # of the first speed
CHUNKS = ChunkLayout()  # of 3 latent frames
OUTLINE_MOTIONS = ("spin", "pulse", None)  # motions that the shapes' centres need not show; None: any was allowed


def read(frames: np.ndarray, clip: Clip, fps: float = 16.0, chunks: ChunkLayout = CHUNKS) -> dict:
    """The row of one video. Shapes: frames uint8 [T, H, W, 3].

    Returns: split, seed, caption, said; `video` as Analysis has it; `windows`, the means of every per-frame value
        over the first and the last five seconds; `curves`, the same second by second. None where nothing can be said.
    Raises: ValueError as `observe` does.
    """
    return row_of(clip, analyse(frames, clip.said, fps, chunks))


def row_of(clip: Clip, analysis: Analysis) -> dict:
    """The row of an analysis that was made against `clip.said`."""
    seconds = analysis.num_frames / analysis.fps
    reach = min(REFERENCE_SECONDS, seconds)
    return _rounded({
        "split": clip.split, "seed": clip.seed, "caption": clip.caption, "said": clip.said.to_json(),
        "pixel_frames": analysis.num_frames, "fps": analysis.fps,
        "video": asdict(analysis.video),
        "windows": {"first": analysis.between(0, reach), "last": analysis.between(seconds - reach, seconds)},
        "curves": {name: values.tolist() for name, values in curves(analysis).items()},
    })


def pace_name(row: dict) -> str:
    """Which of the two speeds shows this caption's motion: that of the shapes' centres, or of their outlines."""
    return "edge_speed" if row["said"]["motion"] in OUTLINE_MOTIONS else "speed"


def paces(row: dict) -> tuple[float | None, float]:
    """Speed in the first and in the last five seconds; shapes that have vanished move no more."""
    first, last = (row["windows"][window][pace_name(row)] for window in ("first", "last"))
    return first, last or 0.0


def speed_ratio(rows: Sequence[dict]) -> float:
    """Mean speed in the last five seconds / in the first, over all videos; NaN if nothing moved at first."""
    known = [(first, last) for first, last in map(paces, rows) if first is not None]
    total = sum(first for first, _ in known)
    return sum(last for _, last in known) / total if total > 0 else float("nan")


def is_frozen(rows: Sequence[dict]) -> bool:
    """Whether these videos, taken together, stand still at the end, or always did: then less drift proves nothing."""
    return not speed_ratio(rows) >= FROZEN


def summarise(rows: Iterable[dict]) -> dict:
    """Shares over all rows: {"videos": n, "holds": {property: share of videos}, "rate": {property: mean share of
    frames}, and the means of "survival", "duplicates", "jumps", "rollbacks"}. None where no caption says it.
    """
    rows = list(rows)
    video = [row["video"] for row in rows]
    means = ("survival", "duplicates", "jumps", "rollbacks")
    return {
        "videos": len(rows),
        "holds": {name: mean_known(v["holds"][name] for v in video) for name in PROPERTIES},
        "rate": {name: mean_known(v["rate"][name] for v in video) for name in PROPERTIES},
        **{name: mean_known(v[name] for v in video) for name in means},
    }


def mean_known(values: Iterable[float | bool | None]) -> float | None:
    """The mean of what is known; None if nothing is."""
    known = [value for value in values if value is not None]
    return float(np.mean(known)) if known else None


def _rounded(value):
    """Plain JSON: floats of DIGITS digits, None for NaN."""
    if isinstance(value, dict):
        return {name: _rounded(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(inner) for inner in value]
    if isinstance(value, float):
        return None if np.isnan(value) else round(float(value), DIGITS)
    return value
