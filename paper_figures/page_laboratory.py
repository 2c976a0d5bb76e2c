"""The laboratory: what one noisy step of each objective is worth, exactly, from dense to sparse."""

import itertools

import numpy as np
import pandas as pd
from artefacts import find_exact
from fig_exact_efficiency import with_gain
from pages import Page, Record, bullets, commands, label, markdown_table, picture

from sapo.analysis.statistics import Interval, seed_interval
from sapo.analysis.verdicts import times

FIGURES = {
    "fig_exact_efficiency": "Efficiency of a step over GRPO's, cosine with the true gradient, zero-variance groups.",
    "fig_exact_phase": "Which objective's noisy step improves exact match most, and how many times GRPO's.",
}
COLUMNS = {"gain": "one group of the prompt", "gain_256": "256 groups of the prompt"}


def ratio(rows: pd.DataFrame, column: str) -> Interval:
    """Geometric mean over worlds with its t interval."""
    return Interval(*np.exp(seed_interval(np.log(rows[column].to_numpy(float)))))


def worth(rows: pd.DataFrame, coupling: float, column: str) -> str:
    """A row an objective, a column a probability of an exact match; GRPO's step is 1."""
    cell = rows[rows["coupling"] == coupling]
    lines = []
    for objective in dict.fromkeys(cell["objective"]):
        if objective == "grpo":
            continue
        line = {"step of": label(objective)}
        for rarity, of_rarity in sorted(cell[cell["objective"] == objective].groupby("exact_match"), reverse=True):
            line[f"exact match {rarity:g}"] = times(ratio(of_rarity, column))
        lines.append(line)
    return markdown_table(pd.DataFrame(lines))


def sentences(rows: pd.DataFrame) -> list[str]:
    """What SAPO's step is worth, the rarest exact match first."""
    of_sapo = rows[(rows["objective"] == "sapo") & (rows["coupling"] == rows["coupling"].min())]
    said = []
    for (column, groups), rarity in itertools.product(COLUMNS.items(), sorted(of_sapo["exact_match"].unique())):
        found = ratio(of_sapo[of_sapo["exact_match"] == rarity], column)
        verdict = "more" if found.low > 1 else "less" if found.high < 1 else "not told apart"
        said.append(
            f"Exact match {rarity:g}, {groups}: a step of SAPO is worth {times(found)} steps of GRPO: {verdict}."
        )
    return said


def main(record: Record) -> list[Page]:
    """One page, from exact.csv."""
    _, rows = find_exact(record.folder, record.folder / "exact.csv")
    rows = with_gain(rows)
    size, items = rows["group_size"].max(), rows["items"].max()
    cell = rows[(rows["group_size"] == size) & (rows["items"] == items) & (rows["layout"] == "blocks_first")]
    worlds = cell["seed"].nunique()
    said = sentences(cell)
    blocks = [
        "In worlds small enough to write down every completion nothing needs sampling. Efficiency: the squared "
        "projection of the expected update on the gradient of the expected exact match, over the second moment of the "
        "update; what a noisy step of the best length gains is proportional to it. With many groups of the same prompt "
        "most noise is averaged out and bias decides.",
        f"K = 3 levels of four codes, groups of {size}, all {items} SIDs are items; geometric means with 95 % t "
        f"intervals over {worlds} worlds. Coupling: what block j says to token k, k not j.",
        bullets(said),
    ]
    for coupling in sorted(cell["coupling"].unique()):
        for column, groups in COLUMNS.items():
            blocks += [f"## Coupling {coupling:g}, {groups}", worth(cell, coupling, column)]
    blocks += [
        *(picture(name, caption) for name, caption in FIGURES.items()),
        "So much for one step; long runs need not follow. See [the control world](control-world.md) and [the reasoning "
        "world](reasoning-world.md) for training, [the ledger](ledger.md) for what follows for the paper's claims.",
        "## Make it again",
        commands(["sapo lab --to paper_figures/data"]),
    ]
    question = (
        "What is one noisy step of each objective worth, where exact matches are frequent and where they are rare?"
    )
    return [Page("laboratory", "The laboratory", question, said[0], tuple(blocks), tuple(FIGURES))]
