"""What may be said from a sample of captions: intervals, ratios, a sign test."""
from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RESAMPLES, CURVE_RESAMPLES = 10_000, 1_000
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


def bootstrap_curves(curves: Sequence[Sequence[float | None]], seed: int = 0) -> np.ndarray:
    """Mean, low and high end over the videos, second by second.

    Shapes: curves [videos, seconds], None where nothing is known; returns [3, seconds], NaN where no video knows.
    Raises: ValueError without curves.
    """
    values = _sample(curves)
    known = np.isfinite(values)
    chosen = _draws(len(values), seed, CURVE_RESAMPLES)
    with np.errstate(invalid="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice")
        filled = np.where(known, values, 0)
        means = filled[chosen].sum(1) / known[chosen].sum(1)          # [resamples, seconds]
        return np.stack([filled.sum(0) / known.sum(0), *np.nanquantile(means, TAILS, axis=0)])


def wilson(right: int, total: int) -> Interval:
    """The share right / total with Wilson's score interval.

    Source: Wilson 1927; Brown, Cai, DasGupta 2001, section 3.1.1.
    Raises: ValueError unless 0 <= right <= total and total > 0.
    """
    if total < 1 or not 0 <= right <= total:
        raise ValueError(f"{right} of {total} is no share. Count at least one video, and no more right ones than all.")
    share, weight = right / total, Z * Z / total
    middle = (share + weight / 2) / (1 + weight)
    half = Z / (1 + weight) * math.sqrt(share * (1 - share) / total + weight / (4 * total))
    return Interval(share, max(0.0, middle - half), min(1.0, middle + half))


def sign_test(lower: int, higher: int) -> float:
    """Two-sided p, exact, that one of two equal methods comes out lower so unevenly often; ties are left out."""
    total = lower + higher
    tail = sum(math.comb(total, k) for k in range(min(lower, higher) + 1))
    return min(1.0, 2 * tail / 2 ** total)


def _sample(values: Sequence[float]) -> np.ndarray:
    if not len(values):
        raise ValueError("no values: nothing can be said. Give at least one.")
    return np.asarray(values, np.float64)


def _draws(count: int, seed: int, resamples: int = RESAMPLES) -> np.ndarray:
    return np.random.default_rng(seed).integers(count, size=(resamples, count))


def _middle(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, TAILS)
    return float(low), float(high)
