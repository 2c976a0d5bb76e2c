"""Seconds per update of SAPO against GRPO in the same set-up; and what more completions a prompt cost."""

from pathlib import Path

import pandas as pd
from artefacts import Artefact, command_line, find_timing, save_table, where

NAME, GROUPS = "table_timing", "table_group_size"
STEPS = {
    "sapo": "SAPO",
    "grpo": "GRPO",
    "sapo, prompts repeated": "SAPO, prompts repeated",
    "grpo, stock TRL": "GRPO, stock TRL",
}


def seconds_per_update(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a trainer, rollouts, rewards, reference and optimizer included."""
    steps = rows[rows["axis"] == "step"].set_index("who").loc[list(STEPS)]
    return pd.DataFrame(
        {
            "trainer": list(STEPS.values()),
            "seconds per update": [f"{value:.2f}" for value in steps["seconds"]],
            "fastest, slowest": [f"{row.low:.2f}, {row.high:.2f}" for row in steps.itertuples()],
            "of GRPO": [f"{value:.2f}" for value in steps["seconds"] / steps.loc["grpo", "seconds"]],
            "memory, MB": [f"{value / 1e6:.0f}" for value in steps["peak_bytes"]],
        }
    )


def per_group_size(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a group size and kind of work; growth is the time of a row over that of half its completions."""
    rows = rows[(rows["axis"] == "completions a prompt")].sort_values(["what", "value"])
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
    """Two tables, from timing.csv, which `make bench` writes."""
    path, rows = find_timing(out, results)
    step = rows[rows["axis"] == "step"]
    artefacts = []
    for name, title, table, what in (
        (
            NAME,
            "Seconds per update",
            seconds_per_update(rows),
            f"One optimizer step with its rollouts, rewards and reference policy: 32 prompts of 128 tokens, G = 16, "
            f"K = 3, completions of {int(step['value'].iloc[0])} tokens, 24 of them words. Stock TRL samples as many "
            f"tokens freely. Median of {int(step['rounds'].iloc[0])} steps in turns; memory is the most that tensors "
            f"hold at once.",
        ),
        (
            GROUPS,
            "Seconds and memory by completions a prompt",
            per_group_size(rows),
            "8 prompts of 128 tokens, completions of 27 tokens, 24 of them words. Growth: the time of a row over that "
            "of the row of half its completions.",
        ),
    ):
        caption = f"{what} {where(rows)}"
        files = save_table(table, out, name, caption)
        artefacts.append(Artefact(name, title, caption, "measured", files, path, table))
    return artefacts


if __name__ == "__main__":
    command_line(main, __doc__)
