"""Amazon catalogues: policies that think and those that do not, SAPO, GRPO, and the reasoning systems of the field."""

import pandas as pd
from pages import (
    OVER_SEEDS,
    Page,
    Record,
    World,
    bullets,
    by_seed,
    commands,
    dataset_name,
    gain,
    label,
    made_up,
    markdown_table,
    mean,
    picture,
)
from worlds import (
    CAPTIONS,
    CONTROLS,
    METRIC,
    NO_THINKING,
    SHOWN,
    START,
    drawn,
    silence,
    systems_table,
    training,
    verdicts,
)

from sapo.analysis.verdicts import judge, listed, mean_half, sides
from sapo.credit.objectives import OBJECTIVES
from sapo.systems import SYSTEMS

BESIDE = ("cooccurrence", "item_knn", "popularity")
FIGURES = ("fig_main_results",)
Worlds = list[tuple[World, pd.DataFrame]]


def catalogues(record: Record) -> Worlds:
    """Every real data set that policies were trained on."""
    return [
        (world, rows)
        for world, rows in record.worlds("")
        if not made_up(world.dataset) and rows["method"].isin([START, *OBJECTIVES]).any()
    ]


def quality(worlds: Worlds, by: str) -> str:
    """NDCG@10 of policies and of counting, a column a data set."""
    tables = {world.name: by_seed(rows, METRIC, by) for world, rows in worlds}
    wanted = [*OBJECTIVES, START, NO_THINKING, *BESIDE]
    methods = [name for name in wanted if any(name in values for values in tables.values())]
    lines = []
    for name in methods:
        line = {"method": label(name)}
        for heading, values in tables.items():
            line[heading] = mean_half(mean(values, name)) if name in values else ""
        lines.append(line)
    return markdown_table(pd.DataFrame(lines))


def learnt(worlds: Worlds) -> str:
    """How often the first item is right on rows that were trained on and on others, for the policies of each world."""
    lines = []
    for world, rows in worlds:
        tables = [by_seed(rows, f"exact_match/{which}_rows", "SID") for which in ("seen", "unseen")]
        for name in (START, NO_THINKING, "sapo", "grpo"):
            if all(name in values for values in tables):
                seen, unseen = (mean_half(mean(values, name)) for values in tables)
                lines.append({"data": world.name, "policy": label(name), "trained on": seen, "not seen": unseen})
    return markdown_table(pd.DataFrame(lines))


def of_systems(worlds: Worlds) -> list[str]:
    """For each data set, which systems are ahead of their start or control, and which behind."""
    sentences = []
    for world, rows in worlds:
        values, found = by_seed(rows, METRIC), {}
        for name, system in SYSTEMS.items():
            pair = gain(values, name, CONTROLS.get(name, system.start))
            if pair is not None:
                found.setdefault(judge(pair[0]), []).append(name)
        if found:
            words = {"ahead": "ahead", "behind": "behind", "not told apart": "not told apart", "unknown": "one seed"}
            said = [f"{words[key]}: {listed(found[key])}" for key in words if key in found]
            sentences.append(f"{world.name}: {'; '.join(said)}.")
    return sentences


def main(record: Record) -> list[Page]:
    """One page; none where no policy was trained on real data."""
    worlds = catalogues(record)
    if not worlds:
        return []
    said = [f"{world.name}: {words}" for world, rows in worlds for words in verdicts(rows)]
    of_sapo = {
        dataset_name(world.dataset): found[0]
        for world, rows in worlds
        if (found := gain(by_seed(rows, METRIC), "sapo", "grpo")) is not None
    }
    answer = sides(of_sapo, "SAPO", "GRPO") or "Nothing is recorded yet"
    figures, pictures = [], []
    for world, rows in worlds:
        of_this = drawn(record, world, rows, FIGURES)
        figures += of_this
        pictures += [picture(name, f"{world.name}. {CAPTIONS['fig_main_results']}") for name in of_this]
    trained = [f"{w.name}: {words}" for w, _ in worlds for words in training(record.curves(w))]
    silent = [f"{w.name}: {words}" for w, _ in worlds if (words := silence(record.rollouts, w))]
    headings = [world.name for world, _ in worlds]
    blocks = [
        f"{SHOWN} over the whole catalogue, all test rows. {OVER_SEEDS}",
        "## By item",
        "A hit is the item itself. Policies name a SID, which a few items may share; they get the exact expectation "
        "over the order of those items. This is the ruler of every verdict below.",
        quality(worlds, "item"),
        "## By SID",
        "A hit is the target's SID, as papers count that compare strings. What names items directly is not listed.",
        quality(worlds, "SID"),
        "## Verdicts",
        bullets(said),
        "## What the policies have learnt",
        "Exact match (by SID) of the first item on rows that stages 1 and 2 were trained on and on rows they never saw.",
        learnt(worlds),
        bullets([*silent, *trained]),
    ]
    table = systems_table(worlds, headings)
    if table:
        blocks += [
            "## Other reasoning systems",
            f"{SHOWN} by item, each system less its starting checkpoint or a control ([what each is]"
            "(../systems.md)), not corrected for the number of systems.",
            table,
            bullets(of_systems(worlds)),
        ]
    blocks += [
        *pictures,
        "## Make it again",
        "Industrial and Office were recovered in part from what MiniOneRec publishes and cannot be made again from "
        "here; Beauty is what `sapo data amazon Beauty --release 2014` makes of the raw reviews. [Your own data]"
        "(../use.md) go the same way. Another machine rounds differently and trains other policies: expect the same "
        "picture, not the same digits.",
        commands([*(world.command for world, _ in worlds), "sapo publish --out my/results"]),
    ]
    return [
        Page(
            "real-catalogues",
            "Real catalogues",
            "On Amazon reviews, does thinking help, and which credit trains it better?",
            f"{answer[0].upper()}{answer[1:]}.",
            tuple(blocks),
            tuple(figures),
        )
    ]


