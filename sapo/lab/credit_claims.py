"""Claims of credit, each an experiment in exact worlds or on recorded rollouts."""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from sapo.analysis.statistics import Interval, seed_interval
from sapo.credit.loss import policy_loss
from sapo.credit.objectives import OBJECTIVES, Objective
from sapo.credit.rewards import step_match
from sapo.errors import InputError
from sapo.lab.exact import efficiency, expected_update, mixed_share, second_moment, silent_share, true_gradient
from sapo.lab.findings import OURS, PAPER, REVIEW, Finding, against_one, as_share, beside_half, finding, seen
from sapo.lab.goal_claims import MOST_LIKELY
from sapo.lab.sweep import FEW, TARGET, sparse_world
from sapo.lab.varying_steps import OneOrTwoSteps, relative_bias
from sapo.lab.world import SidWorld

RIVALS = (("grpo_graded", "graded GRPO"), ("grpo_step_reward", "GRPO with the same step rewards, summed"))
WORLDS = range(8)  # seeds of the laboratory's worlds
OTHER_WORLDS = range(8, 16)  # than those that sapo_fallback was found in


class Cell(NamedTuple):
    """What `sparse_world` takes."""

    exact_match: float
    coupling: float = 0.0
    layout: str = "blocks_first"
    seed: int = 0
    catalogue: tuple[tuple[int, ...], ...] | None = None
    targets: tuple[tuple[int, ...], ...] = TARGET
    target_probs: tuple[float, ...] | None = None


def outcome_reward(record: Path) -> Iterator[Finding]:
    """Claim 1: an outcome-only reward makes step credit trajectory credit; what is left is the weight of lengths."""
    worst = 0.0
    for size in range(2, 17):
        for hits in range(size + 1):
            predicted = (torch.arange(size) >= hits).long()[:, None].expand(-1, 3)  # code 0 is right
            step, trajectory = (_advantages(key, predicted, size) for key in ("sapo_outcome_reward", "grpo"))
            worst = max(worst, float((step - trajectory[:, None]).abs().max()))
    yield Finding(
        "With an outcome-only reward the step advantage is the trajectory advantage",
        REVIEW,
        "every group of 2 to 16 completions with 0 to G hits, K = 3: largest difference",
        *(worst, worst, worst),
        "holds, exactly" if worst == 0 else "fails",
    )
    weights = {}
    steps = torch.tensor([[0, 1, 1, 2, 2, 2, 2]])
    for average in ("sequence", "step"):
        logps = torch.zeros(1, 7, dtype=torch.float64, requires_grad=True)
        point = Objective("exact", "trajectory", average=average)
        policy_loss(
            point, logps, 0 * logps.detach(), torch.ones_like(logps), steps, steps >= 0, num_steps=3
        ).loss.backward()
        assert logps.grad is not None
        weights[average] = -logps.grad
    moved = float((weights["step"] - weights["sequence"]).abs().sum() / 2)
    yield Finding(
        "What then remains of SAPO is the weight of a step's length",
        REVIEW,
        "steps of 1, 2 and 4 trained tokens: share of a completion's weight that the step mean moves between tokens",
        *(moved, moved, moved),
        "holds" if moved > 0 else "fails",
    )
    for name, rows in _worlds(record / "dynamics.csv.gz"):
        of_sapo = rows[(rows["method"] == "sapo_outcome_reward") & (rows["metric"] == "weight_moved")]
        if of_sapo.empty:
            continue
        measured = as_share(seed_interval(of_sapo.groupby("seed")["value"].mean().to_numpy()))
        yield finding(
            "What then remains of SAPO is the weight of a step's length",
            REVIEW,
            f"{name}, training completions of SAPO with an outcome reward: the same share",
            measured,
            seen(measured, f"{measured.value:.1%} of the weight"),
        )


def signs(record: Path) -> Iterator[Finding]:
    """Claim 2: steps of one completion get credit of different sign."""
    experiments: dict[str, list[float]] = {}
    for name, rows in _worlds(record / "rollouts.csv.gz"):
        largest = rows["rollout"].nunique()
        for size in [g for g in (4, 8, 16) if g <= largest]:
            shares = experiments[f"{name}, stage-2 rollouts, groups of {size}"] = []
            for predicted in _rollouts(rows[rows["rollout"] < size]):
                credit = _advantages("sapo", predicted, size)
                shares.append(float(((credit > 0).any(1) & (credit < 0).any(1)).float().mean()))
    for exact_match, size in product((0.2, 1e-2, 1e-4), (4, 16)):
        worlds = [sparse_world(exact_match, 0.5, seed=seed) for seed in WORLDS]
        what = f"exact, coupling 0.5, exact match {exact_match:g}, groups of {size}"
        experiments[what] = [mixed_share(world, size) for world in worlds]
    for experiment, shares in experiments.items():
        share = as_share(seed_interval(shares))
        yield finding(
            "Step credit gives the steps of one completion different signs",
            OURS,
            f"{experiment}: share of completions",
            share,
            seen(share, f"for {share.value:.1%} of completions"),
        )


