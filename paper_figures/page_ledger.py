"""The ledger: what the paper and its critics claim, each an experiment, a number and a verdict."""

from collections import Counter

import pandas as pd
from pages import Page, Record, commands, markdown_table

KINDS = ("holds", "fails", "undecided", "equal", "seen", "not seen")


def kind(verdict: str) -> str:
    """The first words of a verdict, which say which way it went."""
    found = [word for word in KINDS if verdict.startswith(word)]
    return found[0] if found else verdict


def counts(rows: pd.DataFrame) -> str:
    """How many experiments of a claim went which way."""
    found = Counter(map(kind, rows["verdict"]))
    return ", ".join(f"{word} in {found[word]}" for word in sorted(found, key=lambda word: (-found[word], word)))


def shown(rows: pd.DataFrame) -> str:
    """The experiments of one claim."""
    interval = [
        "" if low == high else f"[{low:.3g}, {high:.3g}]" for low, high in zip(rows["low"], rows["high"], strict=True)
    ]
    table = {"experiment": rows["experiment"], "value": [f"{value:.3g}" for value in rows["value"]]}
    return markdown_table(pd.DataFrame({**table, "95 % interval": interval, "verdict": rows["verdict"]}))


def main(record: Record) -> list[Page]:
    """One page, from claims.csv."""
    rows = record.claims
    claims = list(rows.groupby(["claim", "said_by"], sort=False))
    index = pd.DataFrame(
        [
            {"claim": claim, "said by": who, "experiments": len(of), "verdicts": counts(of)}
            for (claim, who), of in claims
        ]
    )
    blocks = [
        "Verdicts are computed from the numbers: against 1 for ratios, 1/2 for shares of groups, 0 for what is lost. "
        "Exact experiments have intervals over worlds of the laboratory, or none where nothing is random, measured "
        "ones over the seeds of recorded rollouts; 95 % t intervals.",
        markdown_table(index),
    ]
    for (claim, who), of_claim in claims:
        command = f"Again: `{'`, `'.join(dict.fromkeys(of_claim['command']))}`."
        blocks += [f"## {claim}", f"Said by: {who}. {counts(of_claim)[0].upper()}{counts(of_claim)[1:]}. {command}"]
        blocks += [shown(of_claim)]
    blocks += ["## Make it again", commands(["sapo claims"])]
    went = Counter(map(kind, rows["verdict"]))
    answer = f"{len(claims)} claims, {len(rows)} experiments: " + ", ".join(
        f"{word} in {number}" for word, number in went.most_common()
    )
    question = "Which claims of the paper and of its critics hold, in which experiment?"
    return [Page("ledger", "The ledger of claims", question, f"{answer}.", tuple(blocks))]
