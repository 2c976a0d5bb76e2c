"""Component ablation: step reward and step advantage, each on and off, and stage 2 alone."""

from pathlib import Path

import pandas as pd
from artefacts import DECODING, Artefact, command_line, find_input, save_table

from sapo.analysis.results import read_results
from sapo.analysis.style import method_label
from sapo.analysis.tables import BLOCK, NOTES, results_table
from sapo.errors import InputError

METRICS = ["recall@5", "ndcg@5", "recall@10", "ndcg@10"]
CELLS = {  # method: (step reward, step advantage)
    "stage2": ("", ""),
    "grpo": ("off", "off"),
    "grpo_step_reward": ("on", "off"),
    "sapo_outcome_reward": ("off", "on"),
    "sapo": ("on", "on"),
    "sapo_sequence_mean": ("on", "on"),
}
NAME = "table_component_ablation"


def shared_seeds(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of seeds that every cell of a data set and preset has: a seed's checkpoint decides more than a cell."""
    parts = []
    for _, of_world in rows.groupby(BLOCK):
        common = set.intersection(*(set(of_cell["seed"]) for _, of_cell in of_world.groupby("method")))
        parts.append(of_world[of_world["seed"].isin(common)])
    return pd.concat(parts)


def ablation(results: pd.DataFrame) -> pd.DataFrame:
    """The cells of every data set and preset, in the order of CELLS; a cell that was not run is empty."""
    rows = results[(results["source"] == "measured") & results["method"].isin(CELLS)]
    if not rows["method"].isin({"grpo", "sapo"}).any():
        raise InputError("no measured rows of sapo or grpo.")
    rows = shared_seeds(rows)
    table = results_table(rows, METRICS).set_index([*BLOCK, "method"])
    worlds = table.index.droplevel("method").unique()
    whole = pd.MultiIndex.from_tuples([(*world, method_label(method)) for world in worlds for method in CELLS])
    table = table.reindex(whole.set_names(table.index.names)).reset_index().drop(columns="source")
    table["seeds"] = table["seeds"].fillna(0).astype(int)
    table.insert(len(BLOCK), "step reward", [CELLS[method][0] for _ in worlds for method in CELLS])
    table.insert(len(BLOCK) + 1, "step advantage", [CELLS[method][1] for _ in worlds for method in CELLS])
    return table


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One table of all data sets, from results.csv."""
    path = find_input(out, results, "results.csv")
    rows = read_results(path)
    try:
        table = ablation(rows)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None
    caption = (
        "Step reward on: the match m_k of every step; off: exact match. Step advantage on: normalised and averaged per "
        "step; off: one advantage a completion and the sequence mean. SAPO with the sequence mean separates credit "
        "from weighting; outcome reward with it is GRPO. All cells of a seed start from its stage-2 checkpoint and"
        " have the same learning-rate grid, ratio, KL and mask; shown are the seeds that every cell has, so these "
        f"means may differ from those of the main table. {DECODING} {NOTES}"
    )
    files = save_table(table, out, NAME, caption)
    return [Artefact(NAME, "Component ablation", caption, "measured", files, path, table)]


if __name__ == "__main__":
    command_line(main, __doc__)
