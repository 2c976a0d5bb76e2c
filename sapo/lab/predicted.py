"""What a noisy step of an objective is worth to a policy, predicted from which of its sampled completions match.

In the reduced world a completion is K decisions, right or wrong, and the only parameter of a step is how likely it is
to be right: its logit, which is added to whatever the earlier steps say. With curvature L in all directions, a step
along g of the best length gains (E[g] . grad J)^2 / (2 L E ||g||^2). The numerator and ||g||^2 are exact sums over the
G completions of a group; advantages come from `Objective.advantages`.

Left out: what a policy does beyond being right or wrong, numbers of tokens (all steps count the same, so that an
objective and its sequence mean coincide), Adam, clipping, KL, and that curvature differs between directions.

N prompts, K steps, U = 2^K outcomes, G completions a group.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from itertools import combinations_with_replacement, product
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.credit.objectives import OBJECTIVES, Objective
from sapo.credit.rewards import exact_match, step_match
from sapo.errors import InputError

GOALS = ("exact", "match", "gated")
STEPS = ("independent", "joint")
PARAMETERS = ("shared", "own")
MOST_GROUPS = 50_000  # kinds of groups that are written out
IN_ONE_GO = 4_000_000  # numbers of them in memory at a time
CERTAIN = 1e6  # pseudo-counts of prompts that do not differ
PRIOR_COUNT = 10.0  # of an outcome, that its steps are independent
SAMPLED_GROUPS = 16_384  # of an objective whose kinds of groups are too many


class Moments(NamedTuple):
    """Of the update of one group of each prompt."""

    mean: Float[Tensor, "N K"]
    """E[g]"""
    second: Float[Tensor, "N"]
    """E ||g||^2"""
    signal: Float[Tensor, "N"]
    """Probability that the group is kept: below 1 under dynamic sampling alone."""


def outcomes(num_steps: int) -> Bool[Tensor, "U K"]:
    """Every way to be right or wrong, the first step varying slowest."""
    return torch.tensor(list(product((False, True), repeat=num_steps)))


def independent_steps(probs: Float[Tensor, "N K"]) -> Float[Tensor, "N U"]:
    """Probability of every outcome where steps are right independently with these probabilities."""
    right = outcomes(probs.shape[1])
    return torch.where(right, probs[:, None], 1 - probs[:, None]).prod(2)


def step_scores(joint: Float[Tensor, "N U"]) -> Float[Tensor, "N U K"]:
    """d log pi(outcome) / d logit of step k = right_k - P(right_k | the earlier steps)."""
    right = outcomes(_num_steps(joint)).double()
    columns = []
    for k in range(right.shape[1]):
        given = joint.view(len(joint), 2**k, 2, -1).sum(3)  # (N, prefixes, wrong or right)
        # A prefix that never occurs has no weight; any number does.
        prob = given[:, :, 1] / given.sum(2).clamp(min=torch.finfo(joint.dtype).tiny)
        columns.append(right[:, k] - prob.repeat_interleave(len(right) // 2**k, 1))
    return torch.stack(columns, 2)


def goal_gradient(joint: Float[Tensor, "N U"], goal: str = "exact") -> Float[Tensor, "N K"]:
    """grad J of every prompt, J being P(all right) or the expected number of right steps, of all ("match") or of those
    after right ones alone ("gated").

    Raises:
        InputError: another goal.
    """
    if goal not in GOALS:
        raise InputError(f"goal is {goal!r}: use {', '.join(GOALS)}.")
    predicted, target = _codes(_num_steps(joint))
    worth = exact_match(predicted, target) if goal == "exact" else step_match(predicted, target, goal == "gated").sum(1)
    return torch.einsum("nu,u,nuk->nk", joint, worth.double(), step_scores(joint))


def group_moments(objective: Objective | str, joint: Float[Tensor, "N U"], group_size: int) -> Moments:
    """Mean and second moment of g = 1/G sum_i A_i * scores_i, of one group of every prompt.

    A scale that is of the batch is that of all prompts here, as in a large batch. Dynamic sampling leaves groups
    without any credit out of both moments; divide their means over prompts by that of `signal`.

    Raises:
        InputError: an objective without a closed form, a group size below 2, more kinds of groups than can be listed.
    """
    chosen, scores = _named(objective), step_scores(joint)
    steps = scores.shape[2]
    if (number := num_groups(chosen, steps, group_size)) > MOST_GROUPS:
        raise InputError(
            f"{steps} steps and groups of {group_size} make {number:,} kinds of groups; {MOST_GROUPS:,} can be listed."
        )
    scale = torch.ones(steps, dtype=torch.float64)
    if chosen.scale in ("batch", "batch_centred"):
        if chosen.credit == "step":  # one std a step; for a trajectory it is one number, which no worth depends on
            rewards, shares = _rewards(chosen, steps), joint.mean(0)
            spread = (shares @ rewards**2 - (shares @ rewards) ** 2).clamp(min=0).sqrt()
            scale = torch.where(spread > 1e-9, 1 / spread, 0.0)
        chosen = replace(chosen, scale="none", baseline="group")
    separate = _separates(chosen)
    parts = [_moments(chosen, joint, scores[:, :, k, None], group_size, k) for k in range(steps)] if separate else []
    parts = parts or [_moments(chosen, joint, scores, group_size, None)]
    mean, second = (torch.cat([part[place] for part in parts], 1) for place in (0, 1))
    signal = parts[0][2] if "dynamic_sampling" in chosen.extras else torch.ones(len(joint), dtype=torch.float64)
    return Moments(mean * scale, (second * scale**2).sum(1), signal)


def sampled_moments(
    objective: Objective | str, joint: Float[Tensor, "N U"], group_size: int, rng: np.random.Generator, groups: int
) -> Moments:
    """`group_moments` from so many sampled groups of each prompt, all normalised in one batch.

    Raises:
        InputError: an objective without a closed form, a group size below 2.
    """
    chosen, scores = _named(objective), step_scores(joint)
    cumulative = joint.cumsum(1)
    uniform = torch.from_numpy(rng.random((len(joint), groups * group_size)))
    drawn = torch.searchsorted(cumulative / cumulative[:, -1:], uniform, right=True).clamp(max=joint.shape[1] - 1)
    rewards = _rewards(chosen, scores.shape[2])[drawn.flatten()]
    advantages = chosen.advantages(rewards[:, 0] if _one_number(chosen) else rewards, group_size)
    shape = (len(joint), groups, group_size, -1)
    credit = advantages.view(shape)
    seen = scores.gather(1, drawn[:, :, None].expand(-1, -1, scores.shape[2])).view(shape)
    updates = (credit * seen).mean(2)
    kept = torch.ones(updates.shape[:2], dtype=torch.float64)
    if "dynamic_sampling" in chosen.extras:
        kept = (credit != 0).flatten(2).any(2).double()
    return Moments(updates.mean(1), updates.square().sum(2).mean(1), kept.mean(1))


def step_worth(moments: Moments, gradient: Float[Tensor, "N K"], prompts: int, parameters: str = "shared") -> float:
    """(E[g] . grad J)^2 / E ||g||^2 of an update with so many of the prompts, drawn at random; J is the mean over all.

    Args:
        parameters: "shared": all prompts have the same K parameters, the gradient is the mean over prompts, and its
            noise, of groups and of which prompts were drawn, falls with their number. "own": each prompt has K of its
            own, and nothing that is learnt on one helps another; `prompts` then changes nothing but the unit.

    Raises:
        InputError: another word for parameters, fewer than 1 prompt.
    """
    if parameters not in PARAMETERS:
        raise InputError(f"parameters is {parameters!r}: use {' or '.join(PARAMETERS)}.")
    if prompts < 1:
        raise InputError(f"prompts is {prompts}: an update has at least 1.")
    kept = float(moments.signal.mean())
    if not kept > 0:
        return 0.0
    second = float(moments.second.mean()) / kept
    if parameters == "own":
        along = float((moments.mean * gradient).sum(1).mean()) / kept
    else:
        mean = moments.mean.mean(0) / kept
        along, bias_only = float(mean @ gradient.mean(0)), float(mean @ mean)
        second = bias_only + (second - bias_only) / prompts
    return along**2 / second if second > 0 else 0.0


def count_outcomes(rollouts: pd.DataFrame) -> Int[np.ndarray, "N U"]:
    """How many of a prompt's completions had which outcome; columns prompt, rollout, level (from 1), match.

    Raises:
        InputError: no rows, or prompts that differ in their numbers of completions or levels.
    """
    steps = rollouts["level"].nunique()
    wide = rollouts.pivot(index=["prompt", "rollout"], columns="level", values="match")
    sizes = wide.groupby("prompt").size()
    if wide.empty or wide.isna().to_numpy().any() or sizes.nunique() > 1:
        raise InputError("rollouts must have the same completions and levels for every prompt, and at least one.")
    kind = wide.to_numpy().astype(int) @ (2 ** np.arange(steps)[::-1])
    kinds = np.arange(2**steps)
    return (kind.reshape(len(sizes), -1)[:, :, None] == kinds).sum(1)


def sample_joint(
    counts: Int[np.ndarray, "N U"], steps: str, rng: np.random.Generator, draws: int = 1
) -> Float[Tensor, "DN U"]:
    """What each prompt's outcome probabilities may be, given its few completions: D draws of all prompts.

    How likely each step is to be right is drawn from its posterior, whose prior is fitted to the prompts
    (`draw_probs`). Drawing keeps how much prompts differ, so that means over prompts are unbiased where the prior's
    family is right: frequencies differ too much, posterior means too little, and add-half smoothing of outcomes invents
    exact matches where they are rare.

    Args:
        steps: "independent": the steps of a prompt are right independently; "joint": an outcome is likelier than that
            by the factor by which it is more frequent over all prompts, shrunk to 1 where rare (`dependence`).

    Raises:
        InputError: another word for steps.
    """
    if steps not in STEPS:
        raise InputError(f"steps is {steps!r}: use {' or '.join(STEPS)}.")
    right, total = outcomes(_num_steps(counts)).numpy(), counts.sum(1)
    levels = [np.tile(np.column_stack([total - hits, hits]), (draws, 1)) for hits in (counts @ right).T]
    joint = independent_steps(torch.from_numpy(np.column_stack([draw_probs(level, rng)[:, 1] for level in levels])))
    if steps == "joint":
        joint = joint * torch.from_numpy(dependence(counts))
        joint = joint / joint.sum(1, keepdim=True)
    return joint


def draw_probs(counts: Int[np.ndarray, "N C"], rng: np.random.Generator) -> Float[np.ndarray, "N C"]:
    """A draw for every row from the posterior of its probabilities, given counts out of the same total.

    The prior is a Dirichlet around the pooled frequencies whose concentration fits how much rows differ beyond what
    multinomial noise explains (moments); of two columns, that is a Beta.
    """
    size = counts.sum(1)[0]
    pooled = counts.sum(0) / counts.sum()
    within = float(pooled @ (1 - pooled))  # sum over columns of mu (1 - mu)
    total = float(((counts / size - pooled) ** 2).sum(1).mean())
    # E total = between + (within - between) / size, and for a Dirichlet between = within / (concentration + 1)
    between = (total * size - within) / (size - 1)
    concentration = CERTAIN if between * CERTAIN <= within else max(within / between - 1, 0.0)
    gammas = rng.standard_gamma(counts + concentration * pooled)
    return gammas / gammas.sum(1, keepdims=True)


def dependence(counts: Int[np.ndarray, "N U"]) -> Float[np.ndarray, "U"]:
    """How much more frequent each outcome is than if the steps of a prompt were right independently, over all prompts.

    (seen + 10) / (expected + 10): the posterior mean of a factor whose prior, a Gamma, has mean 1 and standard
    deviation 10^-1/2. Expected is the mean over all ways to shuffle the completions of a prompt, each step on its own.
    """
    right, size = outcomes(_num_steps(counts)).numpy(), counts.sum(1)[0]
    expected = size * independent_steps(torch.from_numpy(counts @ right / size)).numpy().sum(0)
    return (counts.sum(0) + PRIOR_COUNT) / (expected + PRIOR_COUNT)


def predict(
    rollouts: pd.DataFrame,
    objectives: Sequence[str],
    prompts: int,
    seed: int = 0,
    draws: int = 4,
    goals: Sequence[str] = ("exact", "match"),
) -> pd.DataFrame:
    """Columns objective, steps, parameters, goal, worth: the worth of a step from one start, under every assumption.

    Args:
        rollouts: of one start, as `count_outcomes` reads them; their group size is the one predicted for.
        prompts: of an update.
        seed: of the posterior draws, of which every prompt gets `draws`, and of the groups of objectives that tell more
            than 50,000 kinds apart, whose moments are sampled.

    Raises:
        InputError: as `count_outcomes` and `group_moments`.
    """
    counts = count_outcomes(rollouts)
    group_size, num_steps = int(counts[0].sum()), _num_steps(counts)
    rows = []
    for steps in STEPS:
        rng = np.random.default_rng(seed)
        joint = sample_joint(counts, steps, rng, draws)
        gradients = {goal: goal_gradient(joint, goal) for goal in goals}
        for objective in objectives:
            if num_groups(_named(objective), num_steps, group_size) <= MOST_GROUPS:
                moments = group_moments(objective, joint, group_size)
            else:
                moments = sampled_moments(objective, joint, group_size, rng, -(-SAMPLED_GROUPS // len(joint)))
            for (goal, gradient), parameters in product(gradients.items(), PARAMETERS):
                worth = step_worth(moments, gradient, prompts, parameters)
                rows.append((objective, steps, parameters, goal, worth))
    return pd.DataFrame(rows, columns=["objective", "steps", "parameters", "goal", "worth"])


def num_groups(objective: Objective, num_steps: int, group_size: int) -> int:
    """Kinds of groups that the advantages tell apart, of the step with most or of all together."""
    rewards = _rewards(objective, num_steps)
    parts = rewards.split(1, 1) if _separates(objective) else [rewards]
    return max(math.comb(len(part.unique(dim=0)) + group_size - 1, group_size) for part in parts)


def has_closed_form(objective: Objective) -> bool:
    """Whether its advantages follow from which steps of a group are right."""
    return (
        objective.credit != "token"
        and objective.reward not in ("ranking", "best_of_beam")
        and (objective.credit == "trajectory" or objective.ratio not in ("sequence", "sequence_sum"))
        and (objective.baseline != "batch" or "per_level" in objective.extras)
    )


class _Groups(NamedTuple):
    """Every kind of group, as the number of its members of each of D kinds."""

    kind: Int[Tensor, "U"]  # of the D, that each outcome is
    log_ways: Float[Tensor, "M"]
    counts: Float[Tensor, "M D"]
    advantages: Float[Tensor, "M D C"]


@cache
def _groups(objective: Objective, num_steps: int, group_size: int, step: int | None) -> _Groups:
    """Kinds of groups as the advantages of a step see them, of all steps together where it is None.

    They depend on the rewards alone, so that all prompts share them.
    """
    rewards = _rewards(objective, num_steps)
    columns = rewards if step is None else rewards[:, step, None]
    rows, kind = columns.unique(dim=0, return_inverse=True)
    picks = torch.tensor(list(combinations_with_replacement(range(len(rows)), group_size)))
    parts = []
    for some in picks.split(max(1, IN_ONE_GO // (group_size * rows.shape[1]))):
        members = rows[some].flatten(0, 1)
        values = objective.advantages(members[:, 0] if _one_number(objective) else members, group_size)
        values = values.view(*some.shape, -1)
        by_kind = values.new_zeros(len(some), len(rows), values.shape[2])
        parts.append(by_kind.scatter_(1, some[..., None].expand_as(values), values))
    counts = torch.nn.functional.one_hot(picks, len(rows)).sum(1).double()
    log_ways = math.lgamma(group_size + 1) - torch.lgamma(counts + 1).sum(1)
    return _Groups(kind, log_ways, counts, torch.cat(parts))


def _moments(
    objective: Objective, joint: Float[Tensor, "N U"], scores: Float[Tensor, "N U C"], group_size: int, step: int | None
) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N C"], Float[Tensor, "N"]]:
    """E[g_c], E[g_c^2] and the probability of any credit; the first two without silent groups, which add 0.

    Given how many members are of which kind, their scores are independent.
    """
    groups = _groups(objective, _num_steps(joint), group_size, step)
    kinds = groups.counts.shape[1]
    member = torch.nn.functional.one_hot(groups.kind, kinds).double()  # (U, D)
    share = joint @ member
    inside = joint[:, :, None] / share.clamp(min=1e-300)[:, groups.kind, None]  # of its kind
    mean = torch.einsum("nuc,ud->ndc", inside * scores, member)
    variance = (torch.einsum("nuc,ud->ndc", inside * scores**2, member) - mean**2).clamp(min=0)
    credit = groups.advantages.expand(-1, -1, scores.shape[2])
    pull, noise = groups.counts[..., None] * credit / group_size, groups.counts[..., None] * (credit / group_size) ** 2
    heard = ((groups.counts[..., None] * credit) != 0).flatten(1).any(1).double()
    first, second, signal = [], [], []
    for some in torch.arange(len(joint)).split(max(1, IN_ONE_GO // len(groups.counts))):
        log_share = share[some].clamp(min=1e-300).log()  # a kind that never occurs: its groups then weigh 0
        weight = (groups.log_ways + log_share @ groups.counts.T).exp()
        given = [mean[some, :, c] @ pull[:, :, c].T for c in range(scores.shape[2])]
        spread = [variance[some, :, c] @ noise[:, :, c].T for c in range(scores.shape[2])]
        first.append(torch.stack([(weight * part).sum(1) for part in given], 1))
        both = zip(given, spread, strict=True)
        second.append(torch.stack([(weight * (part**2 + extra)).sum(1) for part, extra in both], 1))
        signal.append(weight @ heard)
    return torch.cat(first), torch.cat(second), torch.cat(signal)


def _separates(objective: Objective) -> bool:
    """Whether a step's credit depends on the rewards of that step alone."""
    return objective.credit == "step" and objective.separates_columns and "dynamic_sampling" not in objective.extras


