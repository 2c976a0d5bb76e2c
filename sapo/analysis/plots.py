"""Figures: tidy data in, Axes out. Nothing here shows or saves, and a method has one colour everywhere.

Where a number comes from decides its line: measured is solid (dashed with a single seed), exact dash-dotted, published
dotted. Intervals are 95 % t intervals over seeds.
"""

import itertools
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch, Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from sapo.analysis.results import WITHOUT_SEEDS, paired_gains, validate_results
from sapo.analysis.statistics import Interval, seed_interval
from sapo.analysis.style import (
    FULL_WIDTH,
    METHOD_COLORS,
    REFERENCE_LINES,
    WORK,
    _ink,
    _step_color,
    credit_color,
    method_color,
    method_label,
    metric_label,
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


def plot_credit_units(ax: Axes | None = None, num_steps: int = 3) -> Axes:
    """What gets one credit: the tokens of one completion, K thinking blocks and then K SID tokens, and their steps.

    Trajectory credit has one shade. Step credit has one per step, and shows that block k and SID token k, which are one
    step, do not stand beside each other.
    """
    if not 1 <= num_steps <= 5:
        raise InputError(f"num_steps is {num_steps}; the diagram has room for 1 to 5 steps.")
    if ax is None:
        ax = plt.subplots(figsize=(FULL_WIDTH, 2.3))[1]
    ax.set_axis_off()
    block = ["⟨", "w", "w", "w", "⟩"]
    lengths = [float(len(block))] * num_steps + [1.0] * num_steps  # tokens of each part of the completion
    lefts = np.cumsum([0.0, *lengths[:-1]]) + 0.22 * np.arange(2 * num_steps)
    lefts[num_steps:] += 0.4  # a breath between thinking and SID
    steps = [*range(num_steps), *range(num_steps)]
    texts = [block] * num_steps + [[f"$s_{{{k + 1}}}$"] for k in range(num_steps)]
    grey = METHOD_COLORS["stage2"]

    def box(left: float, bottom: float, width: float, height: float, color: str | tuple, label: str) -> None:
        shape = "round,pad=0,rounding_size=0.12"
        edge = "white" if label.startswith("$A") else grey
        patch = FancyBboxPatch((left, bottom), width, height, boxstyle=shape, fc=color, ec=edge, linewidth=0.6)
        ax.add_patch(patch)
        ax.text(left + width / 2, bottom + height / 2, label, ha="center", va="center", color=_ink(color), fontsize=8)

    tokens, numbers, trajectory, by_step = 5.6, 4.45, 2.3, 0.0  # bottoms of the rows
    for left, length, step, labels in zip(lefts, lengths, steps, texts, strict=True):
        for token, label in enumerate(labels):
            box(left + token, tokens, 1.0, 1.15, "#f2f2f2" if label in "⟨⟩" else "white", label)
            middle = left + token + 0.5
            ax.text(middle, numbers + 0.45, str(step + 1), ha="center", va="center", fontsize=7, color="#4d4d4d")
        box(left, trajectory, length, 1.4, credit_color("trajectory"), "$A$")
        box(left, by_step, length, 1.4, _step_color(step), f"$A_{{{step + 1}}}$")

    right = lefts[-1] + 1
    for start, end, title in (
        (0, lefts[num_steps - 1] + len(block), f"{num_steps} thinking blocks"),
        (lefts[num_steps], right, f"{num_steps} SID tokens"),
    ):
        ax.plot([start, start, end, end], [7.0, 7.25, 7.25, 7.0], color=grey, linewidth=0.8)
        ax.text((start + end) / 2, 7.45, title, ha="center", va="bottom", fontsize=7)
    for name, middle in (
        ("completion", tokens + 0.575),
        ("step of the token", numbers + 0.45),
        ("trajectory credit\n(GRPO)", trajectory + 0.7),
        ("step credit\n(SAPO)", by_step + 0.7),
    ):
        ax.text(-0.4, middle, name, ha="right", va="center", fontsize=8, linespacing=1.3)
    for k in range(num_steps):  # block k and SID token k are one step
        start, end = lefts[k] + len(block) / 2, lefts[num_steps + k] + 0.5
        depth = -0.75 - 0.62 * (num_steps - 1 - k)
        ax.plot([start, start, end, end], [-0.12, depth, depth, -0.12], color=_step_color(k), linewidth=1.2)
        ax.text(start + 0.15, depth + 0.08, f"step {k + 1}", fontsize=6, va="bottom", color="#4d4d4d")
    ax.set_xlim(-0.3 * right, right + 0.1)
    ax.set_ylim(-0.9 - 0.62 * (num_steps - 1), 8.4)
    return ax


def plot_advantage_distributions(data: pd.DataFrame, ax: Axes | None = None, bin_width: float = 0.25) -> Axes:
    """Histograms of the non-zero advantages, one row a credit unit, all on one scale; zeros are counted at the right.

    Args:
        data: columns credit ("trajectory", "step 1", ...) and advantage, one row a completion.
    """
    ax = new_axes(ax)
    units = _credit_units(data)
    limit = max(np.ceil(data["advantage"].abs().max() / bin_width), 1) * bin_width
    edges = np.arange(-limit, limit + bin_width / 2, bin_width)
    shares, zeros = {}, {}
    for unit in units:
        values = data.loc[data["credit"] == unit, "advantage"].to_numpy()
        shares[unit] = np.histogram(values[values != 0], edges)[0] / len(values)
        zeros[unit] = float((values == 0).mean())
    tallest = max(max(share.max() for share in shares.values()), 1e-12)
    for row, unit in enumerate(reversed(units)):
        ax.bar(
            edges[:-1],
            0.82 * shares[unit] / tallest,
            width=bin_width,
            align="edge",
            bottom=row,
            color=credit_color(unit),
            edgecolor="white",
            linewidth=0.3,
        )
        ax.axhline(row, color="#4d4d4d", linewidth=0.5)
        ax.text(1.02, row + 0.35, f"{zeros[unit]:.0%}", transform=ax.get_yaxis_transform(), va="center", fontsize=7)
    ax.text(
        1.02, len(units) - 0.08, "zero", transform=ax.get_yaxis_transform(), va="center", fontsize=7, style="italic"
    )
    ax.axvline(0, color="#4d4d4d", linewidth=0.5, linestyle=(0, (2, 2)))
    ax.set_yticks([row + 0.35 for row in range(len(units))], list(reversed(units)))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.spines["left"].set_visible(False)
    ax.set_xlim(edges[0], edges[-1])
    ax.set_ylim(0, len(units))
    ax.set_xlabel("advantage of a completion")
    return ax


def plot_zero_signal(data: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of groups without spread, whose advantages are all 0: a bar a credit unit, a dot a seed.

    Args:
        data: columns credit, seed, value.
    """
    units = _credit_units(data)
    ax = _plot_shares(data, "credit", units, [credit_color(unit) for unit in units], ax)
    ax.set_xlabel("share of groups")
    return ax


def plot_sign_disagreement(data: pd.DataFrame, ax: Axes | None = None) -> Axes:
    """Share of completions whose steps get credit of different signs, beside those of one sign and of none.

    Args:
        data: columns signs ("different signs", "one sign", "no signal"), seed, value.
    """
    kinds = ["different signs", "one sign", "no signal"]
    colors = ["#404040", "#8c8c8c", "#d9d9d9"]  # no method's: these are kinds of completions
    ax = _plot_shares(data, "signs", kinds, colors, ax)
    ax.set_xlabel("share of completions")
    return ax


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


def _plot_shares(data: pd.DataFrame, column: str, names: list[str], colors: list, ax: Axes | None) -> Axes:
    """Horizontal bars from 0 to 1: mean over seeds, interval, and every seed as a dot."""
    ax = new_axes(ax)
    for place, (name, color) in enumerate(zip(reversed(names), reversed(colors), strict=True)):
        values = data.loc[data[column] == name, "value"].to_numpy()
        interval: Interval = seed_interval(values)
        ax.barh(place, interval.value, height=0.62, color=color, alpha=0.75)
        if len(values) > 1:
            ax.plot([interval.low, interval.high], [place, place], color="black", linewidth=1.0)
        spread = np.linspace(-0.16, 0.16, len(values)) if len(values) > 1 else np.zeros(1)
        ax.plot(
            values, place + spread, "o", markersize=2.6, color="white", mec="black", mew=0.6, clip_on=False, zorder=4
        )
    ax.set_yticks(range(len(names)), list(reversed(names)))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="y", visible=False)
    ax.set_xlim(0, 1)
    return ax


def _credit_units(data: pd.DataFrame) -> list[str]:
    """ "trajectory", then the steps by number."""
    units = sorted(data["credit"].unique(), key=lambda unit: (unit != "trajectory", len(unit), unit))
    if not units:
        raise InputError("no rows: there is no credit to draw.")
    return units
