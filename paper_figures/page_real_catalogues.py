"""Amazon catalogues: policies that think and those that do not, SAPO, GRPO, and the reasoning systems of the field."""

import pandas as pd
from pages import INTERVALS, Page, Record, World, bullets, commands, headings, label, made_up, markdown_table, picture
from policies import (
    METRIC,
    NO_THINKING,
    PAIRS,
    SHOWN,
    START,
    drawn,
    silence,
    systems_gains,
    systems_table,
    trained,
    training,
)

from sapo.analysis.verdicts import Verdict, judge, listed, sides, signed
from sapo.credit.objectives import OBJECTIVES

BESIDE = ("cooccurrence", "item_knn", "popularity")
FIGURES = ("fig_main_results",)
CAPTION = "Policies by SID, everything else by item: mean and 95 % t interval over seeds."
Worlds = list[tuple[World, pd.DataFrame]]


def catalogues(record: Record) -> Worlds:
    """Every real data set that policies were trained on."""
    return trained((world, rows) for world, rows in record.worlds("") if not made_up(world.dataset))


def quality(record: Record, worlds: Worlds, by: str) -> str:
    """NDCG@10 of policies and of counting, a column a data set."""
    tables = [record.scores(rows, METRIC, by) for _, rows in worlds]
    wanted = [*OBJECTIVES, START, NO_THINKING, *BESIDE]
    methods = [name for name in wanted if any(name in scores for scores in tables)]
    lines = []
    for name in methods:
        cells = {heading: scores.cell(name) for heading, scores in zip(headings(worlds), tables, strict=True)}
        lines.append({"method": label(name)} | cells)
    return markdown_table(pd.DataFrame(lines))


def pairs(record: Record, worlds: Worlds) -> tuple[str, list[str]]:
    """A row a pair that some data set has, with its difference on each; and a sentence a pair, whose verdicts are
    corrected over the whole table."""
    names = headings(worlds)
    tables = [record.scores(rows, METRIC).gains(PAIRS) for _, rows in worlds]
    gains = {
        (pair, name): table[pair] for pair in PAIRS for name, table in zip(names, tables, strict=True) if pair in table
    }
    verdicts = judge(gains)
    lines, sentences = [], []
    for pair in dict.fromkeys(pair for pair, _ in gains):
        one, other = map(label, pair)
        cells = {name: signed(gains[pair, name]) if (pair, name) in gains else "" for name in names}
        lines.append({f"difference in {SHOWN}": f"{one} - {other}"} | cells)
        said = sides({name: verdicts[pair, name] for name in names if (pair, name) in gains}, one, other)
        sentences.append(f"{said[0].upper()}{said[1:]}.")
    return markdown_table(pd.DataFrame(lines)), sentences


def learnt(record: Record, worlds: Worlds) -> str:
    """How often the first item is right on rows that were trained on and on others, for the policies of each world."""
    lines = []
    for heading, (_, rows) in zip(headings(worlds), worlds, strict=True):
        seen, unseen = (record.scores(rows, f"exact_match/{which}_rows", "SID") for which in ("seen", "unseen"))
        for name in (START, NO_THINKING, "sapo", "grpo"):
            if name in seen and name in unseen:
                cells = {"trained on": seen.cell(name), "not seen": unseen.cell(name)}
                lines.append({"data": heading, "policy": label(name)} | cells)
    return markdown_table(pd.DataFrame(lines))


def of_systems(record: Record, worlds: Worlds) -> list[str]:
    """For each data set, which systems are ahead of their start or control, and which behind; corrected over the whole
    table of them."""
    gains = {
        (heading, system): gain
        for heading, (_, rows) in zip(headings(worlds), worlds, strict=True)
        for system, gain in systems_gains(record.scores(rows, METRIC)).items()
    }
    found: dict[str, dict[Verdict, list[str]]] = {}
    for (heading, system), verdict in judge(gains).items():
        found.setdefault(heading, {}).setdefault(verdict, []).append(system)
    said = {
        heading: sorted(f"{verdict}: {listed(systems)}" for verdict, systems in by_verdict.items())
        for heading, by_verdict in found.items()
    }
    return [f"{heading}: {'; '.join(phrases)}." for heading, phrases in said.items()]


def main(record: Record) -> list[Page]:
    """One page; none where no policy was trained on real data."""
    worlds = catalogues(record)
    if not worlds:
        return []
    names = headings(worlds)
    table, said = pairs(record, worlds)
    figures: list[str] = []
    pictures, silent, rewards = [], [], []
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
        f"{SHOWN} over the whole catalogue, all test rows ({places}). {INTERVALS}",
        "## By item",
        "A hit is the item itself. Policies name a SID, which a few items may share; they get the exact expectation "
        "over the order of those items. This is the ruler of every verdict below.",
        quality(record, worlds, "item"),
        "## By SID",
        "A hit is the target's SID, as papers count that compare strings. What names items directly is not listed.",
        quality(record, worlds, "SID"),
        "## Verdicts",
        table,
        bullets(said),
        "That thinking need not pay is known elsewhere: [OneReason](https://arxiv.org/abs/2606.06260) reports that "
        "earlier models of its authors had no advantage from it, and [arXiv 2602.16587]"
        "(https://arxiv.org/abs/2602.16587) is about why it hurts. [The reasoning world](reasoning-world.md) is one in "
        "which it pays.",
        "## What the policies have learnt",
        "Exact match (by SID) of the first item, on rows that stages 1 and 2 were trained on and on rows they never "
        "saw.",
        learnt(record, worlds),
        bullets(silent),
        markdown_table(pd.concat(rewards)),
    ]
    if systems := systems_table(record, worlds):
        blocks += [
            "## Other reasoning systems",
            f"{SHOWN} by item, each system less its starting checkpoint or a control ([what each is](../systems.md)).",
            systems,
            bullets(of_systems(record, worlds)),
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
