"""What the paper claims of training, tested on the recorded runs: each claim in every world that has the runs.

A difference is paired: both methods go on from one stage-2 policy a seed and are tested on the same rows. Its interval
holds users and seeds (`paired_difference`); of the rows of one claim, "holds" and "fails" are what Holm's correction
over all of them leaves. A world counts with at least three seeds.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from sapo.analysis.ranks import Ranks
from sapo.analysis.results import WORLD, read_results
from sapo.analysis.stability import best_rate, cells, gain_at_equal_kl
from sapo.analysis.statistics import Difference, Interval, beyond_noise, seed_difference, seed_interval
from sapo.lab.findings import OURS, PAPER, REVIEW, Finding, as_share, finding

METRIC, SHOWN = "ndcg@10", "NDCG@10"
FEWEST_SEEDS = 3
NAMES = {
    "sapo": "SAPO",
    "grpo": "GRPO",
    "grpo_graded": "GRPO with a graded reward",
    "grpo_step_reward": "GRPO with the step rewards, summed",
    "sapo_outcome_reward": "step advantages of an outcome reward",
    "stage2": "the start",
    "stage2_no_thinking": "not thinking",
}


class Asked(NamedTuple):
    """A difference to judge, and the row of the ledger that it is of."""

    claim: str
    said_by: str
    experiment: str
    difference: Difference


def stabilises(record: Path) -> Iterator[Finding]:
    """Step credit stabilises training: less of a fall from the start, and fewer rates that end below it."""
    path = record / "looks.csv.gz"
    if not path.is_file():
        return
    asked = []
    for key, looks in pd.read_csv(path).groupby(WORLD):
        table = cells(looks)
        if not {"sapo", "grpo"} <= set(table["method"]):
            continue
        falls, shares = {}, {}
        for method in ("sapo", "grpo"):
            of_method = table[table["method"] == method]
            at_best = of_method[of_method["learning_rate"] == best_rate(of_method)].set_index("seed")
            falls[method] = at_best["drawdown"] / at_best["start"]
            rates = of_method.groupby("seed")["learning_rate"].transform("nunique")
            tried = of_method[rates == of_method["learning_rate"].nunique()]
            shares[method] = (tried["gain"] < 0).groupby(tried["seed"]).mean()
        for what, by_seed in (
            ("worst fall of validation NDCG@10 below the start, as a share of it, each at its best rate", falls),
            ("share of the rates of the grid that end below the start", shares),
        ):
            differences = (by_seed["sapo"] - by_seed["grpo"]).dropna().to_numpy(float)
            if len(differences) >= FEWEST_SEEDS:
                experiment = f"{_name(key)}: {what}, SAPO less GRPO"
                found = seed_difference(differences)
                if len(set(differences)) == 1:  # as shares of few rates may be: without spread, a sign test
                    found = found._replace(p_value=2.0 ** (1 - len(differences)) if differences.any() else 1.0)
                asked.append(Asked("Step credit stabilises training", PAPER, experiment, found))
    yield from _judged(asked, more="fails: less stable", less="holds")


def improves(record: Path) -> Iterator[Finding]:
    """Reinforcement learning with step credit consistently improves on its start."""
    for method in ("sapo", "grpo"):
        said_by = PAPER if method == "sapo" else OURS
        claim = f"{NAMES[method]} consistently improves on its start"
        yield from _judged(_compared(record, claim, said_by, method, "stage2"), more="holds", less="fails: it harms")


def sparsest(record: Path) -> Iterator[Finding]:
    """The gain of step credit is largest where exact matches are rarest: rarest against commonest start of a world."""
    results = read_results(record / "results.csv")
    rows = results[results["source"] == "measured"]
    asked = []
    for dataset, of_data in rows.groupby("dataset"):
        exact = of_data[(of_data["metric"] == "rollouts/exact") & (of_data["method"] == "stage2")]
        rarity = exact.groupby("preset")["value"].mean().sort_values()
        values = of_data[of_data["metric"] == METRIC].pivot_table("value", ["preset", "seed"], "method")
        if len(rarity) < 2 or not {"sapo", "grpo"} <= set(values):
            continue
        gains = (values["sapo"] - values["grpo"]).dropna()
        rarity = rarity[rarity.index.isin(gains.index.get_level_values("preset"))]
        if len(rarity) < 2:
            continue
        rare, common = rarity.index[0], rarity.index[-1]
        differences = (gains[rare] - gains[common]).dropna().to_numpy(float)
        if len(differences) >= FEWEST_SEEDS:
            what = (
                f"{dataset}: SAPO - GRPO in {SHOWN} where {rarity[rare]:.2%} of the start's completions are right, "
                f"less the same where {rarity[common]:.2%} are"
            )
            asked.append(
                Asked(
                    "Step credit gains most where exact matches are rarest", PAPER, what, seed_difference(differences)
                )
            )
    yield from _judged(asked, more="holds", less="fails: it gains least there")


def beats_outcome(record: Path) -> Iterator[Finding]:
    """Step credit trains better than outcome credit."""
    asked = _compared(record, "Step credit trains better than outcome credit", PAPER, "sapo", "grpo")
    yield from _judged(asked, more="holds", less="fails: GRPO is ahead")


def both_components(record: Path) -> Iterator[Finding]:
    """It takes both, the step reward and the step advantage."""
    asked = []
    for other in ("grpo_step_reward", "sapo_outcome_reward"):
        asked += _compared(record, "It takes both the step reward and the step advantage", PAPER, "sapo", other)
    yield from _judged(asked, more="holds", less="fails: one of them is enough")


def beats_graded(record: Path) -> Iterator[Finding]:
    """Step credit trains better than a graded outcome reward, which is dense too."""
    asked = _compared(record, "Step credit beats graded outcome credit", REVIEW, "sapo", "grpo_graded")
    yield from _judged(asked, more="holds", less="fails: the graded reward is ahead")


def thinking_pays(record: Path) -> Iterator[Finding]:
    """Thinking first ranks better than not thinking, after as many supervised updates at most."""
    asked = _compared(record, "Thinking pays", OURS, "stage2", "stage2_no_thinking")
    yield from _judged(asked, more="holds", less="fails: not thinking is ahead")


def at_equal_kl(record: Path) -> Iterator[Finding]:
    """Step credit gains more at the same distance from the start: an equal rate is not an equal step."""
    path = record / "looks.csv.gz"
    if not path.is_file():
        return
    asked = []
    for key, looks in pd.read_csv(path).groupby(WORLD):
        if {"sapo", "grpo"} <= set(looks.loc[looks["metric"] == "kl", "method"]):  # no KL is logged where beta is 0
            differences = gain_at_equal_kl(looks, "sapo", "grpo").to_numpy()
            if len(differences) >= FEWEST_SEEDS:
                what = (
                    f"{_name(key)}: gain of validation {SHOWN}, SAPO less GRPO, at the largest KL to the start that "
                    f"both reached, each at its best rate"
                )
                asked.append(Asked("Step credit gains more at equal KL", REVIEW, what, seed_difference(differences)))
    yield from _judged(asked, more="holds", less="fails: GRPO gains more")


def kept_mass(record: Path) -> Iterator[Finding]:
    """The decoder's trie keeps a share of the full softmax's mass, and training under it says nothing of the rest."""
    results = read_results(record / "results.csv")
    rows = results[(results["source"] == "measured") & results["metric"].str.startswith("allowed_mass/level_")]
    for key, of_world in rows.groupby(WORLD):
        for method in ("stage2", "sapo", "grpo"):
            of_method = of_world[of_world["method"] == method]
            by_seed = of_method.groupby("seed")["value"].mean().to_numpy()
            if len(by_seed) >= FEWEST_SEEDS:
                kept = as_share(seed_interval(by_seed))
                what = (
                    f"{_name(key)}: of the full softmax where SID tokens are sampled, the mean share on codes that "
                    f"continue to an item; {NAMES[method]}, {len(by_seed)} seeds"
                )
                says = "keeps over 99 %" if kept.low > 0.99 else f"keeps {kept.value:.1%}"
                yield finding("The trie keeps a share of the full softmax", "TRL issue 6789", what, kept, says)


TRAINING_CLAIMS: tuple[Callable[[Path], Iterator[Finding]], ...] = (
    *(stabilises, improves, sparsest, beats_outcome, both_components, beats_graded, thinking_pays),
    *(at_equal_kl, kept_mass),
)


def _compared(record: Path, claim: str, said_by: str, one: str, other: str) -> list[Asked]:
    """A pair of methods in every world with enough seeds of both."""
    results, ranks = read_results(record / "results.csv"), Ranks(record)
    rows = results[(results["source"] == "measured") & (results["metric"] == METRIC)]
    asked = []
    for key, of_world in rows.groupby(WORLD):
        seeds = [set(of_world.loc[of_world["method"] == method, "seed"]) for method in (one, other)]
        if len(set.intersection(*seeds)) < FEWEST_SEEDS:
            continue
        ours, theirs = (*key, one), (*key, other)
        if ours in ranks and theirs in ranks:
            what = f"{_name(key)}: {NAMES[one]} - {NAMES[other]} in {SHOWN} by SID"
            asked.append(Asked(claim, said_by, what, ranks.gain(ours, theirs, METRIC)))
    return asked


def _judged(asked: list[Asked], more: str, less: str) -> Iterator[Finding]:
    """A row each, with the verdict that Holm's correction over all of them leaves."""
    if not asked:
        return
    sure = beyond_noise([row.difference.p_value for row in asked])
    for row, is_sure in zip(asked, sure, strict=True):
        difference = row.difference
        verdict = (more if difference.value > 0 else less) if is_sure else "undecided"
        units = (
            f"{difference.users:,} users and {difference.seeds} seeds"
            if difference.users
            else (f"{difference.seeds} seeds")
        )
        interval = Interval(*difference[:3])
        yield finding(row.claim, row.said_by, f"{row.experiment}; {units}", interval, verdict)


def _name(key: tuple[str, str, str]) -> str:
    dataset, split, preset = key
    return f"{dataset}, {split.replace('_', ' ')} ({preset})"
