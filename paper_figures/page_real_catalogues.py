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
    gain,
    headings,
    label,
    made_up,
    markdown_table,
    mean,
    picture,
)
from worlds import (
    CONTROLS,
    METRIC,
    NO_THINKING,
    PAIRS,
    SHOWN,
    START,
    drawn,
    silence,
    systems_table,
    trained,
    training,
)

from sapo.analysis.verdicts import judge, listed, mean_half, sides, signed
from sapo.credit.objectives import OBJECTIVES
from sapo.systems import SYSTEMS

BESIDE = ("cooccurrence", "item_knn", "popularity")
FIGURES = ("fig_main_results",)
CAPTION = "Policies by SID, everything else by item: mean and 95 % t interval over seeds."
Worlds = list[tuple[World, pd.DataFrame]]


def catalogues(record: Record) -> Worlds:
    """Every real data set that policies were trained on."""
    return trained((world, rows) for world, rows in record.worlds("") if not made_up(world.dataset))


def quality(worlds: Worlds, by: str) -> str:
    """NDCG@10 of policies and of counting, a column a data set."""
    tables = {name: by_seed(rows, METRIC, by) for name, (_, rows) in zip(headings(worlds), worlds, strict=True)}
    wanted = [*OBJECTIVES, START, NO_THINKING, *BESIDE]
    methods = [name for name in wanted if any(name in values for values in tables.values())]
    lines = []
    for name in methods:
        line = {"method": label(name)}
        for heading, values in tables.items():
            line[heading] = mean_half(mean(values, name)) if name in values else ""
        lines.append(line)
    return markdown_table(pd.DataFrame(lines))


def pairs(worlds: Worlds) -> tuple[str, list[str]]:
    """A row a pair that some data set has, with its difference on each; and a sentence a pair."""
    lines, sentences = [], []
    for one, other in PAIRS:
        gains = {}
        for name, (_, rows) in zip(headings(worlds), worlds, strict=True):
            if (found := gain(by_seed(rows, METRIC), one, other)) is not None:
                gains[name] = found[0]
        if gains:
            cells = {name: signed(gains[name]) if name in gains else "" for name in headings(worlds)}
            lines.append({f"difference in {SHOWN}": f"{label(one)} - {label(other)}"} | cells)
            said = sides(gains, label(one), label(other))
            sentences.append(f"{said[0].upper()}{said[1:]}.")
    return markdown_table(pd.DataFrame(lines)), sentences


def learnt(worlds: Worlds) -> str:
    """How often the first item is right on rows that were trained on and on others, for the policies of each world."""
    lines = []
    for heading, (_, rows) in zip(headings(worlds), worlds, strict=True):
        tables = [by_seed(rows, f"exact_match/{which}_rows", "SID") for which in ("seen", "unseen")]
        for name in (START, NO_THINKING, "sapo", "grpo"):
            if all(name in values for values in tables):
                seen, unseen = (mean_half(mean(values, name)) for values in tables)
                lines.append({"data": heading, "policy": label(name), "trained on": seen, "not seen": unseen})
    return markdown_table(pd.DataFrame(lines))


def of_systems(worlds: Worlds) -> list[str]:
    """For each data set, which systems are ahead of their start or control, and which behind."""
    sentences = []
    for name, (_, rows) in zip(headings(worlds), worlds, strict=True):
        values, found = by_seed(rows, METRIC), {}
        for method, system in SYSTEMS.items():
            pair = gain(values, method, CONTROLS.get(method, system.start))
            if pair is not None:
                found.setdefault(judge(pair[0]), []).append(method)
        said = [f"{verdict}: {listed(methods)}" for verdict, methods in found.items()]
        if said:
            sentences.append(f"{name}: {'; '.join(sorted(said))}.")
    return sentences


def main(record: Record) -> list[Page]:
    """One page; none where no policy was trained on real data."""
    worlds = catalogues(record)
    if not worlds:
        return []
    names = headings(worlds)
    table, said = pairs(worlds)
    figures, pictures, silent, rewards = [], [], [], []
    for name, (world, rows) in zip(names, worlds, strict=True):
        of_this = drawn(record, world, rows, FIGURES)
        figures += of_this
        pictures += [picture(figure, f"{name}. {CAPTION}") for figure in of_this]
        quiet = silence(record.rollouts, world)
        silent += [f"{name}: {quiet}"] if quiet else []
        curves = training(record.curves(world))
        curves.insert(0, "data", name)
        rewards.append(curves)
    places = "; ".join(world.name for world, _ in worlds)
    blocks = [
        f"{SHOWN} over the whole catalogue, all test rows ({places}). {OVER_SEEDS}",
        "## By item",
        "A hit is the item itself. Policies name a SID, which a few items may share; they get the exact expectation "
        "over the order of those items. This is the ruler of every verdict below.",
        quality(worlds, "item"),
        "## By SID",
        "A hit is the target's SID, as papers count that compare strings. What names items directly is not listed.",
        quality(worlds, "SID"),
        "## Verdicts",
        table,
        bullets(said),
        "## What the policies have learnt",
        "Exact match (by SID) of the first item, on rows that stages 1 and 2 were trained on and on rows they never "
        "saw.",
        learnt(worlds),
        bullets(silent),
        markdown_table(pd.concat(rewards)),
    ]
    if systems := systems_table(worlds):
        blocks += [
            "## Other reasoning systems",
            f"{SHOWN} by item, each system less its starting checkpoint or a control ([what each is]"
            "(../systems.md)), not corrected for the number of systems.",
            systems,
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
            said[0] if said else "Nothing to compare yet.",
            tuple(blocks),
            tuple(figures),
        )
    ]
