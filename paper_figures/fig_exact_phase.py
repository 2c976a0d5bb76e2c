"""The laboratory's phase diagram: which objective's noisy step improves exact match most."""

from pathlib import Path

import pandas as pd
from artefacts import Artefact, command_line, find_exact, save_figure
from fig_exact_efficiency import with_gain
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sapo.analysis.plots import FULL_WIDTH, figure_style, method_color, method_label, plot_winners

NAME = "fig_exact_phase"


def draw(rows: pd.DataFrame) -> Figure:
    """A panel a group size."""
    rows = rows[rows["layout"] == "blocks_first"]
    sizes = sorted(rows["group_size"].unique())
    figure, axes = plt.subplots(len(sizes), 1, figsize=(FULL_WIDTH * 0.75, 1.15 * len(sizes) + 0.5), squeeze=False)
    for ax, size in zip(axes[:, 0], sizes, strict=True):
        plot_winners(rows[rows["group_size"] == size], ax).set_title(f"groups of {size}")
        ax.set_xlabel("probability of an exact match" if size == sizes[-1] else "")
    objectives = list(dict.fromkeys(rows["objective"]))
    handles = [Patch(color=method_color(name), label=method_label(name)) for name in objectives]
    figure.legend(handles=handles, loc="outside upper center", ncols=3)
    return figure


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One figure, from exact.csv."""
    path, rows = find_exact(out, results)
    rows = with_gain(rows)
    with figure_style():
        files = save_figure(draw(rows), out, NAME)
    caption = (
        f"Exact, in the worlds of fig_exact_efficiency. The colour of a cell is the objective of the largest "
        f"efficiency, the number how many times GRPO's that is: geometric means over {rows['seed'].nunique()} worlds. "
        f"Rivals in a cell may lie within the spread of worlds, which fig_exact_efficiency shows."
    )
    return [Artefact(NAME, "Phase diagram of objectives", caption, "exact", files, path)]


if __name__ == "__main__":
    command_line(main, __doc__)
