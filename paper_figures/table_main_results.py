"""Main results: measured rows of every data set, and published ones where they were measured on the same test rows."""

import itertools
from pathlib import Path

import pandas as pd
from artefacts import (
    ABLATION_ONLY,
    AS_PRINTED,
    DECODING,
    HITS,
    ONE_WORLD,
    PUBLISHED,
    Artefact,
    command_line,
    doubtful,
    find_input,
    save_table,
)

from sapo.analysis.ranks import RANKS, Ranks
from sapo.analysis.results import merge_results, name_hits, read_results
from sapo.analysis.statistics import Difference, Interval, beyond_noise, seed_interval
from sapo.analysis.style import method_label
from sapo.analysis.tables import NOTES, results_table
from sapo.errors import InputError

HEADLINE = ["item/recall@10", "item/ndcg@10"]
METRICS = [*HEADLINE, "sid/recall@5", "sid/ndcg@5", "sid/recall@10", "sid/ndcg@10"]
COMPARED = {
    "item/ndcg@10": "by item",
    "sid/ndcg@10": "by SID",
    "full/ndcg@10": "by SID with the full softmax",
}
NAME = "table_main_results"


def with_published(results: pd.DataFrame) -> pd.DataFrame:
    """Add the published rows of those data sets and splits that have measured ones."""
    measured = results.loc[results["source"] == "measured", ["dataset", "split"]].drop_duplicates()
    return merge_results(read_results(PUBLISHED).merge(measured, on=["dataset", "split"]), results)


def by_run(results: pd.DataFrame) -> pd.DataFrame:
    """Measured values, a row a (data set, split, preset, seed, metric) and a column a method."""
    rows = results[(results["source"] == "measured") & results["metric"].isin([*METRICS, *COMPARED])]
    return rows.pivot(index=[*ONE_WORLD, "seed", "metric"], columns="method", values="value")


def paired_notes(results: pd.DataFrame, ranks: Ranks | None = None) -> list[str]:
    """SAPO minus GRPO on NDCG@10, paired over the seeds they share, by item, by SID, and with the beams' other score.

    Args:
        results: rows whose metrics say what a hit is.
        ranks: of the same runs. What it holds of both methods gives intervals over users and seeds, and verdicts after
            Holm over all of these; the rest has t intervals over seeds.
    """
    runs = by_run(results)
    if not {"sapo", "grpo"} <= set(runs.columns):
        return []
    difference = (runs["sapo"] - runs["grpo"]).dropna()
    difference = difference[difference.index.get_level_values("metric").isin(COMPARED)]
    found: dict[tuple[str, ...], Interval | Difference] = {}
    seeds: dict[tuple[str, ...], int] = {}
    for (*world, metric), values in difference.groupby([*ONE_WORLD, "metric"]):
        one, other = (*world, "sapo"), (*world, "grpo")
        if ranks is not None and all(ranks.holds(method, metric) for method in (one, other)):
            found[*world, metric] = ranks.gain(one, other, metric)
        else:
            found[*world, metric] = seed_interval(values.to_numpy(dtype=float))
        seeds[tuple(world)] = max(len(values), seeds.get(tuple(world), 0))
    tested = {key: gain.p_value for key, gain in found.items() if isinstance(gain, Difference) and gain.seeds > 1}
    beyond = {key for key, is_beyond in zip(tested, beyond_noise(list(tested.values())), strict=True) if is_beyond}
    notes = []
    for world, count in seeds.items():
        gains = []
        for metric, counted in COMPARED.items():
            if (gain := found.get((*world, metric))) is None:
                continue
            held = " over users and seeds" if (*world, metric) in tested else ""
            interval = f" [{gain.low:+.4f}, {gain.high:+.4f}]{held}" if count > 1 else ""
            mark = " *" if (*world, metric) in beyond else ""
            gains.append(f"{counted} {gain.value:+.4f}{interval}{mark}")
        dataset, split, preset = world
        name = f"{dataset} ({split.replace('_', ' ')}, {preset})"
        paired = f"{count} paired seed{'s' if count > 1 else ''}"
        notes.append(f"SAPO − GRPO, NDCG@10, {name}, {paired}: {'; '.join(gains)}.")
    if notes:
        notes.append("Intervals are 95 % ones, over seeds alone where nothing else is said.")
    if tested:
        notes.append("*: beyond noise after Holm's correction over those that hold users and seeds.")
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
    rows = results[(results["source"] == "measured") & results["metric"].isin(METRICS)]
    counts = rows.groupby(["dataset", "split"])["n"].max()
    return "; ".join(f"{d} ({s.replace('_', ' ')}): n = {n}" for (d, s), n in counts.items()) + " test rows."


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One table of all data sets, from results.csv and the published numbers."""
    path = find_input(out, results, "results.csv")
    rows = read_results(path)
    rows = rows[~rows["method"].isin(ABLATION_ONLY)]
    if not (rows["source"] == "measured").any():
        raise InputError(f"{path}: no measured rows.")
    ranks = Ranks(path.parent, rows) if (path.parent / RANKS).is_file() else None
    rows = name_hits(with_published(rows))
    table = results_table(rows, METRICS)
    caption = " ".join(
        [
            f"Whole catalogue ranked, one target a row. {HITS} –: not measured. {rows_tested(rows)} {DECODING} "
            f"{AS_PRINTED} Published models were trained on "
            "data that is not all at hand: their rows are for orientation, and the column run of "
            "paper_figures/data/published.csv says where each number stands.",
            *paired_notes(rows, ranks),
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
