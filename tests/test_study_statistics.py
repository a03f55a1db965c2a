"""The statistics of the studies, each by a second road."""
from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from evaluation.study.compare import compare
from evaluation.study.statistics import Z, bootstrap_mean, bootstrap_ratio, means_and_ends, sign_test, student_t, wilson


@pytest.mark.parametrize("right, total, low, high", [
    (0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (81, 263, 0.2553, 0.3662),
])
def test_wilson_equals_published_values(right, total, low, high):
    found = wilson(right, total)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5)


@pytest.mark.parametrize("right, total", [(0, 7), (3, 8), (8, 8), (150, 200)])
def test_wilson_ends_where_the_score_test_does(right, total):
    """Second road: both ends p solve (share - p)^2 = z^2 p (1 - p) / n."""
    found, share = wilson(right, total), right / total
    for end in (found.low, found.high):
        assert (share - end) ** 2 == pytest.approx(Z ** 2 * end * (1 - end) / total, abs=1e-9)


@pytest.mark.parametrize("total", range(9))
def test_sign_test_equals_enumeration(total):
    """All 2^n ways in which a fair coin can fall, counted."""
    for lower in range(total + 1):
        away = abs(lower - total / 2)
        falls = [abs(sum(fall) - total / 2) >= away for fall in itertools.product((0, 1), repeat=total)]
        assert sign_test(lower, total - lower) == pytest.approx(np.mean(falls), abs=1e-12)


def test_sign_test_of_many():
    """64 of 64 captions: twice one way in 2^64."""
    assert sign_test(64, 0) == 2 / 2 ** 64
    assert sign_test(0, 0) == sign_test(32, 32) == 1


def test_bootstrap_is_a_function_of_its_seed():
    values = np.random.default_rng(1).exponential(size=50)
    assert bootstrap_mean(values, seed=3) == bootstrap_mean(values, seed=3) != bootstrap_mean(values, seed=4)
    assert bootstrap_ratio(values, 2 * values) == bootstrap_ratio(values, 2 * values)


def test_bootstrap_equals_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(2).normal(5, 2, size=400)
    found, half = bootstrap_mean(values), 1.96 * values.std() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


def test_bootstrap_ratio_keeps_pairs():
    """What is always twice the other is twice it in every resample; equal means, unpaired, would be uncertain."""
    values = np.random.default_rng(2).exponential(size=20)
    found = bootstrap_ratio(2 * values, values)
    assert (found.value, found.low, found.high) == pytest.approx((2, 2, 2))


@pytest.mark.parametrize("freedom, published", [(1, 12.706), (2, 4.303), (3, 3.182), (10, 2.228), (63, 1.998)])
def test_student_equals_published_values(freedom, published):
    assert student_t(freedom) == pytest.approx(published, abs=5e-4)


def test_ends_of_means_by_hand():
    """Second second: one video knows, so that nothing is said but its value; third: none does."""
    mean, low, high = means_and_ends([[1.0, None, None], [3.0, 5.0, None]], shares=False)
    assert mean[:2].tolist() == [2, 5] and (low[0], high[0]) == pytest.approx((2 - 12.706, 2 + 12.706), abs=1e-3)
    assert np.isnan([low[1], high[1], mean[2], low[2], high[2]]).all()


@pytest.mark.parametrize("right, total", [(0, 4), (4, 4), (30, 64)])
def test_ends_of_shares_are_wilsons(right, total):
    """Four right of four may be four of five: their interval is not a point."""
    found = means_and_ends([[1.0]] * right + [[0.0]] * (total - right), shares=True)
    known = wilson(right, total)
    assert found[:, 0].tolist() == pytest.approx([known.value, known.low, known.high])


@pytest.mark.parametrize("shares", [False, True])
@pytest.mark.parametrize("count", [4, 64])
def test_nineteen_of_twenty_intervals_hold_the_mean(shares, count):
    """Samples of a known mean. 2,000 of them: the share's own error is half a point; 92 % allows for skewed values."""
    generator = np.random.default_rng(5)
    values = generator.beta(8, 2, (count, 2000)) if shares else generator.normal(0.8, 0.1, (count, 2000))
    _, low, high = means_and_ends(values, shares=shares)
    assert ((low <= 0.8) & (high >= 0.8)).mean() > 0.92


def verdict(ours, theirs):
    """What is said of two methods with these drifts, caption by caption; everything goes on moving."""
    both = [
        [{"split": "test", "seed": seed, "said": {"motion": "drift"}, "video": {"background_drift": float(value)},
          "windows": {name: {"speed": 1.0} for name in ("first", "last")}} for seed, value in enumerate(drifts)]
        for drifts in (ours, theirs)
    ]
    return compare(*both).verdict


@pytest.mark.parametrize("count", [1, 2, 4, 8, 64])
def test_between_equal_methods_a_difference_is_rarely_said(count):
    """Drifts of one skewed distribution, 300 times: at most one in twenty, however few captions there are."""
    drifts = np.random.default_rng(count).exponential(size=(300, 2, count))
    assert np.mean([verdict(*pair) != "no difference shown" for pair in drifts]) <= 0.05


@pytest.mark.parametrize("count, said", [(1, False), (5, False), (6, True), (64, True)])
def test_a_difference_takes_six_captions(count, said):
    """Five of five fall alike in one of sixteen throws, six of six in one of thirty-two."""
    more = np.linspace(1, 2, count)
    expected = ("drifts less", "drifts more") if said else ("no difference shown",) * 2
    assert (verdict(more / 2, more), verdict(more, more / 2)) == expected


def test_interval_and_sign_test_must_agree():
    """One caption alone moves the mean, or most captions fall one way and the mean the other: nothing is shown."""
    even = np.ones(16)
    assert verdict([0.9] * 15 + [40.0], even) == "no difference shown"
    assert verdict([0.1] * 8 + [1.05] * 8, even) == "no difference shown"
    assert verdict([0.1] * 3 + [1.01] * 13, even) == "no difference shown"


@pytest.mark.parametrize("call", [
    lambda: bootstrap_mean([]), lambda: bootstrap_ratio([1], [1, 2]), lambda: wilson(1, 0), lambda: wilson(3, 2),
])
def test_nothing_is_said_of_nothing(call):
    with pytest.raises(ValueError, match=r"Give|Count"):
        call()
