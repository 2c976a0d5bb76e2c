"""The world in which thinking pays: the study of it, axis by axis, as far as the record has it."""

from functools import lru_cache

import pandas as pd
from artefacts import ONE_WORLD
from fig_components import CELLS as CURVES
from fig_sparsity import gains_by_start
from fig_stability import GAIN, measures
from fig_theory import gains, of_gradients, over_grpo, predictions
from pages import (
    INTERVALS,
    REASONING,
    Page,
    Record,
    World,
    bullets,
    commands,
    label,
    markdown_table,
    of_world,
    picture,
    study_command,
)
from policies import (
    METRIC,
    NO_THINKING,
    SHOWN,
    START,
    answer,
    comparisons,
    drawn,
    objectives_beside,
    results_table,
    section,
    trained,
    training,
    zero_variance,
)

from sapo.analysis.stability import METRIC as VALIDATION
from sapo.analysis.statistics import Interval
from sapo.analysis.style import method_label
from sapo.analysis.verdicts import comparison, judge, mean_half, signed, times
from sapo.data.reasoning import ReasoningWorld
from sapo.experiments.study import AXES, BASE

FIGURES = ("fig_training_dynamics", "fig_objectives", "fig_advantage_distributions")
CELLS = ("grpo", "grpo_step_reward", "sapo_outcome_reward", "sapo")  # of the component ablation, SAPO last
FROM_STARTS = ("base", "components", "objectives", "sparsity")  # axes that differ in nothing but the start
BASE_AXES = ("base", "components", "objectives")  # those of the base point's world
CAPTIONS = {
    "fig_components": "SAPO, GRPO and the two cells between them: validation NDCG@10 over updates, each at the rate "
    "that validation chose, with 95 % t intervals over seeds; start and Bayes optimum drawn in.",
    "fig_sparsity": "What each objective gains over its start, against how rare an exact match is at the start.",
    "fig_stability": "Where training ends at every learning rate, and the share of the grid that ends below its start.",
    "fig_theory": "What one update is predicted to be worth, in the reduced worlds of the laboratory and by the "
    "policy's own gradients, against what training gained.",
}
DEFINITIONS = (
    "A cell is one seed at one rate of the grid, looked at on validation rows; a run ends as collapsed where it falls "
    f"below {BASE.stage3.give_up_below:.0%} of its start, from a quarter of its updates on, and keeps the number that "
    "it ended with.",
    "Best rate: the largest mean gain over the seeds that tried all rates.",
    "End below the start: share of cells whose last look lies below the first, with a Wilson interval over cells.",
    "Gain: last look less the first, at the best rate; ± half of a 95 % t interval over seeds, like the next two.",
    "Worst fall: first look less the lowest, at least 0, at the best rate.",
    "Decades that improve: of the widest run of neighbouring rates that end above the start, log10 of its highest rate "
    "over its lowest.",
    "Spread: standard deviation of the gain over seeds at the best rate, with its chi-square interval.",
    f"Completions and KL to +{GAIN:g}: at the first look that lies so far above the start, median over the seeds that "
    "come there.",
)
OF_GRADIENTS = (
    "Signal: ||E[g]||^2 / E ||g||^2, what is left of g if batches are averaged; the rest is noise.",
    "Cosine: between E[g] and the gradient of the probability of an exact match.",
    "Worth: what a step of the best length gains in exact matches, over GRPO's at the same start, as a geometric mean "
    "with its 95 % interval; for plain gradient steps, and for those of Adam without momentum, where each parameter's "
    "gradient is divided by its own size.",
)
Worlds = list[tuple[World, pd.DataFrame]]


@lru_cache(maxsize=1)
def the_world() -> str:
    """The default world in sentences, and the first of its test rows whose next item follows the automata."""
    world = ReasoningWorld()
    config, rows, traces = world.config, world.split.test, world.traces
    titles = world.catalog.titles

    def thought_leads_to(row: int) -> tuple[list[str], str]:
        blocks = traces.of_row(rows.history[row], rows.target[row])
        return blocks, " ".join(block.split()[-1] for block in blocks)

    row = next(row for row in range(len(rows)) if thought_leads_to(row)[1] == titles[rows.target[row]])
    blocks, title = thought_leads_to(row)
    history = ", ".join(titles[item] for item in rows.history[row][-config.window :])
    said = (
        f"An item is a SID of {config.levels} codes out of {config.codes}, and its title names them, a word each; "
        f"there are {len(titles):,} items for {config.codes**config.levels:,} SIDs.",
        f"Code k of the next item is the state in which automaton k ends that reads code k of the last {config.window} "
        f"items, with probability {config.predictability:g}; else it is any code.",
        "A thought writes the states down one after another, block k those of automaton k, so that the last words of "
        "its blocks are the title that they lead to.",
        f"Without a thought {config.window} permutations have to be composed at once for each of {config.levels} "
        "codes.",
    )
    shown = "\n".join(
        (
            f"history   ..., {history}",
            f"thought   {' '.join(f'<think> {block} </think>' for block in blocks)}",
            f"item      {title}",
        )
    )
    return f"{bullets(said)}\n\n```\n{shown}\n```"


