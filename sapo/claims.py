"""What the paper and its critics claim, as code: each claim an experiment, a number with an interval, and a verdict.

Verdicts are computed from the numbers. Experiments are exact (the laboratory, over worlds), or read the recorded
rollouts of stage-2 policies (over seeds).
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.analysis.laboratory import sparse_world
from sapo.analysis.statistics import Interval, seed_interval
from sapo.credit.exact import SidWorld, efficiency, expected_update, second_moment, true_gradient
from sapo.credit.objectives import OBJECTIVES, Objective, policy_loss
from sapo.credit.rewards import step_match
from sapo.data.synthetic import SyntheticCatalogue
from sapo.errors import InputError

PAPER, REVIEW, OURS = "SAPO (2605.17648)", "a review of the paper", "our question"
ITEMS = tuple(sid for index, sid in enumerate(product(range(4), repeat=3)) if index % 5 in (1, 2))  # 26 of 64 SIDs
RIVALS = (("grpo_graded", "graded GRPO"), ("grpo_step_reward", "GRPO with the same step rewards, summed"))
WORLDS = range(8)  # seeds of the laboratory's worlds
COLUMNS = ["claim", "said_by", "experiment", "value", "low", "high", "verdict", "command"]


@dataclass(frozen=True)
class Finding:
    """One row of the ledger; `low` and `high` bound a 95 % t interval over worlds or seeds, or equal the value."""

    claim: str
    said_by: str
    experiment: str
    value: float
    low: float
    high: float
    verdict: str


def ledger(record: Path, only: int | None = None) -> pd.DataFrame:
    """The rows of every claim, or of one, with the command that makes them again.

    Args:
        record: folder with the recorded rollouts.csv.gz.

    Raises:
        InputError: no claim of that number, or a record without the tables.
    """
    if only is not None and only not in CLAIMS:
        raise InputError(f"there is no claim {only}; there are {', '.join(map(str, CLAIMS))}.")
    rows = [
        {**vars(finding), "command": f"sapo claims --only {number}"}
        for number, find in CLAIMS.items()
        if only in (None, number)
        for finding in find(record)
    ]
    return pd.DataFrame(rows, columns=COLUMNS)


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


def signs(record: Path) -> Iterator[Finding]:
    """Claim 2: steps of one completion get credit of different sign."""
    for name, rows in _worlds(record / "rollouts.csv.gz"):
        largest = rows["rollout"].nunique()
        for size in [g for g in (4, 8, 16) if g <= largest]:
            shares = []
            for predicted in _rollouts(rows[rows["rollout"] < size]):
                credit = _advantages("sapo", predicted, size)
                shares.append(float(((credit > 0).any(1) & (credit < 0).any(1)).float().mean()))
            share = _share(seed_interval(shares))
            yield _finding(
                "Step credit gives the steps of one completion different signs",
                OURS,
                f"{name}, stage-2 rollouts, groups of {size}: share of completions",
                share,
                f"holds, for {share.value:.1%} of completions" if share.value > 0 else "not seen",
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
        starved = _share(seed_interval(silent["grpo"]))
        yield _finding(
            "Exact match leaves most groups without signal",
            PAPER,
            f"{name}, stage-2 rollouts, groups of {size}: share of groups whose completions all fare alike",
            starved,
            _half(starved, "holds", "fails"),
        )
        for key, what in (("grpo_graded", "a graded reward alone"), ("grpo_step_reward", "summed step rewards alone")):
            repaired = [
                (starving - still) / (starving - least)
                for starving, still, least in zip(silent["grpo"], silent[key], silent["sapo"], strict=True)
                if starving > least  # a seed whose groups all have what they can have is no evidence
            ]
            if not repaired:
                continue
            share = _share(seed_interval(repaired))
            yield _finding(
                "It takes step credit to repair this",
                OURS,
                f"{name}: what {what}, under trajectory credit, repairs of what SAPO does",
                share,
                _half(share, "fails: the reward alone repairs more than half", "holds"),
            )


def same_maximiser(record: Path) -> Iterator[Finding]:
    """Claim 4: who maximises the expected matches maximises the expected exact match."""
    cases = (
        ("one target", [(1, 2)], [1.0], None),
        ("two targets, .6 and .4", [(0, 0), (1, 1)], [0.6, 0.4], None),
        ("three targets (0,0) .4, (1,1) .3, (1,2) .3", [(0, 0), (1, 1), (1, 2)], [0.4, 0.3, 0.3], None),
        ("the same three, only items can be named", [(0, 0), (1, 1), (1, 2)], [0.4, 0.3, 0.3], True),
    )
    for goal, (what, targets, probs, constrained) in product(("match", "gated"), cases):
        items = targets if constrained else list(product(range(3), repeat=2))
        distribution = torch.tensor([probs], dtype=torch.float64)
        lost = float(_lost(torch.tensor(items), torch.tensor(targets), distribution, goal))
        yield Finding(
            f"The policy that maximises {'gated ' if goal == 'gated' else ''}step matches maximises exact match",
            f"{PAPER}, proposition",
            f"{what}: exact match that the maximiser of matches gives away",
            *(lost, lost, lost),
            "holds: nothing is lost" if lost < 1e-12 else "fails",
        )
    world = SyntheticCatalogue()
    catalogue = world.catalog.sids
    histories = world.interactions.leave_one_out().test.take(range(200)).history
    given_history = torch.tensor(world.next_item_probabilities(histories)).double()
    for goal in ("match", "gated"):
        given_away = seed_interval(_lost(catalogue, catalogue, given_history, goal).numpy())
        yield _finding(
            f"The policy that maximises {'gated ' if goal == 'gated' else ''}step matches maximises exact match",
            f"{PAPER}, proposition",
            "synthetic catalogue, targets as random as 200 histories leave them: exact match given away",
            given_away,
            "holds: nothing is lost" if given_away.value < 1e-12 else "fails",
        )


def sparsity(record: Path) -> Iterator[Finding]:
    """Claim 5: the gain is largest where exact match is rare; is it the reward's or the advantage's?"""
    for coupling, groups in product((0.0, 1.0), (1, 256)):
        gains = {}
        for exact_match in (0.2, 1e-2, 1e-4):
            worlds = [sparse_world(exact_match, coupling, seed=seed) for seed in WORLDS]
            gains[exact_match] = _log_ratios("sapo", "grpo", worlds, groups)
            gain = _exp(seed_interval(gains[exact_match]))
            yield _finding(
                "A noisy step of SAPO is worth more than one of GRPO",
                OURS,
                f"exact, G = 16, coupling {coupling:g}, exact match {exact_match:g}, {_groups(groups)}: efficiency of "
                "SAPO over that of GRPO",
                gain,
                _against_one(gain),
            )
        more = [sparse - dense for sparse, dense in zip(gains[1e-4], gains[0.2], strict=True)]
        yield _finding(
            "Step credit gains most where exact match is rare",
            PAPER,
            f"exact, G = 16, coupling {coupling:g}, {_groups(groups)}: SAPO's gain over GRPO at exact match 0.0001 "
            "over its gain at 0.2",
            _exp(seed_interval(more)),
            _against_one(_exp(seed_interval(more))),
        )
    for coupling, (key, name) in product((0.0, 1.0), RIVALS):
        worlds = [sparse_world(1e-4, coupling, seed=seed) for seed in WORLDS]
        gain = _exp(seed_interval(_log_ratios("sapo", key, worlds)))
        yield _finding(
            "The advantage helps, not the reward alone",
            OURS,
            f"exact, G = 16, coupling {coupling:g}, exact match 0.0001, one group: efficiency of SAPO over that of "
            f"{name}",
            gain,
            _against_one(gain),
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
        share = _share(seed_interval(shares))
        yield _finding(
            "Ungated matches pay for chance hits",
            OURS,
            f"{name}, stage-2 rollouts: share of the matches beyond level 1 that stand under a wrong prefix",
            share,
            f"holds, {share.value:.0%} of them" if share.value > 0 else "not seen",
        )
    for (what, items), exact_match in product((("any SID", None), ("26 items of 64", ITEMS)), (0.2, 1e-3)):
        worlds = [sparse_world(exact_match, 0.5, seed=seed, catalogue=items) for seed in WORLDS]
        gain = _exp(seed_interval(_log_ratios("sapo_gated", "sapo", worlds)))
        yield _finding(
            "Gating would be better",
            OURS,
            f"exact, G = 16, coupling 0.5, exact match {exact_match:g}, {what}, one group: efficiency of gated SAPO "
            "over SAPO's",
            gain,
            _against_one(gain),
        )


def division_by_std(record: Path) -> Iterator[Finding]:
    """Claim 7: dividing by the std over-weights prompts that are nearly always or nearly never right."""
    for key, exact_match in product(("grpo", "dr_grpo"), (0.01, 0.9)):
        weights = []
        for probability in (exact_match, 0.5):
            world = sparse_world(probability)
            gradient = true_gradient(world)
            weights.append(float(expected_update(key, world, 16) @ gradient / (gradient @ gradient)))
        pull = weights[0] / weights[1]
        yield Finding(
            "Dividing by the std over-weights prompts that are hard or easy",
            "Dr. GRPO (2503.20783)",
            f"exact, G = 16, {key}: weight of the true gradient at exact match {exact_match:g} over that at 0.5",
            *(pull, pull, pull),
            "weighs all alike" if abs(pull - 1) < 0.01 else _against_one(Interval(pull, pull, pull)),
        )


def layout(record: Path) -> Iterator[Finding]:
    """Claim 8: all blocks first, or block k right before code k?"""
    for coupling, key in product((0.0, 1.0), ("sapo", "sapo_suffix")):
        together, apart = (
            _log_ratios(key, "grpo", [sparse_world(1e-2, coupling, name, seed) for seed in WORLDS])
            for name in ("interleaved", "blocks_first")
        )
        gain = _exp(seed_interval([a - b for a, b in zip(together, apart, strict=True)]))
        yield _finding(
            "Step credit gains more over GRPO with block k right before code k",
            OURS,
            f"exact, G = 16, coupling {coupling:g}, exact match 0.01, {key}: gain over GRPO interleaved, over that "
            "with blocks first",
            gain,
            _against_one(gain),
        )


CLAIMS: dict[int, Callable[[Path], Iterator[Finding]]] = dict(
    enumerate(
        (outcome_reward, signs, starvation, same_maximiser, sparsity, chance_matches, division_by_std, layout), start=1
    )
)


def _finding(claim: str, said_by: str, experiment: str, interval: Interval, verdict: str) -> Finding:
    return Finding(claim, said_by, experiment, interval.value, interval.low, interval.high, verdict)


def _share(interval: Interval) -> Interval:
    """The bounds of a t interval, which does not know that a share ends at 0 and 1."""
    return Interval(interval.value, max(interval.low, 0.0), min(interval.high, 1.0))


def _half(share: Interval, more: str, less: str) -> str:
    """Whether an interval lies above or below one half."""
    return more if share.low > 0.5 else less if share.high < 0.5 else "undecided"


def _against_one(ratio: Interval) -> str:
    if ratio.low > 1:
        return f"holds, {ratio.value:.3g} times"
    return f"fails, {ratio.value:.2g} times" if ratio.high < 1 else "undecided"


def _advantages(key: str, predicted: Int[Tensor, "B K"], size: int) -> Tensor:
    """Advantages of completions whose right codes are 0, under an objective of the table."""
    rewards = OBJECTIVES[key].rewards(
        predicted, torch.zeros_like(predicted), torch.ones(len(predicted), dtype=torch.bool)
    )
    return OBJECTIVES[key].advantages(rewards, size)


def _log_ratios(key: str, other: str, worlds: list[SidWorld], groups: int = 1) -> list[float]:
    """Logarithm of the ratio of two efficiencies, for each world, G = 16."""
    logs = []
    for world in worlds:
        gradient = true_gradient(world)
        ours, theirs = (
            efficiency(expected_update(name, world, 16), second_moment(name, world, 16), gradient, groups)
            for name in (key, other)
        )
        logs.append(math.log(ours / theirs))
    return logs


def _groups(number: int) -> str:
    return "one group" if number == 1 else f"{number} groups of the prompt"


def _exp(interval: Interval) -> Interval:
    return Interval(*(math.exp(bound) for bound in (interval.value, interval.low, interval.high)))


def _lost(
    items: Int[Tensor, "N K"], targets: Int[Tensor, "M K"], probs: Float[Tensor, "R M"], goal: str
) -> Float[Tensor, "R"]:
    """Exact match at its own maximiser less that at the maximiser of the goal, for R distributions of the target.

    The policy may be as sharp as it likes, so that each maximiser is an item.
    """
    pairs = (items[:, None] == targets).double()  # (N, M, K)
    exact = probs @ pairs.prod(2).T
    worth = probs @ (pairs.cumprod(2) if goal == "gated" else pairs).sum(2).T
    best = worth >= worth.amax(1, keepdim=True) - 1e-9
    return exact.amax(1) - exact.masked_fill(~best, -1.0).amax(1)  # a tie is broken in favour of the claim


def _worlds(path: Path) -> Iterator[tuple[str, pd.DataFrame]]:
    """(name, rows) of every data set and preset of a recorded table."""
    if not path.is_file():
        raise InputError(f"no {path}: `sapo publish` records it.")
    for (dataset, _split, preset), rows in pd.read_csv(path).groupby(["dataset", "split", "preset"]):
        yield f"{dataset} ({preset})", rows


def _rollouts(rows: pd.DataFrame) -> Iterator[Int[Tensor, "B K"]]:
    """For each seed the completions, prompt by prompt, as codes that are 0 where they match."""
    for _, of_seed in rows.groupby("seed"):
        ordered = of_seed.sort_values(["prompt", "rollout", "level"])
        yield 1 - torch.tensor(ordered["match"].to_numpy()).view(-1, rows["level"].nunique())
