"""The control world, in which the next item follows from the last one and a thought can add nothing."""

from pages import CONTROL, Page, Record, bullets, commands
from policies import METRIC, answer, drawn, section, systems_table, trained

FIGURES = ("fig_objectives", "fig_training_dynamics", "fig_advantage_distributions")


def main(record: Record) -> list[Page]:
    """One page; none where the record has no such world."""
    worlds = trained(record.worlds(CONTROL))
    if not worlds:
        return []
    blocks: list[str] = []
    figures: list[str] = []
    for world, rows in worlds:
        of_this = drawn(record, world, rows, FIGURES) if world.preset == "quick" else ()
        blocks += section(record, world, rows, of_this)
        figures += of_this
    first = worlds[0][1]
    table = systems_table(record, worlds[:1])
    if table:
        blocks += [
            "## Other reasoning systems",
            "From the same seeds, on the same test rows, each less its starting checkpoint or a control "
            "([what each is](../systems.md)).",
            table,
        ]
    blocks += [
        "## Make it again",
        "One line a world above; `--objectives` and `--systems` name more rows.",
        commands([*(world.command for world, _ in worlds), "sapo publish --out my/results"]),
    ]
    intro = bullets(
        [
            "A synthetic catalogue: the next item depends on the last one by a table, so that a thought can "
            "add nothing. The true probabilities are known, and with them the best possible ranking (Bayes optimum).",
            "It is the control for [the world in which thinking pays](reasoning-world.md).",
        ]
    )
    return [
        Page(
            "control-world",
            "The control world: thinking is pointless",
            "What do step-aligned and trajectory credit do where a thought cannot help?",
            answer(record.scores(first, METRIC)),
            (intro, *blocks),
            tuple(figures),
        )
    ]
