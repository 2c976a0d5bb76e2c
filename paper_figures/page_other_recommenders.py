"""Recommenders that are fitted, and counting, beside each other and beside what their papers report."""

import itertools

import pandas as pd
from pages import Page, Record, bullets, commands, dataset_name, label, markdown_table
from table_systems import COUNTED, PLACE, systems

from sapo.analysis.verdicts import comparison, judge, listed
from sapo.experiments.suite import BASELINES, FUSIONS

HITS, QUALITY = "recall@10", "ndcg@10"
METRICS = {HITS: "HR@10", QUALITY: "NDCG@10"}
TOWERS = ("RecCoT blind",)  # fitted like the others, though it comes with the reasoning systems
NOTE = (
    "Not every row is of the code as it stands: when HSTU was fitted to Beauty its positions started wider (a standard "
    "deviation of 0.14 in place of 0.09), and when fusions with fitted parts were ranked, items of one score came in "
    "another order."
)
OURS = {"ReaRec": ("ReaRec ERL", "ReaRec PRL"), "LETTER": ("LETTER-TIGER",)}  # published name: what it is here


def fitted(record: Record) -> pd.DataFrame:
    """Measured rows of methods that name items."""
    rows = systems(record.results)
    return rows[rows["method"].isin([*BASELINES, *FUSIONS, *TOWERS, "cooccurrence", "item_knn", "popularity"])]


def both(values: pd.Series, prefix: str = "") -> str:
    """HR@10 / NDCG@10, empty where there is none."""
    if f"{prefix}{QUALITY}" not in values.index:
        return ""
    return " / ".join(f"{values[f'{prefix}{metric}']:.3f}" for metric in (HITS, QUALITY))


def published(record: Record, dataset: str, split: str) -> pd.DataFrame:
    """What others report for a data set: system, source, both metrics, and whether they contradict each other."""
    rows = record.published
    rows = rows[(rows["dataset"] == dataset) & (rows["split"] == split) & rows["metric"].isin([HITS, QUALITY])]
    lines = []
    for name, of_name in rows.groupby("method"):
        system, _, source = str(name).rstrip(")").partition(" (")
        values = of_name.set_index("metric")["value"]
        if {HITS, QUALITY} <= set(values.index):
            doubt = of_name["run"].str.contains("cannot both be right").any()
            lines.append({"system": system, "source": source, HITS: values[HITS], QUALITY: values[QUALITY]})
            lines[-1]["shown"] = both(values) + "?" * bool(doubt)
    return pd.DataFrame(lines, columns=["system", "source", HITS, QUALITY, "shown"])


def here(system: str) -> tuple[str, ...]:
    """What a published system is called here; none where it is not measured."""
    return OURS.get(system, (system,) if system in BASELINES else ())


def measured_table(means: pd.DataFrame, theirs: pd.DataFrame) -> str:
    """Every measured system, the best NDCG@10 first, with what others report for it."""
    lines = []
    for name in means.sort_values(QUALITY, ascending=False).index:
        values = means.loc[name].dropna()
        of_theirs = theirs[[name in here(system) for system in theirs["system"]]]
        reported = "; ".join(f"{row.shown} ({row.source})" for row in of_theirs.itertuples())
        size = f"{values['parameters'] / 1e6:.2f}" if "parameters" in values.index else ""
        lines.append(
            {
                "system": label(name),
                "HR@10 / NDCG@10": both(values),
                "seen items filtered": both(values, "new/"),
                "million parameters": size,
                "reported": reported,
            }
        )
    return markdown_table(pd.DataFrame(lines))


def against_reported(means: pd.DataFrame, theirs: pd.DataFrame) -> list[str]:
    """How far measured systems stand from each number that others report for them."""
    sentences = []
    for metric, shown in METRICS.items():
        shares = {
            f"{name} ({row['source']}) {means.loc[name, metric] / row[metric] - 1:+.0%}": means.loc[name, metric]
            / row[metric]
            - 1
            for _, row in theirs.iterrows()
            for name in here(row["system"])
            if name in means.index
        }
        if not shares:
            continue
        behind = sorted((share, name) for name, share in shares.items() if share < -0.05)
        said = f"; more than 5 % behind: {listed([name for _, name in behind])}" if behind else ""
        reached = sum(share >= 0 for share in shares.values())
        sentences.append(f"{shown}, against {len(shares)} reported numbers: {reached} reached{said}.")
    return sentences