def starvation(record: Path) -> Iterator[Finding]:
    """Claim 3: an exact match leaves most groups without signal; what repairs it, the reward or the advantage?"""
    for name, rows in _worlds(record / "rollouts.csv.gz"):
        size = rows["rollout"].nunique()
        silent: dict[str, list[float]] = {key: [] for key in ("grpo", "grpo_graded", "grpo_step_reward", "sapo")}
        for predicted in _rollouts(rows):
            for key, shares in silent.items():
                credit = _advantages(key, predicted, size).reshape(-1, size, 1 if key != "sapo" else predicted.shape[1])
                shares.append(float((credit == 0).flatten(1).all(1).float().mean()))
        starved = as_share(seed_interval(silent["grpo"]))
        yield finding(
            "Exact match leaves most groups without signal",
            PAPER,
            f"{name}, stage-2 rollouts, groups of {size}: share of groups whose completions all fare alike",
            starved,
            beside_half(starved, "holds", "fails"),
        )
        for key, what in (("grpo_graded", "a graded reward alone"), ("grpo_step_reward", "summed step rewards alone")):
            repaired = [
                (starving - still) / (starving - least)
                for starving, still, least in zip(silent["grpo"], silent[key], silent["sapo"], strict=True)
                if starving > least  # a seed whose groups all have what they can have is no evidence
            ]
            if not repaired:
                continue
            share = as_share(seed_interval(repaired))
            yield finding(
                "It takes step credit to repair this",
                OURS,
                f"{name}: what {what}, under trajectory credit, repairs of what SAPO does",
                share,
                beside_half(share, "fails: the reward alone repairs more than half", "holds"),
            )
    for size in (2, 4, 8, 16):
        worlds = [SidWorld((size,) * 3, 2, ((0, 1, 1),), coupling=0.5, skill=1.5, seed=seed) for seed in WORLDS]
        for what, said_by, shares in (
            ("the exact match", PAPER, [silent_share("grpo", world, 16) for world in worlds]),
            ("a single step, the mean of the three,", OURS, [_silent_steps(world, 16) for world in worlds]),
        ):
            share = as_share(seed_interval(shares))
            yield finding(
                "Exact match leaves most groups without signal" if said_by == PAPER else "So does a single step",
                said_by,
                f"exact, {size**3:,} items, 1.5 added to the logit of each right code, groups of 16: share of groups "
                f"in which {what} is all alike",
                share,
                beside_half(share, "holds", "fails"),
            )


def sparsity(record: Path) -> Iterator[Finding]:
    """Claim 5: the gain is largest where exact match is rare; is it the reward's or the advantage's?"""
    for coupling, groups in product((0.0, 1.0), (1, 256)):
        gains = {}
        for exact_match in (0.2, 1e-2, 1e-4):
            gains[exact_match] = _log_ratios("sapo", "grpo", Cell(exact_match, coupling), groups)
            gain = _exp(seed_interval(gains[exact_match]))
            yield finding(
                "A noisy step of SAPO is worth more than one of GRPO",
                OURS,
                f"exact, G = 16, coupling {coupling:g}, exact match {exact_match:g}, {_groups(groups)}: efficiency of "
                "SAPO over that of GRPO",
                gain,
                against_one(gain),
            )
        more = [sparse - dense for sparse, dense in zip(gains[1e-4], gains[0.2], strict=True)]
        yield finding(
            "Step credit gains most where exact match is rare",
            PAPER,
            f"exact, G = 16, coupling {coupling:g}, {_groups(groups)}: SAPO's gain over GRPO at exact match 0.0001 "
            "over its gain at 0.2",
            _exp(seed_interval(more)),
            against_one(_exp(seed_interval(more))),
        )
    few, several = Cell(0.0, 0.5, catalogue=FEW), Cell(0.0, 0.5, targets=MOST_LIKELY[0], target_probs=MOST_LIKELY[1])
    for (what, cell), exact_match, groups in product(
        (("only 26 of 64 SIDs are items", few), ("three items may come next", several)), (0.2, 1e-3), (1, 256)
    ):
        cell = cell._replace(exact_match=exact_match)
        gain = _exp(seed_interval(_log_ratios("sapo", "grpo", cell, groups)))
        yield finding(
            "A noisy step of SAPO is worth more than one of GRPO",
            OURS,
            f"exact, G = 16, coupling 0.5, {what}, exact match {exact_match:g}, {_groups(groups)}: efficiency of SAPO "
            "over that of GRPO",
            gain,
            against_one(gain),
        )
    for coupling, (key, name) in product((0.0, 1.0), RIVALS):
        gain = _exp(seed_interval(_log_ratios("sapo", key, Cell(1e-4, coupling))))
        yield finding(
            "The advantage helps, not the reward alone",
            OURS,
            f"exact, G = 16, coupling {coupling:g}, exact match 0.0001, one group: efficiency of SAPO over that of "
            f"{name}",
            gain,
            against_one(gain),
        )
    for (other, name), exact_match, groups in product(
        (("sapo", "SAPO"), ("grpo", "GRPO")), (0.2, 1e-2, 1e-4), (1, 256)
    ):
        gain = _exp(seed_interval(_log_ratios("sapo_fallback", other, Cell(exact_match, 0.5), groups, OTHER_WORLDS)))
        yield finding(
            f"Step credit where the outcome is silent, the outcome elsewhere, beats {name}",
            OURS,
            f"exact, G = 16, coupling 0.5, exact match {exact_match:g}, {_groups(groups)}: efficiency of sapo_fallback "
            f"over that of {name}",
            gain,
            against_one(gain),
        )


