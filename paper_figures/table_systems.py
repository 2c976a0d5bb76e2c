"""All systems on every data set that other recommenders were fitted to: quality, size, time, and what each gains."""

import itertools
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
from artefacts import AS_PRINTED, BY_ITEM, HITS, PUBLISHED, Artefact, command_line, doubtful, find_input, save_table

from sapo.analysis.ranks import RANKS, Ranks
from sapo.analysis.results import WITHOUT_SEEDS, merge_results, name_hits, read_results
from sapo.analysis.statistics import beyond_noise
from sapo.analysis.style import method_label, metric_label
from sapo.analysis.tables import NOTES, results_table
from sapo.credit.objectives import OBJECTIVES
from sapo.errors import InputError
from sapo.experiments.run_folder import read_recorded_runs, read_runs
from sapo.experiments.systems import SYSTEMS

NAME = "table_systems"
HEADLINE = ["item/recall@10", "item/ndcg@10"]
COMPARED = [*HEADLINE, "sid/recall@10", "sid/ndcg@10"]
METRICS = [*HEADLINE, "sid/recall@5", "sid/ndcg@5", "sid/recall@10", "sid/ndcg@10"]
NEW = ["new/recall@10", "new/ndcg@10"]  # with the items of a history removed from its ranking
PRESETS = ("baseline", "quick")  # of a method that was run with both, the first counts
PLACE = ["dataset", "split"]
COUNTED = "cooccurrence"  # what every gain is also measured against
OF_EVERY_RUN = ("stage2", "stage2_no_thinking")


def systems(results: pd.DataFrame) -> pd.DataFrame:
    """Measured rows of the data sets that have baselines, each method with one preset, tested on the same rows."""
    measured = results[(results["source"] == "measured") & results["preset"].isin(PRESETS)]
    fitted = measured.loc[measured["preset"] == "baseline", PLACE].drop_duplicates()
    rows = measured.merge(fitted, on=PLACE)
    order = rows["preset"].map(PRESETS.index)
    rows = rows[order == order.groupby([rows[name] for name in (*PLACE, "method")]).transform("min")]
    tested = rows[rows["metric"].isin(["recall@10", "ndcg@10"])]
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
    inherited = {
        (dataset, split, method)
        for dataset, split, method, metric in parts[[*PLACE, "method", "metric"]].itertuples(index=False, name=None)
        if (dataset, split, metric.removeprefix("weight/")) in marked
    }
    return marked | inherited


def command(method: str, preset: str) -> str:
    """What makes a measured row again, up to the folder of the data and the one of results."""
    if method in WITHOUT_SEEDS:
        return "any of these"
    if preset == "baseline":
        return f"sapo baselines {shlex.quote(method)}"
    if method in OBJECTIVES:
        return f"sapo run --objectives {method}"
    if method in OF_EVERY_RUN:
        return "sapo run"
    system = next((name for name, system in SYSTEMS.items() if method in (name, system.start)), None)
    return "" if system is None else f"sapo run --systems {shlex.quote(system)}"


def with_costs(table: pd.DataFrame, rows: pd.DataFrame, gpu: set[tuple[str, str, str]]) -> pd.DataFrame:
    """Millions of parameters, minutes of one fit, means over seeds, and the command, beside what a table of results
    has; the best NDCG@10 first (by item, of published rows by SID), measured rows before published ones."""
    costs = rows[rows["metric"].isin(["parameters", "seconds"])]
    mean = costs.assign(method=costs["method"].map(method_label)).pivot_table("value", "method", "metric")
    mean = mean.reindex(columns=["parameters", "seconds"])
    made = rows.drop_duplicates("method")
    commands = {method_label(name): command(name, preset) for name, preset in made[["method", "preset"]].to_numpy()}
    labelled = {method_label(method) for _, _, method in gpu}
    joined = table.join(mean, on="method").assign(command=table["method"].map(commands))
    joined.loc[joined["source"] != "measured", ["parameters", "seconds", "command"]] = np.nan
    shown = lambda values, digits: values.map(lambda value: "" if np.isnan(value) else f"{value:.{digits}f}")  # noqa: E731
    best_first = joined["source"].map({"measured": 0, "exact": 1, "published": 2})
    score = -joined["item/ndcg@10"].fillna(joined["sid/ndcg@10"])
    joined = joined.assign(last=best_first, score=score).sort_values(["last", "score"])
    joined = joined.drop(columns=["last", "score"]).reset_index(drop=True)
    joined["million parameters"] = shown(joined.pop("parameters") / 1e6, 2)
    joined["minutes"] = shown(joined.pop("seconds") / 60, 1)
    marked = joined["method"].isin(labelled) & (joined["minutes"] != "")
    joined.loc[marked, "minutes"] += " (GPU)"
    joined["command"] = joined.pop("command")  # last
    return joined.drop(columns=[*PLACE, "preset", "updates", "learning_rate"])