def _one_number(objective: Objective) -> bool:
    """Whether a completion has one reward, not one a step."""
    return objective.credit == "trajectory" and "per_level" not in objective.extras


def _rewards(objective: Objective, num_steps: int) -> Float[Tensor, "U C"]:
    predicted, target = _codes(num_steps)
    rewards = objective.rewards(predicted, target, torch.ones(len(predicted), dtype=torch.bool)).double()
    return rewards if rewards.dim() == 2 else rewards[:, None]


def _codes(num_steps: int) -> tuple[Int[Tensor, "U K"], Int[Tensor, "U K"]]:
    """Codes with every outcome, and their target."""
    predicted = (~outcomes(num_steps)).long()
    return predicted, torch.zeros_like(predicted)


def _num_steps(joint: Tensor | np.ndarray) -> int:
    steps = joint.shape[1].bit_length() - 1
    if joint.shape[1] != 2**steps or not steps:
        raise InputError(f"{joint.shape[1]} outcomes are not those of K steps, which have 2^K.")
    return steps


def _named(objective: Objective | str) -> Objective:
    if not isinstance(objective, Objective):
        if objective not in OBJECTIVES:
            raise InputError(f"objective is {objective!r}; known are {', '.join(OBJECTIVES)}.")
        objective = OBJECTIVES[objective]
    if not has_closed_form(objective):
        raise InputError(f"{objective} has no closed form: its credit does not follow from which steps are right.")
    return objective
