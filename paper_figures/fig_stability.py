"""Stability: where training ends for every learning rate, and how much of the grid ends below its start."""

from pathlib import Path

import pandas as pd
from artefacts import Artefact, command_line, find_looks, read_worlds, save_figure, save_table
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sapo.analysis.plots.study import plot_rates
from sapo.analysis.stability import (
    best_rate,
    cells,
    improving_decades,
    share_below_start,
    spread,
    until_gain,
)
from sapo.analysis.statistics import seed_interval
from sapo.analysis.style import FULL_WIDTH, figure_style, method_color, method_label, ordered_methods

NAME = "fig_stability"
GAIN = 0.02  # of NDCG@10, that rollouts and KL are counted to


def on_grid(table: pd.DataFrame) -> pd.DataFrame:
    """The cells of seeds that tried every rate of their method."""
    tried = table.groupby(["method", "seed"])["learning_rate"].transform("nunique")
    return table[tried == table.groupby("method")["learning_rate"].transform("nunique")]


def measures(looks: pd.DataFrame) -> pd.DataFrame:
    """A row a method: the measures of `sapo.analysis.stability`, each with the bounds of its interval."""
    table, reached = cells(looks), until_gain(looks, GAIN)
    rows = []
    for method in ordered_methods(table["method"]):
        of_method = table[table["method"] == method]
        grid = on_grid(of_method)
        rate = best_rate(of_method)
        at_best = of_method[of_method["learning_rate"] == rate]
        below, width = share_below_start(grid), improving_decades(of_method)
        drop, gain = (seed_interval(at_best[name].to_numpy()) for name in ("drawdown", "gain"))
        first = reached[(reached["method"] == method) & (reached["learning_rate"] == rate)]
        row = {"method": method_label(method), "best rate": rate, "cells": below.of, "seeds at best": len(at_best)}
        row |= {"ends below start": below.interval.value, "from": below.interval.low, "to": below.interval.high}
        for name, interval in (("gain", gain), ("drawdown", drop), ("decades that improve", width)):
            row |= {name: interval.value, f"{name} half": interval.half}
        if len(at_best) > 1:
            sd = spread(at_best["gain"])
            row |= {"sd over seeds": sd.value, "sd from": sd.low, "sd to": sd.high}
        row |= {"seeds that gain .02": f"{first['step'].notna().sum()} of {len(first)}"}
        row |= {f"{name} to .02, median": first[name].median() for name in ("rollouts", "kl")}
        rows.append(row)
    return pd.DataFrame(rows)


def draw(table: pd.DataFrame) -> Figure:
    """Ends against rates, and the share of cells below the start."""
    grid = on_grid(table)
    figure, (ends, shares) = plt.subplots(1, 2, figsize=(FULL_WIDTH, 2.7), width_ratios=(3, 2))
    plot_rates(grid, ends)
    methods = ordered_methods(grid["method"])
    for place, method in enumerate(reversed(methods)):
        share = share_below_start(grid[grid["method"] == method])
        shares.barh(place, share.interval.value, height=0.6, color=method_color(method), alpha=0.75)
        shares.plot(share.interval[1:], [place, place], color="black", linewidth=1.0)
        shares.text(1.02, place, f"{share.hits} of {share.of}", va="center", fontsize=7)
    shares.set(
        xlim=(0, 1), xlabel="share of cells that end below the start", yticks=range(len(methods)), yticklabels=[]
    )
    shares.grid(axis="y", visible=False)
    figure.legend(*ends.get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """A figure and a table a data set and preset whose grid has several rates, from looks.csv.gz."""
    path = find_looks(out, results)
    if path is None:
        return []
    texts, numbers = ("method", "metric"), ("seed", "learning_rate", "step", "value")
    artefacts = []
    for suffix, world, looks in read_worlds(path, texts, numbers):
        table = cells(looks)
        if table["learning_rate"].nunique() < 2:
            continue
        with figure_style():
            files = save_figure(draw(table), out, NAME + suffix)
        units = (
            "A cell is a seed at a rate; Wilson intervals over cells. A run that falls below half of its start, from a "
            "quarter of its updates on, ends there."
        )
        caption = f"{world}. Last validation NDCG@10 less the first. Dots are seeds, lines their means. {units}"
        artefacts.append(Artefact(NAME + suffix, "Stability", caption, "measured", files, path))
        caption = (
            f"{world}. At the best rate: t intervals (half widths) over seeds, standard deviation over seeds with its "
            f"chi-square interval, and completions and KL at the first look that lies {GAIN} above the start. {units}"
        )
        numbers_table = measures(looks)
        name = f"table_stability{suffix}"
        files = save_table(numbers_table, out, name, caption)
        artefacts.append(Artefact(name, "Measures of stability", caption, "measured", files, path, numbers_table))
    return artefacts


if __name__ == "__main__":
    command_line(main, __doc__)