def gains(record: Record, rows: pd.DataFrame, means: pd.DataFrame) -> list[str]:
    """The best of each kind against counting and against the next best, on the same test rows; verdicts are corrected
    for the number of pairs."""
    preset = rows.drop_duplicates("method").set_index("method")["preset"]
    keys = {name: (*rows[PLACE].iloc[0], preset[name], name) for name in preset.index}
    keys = {name: key for name, key in keys.items() if key in record.ranks}
    asked = []
    for metric in (QUALITY, HITS):
        ranked = [name for name in means[metric].sort_values(ascending=False).index if name in keys]
        alone = [name for name in ranked if name not in FUSIONS]
        asked += [(one, other, metric) for one, other in itertools.pairwise(ranked[:3])]
        asked += [(name, COUNTED, metric) for name in dict.fromkeys((*ranked[:1], *alone[:3])) if name != COUNTED]
        asked += [("LETTER-TIGER", "TIGER", metric)]
    pairs = {(frozenset(pair[:2]), pair[2]): pair for pair in reversed(asked)}  # of a pair and its mirror, the first
    asked = [pair for pair in reversed(pairs.values()) if pair[0] in keys and pair[1] in keys]
    if not asked:
        return []
    found = record.ranks.gains([(keys[one], keys[other], metric) for one, other, metric in asked])
    by_pair = dict(zip(asked, found, strict=True))
    verdicts = judge(by_pair)
    return [
        comparison(label(pair[0]), label(pair[1]), METRICS[pair[2]], gain, verdicts[pair], 4)
        for pair, gain in by_pair.items()
    ]


def main(record: Record) -> list[Page]:
    """One page; none where nothing was fitted."""
    rows = fitted(record)
    if rows.empty:
        return []
    blocks = [
        "The whole catalogue is ranked, one target a row; a hit is the item itself. Settings were chosen on validation "
        "rows of the first seed; numbers are means over seeds. Seen items filtered: the items of a history are taken "
        "out of its ranking, as RecBole and S3-Rec do. Reported numbers are other people's, for orientation: of "
        "Industrial a part of their training rows is at hand, of Office rows of all years where theirs are of two. "
        '"?" marks recall and NDCG that cannot both be right.',
    ]
    best = []
    for (dataset, split), of_place in rows.groupby(PLACE):
        means = of_place.groupby(["method", "metric"])["value"].mean().unstack()
        theirs = published(record, dataset, split)
        counts = of_place[of_place["metric"] == QUALITY]
        seeds = counts.groupby("method")["seed"].nunique().max()
        elsewhere = theirs[[not here(system) for system in theirs["system"]]].sort_values(QUALITY, ascending=False)
        name = f"{dataset_name(dataset)}, {split.replace('published_test', 'chronological pairs').replace('_', '-')}"
        first = [means[metric].idxmax() for metric in (QUALITY, HITS)]
        best.append(f"{dataset_name(dataset)}: best NDCG@10 {label(first[0])}, best HR@10 {label(first[1])}.")
        blocks += [
            f"## {name}",
            f"{int(counts['n'].max()):,} test rows, {seeds} seeds.",
            measured_table(means, theirs),
            "Differences are of means over seeds on the same rows, paired by user and seed. Their 95 % intervals hold "
            "both and are not corrected for their number; who is ahead is said after Holm's correction over the list.",
            bullets([*gains(record, of_place, means), *against_reported(means, theirs)]),
        ]
        if len(elsewhere):
            shown = elsewhere[["system", "shown", "source"]]
            blocks += [
                "Reported for these test rows, of systems that are not in the table above; some are here in small, as "
                "[policies](real-catalogues.md):",
                markdown_table(shown.rename(columns={"shown": "HR@10 / NDCG@10"})),
            ]
    blocks += [
        "## Make it again",
        "One row is `sapo baselines NAME --data FOLDER`; all of them are hours on two cores. What each system is, and "
        "how it differs from the published one: [systems](../systems.md).",
        commands(["sapo baselines --data data/office --out my/results", "sapo publish --out my/results"]),
    ]
    blocks.insert(-1, NOTE)
    question = "How far do recommenders get that do not reason, here and as published?"
    return [Page("other-recommenders", "Other recommenders", question, " ".join(best), tuple(blocks))]