def gains(rows: pd.DataFrame, ranks: Ranks) -> pd.DataFrame:
    """Every method of one data set against the next best and against counting, metric by metric; * marks what is beyond
    noise after Holm over all pairs in the table. Methods whose ranks were not kept both ways stand under one alone.

    Args:
        rows: of one data set, with metrics that say what a hit is.
    """
    preset = rows.drop_duplicates("method").set_index("method")["preset"]
    keys = {name: (*rows[PLACE].iloc[0], preset[name], name) for name in preset.index}
    keys = {name: key for name, key in keys.items() if key in ranks}
    compared = []
    for metric in COMPARED:
        mean = rows[rows["metric"] == metric].groupby("method")["value"].mean().sort_values(ascending=False)
        known = [name for name in mean.index if name in keys and ranks.holds(keys[name], metric)]
        compared += [(metric, one, other) for one, other in itertools.zip_longest(known, known[1:])]
    pairs = [(metric, one, other) for metric, one, other in compared if other]
    counted = {metric for metric, one, _ in compared if one == COUNTED}
    pairs += [(metric, one, COUNTED) for metric, one, _ in compared if metric in counted and one != COUNTED]
    if not pairs:
        return pd.DataFrame()
    pairs = list(dict.fromkeys(pairs))
    found = dict(
        zip(pairs, ranks.gains([(keys[one], keys[other], metric) for metric, one, other in pairs]), strict=True)
    )
    # A pair that stands in both columns is one test; one seed of something trained says nothing of other seeds.
    tests = {
        (metric, frozenset((one, other))): gain.p_value
        for (metric, one, other), gain in found.items()
        if gain.users > 1 and (gain.seeds > 1 or {one, other} <= WITHOUT_SEEDS)
    }
    verdicts = dict(zip(tests, beyond_noise(list(tests.values())), strict=True))
    shown = {
        (metric, one, other): f"{gain.value:+.4f} [{gain.low:+.4f}, {gain.high:+.4f}]"
        + " *" * bool(verdicts.get((metric, frozenset((one, other)))))
        for (metric, one, other), gain in found.items()
    }
    lines = []
    for metric, one, other in compared:
        line = {"metric": metric_label(metric), "method": method_label(one)}
        line |= {"next best": method_label(other) if other else "", "gain": shown.get((metric, one, other), "")}
        if COUNTED in keys:
            line[f"over {method_label(COUNTED)}"] = shown.get((metric, one, COUNTED), "")
        lines.append(line)
    return pd.DataFrame(lines)


