"""Figures of the reasoning world: gain against how rare an exact match is, and against the learning rate."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullFormatter

from sapo.analysis.statistics import seed_interval
from sapo.analysis.style import METHOD_COLORS, method_color, method_label, new_axes, ordered_methods

MARKERS = "os^DvpX"


def plot_gain_by_start(data: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """What each method gains over its start, against how often a sampled completion of the start is right.

    Small markers are seeds. Large ones are means over the seeds of one group of starts, with 95 % t intervals of the
    gain; they stand at the geometric mean of the seeds' exact matches.

    Args:
        data: columns start (which group), exact_match (above 0), method, seed, gain.
    """
    ax = new_axes(ax)
    for index, method in enumerate(ordered_methods(data["method"])):
        of_method = data[data["method"] == method]
        color, marker = method_color(method), MARKERS[index % len(MARKERS)]
        ax.plot(
            *(of_method["exact_match"], of_method["gain"]), marker, ms=2.4, color=color, alpha=0.45, mew=0, zorder=2
        )
        groups = [rows for _, rows in of_method.groupby("start")]
        middle = [float(np.exp(np.log(rows["exact_match"]).mean())) for rows in groups]
        intervals = [seed_interval(rows["gain"].to_numpy()) for rows in groups]
        order = np.argsort(middle)
        ax.errorbar(
            np.array(middle)[order],
            [intervals[place].value for place in order],
            yerr=[np.nan_to_num(intervals[place].half) for place in order],
            color=color,
            marker=marker,
            markersize=4.5,
            capsize=2,
            linewidth=1.2,
            elinewidth=0.9,
            label=method_label(method),
            zorder=4 if method == "sapo" else 3,
        )
    ax.axhline(0, color=METHOD_COLORS["stage2"], linewidth=0.9, zorder=1)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.set_xlabel("exact matches among sampled completions of the start")
    ax.set_ylabel("gain in NDCG@10")
    return ax


def plot_rates(data: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Where training ends, against the learning rate: seeds as dots, their mean as a line, the start at 0.

    Args:
        data: columns method, seed, learning_rate, gain; of seeds that tried every rate.
    """
    ax = new_axes(ax)
    for index, method in enumerate(ordered_methods(data["method"])):
        of_method, color = data[data["method"] == method], method_color(method)
        means = of_method.groupby("learning_rate")["gain"].mean()
        beside = 1.06 ** (index - data["method"].nunique() / 2)
        ax.plot(means.index * beside, means, color=color, label=method_label(method), zorder=3)
        marker = MARKERS[index % len(MARKERS)]
        ax.plot(of_method["learning_rate"] * beside, of_method["gain"], marker, ms=3, color=color, mew=0, zorder=4)
    ax.axhline(0, color=METHOD_COLORS["stage2"], linewidth=0.9, zorder=1)
    ax.set_xscale("log")
    ax.set_xlabel("learning rate")
    ax.set_ylabel("NDCG@10 over the start")
    return ax
