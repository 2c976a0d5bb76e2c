"""Seconds per update of SAPO against GRPO in the same set-up."""

from pathlib import Path

import pandas as pd
from artefacts import Artefact, command_line, find_timing, how_timed, save_table, setups

NAME = "table_timing"
STEPS = {
    "sapo": "SAPO",
    "grpo": "GRPO",
    "sapo, prompts repeated": "SAPO, prompts repeated in the update",
    "grpo, stock TRL": "GRPO, stock TRL",
}


def seconds_per_update(rows: pd.DataFrame) -> pd.DataFrame:
    """A row a trainer, rollouts, rewards, reference and optimizer included."""
    steps = rows.set_index("who").loc[list(STEPS)]
    return pd.DataFrame(
        {
            "trainer": list(STEPS.values()),
            "seconds per update": [f"{value:.2f}" for value in steps["seconds"]],
            "fastest, slowest": [f"{row.low:.2f}, {row.high:.2f}" for row in steps.itertuples()],
            "of GRPO": [f"{value:.2f}" for value in steps["seconds"] / steps.loc["grpo", "seconds"]],
            "memory, MB": [f"{value / 1e6:.0f}" for value in steps["peak_bytes"]],
        }
    )


def main(out: Path, results: Path | None = None) -> list[Artefact]:
    """One table, from timing.csv, which `make bench` writes."""
    path, rows = find_timing(out, results)
    rows = rows[rows["axis"] == "step"]
    table = seconds_per_update(rows)
    caption = (
        f"One optimizer step with its rollouts, rewards and reference policy: {setups(rows)}. Stock TRL samples as "
        f"many tokens freely. Memory is the most that tensors hold at once. {how_timed(rows)}"
    )
    files = save_table(table, out, NAME, caption)
    return [Artefact(NAME, "Seconds per update", caption, "measured", files, path, table)]


if __name__ == "__main__":
    command_line(main, __doc__)
