"""The ledger of claims: what the paper and its critics say, an experiment, a number, and the verdict it gives."""

from pathlib import Path

import pandas as pd
from artefacts import RECORD, Artefact, command_line, find_recorded, save_table

from sapo.analysis.results import read_csv, to_numbers

NAME = "table_claims"
TEXTS = ("claim", "said_by", "experiment", "verdict", "command")


def shown(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a finding, numbers as text: their units differ from row to row."""
    interval = [
        "" if low == high else f"[{low:.3g}, {high:.3g}]" for low, high in zip(rows["low"], rows["high"], strict=True)
    ]
    value = [f"{value:.3g}" for value in rows["value"]]
    return pd.DataFrame(
        {
            **{name: rows[name] for name in ("claim", "said_by", "experiment")},
            "value": value,
            "95 % interval": interval,
            **{name: rows[name] for name in ("verdict", "command")},
        }
    )


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One table, from claims.csv, which `sapo claims` writes."""
    path = find_recorded(out, results, "claims.csv")
    rows = to_numbers(read_csv(path, (*TEXTS, "value", "low", "high")), ["value", "low", "high"], str(path))
    table = shown(rows)
    origin = "Of the committed record, not of runs under OUT. " if path.parent == RECORD else ""
    caption = (
        f"{origin}Verdicts are computed from the numbers: against 1 for ratios, 1/2 for shares of groups, 0 for what "
        f"is lost. Exact experiments have intervals over 8 worlds of the laboratory, or none where nothing is random, "
        f"measured ones over the seeds of the recorded stage-2 rollouts; 95 % t intervals. Each command makes its rows "
        f"again."
    )
    files = save_table(table, out, NAME, caption)
    return [Artefact(NAME, "Claims", caption, "exact, measured", files, path, table)]


if __name__ == "__main__":
    command_line(main, __doc__)
