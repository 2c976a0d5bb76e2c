"""What more completions a prompt cost: seconds and memory from G = 4 to 64."""

from pathlib import Path

import pandas as pd
from artefacts import Artefact, command_line, find_timing, how_timed, save_table, setups

NAME = "table_group_size"


def per_group_size(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a group size and kind of work; growth is the time of a row over that of half its completions."""
    rows = rows.sort_values(["what", "value"])
    lines = []
    for what, of_what in rows.groupby("what", sort=False):
        ours = of_what[of_what["who"] == "ours"].set_index("value")
        theirs = of_what[of_what["who"] != "ours"].set_index("value")
        for size, row in ours.iterrows():
            other = theirs.loc[size]
            half = ours["seconds"].get(size / 2)
            lines.append(
                {
                    "work": what,
                    "G": f"{size:g}",
                    "seconds": f"{row['seconds']:.3f}",
                    "growth": "" if half is None else f"{row['seconds'] / half:.2f} x",
                    "against": other["who"],
                    "its seconds": f"{other['seconds']:.3f}",
                    "ratio": f"{other['seconds'] / row['seconds']:.1f} x",
                    "memory, MB": f"{row['peak_bytes'] / 1e6:.0f}",
                    "its memory, MB": f"{other['peak_bytes'] / 1e6:.0f}",
                }
            )
    return pd.DataFrame(lines)


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One table, from timing.csv, which `make bench` writes."""
    path, rows = find_timing(out, results)
    rows = rows[rows["axis"] == "completions a prompt"]
    table = per_group_size(rows)
    caption = (
        f"{setups(rows)}. Growth: the time of a row over that of the row of half its completions. Memory is the most "
        f"that tensors hold at once. {how_timed(rows)}"
    )
    files = save_table(table, out, NAME, caption)
    return [Artefact(NAME, "Time and memory by completions a prompt", caption, "measured", files, path, table)]


if __name__ == "__main__":
    command_line(main, __doc__)
