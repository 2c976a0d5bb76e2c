"""All systems on every data set that other recommenders were fitted to: quality, size, time, and what each gains."""

import itertools
from pathlib import Path

import numpy as np
import pandas as pd
from artefacts import PUBLISHED, Artefact, command_line, find_input, save_table

from sapo.analysis.plots import method_label, metric_label
from sapo.analysis.ranks import RANKS, Ranks
from sapo.analysis.results import merge_results, read_results
from sapo.analysis.tables import NOTES, results_table
from sapo.errors import InputError
from sapo.runs import read_recorded_runs, read_runs

NAME = "table_systems"
METRICS = ["recall@5", "ndcg@5", "recall@10", "ndcg@10"]
NEW = ["new/recall@10", "new/ndcg@10"]  # with the items of a history removed from its ranking
PRESETS = ("baseline", "quick")  # of a method that was run with both, the first counts
PLACE = ["dataset", "split"]


def systems(results: pd.DataFrame) -> pd.DataFrame:
    """Measured rows of the data sets that have baselines, each method with one preset, tested on the same rows."""
    measured = results[(results["source"] == "measured") & results["preset"].isin(PRESETS)]
    fitted = measured.loc[measured["preset"] == "baseline", PLACE].drop_duplicates()
    rows = measured.merge(fitted, on=PLACE)
    order = rows["preset"].map(PRESETS.index)
    rows = rows[order == order.groupby([rows[name] for name in (*PLACE, "method")]).transform("min")]
    tested = rows[rows["metric"].isin(METRICS)]
    most = tested.groupby(PLACE)["n"].transform("max")
    part = tested.loc[tested["n"] < most, [*PLACE, "method"]].drop_duplicates()
    return rows[~pd.MultiIndex.from_frame(rows[[*PLACE, "method"]]).isin(pd.MultiIndex.from_frame(part))]


def on_gpu(rows: pd.DataFrame, folder: Path) -> set[tuple[str, str, str]]:
    """Data set, split and method of rows whose seconds, or those of a fusion's parts, are some of a GPU's; `folder`
    holds a record, or runs."""
    runs = read_recorded_runs(folder) if (folder / "runs.csv").is_file() else read_runs(folder)
    gpu = {Path(run).name for run in runs["run"][~runs["hardware"].fillna("CPU").str.contains("CPU")]}
    timed = rows[rows["metric"] == "seconds"]
    parts = rows[rows["metric"].str.startswith("weight/")]
    fusions = set(zip(*(parts[name] for name in (*PLACE, "method")), strict=True))
    own = timed[timed["run"].isin(gpu)][[*PLACE, "method"]].itertuples(index=False, name=None)
    marked = {key for key in own if key not in fusions}
    used = parts[parts["value"] > 0]
    inherited = {
        (dataset, split, method)
        for dataset, split, method, metric in used[[*PLACE, "method", "metric"]].itertuples(index=False, name=None)
        if (dataset, split, metric.removeprefix("weight/")) in marked
    }
    return marked | inherited


def with_costs(table: pd.DataFrame, rows: pd.DataFrame, gpu: set[tuple[str, str, str]]) -> pd.DataFrame:
    """Millions of parameters and minutes of one fit, means over seeds, beside what a table of results has; the best
    NDCG@10 first, measured rows before published ones."""
    costs = rows[rows["metric"].isin(["parameters", "seconds"])]
    mean = costs.assign(method=costs["method"].map(method_label)).pivot_table(
        "value", [*PLACE, "method"], "metric", aggfunc="mean"
    )
    mean = mean.reindex(columns=["parameters", "seconds"])
    labelled = {(dataset, split, method_label(method)) for dataset, split, method in gpu}
    joined = table.join(mean, on=[*PLACE, "method"])
    joined.loc[joined["source"] != "measured", ["parameters", "seconds"]] = np.nan
    shown = lambda values, digits: values.map(lambda value: "" if np.isnan(value) else f"{value:.{digits}f}")  # noqa: E731
    best_first = joined["source"].map({"measured": 0, "exact": 1, "published": 2})
    joined = joined.assign(last=best_first, score=-joined["ndcg@10"]).sort_values([*PLACE, "last", "score"])
    joined = joined.drop(columns=["last", "score"]).reset_index(drop=True)
    joined["million parameters"] = shown(joined.pop("parameters") / 1e6, 2)
    joined["minutes"] = shown(joined.pop("seconds") / 60, 1)
    keys = joined[[*PLACE, "method"]].itertuples(index=False, name=None)
    marked = [key in labelled and minutes != "" for key, minutes in zip(keys, joined["minutes"], strict=True)]
    joined.loc[marked, "minutes"] += " (GPU)"
    return joined.drop(columns=["preset", "updates", "learning_rate"])


