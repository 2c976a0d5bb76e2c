"""What a page says of the policies of one world: their results, what they gain, what training did to rewards."""

from collections.abc import Collection, Iterable

import pandas as pd
import torch
from fig_advantage_distributions import matches
from pages import (
    INTERVALS,
    Record,
    Scores,
    World,
    bullets,
    headings,
    in_order,
    label,
    markdown_table,
    of_world,
    picture,
)

from sapo.analysis.plots.results import WITHOUT_SEEDS
from sapo.analysis.statistics import Difference, seed_interval
from sapo.analysis.verdicts import comparison, judge, signed, tally
from sapo.credit.objectives import OBJECTIVES
from sapo.experiments.systems import SYSTEMS

METRIC, SHOWN = "ndcg@10", "NDCG@10"
START, NO_THINKING = "stage2", "stage2_no_thinking"
PAIRS = (  # the questions of the paper, as far as a world has the runs
    ("sapo", "grpo"),
    ("sapo", START),
    ("grpo", START),
    ("sapo", "grpo_step_reward"),
    ("sapo", "sapo_outcome_reward"),
    ("sapo", "grpo_graded"),
    ("sapo_gated", "sapo"),
    (START, NO_THINKING),
)
CONTROLS = {"LC-Rec": NO_THINKING, "RecCoT": "RecCoT blind", "RecCoT blind": NO_THINKING}  # others: where they start
OF_SYSTEMS = {*SYSTEMS, *(system.start for system in SYSTEMS.values())} - {START, NO_THINKING}


def trained(worlds: Iterable[tuple[World, pd.DataFrame]]) -> list[tuple[World, pd.DataFrame]]:
    """Those of the worlds in which policies were trained, not other recommenders alone."""
    return [(world, rows) for world, rows in worlds if rows["method"].isin([START, *OBJECTIVES]).any()]


def results_table(record: Record, rows: pd.DataFrame, methods: Collection[str] | None = None) -> str:
    """Policies of a world, what they are compared with, and their paired differences to the start; the best first.

    Args:
        methods: which objectives; all where None. What is no objective always stands there.
    """
    scores, first = record.scores(rows, METRIC), record.scores(rows, "recall@1")
    settings = rows[rows["metric"].isin(["updates", "learning_rate"])]
    settings = settings.pivot_table("value", "method", "metric", aggfunc="max")
    lines = []
    for name in scores.methods:
        objective = name.split(" ")[0] in OBJECTIVES
        if name in OF_SYSTEMS or (objective and methods is not None and name not in methods):
            continue
        over_start = scores.gain(name, START) if objective else None
        known = settings.loc[name] if name in settings.index else pd.Series(dtype=float)
        lines.append(
            {
                "method": label(name),
                SHOWN: scores.cell(name),
                "Recall@1": first.cell(name),
                f"{SHOWN} - {label(START)}": signed(over_start) if over_start else "",
                "seeds": "" if name in WITHOUT_SEEDS else str(scores.values[name].notna().sum()),
                "updates": _number(known.get("updates")),
                "learning rate": _number(known.get("learning_rate")),
            }
        )
    return markdown_table(pd.DataFrame(lines))


def comparisons(scores: Scores, pairs: Iterable[tuple[str, str]] = PAIRS) -> dict[tuple[str, str], str]:
    """A sentence for each pair that the world has; their verdicts are corrected for the number of them."""
    gains = scores.gains(pairs)
    verdicts = judge(gains)
    return {
        pair: comparison(label(pair[0]), label(pair[1]), SHOWN, gain, verdicts[pair]) for pair, gain in gains.items()
    }


def answer(scores: Scores) -> str:
    """Of the sentences, what an index of pages says of a world."""
    said = comparisons(scores)
    return " ".join(said[pair] for pair in (("sapo", "grpo"), (START, NO_THINKING)) if pair in said)


def objectives_beside(scores: Scores, other: str, methods: Iterable[str] = tuple(OBJECTIVES)) -> str | None:
    """How many objectives are ahead of one method; None where there are fewer than two."""
    found = scores.gains((name, other) for name in in_order(list(methods)) if name != other)
    gains = {label(name): gain for (name, _), gain in found.items()}
    return tally(gains, label(other), SHOWN) if len(gains) > 1 else None


def systems_gains(scores: Scores) -> dict[str, Difference]:
    """What each reasoning system of a world has over its start or control."""
    pairs = ((name, CONTROLS.get(name, system.start)) for name, system in SYSTEMS.items())
    return {name: gain for (name, _), gain in scores.gains(pairs).items()}


