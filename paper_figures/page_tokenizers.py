"""Tokenizers: what semantic IDs of each kind are like, and what step-level credit sees of them."""

from pages import Page, Record, bullets, commands, dataset_name, markdown_table
from table_tokenizers import LABELS, TEXTS, compared

from sapo.analysis.results import read_csv, to_numbers
from sapo.analysis.statistics import seed_interval

COLLISIONS = "collisions_before"


def main(record: Record) -> list[Page]:
    """One page, from tokenizers.csv."""
    path = record.folder / "tokenizers.csv"
    rows = to_numbers(read_csv(path, (*TEXTS, "levels", "seed", "value")), ["levels", "seed", "value"], str(path))
    rows = rows.sort_values(["dataset", "source"], ascending=[True, False], kind="stable")
    measured = rows[rows["source"] == "measured"]
    blocks = [
        f"Ours are of TF-IDF vectors of the items' texts, {measured['seed'].nunique()} seeds, mean ± half of the 95 % "
        "t interval; † are published with the data. Items in collisions: after items were moved to free codes of the "
        "last level, before, and had they been given equal shares in rounds instead (LC-Rec, LETTER). Neighbours: "
        "items whose nearest neighbour has their first code. Forced: items whose prefix leaves one code for the last "
        "step, which then can earn no credit. Chance: of two random items with the same last code, how often earlier "
        "codes differ.",
    ]
    answers = []
    for dataset, of_dataset in rows.groupby("dataset"):
        ours = of_dataset[(of_dataset["source"] == "measured") & (of_dataset["metric"] == COLLISIONS)]
        means = {
            LABELS.get(name, name): seed_interval(of["value"].to_numpy(float)).value
            for name, of in ours.groupby("tokenizer")
        }
        table = compared(of_dataset).drop(columns=["dataset", "codes 1", "category", "seconds"])
        blocks += [f"## {dataset_name(str(dataset))}", markdown_table(table)]
        if means:
            fewest = min(means, key=means.__getitem__)
            answers.append(f"{dataset_name(str(dataset))}: fewest collisions as learnt {fewest}, {means[fewest]:.1%}.")
    blocks += [
        bullets(answers),
        "## Make it again",
        commands(["sapo data compare data/office --to paper_figures/data"]),
    ]
    question = "What do the tokenizers of the field make of the same texts?"
    return [Page("tokenizers", "Tokenizers", question, " ".join(answers), tuple(blocks))]
