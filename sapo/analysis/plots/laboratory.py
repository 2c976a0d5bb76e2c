"""Sweeps of the laboratory, and how cost grows."""

import itertools

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from sapo.analysis.statistics import seed_interval
from sapo.analysis.style import (
    REFERENCE_LINES,
    WORK,
    _ink,
    method_color,
    method_label,
    new_axes,
    ordered_methods,
)
from sapo.errors import InputError


def plot_against_sparsity(
    data: pd.DataFrame,
    column: str,
    ax: Axes | None = None,
    log: bool = False,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Axes:
    """A column of the laboratory's table against how rare an exact match is, rarer to the right: mean and interval over
    worlds for each objective.

    Args:
        data: columns objective, exact_match, seed, and `column`; one row for each.
        log: average logarithms and draw them, for ratios.
        bounds: what the column can be at all; the band of a t interval, which does not know, ends there.

    Raises:
        InputError: two rows for one (objective, exact match, world).
    """
    ax = new_axes(ax)
    if data.duplicated(["objective", "exact_match", "seed"]).any():
        raise InputError(f"{column}: two rows for one (objective, exact_match, seed); select one cell of the rest.")
    objectives = ordered_methods(data["objective"])
    for index, objective in enumerate(objectives):
        worlds = data[data["objective"] == objective].pivot(index="exact_match", columns="seed", values=column)
        values = worlds.to_numpy(float)
        intervals = np.array([seed_interval(row) for row in (np.log(values) if log else values)]).T
        middle, low, high = np.exp(intervals) if log else intervals
        low, high = np.clip([low, high], *bounds)
        ax.errorbar(
            worlds.index * 1.05 ** (len(objectives) / 2 - index),  # beside each other, not on top
            middle,
            np.maximum([middle - low, high - middle], 0),
            color=method_color(objective),
            linestyle=REFERENCE_LINES["exact"],
            marker="os^DvpX"[index % 7],
            markersize=2.5,
            linewidth=0.9,
            elinewidth=0.7,
            label=method_label(objective),
            zorder=3 if objective == "sapo" else 2,
        )
    ax.set_xscale("log")
    ax.invert_xaxis()
    if log:
        ax.set_yscale("log")
        low, high = ax.get_ylim()
        ax.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 30 * low else (1.0, 2.0, 5.0)))
        ax.yaxis.set_major_formatter("{x:g}")
        ax.yaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("probability of an exact match")
    return ax


def plot_winners(data: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Who is most efficient: a cell a (coupling, probability of an exact match), in the colour of the objective with
    the largest geometric mean over worlds, and how many times GRPO's that is. Hatched where the 95 % t interval of its
    lead over some rival, paired by world, holds 0.

    Args:
        data: columns objective, exact_match, coupling, seed, gain (efficiency over that of GRPO in the same world).
    """
    ax = new_axes(ax)
    logs = data.assign(gain=np.log(data["gain"])).pivot(
        index=["coupling", "exact_match", "seed"], columns="objective", values="gain"
    )
    couplings = sorted(data["coupling"].unique())
    rarities = sorted(data["exact_match"].unique(), reverse=True)
    for row, column in itertools.product(range(len(couplings)), range(len(rarities))):
        worlds = logs.loc[(couplings[row], rarities[column])]
        of_cell = worlds.mean()
        first, *rest = of_cell.sort_values(ascending=False).index
        color = method_color(first)
        ahead = all(seed_interval((worlds[first] - worlds[other]).to_numpy()).low > 0 for other in rest)
        box = Rectangle((column, row), 1, 1, facecolor=color, edgecolor="white", linewidth=1.0)
        box.set_hatch("" if ahead else "////")
        ax.add_patch(box)
        times = np.exp(of_cell.max())
        text = f"{times:,.0f}×" if times >= 10 else f"{times:.1f}×"
        plate = {"facecolor": color, "edgecolor": "none", "pad": 1.0}
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", color=_ink(color), bbox=plate)
    ax.set_xlim(0, len(rarities))
    ax.set_ylim(0, len(couplings))
    ax.set_xticks(np.arange(len(rarities)) + 0.5, [f"{rarity:g}" for rarity in rarities])
    ax.set_yticks(np.arange(len(couplings)) + 0.5, [f"{coupling:g}" for coupling in couplings])
    ax.grid(False)
    ax.set_xlabel("probability of an exact match")
    ax.set_ylabel("coupling")
    return ax


def plot_growth(data: pd.DataFrame, ax: Axes | None = None, quantity: str = "seconds") -> Axes:
    """How a cost grows: a line for each pair of `what` is done and `who` does it, on two logarithmic axes.

    "ours" is solid, everything else dashed; a marker is a kind of work. Bars run from the fastest to the slowest call.

    Args:
        data: columns value, what, who, `quantity`; for seconds low and high too.
        quantity: "seconds" or "peak_bytes", shown in MB.

    Raises:
        InputError: no rows; work that is not in `WORK`.
    """
    if data.empty:
        raise InputError("no rows of how a cost grows.")
    ax = new_axes(ax)
    unit = 1e6 if quantity == "peak_bytes" else 1.0
    if unknown := set(data["what"]) - set(WORK):
        raise InputError(f"unknown work {min(unknown)!r}; known are {', '.join(WORK)}.")
    for (what, who), rows in data.sort_values("value").groupby(["what", "who"], sort=True):
        height, mine, (color, marker) = rows[quantity] / unit, who == "ours", WORK[what]
        ranges = [height - rows["low"], rows["high"] - height] if quantity == "seconds" else None
        ax.errorbar(
            rows["value"],
            height,
            yerr=ranges,
            color=color,
            marker=marker,
            linestyle="-" if mine else "--",
            markerfacecolor=color if mine else "white",
            label=f"{what}, {who}",
            markersize=3,
            linewidth=1,
            elinewidth=0.7,
        )
    ax.set(xscale="log", yscale="log", ylabel="MB" if unit > 1 else "seconds")
    values = sorted(data["value"].unique())
    ax.set_xticks(values, [_short(value) for value in values])
    low, high = ax.get_ylim()
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if high / low < 100 else (1,)))
    ax.yaxis.set_major_formatter(FuncFormatter(lambda number, _: _short(number)))
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_minor_formatter(NullFormatter())
    return ax


def _short(value: float) -> str:
    for size, name in ((1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:g}{name}"
    return f"{value:g}"
