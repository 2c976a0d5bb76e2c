"""Main results: measured rows of every data set, and published ones where they were measured on the same test rows."""

import itertools
from pathlib import Path

import pandas as pd
from artefacts import (
    ABLATION_ONLY,
    DECODING,
    ONE_WORLD,
    PUBLISHED,
    Artefact,
    command_line,
    doubtful,
    find_input,
    save_table,
)

from sapo.analysis.plots import method_label
from sapo.analysis.results import merge_results, read_results
from sapo.analysis.statistics import seed_interval
from sapo.analysis.tables import NOTES, results_table
from sapo.errors import InputError

METRICS = ["recall@5", "ndcg@5", "recall@10", "ndcg@10"]
NAME = "table_main_results"


def with_published(results: pd.DataFrame) -> pd.DataFrame:
    """Add the published rows of those data sets and splits that have measured ones."""
    measured = results.loc[results["source"] == "measured", ["dataset", "split"]].drop_duplicates()
    return merge_results(read_results(PUBLISHED).merge(measured, on=["dataset", "split"]), results)


def by_run(results: pd.DataFrame) -> pd.DataFrame:
    """Measured values, a row a (data set, split, preset, seed, metric) and a column a method."""
    rows = results[(results["source"] == "measured") & results["metric"].isin([*METRICS, "full/ndcg@10"])]
    return rows.pivot(index=[*ONE_WORLD, "seed", "metric"], columns="method", values="value")


def paired_notes(results: pd.DataFrame) -> list[str]:
    """SAPO minus GRPO on NDCG@10, paired over the seeds they share, with both scores of the beams."""
    runs = by_run(results)
    if not {"sapo", "grpo"} <= set(runs.columns):
        return []
    difference = (runs["sapo"] - runs["grpo"]).dropna()
    notes = []
    for (dataset, split, preset), of_world in difference.groupby(ONE_WORLD):
        gains = []
        for metric, scored in (("ndcg@10", ""), ("full/ndcg@10", " with the full softmax")):
            values = of_world[of_world.index.get_level_values("metric") == metric].to_numpy(dtype=float)
            if len(values):
                gain = seed_interval(values)
                gains.append(f"{gain.value:+.4f}{f' [{gain.low:+.4f}, {gain.high:+.4f}]' * (len(values) > 1)}{scored}")
                seeds = f"{len(values)} paired seed{'s' if len(values) > 1 else ''}"
        if gains:
            name = f"{dataset} ({split.replace('_', ' ')}, {preset})"
            notes.append(f"SAPO − GRPO, NDCG@10, {name}, {seeds}: {'; '.join(gains)}.")
    return notes


def coinciding(results: pd.DataFrame) -> list[str]:
    """Methods with the same numbers in every run they share, as GSPO and GRPO have at ratio 1."""
    runs = by_run(results)
    notes = []
    for one, other in itertools.combinations(runs.columns, 2):
        shared = runs[[one, other]].dropna()
        if len(shared) and (shared[one] == shared[other]).all():
            notes.append(f"{method_label(one)} and {method_label(other)} coincide in every run.")
    return notes


def rows_tested(results: pd.DataFrame) -> str:
    """How many rows each data set was tested on."""
    rows = results[(results["source"] == "measured") & (results["metric"] == "ndcg@10")]
    counts = rows.groupby(["dataset", "split"])["n"].max()
    return "; ".join(f"{d} ({s.replace('_', ' ')}): n = {n}" for (d, s), n in counts.items()) + " test rows."


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
            f"Whole catalogue ranked, one target a row; a hit is the target's SID. {rows_tested(rows)} {DECODING} "
            "Published models were trained on "
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
