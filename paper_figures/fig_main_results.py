"""Main results drawn: every measured method of a data set by item, and the Bayes optimum where it is known."""

from pathlib import Path

import pandas as pd
from artefacts import ABLATION_ONLY, BY_ITEM, DECODING, ONE_WORLD, Artefact, command_line, find_input, save_figure
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sapo.analysis.plots.results import plot_results
from sapo.analysis.results import name_hits, read_results
from sapo.analysis.style import FULL_WIDTH, figure_style
from sapo.errors import InputError

METRICS = ("item/recall@10", "item/ndcg@10")
NAME = "fig_main_results"


def draw(rows: pd.DataFrame) -> Figure:
    """One panel a metric."""
    methods = rows.loc[rows["source"] == "measured", "method"].nunique()
    figure, axes = plt.subplots(1, len(METRICS), figsize=(FULL_WIDTH, 0.9 + 0.19 * methods))
    for metric, ax in zip(METRICS, axes, strict=True):
        plot_results(rows, metric, ax)
    handles, labels = axes[0].get_legend_handles_labels()
    for ax in axes:
        if (legend := ax.get_legend()) is not None:
            legend.remove()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=len(handles))
    return figure


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One figure a data set, split and preset, from results.csv."""
    path = find_input(out, results, "results.csv")
    rows = name_hits(read_results(path))
    rows = rows[rows["source"].isin(["measured", "exact"]) & rows["metric"].isin(METRICS)]
    rows = rows[~rows["method"].isin(ABLATION_ONLY)]
    if not (rows["source"] == "measured").any():
        raise InputError(f"{path}: no measured rows.")
    worlds = list(rows.groupby(ONE_WORLD, sort=True))
    artefacts = []
    for world, of_world in worlds:
        suffix = f"-{'-'.join(world)}" if len(worlds) > 1 else ""
        with figure_style():
            files = save_figure(draw(of_world), out, NAME + suffix)
        sources = "measured, exact" if (of_world["source"] == "exact").any() else "measured"
        caption = (
            f"{world[0]}, {world[1].replace('_', ' ')}, preset {world[2]}, n = {of_world['n'].max()} test rows. Mean "
            "and 95 % t interval over seeds; counting baselines have no seeds, other dots without an interval are one "
            f"seed. {BY_ITEM} {DECODING} The dash-dotted line is the exact expectation of the Bayes-optimal "
            "ranking on the same rows."
        )
        artefacts.append(Artefact(NAME + suffix, "Main results", caption, sources, files, path))
    return artefacts


if __name__ == "__main__":
    command_line(main, __doc__)
