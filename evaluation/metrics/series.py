"""From one number a frame, or a second, to the windows that the papers report. All windows are half-open, in seconds.

T frames; fps pixel frames a second.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from evaluation.metrics.protocol import CannotMeasureError, Granularity, TooShortError, Value

CLIP_S, WINDOW_S = 2.0, 10.0  # VBench-Long's clips; PackForcing's windows of the CLIP score
ENDS_S, ENDS_SHARE = 5.0, 0.15
WHOLE_ENOUGH = 0.5            # a last window shorter than this share of a window is left out (but for clips)


def windows(num_frames: int, fps: float, length_s: float) -> list[tuple[int, int]]:
    """First frame and one past the last, of windows of `length_s`; a short rest is left out, unless all is short."""
    edges = [round(k * length_s * fps) for k in range(int(num_frames / (length_s * fps)) + 2)]
    spans = zip(edges, edges[1:], strict=False)
    found = [(start, min(stop, num_frames)) for start, stop in spans if start < num_frames]
    if len(found) > 1 and found[-1][1] - found[-1][0] < WHOLE_ENOUGH * length_s * fps:
        found.pop()
    return found


def clips(num_frames: int, fps: float) -> list[tuple[int, int]]:
    """VBench-Long's 2 s clips: one after the other, the last one extended backwards to its full length."""
    length = max(1, round(CLIP_S * fps))
    if num_frames <= length:
        return [(0, num_frames)]
    found = [(start, start + length) for start in range(0, num_frames - length + 1, length)]
    return found if found[-1][1] == num_frames else [*found, (num_frames - length, num_frames)]


def means(values: Sequence[float], fps: float, length_s: float) -> list[tuple[float, float]]:
    """(start in seconds, mean) of every window. Shapes: values [T]; NaN marks frames that have no value."""
    values = np.asarray(values, np.float64)
    spans = [(start, values[start:stop]) for start, stop in windows(len(values), fps, length_s)]
    return [(round(start / fps, 3), float(np.nanmean(part))) for start, part in spans if not np.isnan(part).all()]


def ends(values: Sequence[float], fps: float) -> dict[Granularity, tuple[float, float]]:
    """Means of the first and of the last 5 s (of videos of at least 10 s), and of the first and last 15 %.

    Where no frame of these has a value it is that of the nearest one that has; of a single one there are no ends.
    """
    values = np.asarray(values, np.float64)
    known = values[~np.isnan(values)]
    if len(known) < 2:
        return {}
    reaches = {"first_last_15pct": max(1, round(ENDS_SHARE * len(values)))}
    if len(values) >= 2 * ENDS_S * fps:
        reaches["first_last_5s"] = round(ENDS_S * fps)
    return {
        name: (_mean(values[:reach], known[0]), _mean(values[-reach:], known[-1])) for name, reach in reaches.items()
    }


def _mean(values: np.ndarray, otherwise: float) -> float:
    return float(otherwise if np.isnan(values).all() else np.nanmean(values))


def of_frames(name: str, values: Sequence[float], fps: float, *, drift: bool) -> list[Value]:
    """A frame-wise metric's mean over the video, its seconds, and `<name>_drift`: |first - last| of both `ends`."""
    if np.isnan(values).all():  # of none as well
        if len(values) < 2:
            raise TooShortError("a single frame is too few for this metric")
        raise CannotMeasureError("no frame has a value")
    found = [Value(name, "whole", None, float(np.nanmean(values)))]
    found += [Value(name, "second", start, value) for start, value in means(values, fps, 1.0)]
    if drift:
        found += [Value(f"{name}_drift", key, None, abs(a - b)) for key, (a, b) in ends(values, fps).items()]
    return found