def overview(tables: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row a measured method, a column a data set and metric; first who comes nearest to the best NDCG@10 of each."""
    columns, shares = [], []
    for name, table in tables.items():
        measured = table[table["source"] == "measured"].set_index("method")
        measured = measured[~(measured["seeds"] < measured["seeds"].max()).fillna(False)]
        shown = [f"{metric}{half}" for metric in HEADLINE for half in ("", "_half")]
        columns.append(measured[shown].rename(columns=lambda column, of=name: f"{of} {column}"))
        shares.append(measured["item/ndcg@10"] / measured["item/ndcg@10"].max())
    order = pd.concat(shares, axis=1).mean(axis=1).sort_values(ascending=False).index
    return pd.concat(columns, axis=1).loc[order].rename_axis("method").reset_index()


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """Tables of every data set and one of all, of results.csv, the ranks beside it and published numbers; none where no
    baseline was fitted."""
    path = find_input(out, results, "results.csv")
    results = read_results(path)
    rows = systems(results)
    if rows.empty:
        return []
    rows = name_hits(rows)
    published, gpu = name_hits(read_results(PUBLISHED)), on_gpu(rows, path.parent)
    ranks = Ranks(path.parent, results)
    worlds = list(rows.groupby(PLACE))
    datasets = [dataset for (dataset, _), _ in worlds]
    made, tables = [], {}
    for (dataset, split), of_world in worlds:
        name = f"{dataset}, {split.replace('_', ' ')}"
        suffix = f"-{dataset}-{split}" if len(worlds) > 1 else ""
        theirs = published[(published["dataset"] == dataset) & (published["split"] == split)]
        # methods of one data set compete, whatever preset they come from
        plain = results_table(merge_results(theirs, of_world.assign(preset="")), [*METRICS, *NEW])
        table = with_costs(plain, of_world, {key for key in gpu if key[:2] == (dataset, split)})
        tables[dataset if datasets.count(dataset) == 1 else name] = table
        tested = f"n = {of_world.loc[of_world['metric'].isin(METRICS), 'n'].max():,} test rows"
        caption = (
            f"{name}, {tested}; the whole catalogue is ranked, one target a row; the best NDCG@10 by item first. "
            f"{HITS} –: not measured. {AS_PRINTED} Nothing of the history is removed, but in the columns of new items, "
            "which count by item, the items of the history are (TIGER's are of 20 beams). Settings were chosen on "
            "validation rows of the first seed. Minutes are those of one fit by one core or, where it says so, by a "
            "GPU, while other jobs ran beside it, with all stages before it; of a fusion those of its parts; without "
            f"the search for settings. A command goes on with --data FOLDER --out OUT --split {split}. Published "
            "models of office and industrial were trained on other rows than ours. "
            f"{NOTES}"
        )
        caption = " ".join([caption, *doubtful(theirs)])
        files = save_table(table, out, f"{NAME}{suffix}", caption)
        kinds = "measured, published" if len(theirs) else "measured"
        made.append(Artefact(f"{NAME}{suffix}", f"Systems: {name}", caption, kinds, files, path, table))
        compared = gains(of_world[of_world["metric"].isin(COMPARED)], ranks)
        if compared.empty:
            raise InputError(f"{path.parent / RANKS} holds no two of the methods of {path}.")
        caption = (
            f"{name}: each system against the next best in every metric, and against co-occurrence, where the ranks of "
            f"both were kept: the difference of means over the seeds that both have, on the same {tested}, with a 95 % "
            "interval over users, each with all rows, and seeds (of methods without seeds over users alone, and so "
            f"where a trained one has a single seed, which is not tested). {HITS} *: beyond noise, which is at 5 % "
            "after Holm's correction over all pairs in this table."
        )
        files = save_table(compared, out, f"{NAME}-gains{suffix}", caption)
        made.append(Artefact(f"{NAME}-gains{suffix}", f"Gains: {name}", caption, "measured", files, path, compared))
    if len(worlds) > 1:
        table = overview(tables)
        caption = (
            "All measured systems, mean ± half of the 95 % t interval over seeds; –: not measured there, or with fewer "
            "seeds than others. Bold: best; underlined: second best. First are those that come nearest to the best "
            "NDCG@10 by item, on average over the data sets that they were measured on. "
            f"{BY_ITEM} The tables of each data set say more."
        )
        files = save_table(table, out, NAME, caption)
        made.insert(0, Artefact(NAME, "All systems", caption, "measured", files, path, table))
    return made


if __name__ == "__main__":
    command_line(main, __doc__)
