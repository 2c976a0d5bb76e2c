"""The laboratory: how good a noisy step of each objective is, its bias and its silence, from dense to sparse."""

import math
from pathlib import Path

import pandas as pd
from artefacts import Artefact, command_line, find_exact, save_figure
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from sapo.analysis.plots.laboratory import plot_against_sparsity
from sapo.analysis.style import FULL_WIDTH, figure_style
from sapo.errors import InputError

NAME = "fig_exact_efficiency"
PANELS = (  # column, title, logarithmic, what it can be
    ("gain", "efficiency, one group", True, (0.0, math.inf)),
    ("gain_256", "256 groups", True, (0.0, math.inf)),
    ("cosine", "cosine", False, (-1.0, 1.0)),
    ("silent", "silent groups", False, (0.0, 1.0)),
)


def draw(rows: pd.DataFrame) -> Figure:
    """A row of panels for the smallest and one for the largest coupling, at the largest group size."""
    rows = rows[(rows["group_size"] == rows["group_size"].max()) & (rows["layout"] == "blocks_first")]
    rows = rows[rows["items"] == rows["items"].max()]
    couplings = sorted({rows["coupling"].min(), rows["coupling"].max()})
    figure, axes = plt.subplots(len(couplings), len(PANELS), figsize=(FULL_WIDTH, 1.9 * len(couplings)), squeeze=False)
    for of_row, coupling in zip(axes, couplings, strict=True):
        for ax, (column, title, log, bounds) in zip(of_row, PANELS, strict=True):
            plot_against_sparsity(rows[rows["coupling"] == coupling], column, ax, log, bounds).set_xlabel("")
            ax.set_title(title if coupling == couplings[0] else "")
        of_row[0].set_ylabel(f"coupling {coupling:g}")
    figure.supxlabel("probability of an exact match", fontsize=8)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4)
    return figure


def with_gain(rows: pd.DataFrame) -> pd.DataFrame:
    """Add `gain` and `gain_256`, the efficiencies over GRPO's in the same cell and world.

    Raises:
        InputError: a cell without GRPO.
    """
    cell = ["layout", "items", "exact_match", "coupling", "group_size", "seed"]
    measures = ["efficiency", "efficiency_256"]
    grpo = rows.loc[rows["objective"] == "grpo", [*cell, *measures]]
    joined = rows.merge(grpo, on=cell, how="left", suffixes=("", "_of_grpo"))
    if joined["efficiency_of_grpo"].isna().any():
        raise InputError("a cell has no row of grpo, which the others are compared with.")
    gains = {name: joined[name] / joined[f"{name}_of_grpo"] for name in measures}
    return joined.assign(gain=gains["efficiency"], gain_256=gains["efficiency_256"])


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One figure, from exact.csv."""
    path, rows = find_exact(out, results)
    rows = with_gain(rows)
    with figure_style():
        files = save_figure(draw(rows), out, NAME)
    caption = (
        f"Exact, in worlds of 512 trajectories (K = 3, four codes a level, two words a block, one target), groups of "
        f"{rows['group_size'].max()}. Efficiency, GRPO = 1: squared projection of the expected update on the gradient "
        f"of the expected exact match, over the second moment of the update; what a noisy step of the best length "
        f"gains is proportional to it. With 256 groups of the same prompt most noise is averaged out and bias decides. "
        f"Cosine: of the expected update with that gradient, which GRPO's follows by design. Silent: groups without "
        f"any credit; there graded, gated and suffix credit coincide, and so do SAPO and its use where GRPO is silent. "
        f"Coupling: weight of block j in the logits of "
        f"token k != j. Mean (of the efficiency geometric) and 95 % t interval over {rows['seed'].nunique()} worlds; "
        f"points of one probability are drawn beside each other."
    )
    return [Artefact(NAME, "Efficiency of step credit", caption, "exact", files, path)]


if __name__ == "__main__":
    command_line(main, __doc__)
