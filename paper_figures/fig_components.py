"""Validation NDCG@10 over updates: SAPO, GRPO and the two cells between them, the start and the optimum drawn in."""

from pathlib import Path

import pandas as pd
from artefacts import ONE_WORLD, Artefact, command_line, find_input, read_worlds, save_figure
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sapo.analysis.plots import FULL_WIDTH, figure_style, plot_curve, plot_reference_line
from sapo.analysis.results import read_results
from sapo.analysis.stability import METRIC

CELLS = ("sapo", "grpo", "grpo_step_reward", "sapo_outcome_reward")
NAME = "fig_components"


def at_chosen_rates(looks: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """The looks of the runs that results are of: each method at the rate that validation chose."""
    rates = results[results["metric"] == "learning_rate"].groupby("method")["value"].first().rename("chosen")
    looks = looks.merge(rates, left_on="method", right_index=True)
    return looks[looks["learning_rate"] == looks["chosen"]]


def draw(rows: pd.DataFrame, optimum: float | None) -> Figure:
    """One panel of what can be seen of the curves, and one up to the optimum."""
    figure, axes = plt.subplots(1, 2 if optimum else 1, figsize=(FULL_WIDTH, 2.6), squeeze=False)
    for ax in axes[0]:
        plot_curve(rows, METRIC, ax)
        start = rows[(rows["metric"] == METRIC) & (rows["step"] == 0)].groupby("seed")["value"].first().mean()
        ax.axhline(start, color="#8c8c8c", linewidth=0.9, zorder=1, label="start (stage 2)")
        ax.set_ylabel("validation NDCG@10")
    if optimum:
        plot_reference_line(axes[0, 1], optimum, "Bayes optimum")
        axes[0, 1].set_ylim(0, 1.05 * optimum)
    handles, labels = axes[0, -1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One figure a data set, from looks.csv.gz and results.csv of the same folder."""
    path = find_input(out, results, "looks.csv.gz")
    table = read_results(path.parent / "results.csv")
    texts, numbers = ("method", "metric"), ("seed", "learning_rate", "step", "value")
    artefacts = []
    for suffix, world, looks in read_worlds(path, texts, numbers):
        key = looks.iloc[0]
        of_world = table[(table[ONE_WORLD] == key[ONE_WORLD]).all(axis=1)]
        rows = at_chosen_rates(looks[looks["method"].isin(CELLS)], of_world)
        if rows.empty:
            continue
        exact = of_world[(of_world["method"] == "optimum") & (of_world["metric"] == "ndcg@10")]["value"]
        with figure_style():
            files = save_figure(draw(rows, float(exact.iloc[0]) if len(exact) else None), out, NAME + suffix)
        caption = (
            f"{world}. Validation rows, thinking greedily, 10 beams; mean and 95 % t interval over seeds. All methods "
            "of a seed go on from its stage-2 policy, each at the rate that validation chose. A curve ends where a "
            "seed of it has collapsed. The dash-dotted line is the exact optimum of the test rows."
        )
        artefacts.append(Artefact(NAME + suffix, "SAPO, GRPO and the cells between", caption, "measured", files, path))
    return artefacts


if __name__ == "__main__":
    command_line(main, __doc__)