def start_table(record: Record, world: World, rows: pd.DataFrame) -> str:
    """What the policy can do that objectives are trained from, and the most that anyone could."""
    lines = []
    for metric, shown in ((METRIC, SHOWN), ("recall@1", "exact match, greedy thought (Recall@1)")):
        scores = record.scores(rows, metric)
        names = {START: label(START), NO_THINKING: label(NO_THINKING), "optimum": label("optimum")}
        lines.append({"": shown} | {heading: scores.cell(name) for name, heading in names.items()})
    sampled = [
        "rollouts/exact",
        *sorted(name for name in set(rows["metric"]) if name.startswith("rollouts/match_level_")),
    ]
    for metric in sampled:
        if START in (scores := record.scores(rows, metric)):
            level = metric.rpartition("_")[2]
            what = "exact match" if metric == "rollouts/exact" else f"step {level} right"
            lines.append({"": f"{what}, sampled completions", label(START): scores.cell(START)})
    if found := zero_variance(record.rollouts, world):
        size, (exact, *by_step) = found
        shares = {"exact match": exact} | {f"step {level}": share for level, share in enumerate(by_step, start=1)}
        for what, share in shares.items():
            lines.append({"": f"zero-variance groups of {size}, {what}", label(START): f"{share:.0%}"})
    return markdown_table(pd.DataFrame(lines))


def by_start(record: Record, worlds: Worlds) -> str:
    """Every start that objectives were trained from, the rarest exact match first, and what each gained over it."""
    lines = []
    for world, rows in worlds:
        scores, first = record.scores(rows, METRIC), record.scores(rows, "recall@1")
        if START not in scores or START not in first:
            continue
        start, gain = first.mean(START), scores.gain("sapo", "grpo")
        line = {
            "world": world.name,
            "exact match of the start": mean_half(start),
            "of its sampled completions": record.scores(rows, "rollouts/exact").cell(START),
            f"{SHOWN} of the start": scores.cell(START),
        }
        for name in CELLS:
            found = scores.gain(name, START)
            line[f"{label(name)} - start"] = signed(found) if found else ""
        line["SAPO - GRPO"] = signed(gain) if gain else ""
        line["seeds"] = str(gain.seeds if gain else scores.values[START].notna().sum())
        lines.append((start.value, line))
    table = pd.DataFrame([line for _, line in sorted(lines, key=lambda pair: pair[0])])
    return markdown_table(table.loc[:, (table != "").any()])


def sparsity_verdicts(record: Record, worlds: Worlds) -> list[str]:
    """SAPO against GRPO in every world, one sentence each, corrected for the number of worlds."""
    found = {world: record.scores(rows, METRIC).gain("sapo", "grpo") for world, rows in worlds}
    gains = {world: gain for world, gain in found.items() if gain is not None}
    verdicts = judge(gains)
    return [
        f"{world.name}: {comparison(label('sapo'), label('grpo'), SHOWN, gain, verdicts[world])}"
        for world, gain in gains.items()
    ]


def stability_table(looks: pd.DataFrame) -> str:
    """The measures of one world, a row a method, intervals beside their numbers."""
    lines = []
    for row in measures(looks).to_dict("records"):
        half = {name: row[f"{name} half"] for name in ("gain", "drawdown", "decades that improve")}
        cell = {name: f"{row[name]:.3f}{'' if pd.isna(half[name]) else f' ± {half[name]:.3f}'}" for name in half}
        spread = (
            f"{row['sd over seeds']:.3f} [{row['sd from']:.3f}, {row['sd to']:.3f}]" if "sd over seeds" in row else ""
        )
        kl, rollouts = row["kl to .02, median"], row["rollouts to .02, median"]
        lines.append(
            {
                "method": row["method"].removesuffix(" (step-aligned)"),
                "end below the start": f"{row['ends below start']:.2f} [{row['from']:.2f}, {row['to']:.2f}]",
                "cells": str(row["cells"]),
                "best rate": f"{row['best rate']:g}",
                "gain": cell["gain"],
                "worst fall": cell["drawdown"],
                "decades that improve": cell["decades that improve"],
                "spread": "" if "nan" in spread else spread,
                f"seeds to +{GAIN:g}": row["seeds that gain .02"],
                "completions": "" if pd.isna(rollouts) else f"{rollouts:,.0f}",
                "KL": "" if pd.isna(kl) else f"{kl:.3g}",
            }
        )
    return markdown_table(pd.DataFrame(lines))


