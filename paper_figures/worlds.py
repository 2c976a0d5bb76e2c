"""What a page says of the policies of one world: their results, what they gain, what training did to rewards."""

from collections.abc import Iterable

import pandas as pd
from fig_advantage_distributions import matches
from pages import (
    OVER_SEEDS,
    Record,
    World,
    bullets,
    by_seed,
    gain,
    headings,
    in_order,
    label,
    markdown_table,
    mean,
    of_world,
    picture,
)

from sapo.analysis.plots import WITHOUT_SEEDS
from sapo.analysis.statistics import seed_interval
from sapo.analysis.verdicts import comparison, mean_half, signed, tally
from sapo.credit.objectives import OBJECTIVES
from sapo.systems import SYSTEMS

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


def results_table(rows: pd.DataFrame) -> str:
    """Every policy of a world, what it is compared with, and its paired difference to the start; the best first."""
    values, first = by_seed(rows, METRIC), by_seed(rows, "recall@1")
    settings = rows[rows["metric"].isin(["updates", "learning_rate"])]
    settings = settings.pivot_table("value", "method", "metric", aggfunc="max")
    methods = [name for name in values if name not in OF_SYSTEMS]
    lines = []
    for name in sorted(methods, key=lambda name: -values[name].mean()):
        over_start = gain(values, name, START) if name.split(" ")[0] in OBJECTIVES else None
        known = settings.loc[name] if name in settings.index else pd.Series(dtype=float)
        lines.append(
            {
                "method": label(name),
                SHOWN: mean_half(mean(values, name)),
                "Recall@1": mean_half(mean(first, name)) if name in first else "",
                f"{SHOWN} - {label(START)}": signed(over_start[0]) if over_start else "",
                "seeds": "" if name in WITHOUT_SEEDS else str(values[name].notna().sum()),
                "updates": _number(known.get("updates")),
                "learning rate": _number(known.get("learning_rate")),
            }
        )
    return markdown_table(pd.DataFrame(lines))


def verdicts(rows: pd.DataFrame, pairs: tuple[tuple[str, str], ...] = PAIRS) -> list[str]:
    """A sentence for each pair that the world has."""
    values = by_seed(rows, METRIC)
    return [
        comparison(label(one), label(other), SHOWN, *found)
        for one, other in pairs
        if (found := gain(values, one, other)) is not None
    ]


def objectives_beside(rows: pd.DataFrame, other: str) -> str | None:
    """How many objectives are ahead of one method; None where there are fewer than two."""
    values = by_seed(rows, METRIC)
    names = [name for name in in_order(list(OBJECTIVES)) if name != other]
    gains = {label(name): found[0] for name in names if (found := gain(values, name, other)) is not None}
    return tally(gains, label(other), SHOWN) if len(gains) > 1 else None


def systems_table(worlds: list[tuple[World, pd.DataFrame]]) -> str | None:
    """Every reasoning system less its start or control, two columns a world that has any, the best of the first world
    first; None where no world has."""
    worlds = [(world, rows) for world, rows in worlds if rows["method"].isin(list(SYSTEMS)).any()]
    tables = [by_seed(rows, METRIC) for _, rows in worlds]
    named = [name for name in SYSTEMS if any(name in values for values in tables)]
    if not named:
        return None
    lines = []
    for name in sorted(named, key=lambda name: -tables[0][name].mean() if name in tables[0] else 1.0):
        beside = CONTROLS.get(name, SYSTEMS[name].start)
        line = {"system": name, "less": label(beside)}
        for heading, values in zip(headings(worlds), tables, strict=True):
            found = gain(values, name, beside)
            line[heading] = mean_half(mean(values, name)) if name in values else ""
            line[f"{heading}: difference"] = signed(found[0]) if found else ""
        lines.append(line)
    return markdown_table(pd.DataFrame(lines))


def silence(rollouts: pd.DataFrame, world: World) -> str | None:
    """How many groups an exact match and a single step leave without signal, in rollouts of the start."""
    rows = of_world(rollouts, world)
    if rows.empty:
        return None
    exact, steps = [], []
    for _, of_seed in rows.groupby("seed"):
        match, size = matches(of_seed)
        groups = match.view(-1, size, match.shape[1])
        silent = lambda hits: float((hits.amax(1) == hits.amin(1)).float().mean())  # noqa: E731
        exact.append(silent(groups.prod(2)))
        steps.append([silent(groups[:, :, level]) for level in range(match.shape[1])])
    by_step = [seed_interval(list(shares)).value for shares in zip(*steps, strict=True)]
    shown = ", ".join(f"{share:.0%} of step {level}" for level, share in enumerate(by_step, start=1))
    return (
        f"Zero-variance groups, in which all {size} completions of the start fare alike: "
        f"{seed_interval(exact).value:.0%} in exact match; {shown}."
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
    said = [*verdicts(rows)]
    said += [words for other in ("grpo", START) if (words := objectives_beside(rows, other))]
    blocks = [
        f"## {world.name[0].upper()}{world.name[1:]}",
        f"{tested:,} test rows, the whole catalogue ranked; thoughts are greedy, then 10 beams search. {OVER_SEEDS}",
        results_table(rows),
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
