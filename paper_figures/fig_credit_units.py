"""Notation and credit units: which tokens of a completion share one credit under GRPO and under SAPO."""

from pathlib import Path

from artefacts import Artefact, command_line, save_figure
from matplotlib import pyplot as plt

from sapo.analysis.plots.credit import plot_credit_units
from sapo.analysis.style import FULL_WIDTH, figure_style

CAPTION = (
    "One completion: K thinking blocks ⟨ w … ⟩, then the K tokens s_1 … s_K of a semantic ID. Step k is block k "
    "together with s_k, although they do not stand side by side. Trajectory credit gives one advantage A to all "
    "tokens; step credit gives step k its own A_k: whether s_k is right, against the other completions of the group."
)


def main(out: Path) -> list[Artefact]:
    """Draw the diagram; it needs no data."""
    with figure_style():
        figure, ax = plt.subplots(figsize=(FULL_WIDTH, 2.3))
        plot_credit_units(ax)
        files = save_figure(figure, out, "fig_credit_units")
    return [Artefact("fig_credit_units", "What one credit reaches", CAPTION, "", files)]


if __name__ == "__main__":
    command_line(main, __doc__, takes_results=False)
