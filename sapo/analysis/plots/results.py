"""Results of methods: tidy data in, Axes out. Nothing here shows or saves; a method has one colour everywhere.

Where a number comes from decides its line: measured is solid (dashed with a single seed), exact dash-dotted, published
dotted. Intervals are 95 % t intervals over seeds.
"""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from sapo.analysis.plots.curves import plot_reference_line
from sapo.analysis.results import WITHOUT_SEEDS, paired_gains, validate_results
from sapo.analysis.statistics import seed_interval
from sapo.analysis.style import (
    METHOD_COLORS,
    method_color,
    method_label,
    metric_label,
    new_axes,
)
from sapo.errors import InputError


def plot_results(data: pd.DataFrame, metric: str, ax: Axes | None = None) -> Axes:
    """One dataset's results, a row a method, best at the top: mean and interval over seeds.

    Filled dots are measured, open diamonds published; exact numbers are lines across.

    Args:
        data: rows of the results table, of one dataset, split and preset.

    Raises:
        InputError: no rows of `metric`, or rows of several datasets, splits or presets.
    """
    ax = new_axes(ax)
    rows = validate_results(data)
    rows = rows[rows["metric"] == metric]
    if rows.empty:
        raise InputError(f"no rows of metric {metric!r}; there are {', '.join(sorted(data['metric'].unique()))}.")
    ours = rows[rows["source"] == "measured"]
    if len(rows[["dataset", "split"]].drop_duplicates()) > 1 or ours["preset"].nunique() > 1:
        raise InputError("the rows are of several datasets, splits or presets; plot_results draws one.")
    for row in rows[rows["source"] == "exact"].itertuples():
        plot_reference_line(ax, row.value, method_label(row.method), "exact", vertical=True)
    ranked = rows[rows["source"] != "exact"].groupby("method")["value"].mean().sort_values()
    labels = []
    for place, method in enumerate(ranked.index):
        of_method = rows[rows["method"] == method]
        interval, color = seed_interval(of_method["value"].to_numpy()), method_color(method)
        published = of_method["source"].iloc[0] == "published"
        ax.plot(
            interval.value,
            place,
            marker="D" if published else "o",
            markersize=4,
            color=color,
            markerfacecolor="white" if published else color,
            linestyle="none",
            zorder=3,
        )
        if len(of_method) > 1:
            ax.plot([interval.low, interval.high], [place, place], "|-", ms=5, color=color, linewidth=1.4, zorder=2)
        seedless = published or method in WITHOUT_SEEDS
        runs = "" if seedless else f", {len(of_method)} seed{'s' if len(of_method) > 1 else ''}"
        labels.append(method_label(method) + runs)
    if (rows["source"] == "published").any():
        ax.plot([], [], "D", markersize=4, color=METHOD_COLORS["published"], markerfacecolor="white", label="published")
    ax.set_yticks(range(len(labels)), labels)
    ax.set_ylim(-0.6, len(labels) - 0.4)
    ax.set_xlabel(metric_label(metric))
    if (rows["source"] != "measured").any():
        ax.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    return ax


def plot_gains(
    data: pd.DataFrame, metric: str, against: str, ax: Axes | None = None, order: Sequence[str] | None = None
) -> Axes:
    """What every objective gains over a method of the same seed: mean and interval of the difference, seeds as dots.

    Args:
        data: measured rows of the results table, of one dataset, split and preset.
        against: the method that is subtracted, seed by seed.
        order: methods from the top; by their mean gain where None.

    Raises:
        InputError: no method that shares a seed with `against` in this metric.
    """
    ax = new_axes(ax)
    gains = paired_gains(data, metric, against)
    methods = list(order or gains.mean().sort_values(ascending=False).index)
    for place, method in enumerate(methods):
        of_method, color = gains[method].dropna().to_numpy(), method_color(method)
        interval = seed_interval(of_method)
        if len(of_method) > 1:
            ax.plot([interval.low, interval.high], [place, place], "|-", ms=5, color=color, linewidth=1.4, zorder=2)
            ax.plot(of_method, [place] * len(of_method), "o", ms=2, color="white", mec=color, mew=0.5, zorder=4)
        ax.plot(interval.value, place, "o", ms=4, color=color, zorder=3)
    ax.axvline(0, color=method_color(against), linewidth=0.8, zorder=1)
    ax.set_yticks(range(len(methods)), [method_label(method) for method in methods])
    ax.set_ylim(len(methods) - 0.4, -0.6)
    ax.xaxis.set_major_locator(MaxNLocator(5))  # small gains have long numbers
    ax.set_xlabel(f"{metric_label(metric)} over {method_label(against)}")
    return ax