def chance_matches(record: Path) -> Iterator[Finding]:
    """Claim 6: ungated matches pay for chance hits under a wrong prefix."""
    for name, rows in _worlds(record / "rollouts.csv.gz"):
        shares = []
        for predicted in _rollouts(rows):
            right = torch.zeros_like(predicted)
            match, gated = step_match(predicted, right), step_match(predicted, right, gated=True)
            if match[:, 1:].any():  # a seed without any has no share
                shares.append(float((match - gated).sum() / match[:, 1:].sum()))
        if not shares:
            continue
        share = as_share(seed_interval(shares))
        yield finding(
            "Ungated matches pay for chance hits",
            OURS,
            f"{name}, stage-2 rollouts: share of the matches beyond level 1 that stand under a wrong prefix",
            share,
            seen(share, f"{share.value:.0%} of them"),
        )
    for (what, items), exact_match in product((("any SID", None), ("26 items of 64", FEW)), (0.2, 1e-3)):
        gain = _exp(seed_interval(_log_ratios("sapo_gated", "sapo", Cell(exact_match, 0.5, catalogue=items))))
        yield finding(
            "Gating would be better",
            OURS,
            f"exact, G = 16, coupling 0.5, exact match {exact_match:g}, {what}, one group: efficiency of gated SAPO "
            "over SAPO's",
            gain,
            against_one(gain),
        )


def division_by_std(record: Path) -> Iterator[Finding]:
    """Claim 7: dividing by the std over-weights prompts that are nearly always or nearly never right."""
    divided, undivided = "Dividing by the std over-weights what is hard or easy", "Without a division all weigh alike"
    for (key, claim, said_by), exact_match in product(
        (("grpo", divided, "Dr. GRPO (2503.20783)"), ("dr_grpo", undivided, "Dr. GRPO (2503.20783)")),
        (0.01, 0.9),
    ):
        yield _pull(
            claim,
            said_by,
            f"exact, G = 16, {key}: weight along the true gradient of a prompt whose exact match is {exact_match:g}, "
            "over that at 0.5",
            _prompt_weight(key, exact_match) / _prompt_weight(key, 0.5),
        )
    # E[A | hit] - E[A | miss] of a step that is right with probability p is what its gradient is weighed by.
    for (name, claim, scale), probability in product(
        (("SAPO", divided, "group"), ("SAPO without the std", undivided, "none")), (0.01, 0.9)
    ):
        point = Objective("match", "step", scale=scale, average="step")
        yield _pull(
            claim,
            OURS,
            f"exact, G = 16, {name}: weight of the gradient of a step that is right with probability {probability:g}, "
            "over that at 0.5",
            _step_weight(point, probability) / _step_weight(point, 0.5),
        )


def layout(record: Path) -> Iterator[Finding]:
    """Claim 8: all blocks first, or block k right before code k?"""
    for coupling, key in product((0.0, 1.0), ("sapo", "sapo_suffix")):
        together, apart = (
            _log_ratios(key, "grpo", Cell(1e-2, coupling, name)) for name in ("interleaved", "blocks_first")
        )
        gain = _exp(seed_interval([a - b for a, b in zip(together, apart, strict=True)]))
        yield finding(
            "Step credit gains more over GRPO with block k right before code k",
            OURS,
            f"exact, G = 16, coupling {coupling:g}, exact match 0.01, {key}: gain over GRPO interleaved, over that "
            "with blocks first",
            gain,
            against_one(gain),
        )


