"""How stable training is, by definitions that were fixed before any run was looked at.

All read what validation looks saw of every (seed, learning rate): columns method, seed, learning_rate, step, metric,
value. A start is the look before the first update; a run's end is its last look, also of one that was ended as
collapsed.
"""

from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from sapo.analysis.statistics import Interval, seed_interval
from sapo.errors import InputError

METRIC = "valid/ndcg@10"
CELL = ["method", "seed", "learning_rate"]


class Share(NamedTuple):
    """So many of n, with a Wilson interval over them as if they were independent."""

    interval: Interval
    hits: int
    of: int


def cells(looks: pd.DataFrame, metric: str = METRIC) -> pd.DataFrame:
    """One row a (method, seed, learning rate): `start`, `end`, `worst` and `best` of a validation metric, `updates` to
    the last look, `gain` = end - start, and `drawdown` = start - worst, at least 0.

    Raises:
        InputError: no looks of the metric, or a run without one before its first update.
    """
    rows = looks[looks["metric"] == metric].sort_values("step")
    if rows.empty:
        raise InputError(f"no looks of {metric!r}; there are {', '.join(sorted(looks['metric'].unique())) or 'none'}.")
    groups = rows.groupby(CELL)
    if late := [cell for cell, first in groups["step"].first().items() if first]:
        raise InputError(f"the run {late[0]} has no look before its first update.")
    table = pd.DataFrame(
        {
            "start": groups["value"].first(),
            "end": groups["value"].last(),
            "worst": groups["value"].min(),
            "best": groups["value"].max(),
            "updates": groups["step"].last(),
        }
    ).reset_index()
    return table.assign(gain=table["end"] - table["start"], drawdown=table["start"] - table["worst"])


def share_below_start(of_method: pd.DataFrame, level: float = 0.95) -> Share:
    """Share of (seed, rate) cells that end below their start, of one method's `cells`."""
    below, count = int((of_method["gain"] < 0).sum()), len(of_method)
    bounds = stats.binomtest(below, count).proportion_ci(level, "wilson")
    return Share(Interval(below / count, float(bounds.low), float(bounds.high)), below, count)


def best_rate(of_method: pd.DataFrame) -> float:
    """The rate with the largest mean gain over the seeds that tried all; ties go to the smaller one."""
    tried = of_method.groupby("seed")["learning_rate"].nunique()
    on_grid = of_method[of_method["seed"].isin(tried[tried == tried.max()].index)]
    gains = on_grid.groupby("learning_rate")["gain"].mean()
    return float(gains.idxmax())


def improving_decades(of_method: pd.DataFrame) -> Interval:
    """Decades between the lowest and the highest rate of the widest run of neighbouring rates that end above the start;
    a rate alone counts 0, and so does none. Mean over the seeds that tried every rate.
    """
    rates = sorted(of_method["learning_rate"].unique())
    widths = []
    for _, of_seed in of_method.groupby("seed"):
        gains = of_seed.set_index("learning_rate")["gain"]
        if len(gains) < len(rates):
            continue
        widest, first = 0.0, None
        for rate in rates:
            first = (rate if first is None else first) if gains[rate] > 0 else None
            widest = max(widest, 0.0 if first is None else float(np.log10(rate / first)))
        widths.append(widest)
    if not widths:
        raise InputError("no seed tried every rate.")
    return seed_interval(widths)


def spread(gains: pd.Series, level: float = 0.95) -> Interval:
    """Standard deviation over seeds (ddof 1) with its chi-square interval, of gains that are about normal.

    Raises:
        InputError: fewer than two seeds.
    """
    free = len(gains) - 1
    if free < 1:
        raise InputError("the spread over seeds needs at least two.")
    variance = float(gains.var())
    low, high = (free * variance / stats.chi2.ppf(point, free) for point in ((1 + level) / 2, (1 - level) / 2))
    return Interval(variance**0.5, float(low) ** 0.5, float(high) ** 0.5)


def until_gain(looks: pd.DataFrame, gain: float, metric: str = METRIC) -> pd.DataFrame:
    """When each run first was so far above its start: one row a (method, seed, rate) with `step`, and `kl` and
    `rollouts` there; nan where it never was.

    `rollouts` are the completions generated until then, from the logged mean of an update.
    """
    wide = looks.pivot_table(index=[*CELL, "step"], columns="metric", values="value")
    found = []
    for cell, of_cell in wide.groupby(CELL):
        curve = of_cell.droplevel(CELL)
        seen = curve[metric].dropna()
        above = seen.index[seen >= seen.iloc[0] + gain]
        row = dict(zip(CELL, cell, strict=True)) | {"step": np.nan, "kl": np.nan, "rollouts": np.nan}
        if len(above):
            row["step"] = above[0]
            if "kl" in curve:
                row["kl"] = curve.loc[: above[0], "kl"].dropna().iloc[-1]
            if "rollouts" in curve:
                row["rollouts"] = above[0] * curve["rollouts"].mean()
        found.append(row)
    return pd.DataFrame(found)


def gain_at_equal_kl(looks: pd.DataFrame, one: str, other: str, metric: str = METRIC) -> pd.Series:
    """By seed, the gain of one method over the start less that of another at the largest KL to the start that both
    reached, each at its best rate; of seeds that have both.

    The KL of a look is the largest that was logged until then. Between looks the gain is interpolated.
    """
    curves: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for method in (one, other):
        of_method = looks[looks["method"] == method]
        at_best = of_method[of_method["learning_rate"] == best_rate(cells(of_method, metric))]
        wide = at_best.pivot_table(index=["seed", "step"], columns="metric", values="value")
        curves[method] = {}
        for seed, curve in wide.groupby("seed"):
            curve = curve.assign(kl=curve["kl"].fillna(0).cummax()).dropna(subset=metric)
            curves[method][int(seed)] = (curve["kl"].to_numpy(), (curve[metric] - curve[metric].iloc[0]).to_numpy())
    differences = {}
    for seed in sorted(set(curves[one]) & set(curves[other])):
        reached = min(curves[method][seed][0][-1] for method in (one, other))
        gains = [float(np.interp(reached, *curves[method][seed])) for method in (one, other)]
        differences[seed] = gains[0] - gains[1]
    return pd.Series(differences, dtype=float)
