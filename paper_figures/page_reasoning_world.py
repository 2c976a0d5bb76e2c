"""The world in which thinking pays: does step credit train better than trajectory credit, and when?"""

from pathlib import Path

import pandas as pd
from pages import (
    OVER_SEEDS,
    REASONING,
    Page,
    Record,
    World,
    bullets,
    by_seed,
    commands,
    gain,
    label,
    markdown_table,
    mean,
    picture,
)
from worlds import METRIC, NO_THINKING, SHOWN, START, drawn, section, trained, verdicts

from sapo.analysis.verdicts import comparison, mean_half, signed

FIGURES = ("fig_training_dynamics", "fig_objectives", "fig_advantage_distributions")
CELLS = ("grpo", "grpo_step_reward", "sapo_outcome_reward", "sapo")  # of the component ablation, SAPO last
SPARSITY = sorted(script.stem for script in Path(__file__).parent.glob("fig_*sparsity*.py"))


def by_start(worlds: list[tuple[World, pd.DataFrame]]) -> str:
    """Every start that objectives were trained from, the rarest exact match first, and what each gained over it."""
    lines = []
    for world, rows in worlds:
        values, first = by_seed(rows, METRIC), by_seed(rows, "recall@1")
        if START not in values or START not in first:
            continue
        start = mean(first, START)
        line = {
            "world": world.name,
            "exact match of the start": mean_half(start),
            f"{SHOWN} of the start": mean_half(mean(values, START)),
        }
        for name in CELLS:
            found = gain(values, name, START)
            line[f"{label(name)} - start"] = signed(found[0]) if found else ""
        found = gain(values, "sapo", "grpo")
        line["SAPO - GRPO"] = signed(found[0]) if found else ""
        line["seeds"] = found[1].split()[0] if found else str(values[START].notna().sum())
        lines.append((start.value, line))
    return markdown_table(pd.DataFrame([line for _, line in sorted(lines, key=lambda pair: pair[0])]))


def sparsity_verdicts(worlds: list[tuple[World, pd.DataFrame]]) -> list[str]:
    """SAPO against GRPO in every world, one sentence each."""
    sentences = []
    for world, rows in worlds:
        found = gain(by_seed(rows, METRIC), "sapo", "grpo")
        if found:
            sentences.append(f"{world.name}: {comparison('SAPO', 'GRPO', SHOWN, *found)}")
    return sentences


def main(record: Record) -> list[Page]:
    """One page, which says so where nothing is recorded yet."""
    worlds = trained(record.worlds(REASONING))
    title, question = (
        "The reasoning world: thinking pays",
        "Where an item can only be found by thinking, does step-aligned credit train better than trajectory credit?",
    )
    if not worlds:
        answer = "Not in the record yet."
        blocks = (answer, "`make reproduce` trains in it and draws the curves; `sapo publish` adds them to the record.")
        return [Page("reasoning-world", title, question, answer, blocks)]
    figures = list(SPARSITY)
    blocks = [
        picture(name, "What each objective gains against how rare an exact match is at the start.") for name in SPARSITY
    ]
    if len(worlds) > 1:
        blocks += [
            "## From every start",
            f"Starts are ordered by what they can do, the rarest exact match first. {OVER_SEEDS}",
            by_start(worlds),
            bullets(sparsity_verdicts(worlds)),
        ]
    for world, rows in worlds:
        of_this = drawn(record, world, rows, FIGURES if world.preset == "quick" else ())
        blocks += section(record, world, rows, of_this)
        figures += of_this
    lines = dict.fromkeys(world.command for world, _ in worlds)
    blocks += ["## Make it again", commands([*lines, "sapo publish --out my/results"])]
    answer = " ".join(verdicts(worlds[0][1], (("sapo", "grpo"), (START, NO_THINKING))))
    return [Page("reasoning-world", title, question, answer, tuple(blocks), tuple(figures))]
