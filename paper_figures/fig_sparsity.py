"""The main figure: what step credit and outcome credit gain, against how rare exact matches are at the start."""

from pathlib import Path

import pandas as pd
from artefacts import ONE_WORLD, Artefact, command_line, find_input, save_figure
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sapo.analysis.plots.study import plot_gain_by_start
from sapo.analysis.results import read_results
from sapo.analysis.style import FULL_WIDTH, figure_style

METHODS = ("sapo", "grpo", "grpo_graded")
NAME = "fig_sparsity"


def gains_by_start(results: pd.DataFrame, metric: str = "ndcg@10") -> pd.DataFrame:
    """Columns dataset, start, exact_match, method, seed, gain: test metric less that of the seed's stage-2 policy."""
    rows = results[results["source"] == "measured"]
    wide = rows[rows["metric"] == metric].pivot(index=[*ONE_WORLD, "seed"], columns="method", values="value")
    exact = rows[(rows["metric"] == "rollouts/exact") & (rows["method"] == "stage2")]
    wide = wide.join(exact.set_index([*ONE_WORLD, "seed"])["value"].rename("exact_match"), how="inner")
    parts = [
        pd.DataFrame({"exact_match": wide["exact_match"], "method": name, "gain": wide[name] - wide["stage2"]})
        for name in METHODS
        if name in wide
    ]
    if not parts:
        return pd.DataFrame(columns=["dataset", "start", "exact_match", "method", "seed", "gain"])
    table = pd.concat(parts).dropna().reset_index().rename(columns={"preset": "start"})
    return table[table["exact_match"] > 0]


def draw(data: pd.DataFrame) -> Figure:
    """One panel."""
    figure, ax = plt.subplots(figsize=(0.75 * FULL_WIDTH, 2.7))
    plot_gain_by_start(data, ax)
    figure.legend(*ax.get_legend_handles_labels(), loc="outside upper center", ncols=3)
    return figure


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One figure of every reasoning world with a measured start, from results.csv."""
    path = find_input(out, results, "results.csv")
    data = gains_by_start(read_results(path))
    artefacts = []
    worlds = list(data.groupby("dataset"))
    for dataset, of_world in worlds:
        suffix = f"-{dataset}" if len(worlds) > 1 else ""
        with figure_style():
            files = save_figure(draw(of_world), out, NAME + suffix)
        seeds = of_world.groupby(["start", "method"])["seed"].nunique()
        caption = (
            f"{dataset}: test NDCG@10 less that of the stage-2 policy that training went on from. Each small dot is a "
            f"seed; large ones are means over {seeds.min()} to {seeds.max()} seeds whose stage 2 ended at the same "
            "share of right greedy answers, with 95 % t intervals over seeds. Rates are chosen on validation from one "
            "grid."
        )
        artefacts.append(Artefact(NAME + suffix, "Gain against sparsity", caption, "measured", files, path))
    return artefacts


if __name__ == "__main__":
    command_line(main, __doc__)
