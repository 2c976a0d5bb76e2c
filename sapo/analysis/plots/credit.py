"""Credit: its units, how advantages are distributed, where there is none."""

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyBboxPatch

from sapo.analysis.statistics import Interval, seed_interval
from sapo.analysis.style import (
    FULL_WIDTH,
    METHOD_COLORS,
    _ink,
    _step_color,
    credit_color,
    new_axes,
)
from sapo.errors import InputError


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
