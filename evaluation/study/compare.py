"""Which of two methods drifts less, caption by caption: both had the same captions and the same noise."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from evaluation.study.results import paired
from evaluation.study.scores import is_frozen
from evaluation.study.statistics import Interval, bootstrap_ratio, sign_test

FROZEN_MARK = "frozen"
SIGNIFICANT = 0.05  # p of a sign test that shows a difference: never reached by fewer than six captions


@dataclass(frozen=True)
class Comparison:
    """One method's drift against another's, on the captions that both have."""

    videos: int
    ratio: Interval   # mean drift / the other's mean drift
    lower: int        # captions on which it drifts less
    higher: int
    p: float          # two-sided sign test over captions, ties dropped
    frozen: tuple[bool, bool]  # it, and the other, stand still at the end: then less drift proves nothing

    @property
    def verdict(self) -> str:
        """In words: a difference where interval and sign test agree; of few captions the interval alone is too sure."""
        if self.p < SIGNIFICANT and self.ratio.low > 1 and self.higher > self.lower:
            return f"the other is {FROZEN_MARK}: does not count" if self.frozen[1] else "drifts more"
        if self.p < SIGNIFICANT and self.ratio.high < 1 and self.lower > self.higher:
            return f"{FROZEN_MARK}: does not count" if self.frozen[0] else "drifts less"
        return "no difference shown"


def drift(row: dict) -> float | None:
    """How far the background's colours of the last five seconds lie from those of the first, 0..1."""
    return row["video"]["background_drift"]


def compare(first: Sequence[dict], second: Sequence[dict]) -> Comparison | None:
    """The first method's drift against the second's; None where they share no caption."""
    pairs = [(a, b) for a, b in paired(first, second) if drift(a) is not None and drift(b) is not None]
    if not pairs:
        return None
    ours, theirs = zip(*pairs, strict=True)
    drifts = [(drift(a), drift(b)) for a, b in pairs]
    lower, higher = sum(a < b for a, b in drifts), sum(a > b for a, b in drifts)
    ratio = bootstrap_ratio(*zip(*drifts, strict=True))
    frozen = is_frozen(ours), is_frozen(theirs)
    return Comparison(len(pairs), ratio, lower, higher, sign_test(lower, higher), frozen)
