"""Sentences follow from their numbers, whichever way these come out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo.analysis.statistics import Interval, seed_interval
from sapo.analysis.verdicts import comparison, judge, listed, mean_half, sides, signed, tally, times

UP, DOWN, OPEN = Interval(0.02, 0.01, 0.03), Interval(-0.02, -0.03, -0.01), Interval(0.0, -0.01, 0.01)
ALONE, SAME = Interval(0.02, math.nan, math.nan), Interval(0.0, 0.0, 0.0)


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (UP, "ahead"),
        (DOWN, "behind"),
        (OPEN, "not told apart"),
        (ALONE, "unknown"),
        (SAME, "equal"),
        (Interval(0.01, 0.0, 0.02), "not told apart"),  # a bound at 0 leaves no difference possible
        (Interval(0.02, 0.02, 0.02), "ahead"),
    ],
)
def test_verdicts_by_hand(gain, verdict):
    assert judge(gain) == verdict


bounds = st.floats(-1, 1, allow_nan=False)


@given(st.lists(bounds, min_size=3, max_size=3))
def test_the_mirror_of_a_comparison_has_the_mirrored_verdict(values):
    low, value, high = sorted(values)
    mirrored = {"ahead": "behind", "behind": "ahead"}
    verdict = judge(Interval(value, low, high))
    assert judge(Interval(-value, -high, -low)) == mirrored.get(verdict, verdict)


def test_sentences_by_hand():
    """Three seeds .1, .2, .3: standard error .1 / sqrt 3, times 4.303 for two degrees of freedom is .248."""
    gain = seed_interval([0.1, 0.2, 0.3])
    assert signed(gain, 2) == "+0.20 [-0.05, +0.45]"
    assert mean_half(gain, 2) == "0.20 ± 0.25"
    said = comparison("A", "B", "NDCG@10", gain, "3 seeds", 2)
    assert said == "A - B in NDCG@10: +0.20 [-0.05, +0.45] over 3 seeds: not told apart."
    assert comparison("A", "B", "M", UP, "3 seeds").endswith("over 3 seeds: A is ahead.")
    assert comparison("A", "B", "M", DOWN, "3 seeds").endswith("over 3 seeds: B is ahead.")
    assert comparison("A", "B", "M", SAME, "3 seeds").endswith("over 3 seeds: the same every time.")
    assert comparison("A", "B", "M", ALONE, "1 seed") == "A - B in M: +0.020 over 1 seed: no interval, so no verdict."
    assert mean_half(ALONE) == "0.020"


def test_ratios_have_three_digits():
    assert times(Interval(178.2, 131.4, 240.4)) == "178 [131, 240]"
    assert times(Interval(1.7, 1.52, 1.889)) == "1.70 [1.52, 1.89]"
    assert times(Interval(0.9996, 0.05, 9.999)) == "1.00 [0.0500, 10.0]"  # rounding reaches the next power of ten
    assert times(Interval(2.0, math.nan, math.nan)) == "2.00"


def test_a_tally_names_who_can_be_told_apart():
    said = tally({"A": UP, "B": OPEN, "C": DOWN, "D": SAME, "E": ALONE}, "X", "M")
    assert said == (
        "Of 5 methods beside X in M, without a correction for their number: ahead are A (+0.020 [+0.010, +0.030]); "
        "behind are C (-0.020 [-0.030, -0.010]); without an interval are E (+0.020); 2 cannot be told apart from it."
    )
    assert tally({"B": OPEN}, "X", "M").startswith("Of 1 method beside X in M")


def test_sides_name_every_place_once():
    said = sides({"X": UP, "Y": OPEN, "Z": DOWN, "V": OPEN}, "A", "B")
    assert said == ("A ranks better than B on X; B ranks better than A on Z; A and B cannot be told apart on Y and V")
    assert sides({}, "A", "B") == ""


def test_lists_read_as_text():
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
