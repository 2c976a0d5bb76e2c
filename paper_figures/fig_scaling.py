"""How time and memory grow with completions, prompt length, steps, beams and items, against what a user would run."""

from pathlib import Path

import pandas as pd
from artefacts import Artefact, command_line, find_timing, how_timed, save_figure, setups
from matplotlib import pyplot as plt
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from sapo.analysis.plots.laboratory import plot_growth
from sapo.analysis.style import FULL_WIDTH, WORK, figure_style

NAME = "fig_scaling"
# (axis of timing.csv, label, what is drawn, quantity) of each panel
PANELS = (
    ("completions a prompt", "completions a prompt, G", None, "seconds"),
    ("prompt tokens", "tokens of a prompt", None, "seconds"),
    ("steps K", "steps, K", None, "seconds"),
    ("beams", "beams", None, "seconds"),
    ("items", "items of the catalogue", None, "seconds"),
    ("completions a prompt", "completions a prompt, G", ("policy update",), "peak_bytes"),
    ("prompt tokens", "tokens of a prompt", ("policy update",), "peak_bytes"),
    ("beams", "beams", ("beam search",), "peak_bytes"),
    ("items", "items of the catalogue", ("trie build",), "peak_bytes"),
)


def draw(rows: pd.DataFrame) -> Figure:
    """Seconds, then memory; one legend for all."""
    figure, axes = plt.subplots(3, 3, figsize=(FULL_WIDTH, 5.6))
    for ax, (axis, label, only, quantity) in zip(axes.flat, PANELS, strict=True):
        panel = rows[(rows["axis"] == axis) & rows[quantity].notna()]
        panel = panel if only is None else panel[panel["what"].isin(only)]
        plot_growth(panel, ax, quantity).set_xlabel(label)
        ax.set_title("time" if quantity == "seconds" else "memory")
    figure.align_ylabels()
    shown = rows[rows["axis"].isin([axis for axis, *_ in PANELS])]
    handles = [
        Line2D([], [], color=color, marker=marker, markersize=3, linewidth=1, label=name)
        for name, (color, marker) in WORK.items()
        if name in set(shown["what"])
    ]
    handles += [
        Line2D([], [], color="black", linewidth=1, label="this library"),
        Line2D([], [], color="black", linewidth=1, linestyle="--", label="what one would run instead"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=4)
    return figure


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One figure, from timing.csv, which `make bench` writes."""
    path, rows = find_timing(out, results)
    with figure_style():
        files = save_figure(draw(rows), out, NAME)
    shown = rows[rows["axis"].isin([axis for axis, *_ in PANELS])]
    instead = "; ".join(
        f"{what}: {', '.join(sorted(set(of_what['who']) - {'ours'}))}"
        for what, of_what in shown.groupby("what")
        if set(of_what["who"]) - {"ours"}
    )
    by_axis = ". ".join(f"Over {axis}: {setups(of_axis)}" for axis, of_axis in shown.groupby("axis", sort=False))
    caption = (
        f"Bars from the fastest to the slowest call. {by_axis}. Memory of a trie is what stays, that of the others the "
        f"most that tensors hold at once. Instead: {instead}. {how_timed(shown)}"
    )
    return [Artefact(NAME, "How cost grows", caption, "measured", files, path)]


if __name__ == "__main__":
    command_line(main, __doc__)
