"""Measures of stability on looks made by hand."""

import math

import numpy as np
import pandas as pd
import pytest

from sapo.analysis.stability import (
    best_rate,
    cells,
    gain_at_equal_kl,
    improving_decades,
    share_below_start,
    spread,
    until_gain,
)
from sapo.errors import InputError


def looks(**curves: list[float]) -> pd.DataFrame:
    """Looks every 20 updates of runs named seed_rate, with a KL of a thousandth of the step and 512 rollouts a time."""
    rows = []
    for name, values in curves.items():
        seed, rate = name.removeprefix("s").split("_")
        for number, value in enumerate(values):
            run = {"method": "sapo", "seed": int(seed), "learning_rate": 10.0 ** -int(rate), "step": 20 * number}
            rows.append(run | {"metric": "valid/ndcg@10", "value": value})
            if number:
                rows.append(run | {"metric": "kl", "value": 0.001 * 20 * number})
                rows.append(run | {"metric": "rollouts", "value": 512.0})
    return pd.DataFrame(rows)


# two seeds; at 1e-2 the first collapses early and the second gains
LOOKS = looks(
    s0_4=[0.10, 0.11, 0.12],
    s0_3=[0.10, 0.08, 0.16],
    s0_2=[0.10, 0.02],
    s1_4=[0.20, 0.20, 0.21],
    s1_3=[0.20, 0.25, 0.30],
    s1_2=[0.20, 0.10, 0.24],
)


def test_cells_by_hand():
    table = cells(LOOKS).set_index(["seed", "learning_rate"])
    assert table.loc[(0, 1e-3), "gain"] == pytest.approx(0.06)
    assert table.loc[(0, 1e-3), "drawdown"] == pytest.approx(0.02)
    assert table.loc[(0, 1e-4), "drawdown"] == 0  # it never was below its start
    assert table.loc[(0, 1e-2), ["end", "updates"]].tolist() == [0.02, 20]
    assert table.loc[(1, 1e-2), "drawdown"] == pytest.approx(0.1)


def test_share_of_cells_below_their_start():
    """One of six. Wilson: centre (1/6 + z^2/12) / (1 + z^2/6), half z sqrt(5/36/6 + z^2/144) / (1 + z^2/6)."""
    share = share_below_start(cells(LOOKS))
    z = 1.959964
    scale = 1 + z**2 / 6
    centre, half = (1 / 6 + z**2 / 12) / scale, z * math.sqrt(5 / 36 / 6 + z**2 / 144) / scale
    assert (share.hits, share.of) == (1, 6)
    assert share.interval == pytest.approx((1 / 6, centre - half, centre + half), abs=1e-6)


def test_best_rate_is_the_mean_over_seeds_that_tried_all():
    """Mean gains .015, .08 and -.02; a third seed that tried one rate alone changes nothing."""
    table = cells(pd.concat([LOOKS, looks(s2_4=[0.1, 0.9])]))
    assert best_rate(table) == pytest.approx(1e-3)


def test_decades_of_rates_that_improve():
    """Seed 0 improves at 1e-4 and 1e-3, one decade; seed 1 at all three, two decades."""
    width = improving_decades(cells(LOOKS))
    assert width.value == pytest.approx(1.5)
    gap = cells(looks(s0_4=[0.1, 0.2], s0_3=[0.1, 0.0], s0_2=[0.1, 0.2]))  # two rates alone, with a bad one between
    assert improving_decades(gap).value == 0


def test_spread_over_seeds():
    """Gains 1, 2, 3: variance 1 with 2 degrees of freedom; the bounds are sqrt(2 / chi2) at .975 and .025."""
    found = spread(pd.Series([1.0, 2.0, 3.0]))
    # chi-square of 2 degrees is exponential of mean 2: the point p is -2 log(1 - p)
    low, high = (math.sqrt(2 / (-2 * math.log(1 - p))) for p in (0.975, 0.025))
    assert found == pytest.approx((1.0, low, high))
    with pytest.raises(InputError, match="at least two"):
        spread(pd.Series([1.0]))


def test_until_a_gain():
    table = until_gain(LOOKS, 0.05).set_index(["seed", "learning_rate"])
    assert table.loc[(1, 1e-3), ["step", "kl", "rollouts"]].tolist() == pytest.approx([20, 0.02, 20 * 512])
    assert table.loc[(0, 1e-3), "step"] == 40
    assert np.isnan(table.loc[(0, 1e-4), "step"])
    assert np.isnan(table.loc[(0, 1e-2), "kl"])


def test_looks_that_are_not_there_are_said():
    with pytest.raises(InputError, match="no looks of 'valid/recall@1'; there are kl, rollouts, valid/ndcg@10"):
        cells(LOOKS, "valid/recall@1")
    with pytest.raises(InputError, match="no look before its first update"):
        cells(LOOKS[LOOKS["step"] > 0])


def test_gain_at_equal_kl_by_hand():
    """SAPO's best rate, 1e-3, gains .05, .10 at KL .02 and .04 on seed 1, and seed 0 falls by .02 before it gains .06.
    The other moves twice as far: at KL .04, where SAPO ends, it has gained .02 and .01."""
    other = looks(s0_3=[0.10, 0.12, 0.20], s1_3=[0.20, 0.21, 0.40]).assign(method="grpo")
    twice = other["metric"] == "kl"
    other.loc[twice, "value"] *= 2
    both = pd.concat([LOOKS, other])
    found = gain_at_equal_kl(both, "sapo", "grpo")
    assert found.to_dict() == pytest.approx({0: 0.06 - 0.02, 1: 0.10 - 0.01})
    assert gain_at_equal_kl(both, "grpo", "sapo").to_dict() == pytest.approx((-found).to_dict())
    # at half the distance of a look, half of its gain
    near = LOOKS.copy()
    near.loc[near["metric"] == "kl", "value"] /= 4  # SAPO ends at .01, a quarter of the way to the other's first look
    assert gain_at_equal_kl(pd.concat([near, other]), "sapo", "grpo")[0] == pytest.approx(0.06 - 0.02 / 4)