def gradients_table(record: Record, world: World) -> list[str]:
    """What an update of each objective knows at the starts of a world; nothing where it was not measured."""
    if record.gradients is None or (table := of_world(record.gradients, world)).empty:
        return []
    found = of_gradients(table, gains(of_world(record.results, world)))
    lines = [
        {
            "method": row["method"].removesuffix(" (step-aligned)"),
            "signal": f"{row['signal']:.2f} ± {row['signal half']:.2f}",
            "cosine": f"{row['cosine']:.2f} ± {row['cosine half']:.2f}",
            "worth over GRPO's": times(Interval(*(row[f"worth {name}"] for name in ("over GRPO", "from", "to")))),
            "with Adam": times(Interval(*(row[f"adam_worth {name}"] for name in ("over GRPO", "from", "to")))),
            f"gain in {SHOWN}": f"{row['gain']:+.3f} ± {row['gain half']:.3f}",
            "starts": str(row["seeds"]),
        }
        for row in found.sort_values("gain", ascending=False).to_dict("records")
    ]
    return [
        "What one update knows at the start, measured on the policy's own gradients g of batches of rollouts:",
        markdown_table(pd.DataFrame(lines)),
        bullets(OF_GRADIENTS),
        *theory_and_training(record, world, found),
    ]


def theory_and_training(record: Record, world: World, found: pd.DataFrame) -> list[str]:
    """SAPO's worth over GRPO's three ways, and why the first is another where it is; nothing where one is not known.

    Args:
        found: as of `of_gradients`.
    """
    methods = found.set_index("method")
    if not {method_label("sapo"), method_label("grpo")} <= set(methods.index):
        return []
    ours, grpo = methods.loc[method_label("sapo")], methods.loc[method_label("grpo")]
    if not min(ours["gain"], grpo["gain"]) > 0:
        return []
    reduced = over_grpo(
        predictions(of_world(record.rollouts, world), gains(of_world(record.results, world))), "sapo", "shared"
    )
    own = Interval(*(ours[f"adam_worth {name}"] for name in ("over GRPO", "from", "to")))
    said = (
        f"SAPO over GRPO: {times(reduced)} times by the reduced world of the laboratory, {times(own)} times by the "
        f"policy's own gradients with Adam, {ours['gain'] / grpo['gain']:.3g} times in training."
    )
    if own.low > reduced.high:
        said += (
            f" The reduced world has a parameter a step: averaged over {BASE.stage3.prompts} prompts, its updates are "
            f"nearly free of noise, and direction alone counts. An update of the policy carries the noise of all its "
            f"parameters, so that its signal counts too."
        )
    return [said]


def batches_of(record: Record, worlds: Worlds, axis: str) -> int | None:
    """On how many batches gradients of an axis's objectives were measured; None where they were not."""
    if record.gradients is None:
        return None
    tables = [of_world(record.gradients, world) for world, _ in worlds if axis in world.axes]
    found = pd.concat(tables) if tables else record.gradients.head(0)
    found = found[found["objective"].isin(AXES[axis].methods)]
    return None if found.empty else int(found["batches"].max())


def of_looks(record: Record, world: World) -> tuple[dict[str, str], pd.DataFrame]:
    """Of the figures that are made of validation looks, those that a world has the numbers for, and its looks."""
    looks = of_world(record.looks, world)
    validated = looks[looks["metric"] == VALIDATION]
    suffix = world.suffix if len(record.looks.drop_duplicates(ONE_WORLD)) > 1 else ""
    has = {
        "fig_components": validated["method"].isin(CURVES).any(),
        "fig_stability": validated["learning_rate"].nunique() > 1,
    }
    return {name: f"{name}{suffix}" for name, there in has.items() if there}, looks


def sparsity_figures(record: Record) -> list[str]:
    """The figure of every reasoning world that was trained in from several starts."""
    starts = gains_by_start(record.results).groupby("dataset")["start"].nunique()
    several = [name for name, count in starts.items() if str(name).startswith(REASONING) and count > 1]
    return [f"fig_sparsity-{name}" if len(starts) > 1 else "fig_sparsity" for name in several]