def systems_table(record: Record, worlds: list[tuple[World, pd.DataFrame]]) -> str | None:
    """Every reasoning system less its start or control, two columns a world that has any, the best of the first world
    first; None where no world has."""
    worlds = [(world, rows) for world, rows in worlds if rows["method"].isin(list(SYSTEMS)).any()]
    tables = [record.scores(rows, METRIC) for _, rows in worlds]
    named = [name for name in SYSTEMS if any(name in scores for scores in tables)]
    if not named:
        return None
    gains = [systems_gains(scores) for scores in tables]
    lines = []
    for name in sorted(named, key=lambda name: -tables[0].mean(name).value if name in tables[0] else 1.0):
        line = {"system": name, "less": label(CONTROLS.get(name, SYSTEMS[name].start))}
        for heading, scores, differences in zip(headings(worlds), tables, gains, strict=True):
            line[heading] = scores.cell(name)
            line[f"{heading}: difference"] = signed(differences[name]) if name in differences else ""
        lines.append(line)
    return markdown_table(pd.DataFrame(lines))


def zero_variance(rollouts: pd.DataFrame, world: World) -> tuple[int, list[float]] | None:
    """The size of a group of the start's rollouts, and the share of groups without variance, in exact match and then in
    each step, mean over seeds; None where none are recorded."""
    rows = of_world(rollouts, world)
    if rows.empty:
        return None
    size, shares = 0, []
    for _, of_seed in rows.groupby("seed"):
        match, size = matches(of_seed)
        groups = match.view(-1, size, match.shape[1])
        hits = torch.cat([groups.prod(2, keepdim=True), groups], dim=2)
        shares.append((hits.amax(1) == hits.amin(1)).double().mean(0).tolist())
    return size, [seed_interval(of_column).value for of_column in zip(*shares, strict=True)]


def silence(rollouts: pd.DataFrame, world: World) -> str | None:
    """How many groups an exact match and a single step leave without signal, in rollouts of the start."""
    found = zero_variance(rollouts, world)
    if found is None:
        return None
    size, (exact, *by_step) = found
    shown = ", ".join(f"{share:.0%} of step {level}" for level, share in enumerate(by_step, start=1))
    return (
        f"Zero-variance groups, in which all {size} completions of the start fare alike: {exact:.0%} in exact match; "
        f"{shown}."
    )


def training(curves: pd.DataFrame, methods: tuple[str, ...] = ("sapo", "grpo")) -> pd.DataFrame:
    """The share of training completions that are exact at the first logged update and at the last, mean over seeds."""
    rows = curves[(curves["metric"] == "rewards/exact/mean") & curves["method"].isin(methods)]
    lines = []
    for method, of_method in rows.groupby("method"):
        by_step = of_method.pivot(index="step", columns="seed", values="value").dropna()
        if by_step.empty:
            continue
        first, last = seed_interval(by_step.iloc[0].to_numpy()), seed_interval(by_step.iloc[-1].to_numpy())
        lines.append(
            {
                "exact matches of training completions": label(str(method)),
                "first logged": f"{first.value:.3f} (update {by_step.index[0]})",
                "last logged": f"{last.value:.3f} (update {by_step.index[-1]})",
                "seeds": str(by_step.shape[1]),
            }
        )
    return pd.DataFrame(lines)


def section(record: Record, world: World, rows: pd.DataFrame, figures: tuple[str, ...]) -> list[str]:
    """A world under a heading of its own."""
    tested = int(rows.loc[rows["metric"] == METRIC, "n"].max())
    scores = record.scores(rows, METRIC)
    said = [*comparisons(scores).values()]
    said += [words for other in ("grpo", START) if (words := objectives_beside(scores, other))]
    blocks = [
        f"## {world.name[0].upper()}{world.name[1:]}",
        f"{tested:,} test rows, the whole catalogue ranked; thoughts are greedy, then 10 beams search. {INTERVALS}",
        results_table(record, rows),
        bullets(said),
    ]
    if quiet := silence(record.rollouts, world):
        blocks.append(quiet)
    if not (happened := training(record.curves(world))).empty:
        blocks.append(markdown_table(happened))
    return [*blocks, *(picture(name, CAPTIONS[name.split("-")[0]]) for name in figures)]


def drawn(record: Record, world: World, rows: pd.DataFrame, wanted: tuple[str, ...]) -> tuple[str, ...]:
    """Those of the wanted figures that a world has the numbers for."""
    measured = set(rows.loc[rows["metric"] == METRIC, "method"])
    has = {
        "fig_main_results": bool(measured),
        "fig_objectives": START in measured and bool(measured & set(OBJECTIVES)),
        "fig_training_dynamics": bool({"sapo", "grpo"} & set(record.curves(world)["method"])),
        "fig_advantage_distributions": not of_world(record.rollouts, world).empty,
    }
    return tuple(f"{name}{world.suffix}" for name in wanted if has[name])


CAPTIONS = {
    "fig_main_results": "All methods: mean and 95 % t interval over seeds; the dash-dotted line is the Bayes optimum.",
    "fig_objectives": "Every objective less its starting checkpoint: mean and 95 % t interval; small dots are seeds.",
    "fig_training_dynamics": "Training: rewards, KL to the reference, match rate and length of every step.",
    "fig_advantage_distributions": "Advantages of the same stage-2 rollouts under trajectory and step credit.",
}


def _number(value: float | None) -> str:
    return "" if value is None or pd.isna(value) else f"{value:g}"
