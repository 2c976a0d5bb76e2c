"""Intervals that name their replication unit: users within one run, or seeds across runs.

Both are paired where runs share them: methods are compared on the same users, and all objectives of a seed start from
that seed's checkpoint.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from sapo.errors import InputError

CHUNK = 4_000_000  # draws of the bootstrap in memory at a time


class Interval(NamedTuple):
    """An estimate and its interval; the bounds are nan where one replicate leaves nothing to estimate them from."""

    value: float
    low: float
    high: float

    @property
    def half(self) -> float:
        """Half the width."""
        return (self.high - self.low) / 2


def paired_bootstrap(
    a: ArrayLike,
    b: ArrayLike,
    units: ArrayLike | None = None,
    seed: int = 0,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> Interval:
    """mean(a - b) with its percentile bootstrap interval.

    Args:
        a, b: metric of two methods on the same rows, (U,).
        units: label of each row's user. Users are drawn with all their rows, because rows of one user are not
            independent; every resample is (sum of the drawn rows) / (number of drawn rows). None: every row is a unit.
        level: coverage the interval aims at.

    Raises:
        InputError: lengths that differ, no rows, a value that is not finite, a level outside (0, 1).
    """
    if np.ndim(a) != 1 or np.shape(a) != np.shape(b) or not np.size(a):
        raise InputError(f"a and b have shapes {np.shape(a)} and {np.shape(b)}: give one value a row for both.")
    difference = np.asarray(a, dtype=np.float64) - np.asarray(b, dtype=np.float64)
    return bootstrap_means(difference[:, None], units, seed, num_resamples, level)[0]


def bootstrap_means(
    values: ArrayLike,
    units: ArrayLike | None = None,
    seed: int = 0,
    num_resamples: int = 10_000,
    level: float = 0.95,
) -> list[Interval]:
    """The mean of every column with its percentile bootstrap interval; all columns see the same draws.

    Args:
        values: (U, C), a row a test row.
        units, level: as of `paired_bootstrap`.

    Raises:
        InputError: no rows, a value that is not finite, units of another length, a level outside (0, 1).
    """
    table = np.asarray(values, dtype=np.float64)
    if table.ndim != 2 or not len(table):
        raise InputError(f"values have shape {table.shape}: give rows of one value a column.")
    if not np.isfinite(table).all():
        raise InputError("a value is not finite.")
    _check_level(level)
    unit = np.arange(len(table))
    if units is not None:
        labels = np.asarray(units)
        if labels.shape != (len(table),):
            raise InputError(f"units has shape {labels.shape} for {len(table)} rows: give one label a row.")
        unit = np.unique(labels, return_inverse=True)[1]
    means, columns = table.mean(0), np.column_stack([table, np.ones(len(table))])
    sums = np.column_stack([np.bincount(unit, weights=column) for column in columns.T])  # the last one counts rows
    if len(sums) == 1:
        return [Interval(float(mean), np.nan, np.nan) for mean in means]

    rng = np.random.default_rng(seed)
    resampled = np.empty((num_resamples, len(means)))
    rows = max(1, CHUNK // len(sums))
    for start in range(0, num_resamples, rows):
        drawn = rng.integers(len(sums), size=(min(rows, num_resamples - start), len(sums)))
        places = drawn + len(sums) * np.arange(len(drawn))[:, None]
        times = np.bincount(places.ravel(), minlength=drawn.size).reshape(drawn.shape)  # that each unit was drawn
        drawn_sums = times.astype(np.float64) @ sums
        resampled[start : start + rows] = drawn_sums[:, :-1] / drawn_sums[:, -1:]
    low, high = np.quantile(resampled, [(1 - level) / 2, (1 + level) / 2], axis=0)
    return [Interval(*map(float, bounds)) for bounds in zip(means, low, high, strict=True)]


def seed_interval(values: Sequence[float] | np.ndarray, level: float = 0.95) -> Interval:
    """Mean over seeds with its t interval. A bootstrap over 3 seeds would cover 74 %, not 95 %.

    One seed has a mean and nan bounds.

    Raises:
        InputError: no values, a value that is not finite, a level outside (0, 1).
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array) or not np.isfinite(array).all():
        raise InputError(f"values must be a non-empty list of finite numbers, one a seed; got {values!r}.")
    _check_level(level)
    mean = float(array.mean())
    if len(array) == 1:
        return Interval(mean, np.nan, np.nan)
    half = float(stats.t.ppf((1 + level) / 2, len(array) - 1) * array.std(ddof=1) / np.sqrt(len(array)))
    return Interval(mean, mean - half, mean + half)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise InputError(f"level is {level}; it is a coverage between 0 and 1, such as 0.95.")
