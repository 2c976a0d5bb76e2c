"""Intervals: by hand, by simulation of what they promise, and against a loop over resamples."""

import math

import numpy as np
import pytest

from sapo.analysis import statistics
from sapo.analysis.statistics import bootstrap_means, paired_bootstrap, seed_interval
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
