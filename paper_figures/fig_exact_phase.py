"""The laboratory's phase diagram: which objective's noisy step improves exact match most."""

from pathlib import Path

import pandas as pd
from artefacts import Artefact, command_line, find_exact, save_figure
from fig_exact_efficiency import with_gain
from matplotlib import pyplot as plt
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from sapo.analysis.plots.laboratory import plot_winners
from sapo.analysis.style import FULL_WIDTH, figure_style, method_color, method_label

NAME = "fig_exact_phase"


def draw(rows: pd.DataFrame) -> Figure:
    """A row of panels for each group size, and one for the smaller catalogue; one group of the prompt at the left, 256
    at the right."""
    rows = rows[rows["layout"] == "blocks_first"]
    sizes, most = sorted(rows["group_size"].unique()), rows["items"].max()
    panels = [(size, most) for size in sizes]
    panels += [(sizes[-1], items) for items in sorted(rows["items"].unique(), reverse=True) if items < most]
    figure, axes = plt.subplots(len(panels), 2, figsize=(FULL_WIDTH, 1.15 * len(panels) + 0.5), squeeze=False)
    for of_row, (size, items) in zip(axes, panels, strict=True):
        cell = rows[(rows["group_size"] == size) & (rows["items"] == items)]
        for ax, column, groups in zip(of_row, ("gain", "gain_256"), ("one group", "256 groups"), strict=True):
            only = "" if items == most else f", {items} of {most} SIDs are items"
            plot_winners(cell.assign(gain=cell[column]), ax).set_title(f"{groups} of {size}{only}")
            ax.set_xlabel("probability of an exact match" if ax in axes[-1] else "")
        of_row[1].set_ylabel("")
    seen = {to_hex(patch.get_facecolor()) for ax in axes.flat for patch in ax.patches}
    objectives = [name for name in dict.fromkeys(rows["objective"]) if to_hex(method_color(name)) in seen]
    handles = [Patch(color=method_color(name), label=method_label(name)) for name in objectives]
    handles.append(Patch(facecolor="#bbbbbb", edgecolor="white", hatch="////", label="no clear winner"))
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
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
        f"Hatched: the 95 % t interval of its lead over some rival, paired by world, holds 0."
    )
    return [Artefact(NAME, "Phase diagram of objectives", caption, "exact", files, path)]


if __name__ == "__main__":
    command_line(main, __doc__)