def gains(rows: pd.DataFrame, ranks: Ranks) -> pd.DataFrame:
    """Every method against the next best of its data set, metric by metric, on the same test rows."""
    lines = []
    for (dataset, split), of in rows[rows["metric"].isin(METRICS)].groupby(PLACE):
        preset = of.drop_duplicates("method").set_index("method")["preset"]
        for metric in METRICS:
            mean = of[of["metric"] == metric].groupby("method")["value"].mean().sort_values(ascending=False)
            known = [name for name in mean.index if (dataset, split, preset[name], name) in ranks]
            for one, other in itertools.pairwise(known):
                pair = [(dataset, split, preset[name], name) for name in (one, other)]
                gain = ranks.gain(pair[0], pair[1], metric)
                lines.append(
                    {
                        "dataset": dataset,
                        "split": split,
                        "metric": metric_label(metric),
                        "method": method_label(one),
                        "next best": method_label(other),
                        "gain": f"{gain.value:+.4f}",
                        "95 % interval": f"[{gain.low:+.4f}, {gain.high:+.4f}]",
                    }
                )
    return pd.DataFrame(lines)


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """Two tables, of results.csv, the ranks beside it and published numbers; none where no baseline was fitted."""
    path = find_input(out, results, "results.csv")
    rows = systems(read_results(path))
    if rows.empty:
        return []
    places = rows[PLACE].drop_duplicates()
    published = read_results(PUBLISHED).merge(places, on=PLACE)
    alike = rows.assign(preset="")  # methods of one data set compete, whatever preset they come from
    table = with_costs(
        results_table(merge_results(published, alike), [*METRICS, *NEW]), rows, on_gpu(rows, path.parent)
    )
    counts = rows[rows["metric"] == "ndcg@10"].groupby(PLACE)["n"].max()
    tested = "; ".join(f"{d} ({s.replace('_', ' ')}): n = {n:,}" for (d, s), n in counts.items())
    caption = (
        f"Whole catalogue ranked, one target a row; test rows: {tested}. Nothing of the history is removed, but for "
        "the columns of new items, which policies have not and TIGER has of 20 beams. A hit is the item itself, or, "
        "of policies that generate SIDs, its SID, which a few items share. Settings were chosen on validation rows "
        "of the first seed. Minutes are those of one fit by one core or, where it says so, by a GPU, while other "
        "jobs ran beside it, with all stages before it and the parts of a fusion. A row is made again by `sapo "
        "baselines NAME --data FOLDER`, or `sapo run --systems NAME --data FOLDER`. Published models of office and "
        f"industrial were trained on other rows than ours. {NOTES}"
    )
    files = save_table(table, out, NAME, caption)
    made = [Artefact(NAME, "All systems", caption, "measured, published", files, path, table)]
    compared = gains(rows, Ranks(path.parent))
    if compared.empty:
        raise InputError(f"{path.parent / RANKS} holds no two of the methods of {path}.")
    caption = (
        "Each system against the next best in every column: the difference of means over seeds on the same test rows, "
        f"with the 95 % interval of a paired bootstrap that draws users with all their rows. Test rows: {tested}."
    )
    files = save_table(compared, out, f"{NAME}-gains", caption)
    return [*made, Artefact(f"{NAME}-gains", "Gains over the next best", caption, "measured", files, path, compared)]


if __name__ == "__main__":
    command_line(main, __doc__)
