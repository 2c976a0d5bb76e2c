"""Every tokenizer on every catalogue: what its SIDs are like, and what step-level credit sees of them."""

from pathlib import Path

import numpy as np
import pandas as pd
from artefacts import Artefact, command_line, find_recorded, save_table

from sapo.analysis.results import read_csv, to_numbers
from sapo.analysis.statistics import seed_interval
from sapo.errors import InputError

NAME = "table_tokenizers"
TEXTS = ("dataset", "tokenizer", "source", "metric")
LABELS = {
    "rkmeans": "residual k-means",
    "rkmeans_balanced": "the same, balanced (OneRec)",
    "rqvae": "RQ-VAE (TIGER)",
    "lcrec": "RQ-VAE, Sinkhorn (LC-Rec)",
    "letter": "LETTER",
}


def compared(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a (dataset, tokenizer), published ones first; mean ± half of the 95 % t interval over seeds."""
    lines = []
    for (dataset, source, tokenizer), of in rows.groupby(["dataset", "source", "tokenizer"], sort=False):
        values = {metric: of_metric["value"].to_numpy() for metric, of_metric in of.groupby("metric")}
        last = int(of["levels"].iloc[0])

        def shown(metric: str, digits: int = 2, scale: float = 1, values: dict[str, np.ndarray] = values) -> str:
            if metric not in values:
                return ""
            interval = seed_interval(values[metric] * scale)
            known = len(values[metric]) > 1 and interval.low < interval.high
            half = f" ± {interval.high - interval.value:.{digits}f}" if known else ""
            return f"{interval.value:.{digits}f}{half}"

        lines.append(
            {
                "dataset": dataset,
                "SIDs": LABELS[tokenizer] if source == "measured" else f"{tokenizer}†",
                "K": last,
                "in collisions, %": shown("collision_rate", 1, 100),
                "before moving, %": shown("collisions_before", 1, 100),
                "shared out, %": shown("collisions_shared_out", 1, 100),
                "codes 1": shown("codes_1", 0),
                "perplexity 1": shown("perplexity_1", 0),
                "error": shown("reconstruction_error"),
                "neighbours": shown("neighbours_share_1"),
                "category": shown("same_category_1"),
                "forced": shown(f"forced_{last}"),
                "chance": shown(f"chance_{last}"),
                "seconds": shown("seconds", 0),
            }
        )
    return pd.DataFrame(lines)


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One table, from tokenizers.csv, which `sapo data compare` writes."""
    path = find_recorded(out, results, "tokenizers.csv")
    rows = to_numbers(read_csv(path, (*TEXTS, "levels", "seed", "value")), ["levels", "seed", "value"], str(path))
    if rows.empty:
        raise InputError(f"{path}: no rows.")
    rows = rows.sort_values(["dataset", "source"], ascending=[True, False], kind="stable")
    table = compared(rows)
    caption = (
        "SIDs of each catalogue: those published with it (†), and ours of TF-IDF vectors, K levels of at most 256 "
        f"codes, {rows.loc[rows['source'] == 'measured', 'seed'].nunique()} seeds, mean ± half of the 95 % t interval. "
        "Items in collisions after items are moved to free codes of the last level, before, and had they been given "
        "equal shares in rounds instead, as LC-Rec's and LETTER's own indexes are made; these two compare with "
        "published indexes, for once moved hardly any codes collide, however they were learnt. Codes in use on level "
        "1 and the number effectively used. Error: variance of the vectors that codes leave, before moving. "
        "Neighbours: items whose nearest neighbour has their first code. Category: pairs with the same first code "
        "whose category, two names deep, is the same. Forced: items whose prefix leaves one code for the last step. "
        "Chance: of two random items with the same last code, how often codes before it differ. Seconds of fitting by "
        "one thread, other work beside it."
    )
    files = save_table(table, out, NAME, caption)
    return [Artefact(NAME, "Tokenizers", caption, "measured, published", files, path, table)]


if __name__ == "__main__":
    command_line(main, __doc__)