def at_base(record: Record, world: World, rows: pd.DataFrame, axis: str) -> tuple[list[str], list[str]]:
    """Blocks and figures of an axis that trains other objectives at the base point; none where none is recorded."""
    scores = record.scores(rows, METRIC)
    methods = [name for name in AXES[axis].methods if name in scores]
    if not methods:
        return [], []
    pictures, looks = of_looks(record, world)
    blocks, figures = [f"## {AXES[axis].question}"], []

    def show(name: str, caption: str) -> None:
        figures.append(name)
        blocks.append(picture(name, caption))

    if axis == "base":
        tested = int(rows.loc[rows["metric"] == METRIC, "n"].max())
        blocks += [
            f"{tested:,} test rows, the whole catalogue ranked; thoughts are greedy, then 10 beams search. {INTERVALS}",
            "What training starts from:",
            start_table(record, world, rows),
        ]
    if axis == "components" and "fig_components" in pictures:
        show(pictures["fig_components"], CAPTIONS["fig_components"])
    blocks.append(results_table(record, rows, {*BASE.objectives, *methods}))
    if axis == "objectives":
        said = [objectives_beside(scores, other, methods) for other in ("grpo", START)]
        blocks.append(bullets([words for words in said if words]))
        for name in drawn(record, world, rows, ("fig_objectives",)):
            show(name, "Every objective less its start: mean and 95 % t interval over seeds; small dots are seeds.")
        return blocks, figures
    pairs = [("sapo", name) for name in methods if name != "sapo"] + [(name, START) for name in methods]
    pairs += [(START, NO_THINKING)] if axis == "base" else []
    blocks.append(bullets(list(comparisons(scores, pairs).values())))
    if axis == "components":
        blocks += gradients_table(record, world)
    if axis == "base":
        if not (happened := training(record.curves(world))).empty:
            blocks.append(markdown_table(happened))
        for name in drawn(record, world, rows, ("fig_training_dynamics",)):
            show(name, "Training: rewards, KL to the reference, match rate and length of every step.")
        if "fig_stability" in pictures:
            show(pictures["fig_stability"], CAPTIONS["fig_stability"])
            blocks += [stability_table(looks), bullets(DEFINITIONS)]
        show(f"fig_theory-{world.dataset}", CAPTIONS["fig_theory"])
    return blocks, figures


def sparsity(record: Record, worlds: Worlds) -> tuple[list[str], list[str]]:
    """Blocks and figures of what was trained from several starts; none where there is one."""
    worlds = [(world, rows) for world, rows in worlds if set(world.axes) <= set(FROM_STARTS)]
    if len(worlds) < 2:
        return [], []
    figures = sparsity_figures(record)
    blocks = [
        f"## {AXES['sparsity'].question}",
        *(picture(name, CAPTIONS["fig_sparsity"]) for name in figures),
        "Starts are ordered by what they can do, the rarest exact match first.",
        by_start(record, worlds),
        bullets(sparsity_verdicts(record, worlds)),
    ]
    return blocks, figures


def turned(record: Record, worlds: Worlds, axis: str) -> list[str]:
    """An axis that turns a knob of the world or of training: its worlds, each with its start and its verdicts."""
    blocks = []
    for world, rows in worlds:
        if axis in world.axes:
            said = comparisons(record.scores(rows, METRIC)).values()
            blocks += [f"{world.name[0].upper()}{world.name[1:]}:", start_table(record, world, rows)]
            blocks += [results_table(record, rows), bullets(list(said))]
            pictures, looks = of_looks(record, world)
            blocks += [stability_table(looks)] if "fig_stability" in pictures else []
    return [f"## {AXES[axis].question}", *blocks] if blocks else []


def main(record: Record) -> list[Page]:
    """One page, which says so where nothing is recorded yet."""
    worlds = trained(record.worlds(REASONING))
    title, question = (
        "The reasoning world: thinking pays",
        "Where an item can only be found by thinking, does step-aligned credit train better than trajectory credit?",
    )
    blocks, figures = [the_world()], []
    if not worlds:
        said = "Not in the record yet."
        blocks += [
            said,
            "`make reproduce` trains in it and draws the curves; `sapo study` adds the study to the record.",
        ]
        return [Page("reasoning-world", title, question, said, tuple(blocks))]
    lines = []
    for axis in AXES:
        if axis in BASE_AXES:
            at = [(world, rows) for world, rows in worlds if axis in world.axes]
            made, shown = at_base(record, *at[0], axis) if at else ([], [])
        elif axis == "sparsity":
            made, shown = sparsity(record, worlds)
        else:
            made, shown = turned(record, worlds, axis), []
        blocks += made
        figures += shown
        if made and any(axis in world.axes for world, _ in worlds):
            lines.append(study_command(axis, batches_of(record, worlds, axis)))
    for world, rows in worlds:
        if not world.axes:
            of_this = drawn(record, world, rows, FIGURES if world.preset == "quick" else ())
            blocks += section(record, world, rows, of_this)
            figures += of_this
            lines += [world.command]
    if any(not world.axes for world, _ in worlds):
        lines.append("sapo publish --out my/results")
    blocks += ["## Make it again", commands(list(dict.fromkeys(lines)))]
    said = answer(record.scores(worlds[0][1], METRIC))
    return [Page("reasoning-world", title, question, said, tuple(blocks), tuple(figures))]
