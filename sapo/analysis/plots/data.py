"""Pictures of data folders and of SID trees: who took how much and when, and how codes divide a catalogue."""

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import seaborn as sns
from jaxtyping import Int
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from sapo.data.interactions import Interactions
from sapo.errors import InputError

_INK, _SECOND = sns.color_palette("colorblind")[0], sns.color_palette("colorblind")[1]


def plot_lengths(data: Interactions, ax: Axes | None = None) -> Axes:
    """Share of users with at least so many items, on logarithmic axes."""
    lengths = np.sort([len(items) for items in data.items])
    ax = _axes(ax)
    ax.step(lengths, 1 - np.arange(len(lengths)) / len(lengths), where="post", color=_INK)
    if lengths[-1] > 10 * lengths[0]:
        ax.set_xscale("log")
    ax.set(yscale="log", xlabel="items of a user, at least", ylabel="share of users")
    ax.set_title(f"{len(lengths):,} users, median {int(np.median(lengths))}")
    return ax


def plot_popularity(data: Interactions, ax: Axes | None = None) -> Axes:
    """Interactions of each item, from the most to the least popular, on two logarithmic axes."""
    counts = np.sort(list(Counter(item for items in data.items for item in items).values()))[::-1]
    top = counts[: max(1, len(counts) // 10)].sum() / counts.sum()
    ax = _axes(ax)
    ax.plot(np.arange(1, len(counts) + 1), counts, color=_INK)
    ax.set(xscale="log", yscale="log", xlabel="rank of the item", ylabel="interactions")
    ax.set_title(f"{len(counts):,} items; the top tenth has {top:.0%}")
    return ax


def plot_days(data: Interactions, ax: Axes | None = None, bins: int = 60) -> Axes:
    """Interactions over time, and, where there is a published cut, when its validation and test rows begin.

    Raises:
        InputError: days are not known.
    """
    if data.days is None:
        raise InputError("the days of these interactions are not known (a column days in sequences.tsv.gz).")
    days = np.concatenate([np.asarray(of_user) for of_user in data.days])
    ax = _axes(ax)
    ax.hist(days.astype("datetime64[D]"), bins=bins, color=_INK)
    if data.published_pairs is not None:
        number = {user: at for at, user in enumerate(data.user_ids)}
        parts = (("validation ", data.published_pairs.valid, "right"), (" test", data.published_pairs.test, "left"))
        for name, rows, side in parts:
            began: Any = np.datetime64(_first_day(data, number, rows.user, rows.target), "D")
            ax.axvline(began, color=_SECOND, linewidth=0.8)
            where = ("data", "axes fraction")
            ax.annotate(name, (began, 1), xycoords=where, ha=side, va="top", fontsize=6)
    ax.set(xlabel="day", ylabel="interactions")
    ax.xaxis.set_major_locator(AutoDateLocator(minticks=3, maxticks=6))
    ax.xaxis.set_major_formatter(ConciseDateFormatter(ax.xaxis.get_major_locator()))
    return ax


def plot_repeats(data: Interactions, ax: Axes | None = None, longest: int = 20) -> Axes:
    """How often the t-th item of a user is one that the user had before, with 95 % intervals over users."""
    again: list[list[bool]] = [[] for _ in range(longest)]
    for items in data.items:
        seen: set[int] = set()
        for place, item in enumerate(items[:longest]):
            again[place].append(item in seen)
            seen.add(item)
    places = [place for place in range(1, longest) if again[place]]
    share = np.array([np.mean(again[place]) for place in places])
    half = 1.96 * np.sqrt(share * (1 - share) / [len(again[place]) for place in places])
    ax = _axes(ax)
    ax.errorbar(np.array(places) + 1, share, half, color=_INK, marker="o", markersize=2.5, linewidth=0.8)
    ax.set(xlabel="place in the sequence", ylabel="share of repeats", ylim=(0, None))
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_title(f"{sum(map(sum, again)):,} repeats in the first {longest}")
    return ax


def plot_sid_tree(
    sids: Int[Tensor, "N K"], ax: Axes | None = None, label: Callable[[tuple[int, ...]], str] | None = None
) -> Axes:
    """The tree as bars of bars: a row a level, a box a node, as wide as its items. A box that stays as wide on the next
    row has one child, a forced step.

    Args:
        label: text of a node, written where its box is wide enough.
    """
    rows = sorted(map(tuple, sids.tolist()))
    levels = sids.shape[1]
    palette = sns.color_palette("husl", 12)
    ax = _axes(ax)
    boxes, colors = [], []
    for level in range(1, levels + 1):
        start = 0
        for end in range(1, len(rows) + 1):
            if end == len(rows) or rows[end][:level] != rows[start][:level]:
                boxes.append(Rectangle((start, -level), end - start, 0.92))
                colors.append(palette[rows[start][level - 1] % len(palette)])
                if label is not None and end - start > len(rows) / 12:
                    text = label(rows[start][:level])
                    ax.text((start + end) / 2, -level + 0.46, text, ha="center", va="center", fontsize=5)
                start = end
    ax.add_collection(
        PatchCollection(boxes, facecolor=colors, edgecolor="white", linewidth=min(0.5, 40 / len(rows)), zorder=0)
    )
    ax.set(
        xlim=(0, len(rows)), ylim=(-levels, 0), xlabel="items", yticks=[-level + 0.46 for level in range(1, levels + 1)]
    )
    ax.set_yticklabels([f"level {level}" for level in range(1, levels + 1)])
    ax.grid(visible=False)
    return ax


def _first_day(data: Interactions, number: dict[str, int], users: Sequence[str], targets: Sequence[int]) -> int:
    """The earliest day on which a user took a target."""
    assert data.days is not None
    days = data.days
    return min(
        max(day for item, day in zip(data.items[number[user]], days[number[user]], strict=True) if item == target)
        for user, target in zip(users, targets, strict=True)
        if user in number and target in data.items[number[user]]
    )


def _axes(ax: Axes | None) -> Axes:
    return plt.subplots()[1] if ax is None else ax