def fixed_steps(record: Path) -> Iterator[Finding]:
    """Normalising each step over the group is unbiased where K is fixed, and not where the policy decides it."""
    for goes_on, absent in product((0.2, 0.5, 0.8), ("left_out", "zero")):
        policy = OneOrTwoSteps(0.5, goes_on, 0.3)
        bias = relative_bias(policy, 8, absent)
        what = "completions without a step 2 are left out of its mean" if absent == "left_out" else "they are paid 0"
        yield Finding(
            "Normalising at a fixed step is unbiased because K is fixed",
            "verl issue 7244",
            f"exact, G = 8, the policy goes on to step 2 with probability {goes_on:g}, {what}: size of the bias over "
            "that of the gradient",
            *(bias, bias, bias),
            "holds: no bias with K fixed" if bias < 1e-9 else f"biased by {bias:.0%} where the policy decides K",
        )


def _advantages(key: str, predicted: Int[Tensor, "B K"], size: int) -> Tensor:
    """Advantages of completions whose right codes are 0, under an objective of the table."""
    rewards = OBJECTIVES[key].rewards(
        predicted, torch.zeros_like(predicted), torch.ones(len(predicted), dtype=torch.bool)
    )
    return OBJECTIVES[key].advantages(rewards, size)


def _log_ratios(key: str, other: str, cell: Cell, groups: int = 1, seeds: Sequence[int] | None = None) -> list[float]:
    """Logarithm of the ratio of two efficiencies for the worlds of a cell, G = 16."""
    logs = []
    for seed in WORLDS if seeds is None else seeds:
        of_world = cell._replace(seed=seed)
        ours, theirs = (efficiency(*_moments(name, of_world), groups) for name in (key, other))
        logs.append(math.log(ours / theirs))
    return logs


@cache
def _moments(key: str, cell: Cell) -> tuple[Tensor, Tensor, Tensor]:
    """Expected update, its second moment and the true gradient, G = 16."""
    world = sparse_world(*cell)
    return expected_update(key, world, 16), second_moment(key, world, 16), true_gradient(world)


def _silent_steps(world: SidWorld, size: int) -> float:
    """Probability that a group's matches at a step are all alike, the mean over steps."""
    right = world.probs @ step_match(world.sids, world.target_sids.expand(world.sids.shape)).double()
    return float((right**size + (1 - right) ** size).mean())


def _prompt_weight(key: str, exact_match: float) -> float:
    """The expected update as a multiple of the true gradient, along it; G = 16."""
    update, _, gradient = _moments(key, Cell(exact_match))
    return float(update @ gradient / (gradient @ gradient))


def _step_weight(point: Objective, probability: float) -> float:
    """E[A | hit] - E[A | miss] at a step that is right with this probability, G = 16."""
    others = torch.arange(16, dtype=torch.float64)
    chance = torch.distributions.Binomial(15, torch.tensor(probability, dtype=torch.float64)).log_prob(others).exp()
    means = []
    for own in (1, 0):
        groups = torch.cat([torch.full((16, 1), own), (torch.arange(15) < others[:, None]).long()], 1).double()
        advantages = point.advantages(groups.view(-1, 1), 16).view(16, 16)
        means.append(float(chance @ advantages[:, 0]))
    return means[0] - means[1]


def _pull(claim: str, said_by: str, experiment: str, ratio: float) -> Finding:
    alike = "holds" if "alike" in claim else "fails: weighs all alike"
    other = f"fails, {ratio:.3g} times" if "alike" in claim else against_one(Interval(ratio, ratio, ratio))
    return Finding(claim, said_by, experiment, ratio, ratio, ratio, alike if abs(ratio - 1) < 0.01 else other)


def _groups(number: int) -> str:
    return "one group" if number == 1 else f"{number} groups of the prompt"


def _exp(interval: Interval) -> Interval:
    return Interval(*(math.exp(bound) for bound in (interval.value, interval.low, interval.high)))


def _worlds(path: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, rows) of every data set and preset of a recorded table.

    Presets that differ in stage 3 alone have the same stage-2 rollouts, which count once.
    """
    if not path.is_file():
        raise InputError(f"no {path}: `sapo publish` records it.")
    seen: list[pd.DataFrame] = []
    for (dataset, _split, preset), rows in pd.read_csv(path).groupby(["dataset", "split", "preset"]):
        content = rows.drop(columns="preset").reset_index(drop=True)
        if not any(content.equals(other) for other in seen):
            seen.append(content)
            yield f"{dataset} ({preset})", rows


def _rollouts(rows: pd.DataFrame) -> Iterator[Int[Tensor, "B K"]]:
    """For each seed the completions, prompt by prompt, as codes that are 0 where they match."""
    for _, of_seed in rows.groupby("seed"):
        ordered = of_seed.sort_values(["prompt", "rollout", "level"])
        yield 1 - torch.tensor(ordered["match"].to_numpy()).view(-1, rows["level"].nunique())
