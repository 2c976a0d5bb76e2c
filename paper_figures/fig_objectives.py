"""Every objective that was trained: what it gains over the stage-2 policy it started from."""

from pathlib import Path

import pandas as pd
from artefacts import DECODING, ONE_WORLD, Artefact, command_line, find_input, save_figure
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sapo.analysis.plots.results import plot_gains
from sapo.analysis.results import paired_gains, read_results
from sapo.analysis.style import FULL_WIDTH, figure_style
from sapo.credit.objectives import OBJECTIVES
from sapo.errors import InputError

METRICS = ("ndcg@10", "recall@1")
NAME = "fig_objectives"
START = "stage2"


def draw(rows: pd.DataFrame) -> Figure:
    """One panel a metric, objectives in the order of the first."""
    best_first = paired_gains(rows, METRICS[0], START).mean().sort_values(ascending=False).index
    figure, axes = plt.subplots(1, len(METRICS), figsize=(FULL_WIDTH, 0.7 + 0.17 * len(best_first)))
    for metric, ax in zip(METRICS, axes, strict=True):
        plot_gains(rows, metric, START, ax, list(best_first))
    for ax in axes[1:]:
        ax.set_yticklabels([])
    return figure


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One figure a data set, split and preset with an objective, from results.csv."""
    path = find_input(out, results, "results.csv")
    rows = read_results(path)
    rows = rows[
        (rows["source"] == "measured") & rows["metric"].isin(METRICS) & rows["method"].isin([*OBJECTIVES, START])
    ]
    worlds = [
        (world, of_world)
        for world, of_world in rows.groupby(ONE_WORLD, sort=True)
        if of_world["method"].nunique() > 1 and START in set(of_world["method"])
    ]
    if not worlds:
        raise InputError(f"{path}: no objective beside {START}.")
    artefacts = []
    for world, of_world in worlds:
        suffix = f"-{'-'.join(world)}" if len(worlds) > 1 else ""
        with figure_style():
            files = save_figure(draw(of_world), out, NAME + suffix)
        seeds = of_world["seed"].nunique()
        caption = (
            f"{world[0]}, {world[1].replace('_', ' ')}, preset {world[2]}, n = {of_world['n'].max()} test rows. Test "
            f"metric of each objective less that of the stage-2 policy of the same seed: mean and 95 % t interval over "
            f"at most {seeds} seeds, which are the small dots; without an interval there is one seed. Each objective "
            f"at the learning rate that validation chose from one grid. {DECODING}"
        )
        artefacts.append(Artefact(NAME + suffix, "Every objective", caption, "measured", files, path))
    return artefacts


if __name__ == "__main__":
    command_line(main, __doc__)
