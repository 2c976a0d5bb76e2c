"""Curves of training."""

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from sapo.analysis.statistics import seed_interval
from sapo.analysis.style import (
    METHOD_COLORS,
    REFERENCE_LINES,
    method_color,
    method_label,
    new_axes,
    ordered_methods,
)
from sapo.errors import InputError


def plot_curve(
    data: pd.DataFrame,
    metric: str,
    ax: Axes | None = None,
    window: int = 1,
    bounds: tuple[float, float] = (-np.inf, np.inf),
) -> Axes:
    """A metric against the training step: per method the mean over seeds, and its interval as a band.

    Args:
        data: columns method, seed, step, metric, value. Only steps that every seed of a method has are drawn.
        window: each seed's curve is first averaged over this many logged steps (centred), to quieten noisy rewards.
        bounds: what the metric can be at all; the band of a t interval, which does not know, ends there.

    Raises:
        InputError: no rows of `metric`, two values for one (method, seed, step), or seeds without a common step.
    """
    ax = new_axes(ax)
    rows = data[data["metric"] == metric]
    if rows.empty:
        raise InputError(f"no rows of metric {metric!r}; there are {', '.join(sorted(data['metric'].unique()))}.")
    if rows.duplicated(["method", "seed", "step"]).any():
        raise InputError(f"{metric}: two values for one (method, seed, step); select one dataset and preset.")
    for method in ordered_methods(rows["method"]):
        runs = rows[rows["method"] == method].pivot(index="step", columns="seed", values="value").dropna()
        if runs.empty:
            raise InputError(f"{metric}: the seeds of {method} have no step in common.")
        runs = runs.rolling(window, center=True, min_periods=1).mean()
        intervals = [seed_interval(values) for values in runs.to_numpy()]
        color, single = method_color(method), runs.shape[1] == 1
        ax.plot(
            runs.index,
            [interval.value for interval in intervals],
            color=color,
            linestyle="--" if single else "-",
            label=f"{method_label(method)}, {runs.shape[1]} seed{'' if single else 's'}",
            zorder=3 if method == "sapo" else 2,
        )
        if not single:
            low, high = [interval.low for interval in intervals], [interval.high for interval in intervals]
            ax.fill_between(runs.index, *np.clip([low, high], *bounds), color=color, alpha=0.2, linewidth=0)
    ax.set_xlabel("update")
    return ax


def plot_reference_line(ax: Axes, value: float, label: str, source: str = "exact", vertical: bool = False) -> Axes:
    """A computed ("exact", dash-dotted) or somebody else's ("published", dotted) number as a line across the axes."""
    if source not in REFERENCE_LINES:
        raise InputError(f"source is {source!r}; a reference line is {' or '.join(REFERENCE_LINES)}.")
    color = METHOD_COLORS["optimum" if source == "exact" else "published"]
    line = ax.axvline if vertical else ax.axhline
    line(value, color=color, linestyle=REFERENCE_LINES[source], linewidth=1.0, label=label, zorder=1)
    return ax
