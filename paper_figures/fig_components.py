"""Validation NDCG@10 over updates: SAPO, GRPO and the two cells between them, the start and the optimum drawn in."""

from itertools import chain
from pathlib import Path

import pandas as pd
from artefacts import ONE_WORLD, Artefact, command_line, find_looks, read_worlds, save_figure
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sapo.analysis.plots.curves import plot_curve, plot_reference_line
from sapo.analysis.results import read_results
from sapo.analysis.stability import METRIC
from sapo.analysis.style import FULL_WIDTH, METHOD_COLORS, figure_style, method_color

CELLS = ("sapo", "grpo", "grpo_step_reward", "sapo_outcome_reward")
NAME = "fig_components"


def at_chosen_rates(looks: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """The looks of the runs that results are of: each method at the rate that validation chose."""
    rates = results[results["metric"] == "learning_rate"].groupby("method")["value"].first().rename("chosen")
    looks = looks.merge(rates, left_on="method", right_index=True)
    return looks[looks["learning_rate"] == looks["chosen"]]


def over_start(rows: pd.DataFrame) -> pd.DataFrame:
    """The looks of each seed less its first one: methods of a seed share their start, seeds do not."""
    start = rows[rows["step"] == 0].groupby(["method", "seed"])["value"].first().rename("start")
    rows = rows.merge(start, left_on=["method", "seed"], right_index=True)
    return rows.assign(value=rows["value"] - rows["start"])


def draw(rows: pd.DataFrame, optimum: float | None) -> Figure:
    """What is gained over the start; and where that is between the start and the optimum."""
    rows = rows[rows["metric"] == METRIC]
    figure, axes = plt.subplots(1, 2 if optimum else 1, figsize=(FULL_WIDTH, 2.7), squeeze=False)
    plot_curve(over_start(rows), METRIC, axes[0, 0])
    axes[0, 0].set_ylabel("NDCG@10, less the start")
    axes[0, 0].axhline(0, color=METHOD_COLORS["stage2"], linewidth=0.9, zorder=1, label="start (stage 2)")
    if optimum:
        for method, of_method in rows.groupby("method"):
            by_seed = of_method.pivot(index="step", columns="seed", values="value").dropna()
            axes[0, 1].plot(by_seed.mean(axis=1), color=method_color(str(method)))
        start = rows[rows["step"] == 0].groupby("seed")["value"].first().mean()
        axes[0, 1].axhline(start, color=METHOD_COLORS["stage2"], linewidth=0.9, zorder=1)
        plot_reference_line(axes[0, 1], optimum, "Bayes optimum")
        axes[0, 1].set(ylim=(0, 1.08 * optimum), xlabel="update", ylabel="NDCG@10")
    lines = [ax.get_legend_handles_labels() for ax in axes[0]]
    handles, labels = (list(chain(*parts)) for parts in zip(*lines, strict=True))
    figure.legend(handles, labels, loc="outside upper center", ncols=3)
    return figure


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One figure a data set, from looks.csv.gz and results.csv of the same folder."""
    path = find_looks(out, results)
    if path is None:
        return []
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
            f"{world}. Validation rows, thinking greedily, 10 beams. Left: less the start, paired by seed, mean and "
            "95 % t interval over seeds. Right: the same means between the start and the exact optimum (of the test "
            "rows). All methods of a seed go on from its stage-2 policy, each at the rate that validation chose; a "
            "curve ends where a seed of it has collapsed."
        )
        artefacts.append(Artefact(NAME + suffix, "SAPO, GRPO and the cells between", caption, "measured", files, path))
    return artefacts


if __name__ == "__main__":
    command_line(main, __doc__)
