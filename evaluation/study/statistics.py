"""What may be said from a sample of captions: intervals, ratios, a sign test."""
from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES = 10_000
TAILS = (0.025, 0.975)  # of a two-sided 95 % interval
Z = 1.959963984540054   # the normal distribution's


@dataclass(frozen=True)
class Interval:
    """A number and its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap_mean(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean, with a percentile bootstrap over the values.

    Raises: ValueError without values.
    """
    sample = _sample(values)
    means = sample[_draws(len(sample), seed)].mean(1)
    return Interval(float(sample.mean()), *_middle(means))


def bootstrap_ratio(above: Sequence[float], below: Sequence[float], seed: int = 0) -> Interval:
    """mean(above) / mean(below) of paired values, with a percentile bootstrap over the pairs.

    Raises: ValueError without pairs, or if the numbers differ in length.
    """
    a, b = _sample(above), _sample(below)
    if len(a) != len(b):
        raise ValueError(f"{len(a)} and {len(b)} values are no pairs. Give one of each for every caption.")
    chosen = _draws(len(a), seed)
    with np.errstate(divide="ignore", invalid="ignore"):
        return Interval(float(a.mean() / b.mean()), *_middle(a[chosen].mean(1) / b[chosen].mean(1)))


def means(values: Sequence) -> np.ndarray:
    """Mean [...] over the first axis of values [n, ...], None or NaN where nothing is known; NaN where none knows."""
    sample = _sample(values)
    known = np.isfinite(sample)
    with np.errstate(invalid="ignore"):
        return np.where(known, sample, 0).sum(0) / known.sum(0)


def means_and_ends(values: Sequence, *, shares: bool) -> np.ndarray:
    """Mean, low and high end over the first axis, videos; honest for a few of them, where a bootstrap is too sure.

    Shapes: values [videos, ...], None or NaN where nothing is known; returns [3, ...], NaN where no video knows.
    Args:
        shares: the values are shares of frames. Then it is Wilson's score interval, with videos as the trials: what
            holds in every one of a few may still fail. Else Student's t, whose ends are NaN for one video.
    Raises: ValueError without values.
    """
    sample = _sample(values)
    known = np.isfinite(sample)
    count = known.sum(0)
    mean = means(sample)
    with np.errstate(invalid="ignore", divide="ignore"):
        if shares:
            middle, half = _score(mean, count)
            return np.stack([mean, np.maximum(0, middle - half), np.minimum(1, middle + half)])
        variance = (np.where(known, sample - mean, 0) ** 2).sum(0) / (count - 1)
        half = np.vectorize(student_t, otypes=[float])(count - 1) * np.sqrt(variance / count)
    return np.stack([mean, mean - half, mean + half])


@functools.cache
def student_t(freedom: int) -> float:
    """The t that 95 % of Student's distribution lie within, both sides; NaN without a degree of freedom.

    With t = sqrt(freedom) tan(angle), the density over the angle is cos(angle) ** (freedom - 1).
    """
    if freedom < 1:
        return float("nan")
    angles = np.linspace(0, np.pi / 2, 20_001)
    density = np.cos(angles) ** (freedom - 1)
    within = np.concatenate([[0], np.cumsum(density[1:] + density[:-1])])
    return math.sqrt(freedom) * math.tan(np.interp(TAILS[1] - TAILS[0], within / within[-1], angles))


def wilson(right: int, total: int) -> Interval:
    """The share right / total with Wilson's score interval.

    Source: Wilson 1927; Brown, Cai, DasGupta 2001, section 3.1.1.
    Raises: ValueError unless 0 <= right <= total and total > 0.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} of {total} is no share. Count at least one video, and no more right ones than all.")
    middle, half = _score(right / total, total)
    return Interval(right / total, max(0.0, float(middle - half)), min(1.0, float(middle + half)))


def _score(share: np.ndarray | float, total: np.ndarray | int) -> tuple[np.ndarray, np.ndarray]:
    """Middle and half width of Wilson's interval."""
    weight = Z * Z / total
    half = Z / (1 + weight) * np.sqrt(share * (1 - share) / total + weight / (4 * total))
    return (share + weight / 2) / (1 + weight), half


def sign_test(lower: int, higher: int) -> float:
    """Two-sided p, exact, that one of two equal methods comes out lower so unevenly often; ties are left out."""
    total = lower + higher
    tail = sum(math.comb(total, k) for k in range(min(lower, higher) + 1))
    return min(1.0, 2 * tail / 2 ** total)


def _sample(values: Sequence[float]) -> np.ndarray:
    if not len(values):
        raise ValueError("no values: nothing can be said. Give at least one.")
    return np.asarray(values, np.float64)


def _draws(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, TAILS)
    return float(low), float(high)
