"""Sentences follow from their numbers, whichever way these come out."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapo.analysis.statistics import Difference, Interval, seed_difference, seed_interval
from sapo.analysis.verdicts import comparison, judge, listed, mean_half, replicates, sides, signed, tally, times

UP, DOWN = Difference(0.02, 0.01, 0.03, 0.001, 100, 3), Difference(-0.02, -0.03, -0.01, 0.001, 100, 3)
OPEN, SAME = Difference(0.0, -0.01, 0.01, 0.9, 100, 3), Difference(0.0, 0.0, 0.0, 1.0, 0, 3)
ALONE = Difference(0.02, math.nan, math.nan, math.nan, 0, 1)


@pytest.mark.parametrize(
    ("gain", "verdict"),
    [
        (UP, "ahead"),
        (DOWN, "behind"),
        (OPEN, "not told apart"),
        (ALONE, "unknown"),
        (SAME, "equal"),
        (Difference(0.02, 0.02, 0.02, 0.0, 0, 3), "ahead"),  # the same gain every time
    ],
)
def test_verdicts_by_hand(gain, verdict):
    assert judge({"A": gain}) == {"A": verdict}


def test_verdicts_are_corrected_over_their_list():
    """p = .03 alone is beyond noise at .05; of two, the smaller counts twice, and .06 is not. One that nothing can be
    tested of does not count."""
    close = Difference(0.02, 0.002, 0.038, 0.03, 100, 3)
    assert judge({"A": close, "B": ALONE}) == {"A": "ahead", "B": "unknown"}
    assert judge({"A": close, "B": OPEN}) == {"A": "not told apart", "B": "not told apart"}
    assert judge({"A": close, "B": UP, "C": DOWN}) == {"A": "ahead", "B": "ahead", "C": "behind"}
    assert judge({}) == {}


probabilities = st.floats(0, 1, allow_nan=False)
values = st.floats(-1, 1, allow_nan=False)


@given(st.lists(st.tuples(values, probabilities), min_size=1))
def test_the_mirror_of_a_list_has_the_mirrored_verdicts(pairs):
    mirrored = {"ahead": "behind", "behind": "ahead"}
    gains = {n: Difference(v, v - 1, v + 1, p if v else 1.0, 10, 3) for n, (v, p) in enumerate(pairs)}
    mirror = {n: Difference(-v, -high, -low, p, *rest) for n, (v, low, high, p, *rest) in gains.items()}
    assert judge(mirror) == {n: mirrored.get(verdict, verdict) for n, verdict in judge(gains).items()}


def test_sentences_by_hand():
    """Three seeds .1, .2, .3: standard error .1 / sqrt 3, times 4.303 for two degrees of freedom is .248."""
    gain = seed_difference([0.1, 0.2, 0.3])
    assert signed(gain, 2) == "+0.20 [-0.05, +0.45]"
    assert mean_half(seed_interval([0.1, 0.2, 0.3]), 2) == "0.20 ± 0.25"
    said = comparison("A", "B", "NDCG@10", gain, "not told apart", 2)
    assert said == "A - B in NDCG@10: +0.20 [-0.05, +0.45] over 3 seeds: not told apart."
    assert comparison("A", "B", "M", UP, "ahead").endswith("over 100 users and 3 seeds: A is ahead.")
    assert comparison("A", "B", "M", DOWN, "behind").endswith("over 100 users and 3 seeds: B is ahead.")
    assert comparison("A", "B", "M", SAME, "equal").endswith("over 3 seeds: the same every time.")
    alone = comparison("A", "B", "M", ALONE, "unknown")
    assert alone == "A - B in M: +0.020 over 1 seed: no interval, so no verdict."
    assert mean_half(Interval(0.02, math.nan, math.nan)) == "0.020"


def test_units_are_named_as_far_as_an_interval_holds_them():
    assert replicates(Difference(0, -1, 1, 1.0, 3000, 5)) == "3,000 users and 5 seeds"
    assert replicates(Difference(0, -1, 1, 1.0, 0, 5)) == "5 seeds"
    assert replicates(Difference(0, -1, 1, 1.0, 1, 1)) == "1 user and 1 seed"


def test_ratios_have_three_digits():
    assert times(Interval(178.2, 131.4, 240.4)) == "178 [131, 240]"
    assert times(Interval(1.7, 1.52, 1.889)) == "1.70 [1.52, 1.89]"
    assert times(Interval(0.9996, 0.05, 9.999)) == "1.00 [0.0500, 10.0]"  # rounding reaches the next power of ten
    assert times(Interval(2.0, math.nan, math.nan)) == "2.00"


def test_a_tally_names_who_can_be_told_apart():
    said = tally({"A": UP, "B": OPEN, "C": DOWN, "D": SAME, "E": ALONE}, "X", "M")
    assert said == (
        "Of 5 methods beside X in M: ahead are A (+0.020 [+0.010, +0.030]); behind are C (-0.020 [-0.030, -0.010]); "
        "without an interval are E (+0.020); 2 cannot be told apart from it."
    )
    assert tally({"B": OPEN}, "X", "M").startswith("Of 1 method beside X in M")


def test_sides_name_every_place_once():
    said = sides({"X": "ahead", "Y": "not told apart", "Z": "behind", "V": "not told apart"}, "A", "B")
    assert said == ("A ranks better than B on X; B ranks better than A on Z; A and B cannot be told apart on Y and V")
    assert sides({}, "A", "B") == ""


def test_lists_read_as_text():
    assert [listed(names) for names in (["a"], ["a", "b"], ["a", "b", "c"])] == ["a", "a and b", "a, b and c"]
