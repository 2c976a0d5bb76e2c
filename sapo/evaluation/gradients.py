"""How far one update of an objective leads towards a goal, measured on the gradients of a policy itself.

`sapo.lab.predicted` says it of a reduced world, in which a step has one logit. Here nothing is reduced: g is the
descent direction of the objective's loss on one batch of rollouts, over all P parameters of the policy, and h the
score-function estimate of grad J on it, J being the goal. With curvature L in all directions, a step along g of the
best length gains (E[g] . grad J)^2 / (2 L E ||g||^2), as in the reduced world. Adam without momentum divides each
parameter's gradient by its own size, so that its steps have one length whatever the objective: the best of them gains
(sum_i E[g_i] (grad J)_i / sqrt E[g_i^2])^2 / (2 L P), P being the parameters that move. Momentum averages noise away
over some steps and is left out, as is all that changes once training is under way.

Batches are independent, so E[g] . grad J is the mean of g_b . h_c over batches b != c; with b = c it would be biased.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from sapo.common.progress import progress_bar
from sapo.credit.loss import policy_loss
from sapo.credit.objectives import OBJECTIVES, Objective
from sapo.data.interactions import Rows
from sapo.decoding.sampling import Rollouts
from sapo.errors import InputError
from sapo.policy.policy import Policy

if TYPE_CHECKING:
    from transformers import BatchEncoding

EXACT = Objective("exact", "trajectory", baseline="leave_one_out", scale="none", average="constant")
GOALS = {"exact": EXACT, "match": replace(EXACT, reward="match")}  # whose gradients are unbiased ones of their rewards


def learns_from_given_rollouts(objective: str) -> bool:
    """Whether an objective's update follows from any samples of the policy: not where it learns values, looks at beams
    or chooses its samples.

    Raises:
        InputError: an unknown objective.
    """
    if objective not in OBJECTIVES:
        raise InputError(f"unknown objective {objective!r}; known are {', '.join(OBJECTIVES)}.")
    chosen = OBJECTIVES[objective]
    more = chosen.credit == "token" or chosen.reward == "best_of_beam"
    return not more and not {"dynamic_sampling", "beam_rollouts"} & {*chosen.extras}


class _Sums:
    """Sums over batches of an objective's direction g, of g^2, and of g h for each goal's h."""

    def __init__(self, size: int):
        self.direction = torch.zeros(size, dtype=torch.float64)
        self.square = torch.zeros_like(self.direction)
        self.with_goal = {goal: torch.zeros_like(self.direction) for goal in GOALS}

    def add(self, direction: Float[Tensor, "P"], goals: dict[str, Float[Tensor, "P"]]) -> None:
        self.direction += direction
        self.square += direction.square()
        for goal, gradient in goals.items():
            self.with_goal[goal] += direction * gradient


def measure_gradients(
    policy: Policy,
    rows: Rows,
    objectives: Sequence[str],
    *,
    prompts: int,
    group_size: int,
    batches: int,
    seed: int,
    temperature: float = 1.0,
    title: str = "gradients",
) -> pd.DataFrame:
    """What an update of each objective is worth to a policy, with the same rollouts for all of them and without KL.

    Args:
        rows: whose histories are asked; each batch draws `prompts` of them.
        batches: at least 2; the interval over policies says how many are enough.

    Returns:
        A row an (objective, goal): along (E[g] . grad J), size (E ||g||^2), signal (||E[g]||^2 / size: the rest is
        noise), cosine (between E[g] and grad J), worth (along^2 / size) and adam_worth, which are gains times 2 L.
        Signal and cosine are ratios of unbiased estimates: from few batches they may leave [0, 1], or be nan. Worths
        are squares of them, so that noise makes them larger, most where there is little signal.

    Raises:
        InputError: fewer than 2 batches or completions, an objective that does not learn from given rollouts.
    """
    if batches < 2 or group_size < 2:
        raise InputError(f"batches is {batches} and group_size {group_size}: both need at least 2.")
    if others := [name for name in objectives if not learns_from_given_rollouts(name)]:
        raise InputError(f"{', '.join(others)}: not learnt from samples of the policy alone, so nothing is measured.")
    rng, generator = np.random.default_rng(seed), torch.Generator(policy.model.device).manual_seed(seed)
    size = sum(parameter.numel() for parameter in policy.model.parameters() if parameter.requires_grad)
    sums, goals = {name: _Sums(size) for name in objectives}, {name: _Sums(size) for name in GOALS}
    for _ in progress_bar(title, range(batches)):
        drawn = rows.take(rng.integers(len(rows), size=prompts).tolist())
        encoded = policy.encode(policy.prompts(drawn.history))
        rollouts = policy.sample(encoded, group_size, generator, temperature)
        target = policy.catalog.sids[drawn.target].repeat_interleave(group_size, 0).to(rollouts.sids.device)
        of = lambda objective: _direction(policy, encoded, rollouts, target, objective, temperature)  # noqa: B023, E731
        towards = {goal: of(objective) for goal, objective in GOALS.items()}
        for goal, gradient in towards.items():
            goals[goal].add(gradient, {})
        for name in objectives:
            sums[name].add(of(OBJECTIVES[name]), towards)
    lines = []
    for name, of_objective in sums.items():
        for goal, of_goal in goals.items():
            line = _measures(of_objective, of_objective.with_goal[goal], of_goal, batches)
            lines.append({"objective": name, "goal": goal} | line)
    return pd.DataFrame(lines)


def _direction(
    policy: Policy,
    prompts: "BatchEncoding",
    rollouts: Rollouts,
    target: Tensor,
    objective: Objective,
    temperature: float,
) -> Float[Tensor, "P"]:
    """Minus the gradient of an objective's loss at the policy that sampled the rollouts."""
    layout, trie, written = policy.layout, policy.trie, rollouts.completion_mask
    group_size = len(written) // len(prompts["input_ids"])
    rewards = objective.rewards(rollouts.sids, target, trie.contains(rollouts.sids), group_size)
    steps = layout.token_steps(rollouts.completion_ids).masked_fill(~written, -1)
    credit = objective.to_tokens(objective.advantages(rewards, group_size), steps)
    trained = rollouts.sampled
    if "thinking_only" in objective.extras:
        trained = trained & layout.read(rollouts.completion_ids).in_block
    logps = policy.logps(prompts, rollouts, temperature)
    loss = policy_loss(
        objective, logps, logps.detach(), credit, steps, trained, num_steps=layout.num_steps, beta=0.0, max_length=1
    ).loss
    parameters = [parameter for parameter in policy.model.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    return -torch.cat([gradient.flatten() for gradient in gradients]).double().cpu()


def _measures(sums: _Sums, with_goal: Float[Tensor, "P"], goal: _Sums, batches: int) -> dict[str, float]:
    pairs = batches * (batches - 1)
    cross = (sums.direction * goal.direction - with_goal) / pairs  # of each parameter, its part of E[g] . grad J
    second = sums.square / batches
    own = [float((of.direction.square() - of.square).sum()) / pairs for of in (sums, goal)]  # ||E[g]||^2, ||grad J||^2
    along, size = float(cross.sum()), float(second.sum())
    moved = second > 0
    adam = float((cross[moved] / second[moved].sqrt()).sum())
    return {
        "along": along,
        "size": size,
        "signal": own[0] / size if size > 0 else float("nan"),
        "cosine": along / (own[0] * own[1]) ** 0.5 if min(own) > 0 else float("nan"),
        "worth": max(along, 0.0) ** 2 / size if size > 0 else 0.0,
        "adam_worth": max(adam, 0.0) ** 2 / int(moved.sum()) if moved.any() else 0.0,
    }
