"""Intervals: by hand, by simulation of what they promise, and against a loop over resamples."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from sapo.analysis import statistics
from sapo.analysis.statistics import (
    beyond_noise,
    bootstrap_means,
    holm,
    paired_bootstrap,
    paired_difference,
    seed_difference,
    seed_interval,
)
from sapo.errors import InputError


def test_t_interval_by_hand():
    # mean 2, std 1, n 3: half width = t(0.975, 2) / sqrt(3) = 4.302653 / 1.732051
    interval = seed_interval([1.0, 2.0, 3.0])
    assert interval.value == 2
    assert interval.half == pytest.approx(2.484138, abs=1e-6)
    assert (interval.low + interval.high) / 2 == pytest.approx(2)
    value, low, high = seed_interval([1.0, 2.0, 3.0], level=0.5)  # t(0.75, 2) = 0.816497 = sqrt(2/3)
    assert (value, high - low) == (2, pytest.approx(2 * math.sqrt(2 / 3) / math.sqrt(3)))


def test_one_seed_has_no_interval():
    interval = seed_interval([0.3])
    assert interval.value == 0.3
    assert math.isnan(interval.low)
    assert math.isnan(interval.high)


@pytest.mark.parametrize("values", [[], [1.0, math.nan], np.ones((1, 2))])
def test_seed_interval_refuses(values):
    with pytest.raises(InputError, match="one a seed"):
        seed_interval(values)


def test_t_interval_covers_what_it_promises():
    rng = np.random.default_rng(0)
    covered = [i.low < 0 < i.high for i in (seed_interval(row) for row in rng.normal(size=(2000, 3)))]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)  # three standard errors of 2000 trials


def test_differences_over_seeds_by_hand():
    """1, 2, 3: t = 2 / (1 / sqrt 3) = 3.4641; with two degrees of freedom its two-sided p is 1 - t / sqrt(t^2 + 2) =
    1 - sqrt(12 / 14)."""
    found = seed_difference([1.0, 2.0, 3.0])
    assert found[:3] == tuple(seed_interval([1.0, 2.0, 3.0]))
    assert found.p_value == pytest.approx(1 - math.sqrt(12 / 14))
    assert (found.users, found.seeds) == (0, 3)


@given(st.lists(st.integers(-50, 50), min_size=2, max_size=8))
def test_p_values_over_seeds_agree_with_their_interval(values):
    """An interval of level 1 - p ends at 0, whatever the values."""
    found = seed_difference(values)
    if found.low < found.high and 1e-6 < found.p_value < 1 - 1e-6:
        bounds = seed_difference(values, level=1 - found.p_value)
        assert min(abs(bounds.low), abs(bounds.high)) == pytest.approx(0, abs=1e-6 * abs(found.value))


def test_differences_over_seeds_without_spread():
    assert seed_difference([0.25, 0.25]) == (0.25, 0.25, 0.25, 0.0, 0, 2)
    assert seed_difference([0.0, 0.0]) == (0.0, 0.0, 0.0, 1.0, 0, 2)
    alone = seed_difference([0.25])
    assert math.isnan(alone.p_value)
    assert math.isnan(alone.low)
    assert (alone.value, alone.seeds) == (0.25, 1)
    with pytest.raises(InputError, match="one a seed"):
        seed_difference([])


def test_bootstrap_by_hand():
    # Differences 0 and 1: a resample of two has mean 0, 1/2, 1 with probability 1/4, 1/2, 1/4.
    interval = paired_bootstrap([0, 1], [0, 0], num_resamples=2000)
    assert interval == (0.5, 0.0, 1.0)
    assert paired_bootstrap([0, 1], [0, 0], num_resamples=2000, level=0.4)[1:] == (0.5, 0.5)


def test_no_difference_has_no_width():
    values = np.random.default_rng(1).random(50)
    assert paired_bootstrap(values, values) == (0.0, 0.0, 0.0)


def test_pairing_removes_what_users_share():
    rng = np.random.default_rng(2)
    ease = rng.normal(size=400)  # of the user, common to both methods
    a, b = ease + 0.1 + 0.01 * rng.normal(size=400), ease
    interval = paired_bootstrap(a, b)
    assert interval.low > 0.09
    assert interval.high < 0.11


def test_bootstrap_covers_what_it_promises():
    rng = np.random.default_rng(3)
    covered = []
    for trial in range(300):
        a, b = rng.random(80) < 0.4, rng.random(80) < 0.3
        interval = paired_bootstrap(a, b, seed=trial, num_resamples=400)
        covered.append(interval.low <= 0.1 <= interval.high)
    assert np.mean(covered) == pytest.approx(0.95, abs=0.04)


def test_users_are_drawn_with_all_their_rows():
    rng = np.random.default_rng(4)
    taste = np.repeat(rng.normal(size=100), 10)  # ten equal rows a user
    rows = paired_bootstrap(taste, np.zeros(1000))
    users = paired_bootstrap(taste, np.zeros(1000), units=np.repeat(np.arange(100), 10))
    assert users.value == rows.value
    assert users.half == pytest.approx(math.sqrt(10) * rows.half, rel=0.1)  # 100 users, not 1000 rows


def test_ragged_users_against_a_loop():
    rng = np.random.default_rng(5)
    units = np.array(["c", "a", "a", "b", "c", "a"])
    a, b = rng.random(6), rng.random(6)
    names, rows_of = np.unique(units), {name: (a - b)[units == name] for name in np.unique(units)}
    draws = np.random.default_rng(7).integers(3, size=(500, 3))
    means = [np.concatenate([rows_of[names[user]] for user in draw]).mean() for draw in draws]
    interval = paired_bootstrap(a, b, units=units, seed=7, num_resamples=500)
    assert interval.value == pytest.approx((a - b).mean())
    assert interval[1:] == pytest.approx(np.quantile(means, [0.025, 0.975]))


def test_same_seed_same_interval_whatever_the_chunks(monkeypatch):
    a, b = np.random.default_rng(6).random((2, 37))
    whole = paired_bootstrap(a, b, seed=1, num_resamples=1000)
    assert paired_bootstrap(a, b, seed=2, num_resamples=1000) != whole
    monkeypatch.setattr(statistics, "CHUNK", 111)  # three resamples at a time
    assert paired_bootstrap(a, b, seed=1, num_resamples=1000) == pytest.approx(whole, abs=1e-12)


def test_one_user_has_no_interval():
    interval = paired_bootstrap([1.0, 2.0], [0.0, 0.0], units=["u", "u"])
    assert interval.value == 1.5
    assert math.isnan(interval.low)


@pytest.mark.parametrize(
    ("a", "b", "options", "message"),
    [
        ([1.0], [1.0, 2.0], {}, "shapes"),
        ([], [], {}, "one value a row"),
        ([1.0, math.inf], [0.0, 0.0], {}, "finite"),
        ([1.0, 2.0], [0.0, 0.0], {"units": ["u"]}, "one label a row"),
        ([1.0, 2.0], [0.0, 0.0], {"level": 95.0}, "between 0 and 1"),
    ],
)
def test_bad_input(a, b, options, message):
    with pytest.raises(InputError, match=message):
        paired_bootstrap(a, b, **options)


def test_columns_see_the_same_draws():
    """Each has the interval that it has alone, so that two of them can be compared."""
    rng = np.random.default_rng(3)
    values, units = rng.normal((0, 1, 5), size=(50, 3)), rng.integers(12, size=50)
    together = bootstrap_means(values, units, seed=4, num_resamples=500)
    for column, interval in zip(values.T, together, strict=True):
        alone = paired_bootstrap(column, np.zeros(50), units, seed=4, num_resamples=500)
        assert interval == pytest.approx(alone, abs=1e-12)
    (one, all_of_it) = bootstrap_means(np.column_stack([values[:, 0], 2 * values[:, 0]]), units, num_resamples=500)
    assert 2 * np.array(one) == pytest.approx(np.array(all_of_it))


def test_values_without_rows_or_columns_are_refused():
    for values in ([], [1.0, 2.0], np.zeros((0, 2))):
        with pytest.raises(InputError, match="give rows of one value a column"):
            bootstrap_means(values)


def test_users_and_seeds_by_hand():
    """Two seeds, two users, one row each: differences 1, 2 and 3, 6.

    Seed means 1.5 and 4.5, user means 2 and 4, mean 3. V_seeds = var(1.5, 4.5) / 2 = 4.5 / 2 = 2.25. The rest,
    1 - 1.5 - 2 + 3 = .5 and so on, is +-.5 four times: its mean square, with (2 - 1) (2 - 1) degrees of freedom, is 1,
    and of it a mean over 2 x 2 has 1 / 4. V_users = var(2, 4) / 2 - 1 / 4 = .75. Both have one degree of freedom, so
    the critical value is t(.975, 1) = 12.7062, and the standard error sqrt(3).
    P(|t| > 3 / sqrt(3)) = 1 - 2 atan(sqrt(3)) / pi = 1 / 3.
    """
    found = paired_difference([[1, 2], [3, 6]])
    assert (found.value, found.users, found.seeds) == (3, 2, 2)
    assert found.high - 3 == pytest.approx(12.7062 * math.sqrt(3), rel=1e-5)
    assert found.low - 3 == pytest.approx(-12.7062 * math.sqrt(3), rel=1e-5)
    assert found.p_value == pytest.approx(1 / 3)


def test_critical_value_is_weighted_by_shares_of_variance():
    """Three seeds that differ by a constant and 40 users that are the same in all: the rest is 0."""
    users = np.random.default_rng(8).normal(size=40)
    found = paired_difference(np.add.outer([0.1, 0.2, 0.6], users))
    of_seeds, of_users = np.var([0.1, 0.2, 0.6], ddof=1) / 3, users.var(ddof=1) / 40
    critical = (4.302653 * of_seeds + 2.022691 * of_users) / (of_seeds + of_users)  # t(.975) with 2 and with 39
    assert found.high - found.value == pytest.approx(critical * math.sqrt(of_seeds + of_users), rel=1e-6)


def test_one_seed_is_a_t_interval_over_users():
    users = np.random.default_rng(9).normal(0.3, size=12)
    found, interval = paired_difference([users]), seed_interval(users)
    assert found[:3] == pytest.approx(interval)
    assert found.p_value == pytest.approx(stats.ttest_1samp(users, 0).pvalue)
    assert found.seeds == 1


def test_users_all_alike_leave_the_t_interval_over_seeds():
    found = paired_difference(np.repeat([[0.1], [0.4], [0.3]], 5, axis=1))
    assert found[:3] == pytest.approx(seed_interval([0.1, 0.4, 0.3]))
    assert found.p_value == pytest.approx(stats.ttest_1samp([0.1, 0.4, 0.3], 0).pvalue)


def test_rows_of_one_user_are_one_unit():
    """Ten equal rows a user say no more than one."""
    users = np.random.default_rng(10).normal(size=(3, 20))
    once = paired_difference(users)
    repeated = paired_difference(np.repeat(users, 10, axis=1), units=np.repeat(np.arange(20), 10))
    assert repeated == pytest.approx(once)
    assert repeated.users == 20


def test_an_interval_and_its_p_value_agree():
    rng = np.random.default_rng(11)
    for _ in range(20):
        differences = rng.normal(0.2, size=(3, 1)) + rng.normal(size=(3, 30))
        p = paired_difference(differences).p_value
        at_the_edge = paired_difference(differences, level=1 - p)
        assert min(abs(at_the_edge.low), abs(at_the_edge.high)) == pytest.approx(0, abs=1e-9)
    flipped = paired_difference(-differences)
    assert flipped.p_value == pytest.approx(p)
    assert flipped.value == -paired_difference(differences).value


def test_no_variance_and_one_user():
    assert paired_difference(np.zeros((3, 4))) == (0, 0, 0, 1, 4, 3)
    assert paired_difference(np.full((3, 4), 0.25)) == (0.25, 0.25, 0.25, 0, 4, 3)
    alone = paired_difference([[0.5, 1.5]], units=["ann", "ann"])
    assert (alone.value, alone.users) == (1, 1)
    assert math.isnan(alone.low)
    assert math.isnan(alone.p_value)


@pytest.mark.parametrize("seeds", [3, 5])
@pytest.mark.parametrize(
    ("seed_share", "user_share", "rest_share"), [(0, 1, 1), (1, 1, 1), (4, 1, 1), (0, 1, 9), (1, 1, 9), (1, 0, 1)]
)
def test_users_and_seeds_are_covered_as_promised(seeds, seed_share, user_share, rest_share):
    """Shares of the variance of the mean, times the users; of the rest it has 1 / S. Of 600 trials the standard error
    is 1 percentage point."""
    users = 80
    rng = np.random.default_rng([seeds, seed_share, user_share, rest_share])
    inside = 0
    for _ in range(600):
        differences = math.sqrt(seed_share * seeds / users) * rng.normal(size=(seeds, 1))
        differences = differences + math.sqrt(user_share) * rng.normal(size=users)
        differences += math.sqrt(rest_share) * rng.normal(size=(seeds, users))
        found = paired_difference(differences)
        inside += found.low <= 0 <= found.high
    assert 0.92 <= inside / 600 <= 0.995


def test_intervals_of_one_kind_do_not_cover_both():
    """What the interval is for: with as much variance between seeds as between users, either alone is too short."""
    rng, users, seeds = np.random.default_rng(12), 80, 3
    of_users, of_seeds, of_both = [], [], []
    for _ in range(500):
        differences = math.sqrt(seeds / users) * rng.normal(size=(seeds, 1)) + rng.normal(size=users)
        differences += rng.normal(size=(seeds, users))
        one_seed = [differences.mean(0)]
        pair = zip(
            (of_users, of_seeds, of_both),
            (paired_difference(one_seed), seed_interval(differences.mean(1)), paired_difference(differences)),
            strict=True,
        )
        for covered, interval in pair:
            covered.append(interval.low <= 0 <= interval.high)
    assert np.mean(of_users) < 0.92 < np.mean(of_both)
    assert np.mean(of_seeds) < np.mean(of_both)


@pytest.mark.parametrize(
    ("differences", "options", "message"),
    [
        ([1.0, 2.0], {}, "a row a seed"),
        (np.zeros((3, 0)), {}, "a row a seed"),
        ([[1.0, math.nan]], {}, "not finite"),
        ([[1.0, 2.0]], {"units": ["u"]}, "one label a row"),
        ([[1.0, 2.0]], {"level": 0}, "between 0 and 1"),
    ],
)
def test_differences_that_are_refused(differences, options, message):
    with pytest.raises(InputError, match=message):
        paired_difference(differences, **options)


def test_holm_by_hand():
    """Sorted .01, .02, .03, .5: times 4, 3, 2, 1 they are .04, .06, .06, .5; equal ones stay equal."""
    assert holm([0.03, 0.01, 0.5, 0.02]) == pytest.approx([0.06, 0.04, 0.5, 0.06])
    assert holm([0.04, 0.015, 0.02]) == pytest.approx([0.045, 0.045, 0.045])  # .04 alone is .04, but none falls back
    assert holm([0.6, 0.7]).tolist() == [1, 1]
    assert holm([0.2]).tolist() == [0.2]
    assert holm([]).size == 0
    assert beyond_noise([0.03, 0.01, 0.5, 0.02]).tolist() == [False, True, False, False]
    assert beyond_noise([0.03, 0.01, 0.5, 0.02], level=0.9).tolist() == [True, True, False, True]
    assert beyond_noise([0.04]).tolist() == [True]


def test_holm_keeps_false_alarms_of_a_table_to_its_level():
    rng = np.random.default_rng(13)
    tables = rng.random((2000, 20))  # of 20 tests without an effect
    assert np.mean([beyond_noise(p).any() for p in tables]) == pytest.approx(0.05, abs=0.015)
    assert np.mean((tables <= 0.05).any(1)) > 0.5


@pytest.mark.parametrize("p_values", [[0.1, 1.2], [-0.1], [math.nan], 0.3])
def test_holm_refuses_what_is_no_probability(p_values):
    with pytest.raises(InputError, match="from 0 to 1"):
        holm(p_values)
