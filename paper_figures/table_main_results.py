"""Main results: measured rows of every data set, and published ones where they were measured on the same test rows."""

import itertools
from pathlib import Path

import pandas as pd
from artefacts import ONE_WORLD, PUBLISHED, Artefact, command_line, find_input, save_table

from sapo.analysis.plots import method_label
from sapo.analysis.results import merge_results, read_results
from sapo.analysis.statistics import seed_interval
from sapo.analysis.tables import NOTES, results_table
from sapo.errors import InputError

METRICS = ["recall@5", "ndcg@5", "recall@10", "ndcg@10"]
ABLATION_ONLY = ("grpo_step_reward", "sapo_outcome_reward", "sapo_sequence_mean")
NAME = "table_main_results"


def with_published(results: pd.DataFrame) -> pd.DataFrame:
    """Add the published rows of those data sets and splits that have measured ones."""
    measured = results.loc[results["source"] == "measured", ["dataset", "split"]].drop_duplicates()
    return merge_results(read_results(PUBLISHED).merge(measured, on=["dataset", "split"]), results)


def by_run(results: pd.DataFrame) -> pd.DataFrame:
    """Measured values, a row a (data set, split, preset, seed, metric) and a column a method."""
    rows = results[(results["source"] == "measured") & results["metric"].isin(METRICS)]
    return rows.pivot(index=[*ONE_WORLD, "seed", "metric"], columns="method", values="value")


def paired_notes(results: pd.DataFrame) -> list[str]:
    """SAPO minus GRPO on NDCG@10, paired over the seeds they share: one sentence a data set and preset."""
    runs = by_run(results)
    if not {"sapo", "grpo"} <= set(runs.columns):
        return []
    difference = (runs["sapo"] - runs["grpo"]).dropna().xs("ndcg@10", level="metric")
    notes = []
    for (dataset, split, preset), values in difference.groupby(ONE_WORLD):
        gain = seed_interval(values.to_numpy(dtype=float))
        interval = f" [{gain.low:+.4f}, {gain.high:+.4f}]" if len(values) > 1 else ""
        notes.append(
            f"SAPO − GRPO, NDCG@10, {dataset} ({split.replace('_', ' ')}, {preset}): {gain.value:+.4f}{interval}, "
            f"{len(values)} paired seed{'s' if len(values) > 1 else ''}."
        )
    return notes


def doubtful(results: pd.DataFrame) -> list[str]:
    """Published methods whose numbers contradict each other."""
    rows = results[results["run"].str.contains("cannot both be right")]
    notes = (
        f"As published, recall and NDCG of {', '.join(sorted(methods.unique()))} on {dataset} cannot both be right."
        for dataset, methods in rows.groupby("dataset")["method"]
    )
    return list(notes)


def coinciding(results: pd.DataFrame) -> list[str]:
    """Methods with the same numbers in every run they share, as GSPO and GRPO have at ratio 1."""
    runs = by_run(results)
    notes = []
    for one, other in itertools.combinations(runs.columns, 2):
        shared = runs[[one, other]].dropna()
        if len(shared) and (shared[one] == shared[other]).all():
            notes.append(f"{method_label(one)} and {method_label(other)} coincide in every run.")
    return notes


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One table of all data sets, from results.csv and the published numbers."""
    path = find_input(out, results, "results.csv")
    rows = read_results(path)
    rows = rows[~rows["method"].isin(ABLATION_ONLY)]
    if not (rows["source"] == "measured").any():
        raise InputError(f"{path}: no measured rows.")
    rows = with_published(rows)
    table = results_table(rows, METRICS)
    caption = " ".join(
        [
            "Whole catalogue ranked, one target a row; a hit is the target's SID. Published models were trained on "
            "data that is not all at hand: their rows are for orientation, and the column run of "
            "paper_figures/data/published.csv says where each number stands.",
            *paired_notes(rows),
            *coinciding(rows),
            *doubtful(rows),
            NOTES,
        ]
    )
    files = save_table(table, out, NAME, caption)
    sources = ", ".join(source for source in ("measured", "exact", "published") if (table["source"] == source).any())
    return [Artefact(NAME, "Main results", caption, sources, files, path, table)]


if __name__ == "__main__":
    command_line(main, __doc__)
