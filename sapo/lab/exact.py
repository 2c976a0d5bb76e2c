"""Exact gradients of every objective in a world that is enumerated (`sapo.lab.world`), in float64, without a sample.

A trajectory y is K thinking blocks of one word each, then K SID tokens. The G completions of a group are independent,
so the expected update of an objective is a finite sum,

    E[g] = sum_y pi(y) sum_t w_t(y) E[A_t | y] grad log pi(y_t),

and E[A_t | y] is one too: given its own reward, an advantage depends on the rewards of the other G-1 completions only
through how many of them have which value, and those counts are multinomial. The advantages themselves come from
`Objective.advantages` and the token weights from the gradient of `policy_loss`, the functions that training calls.

Y trajectories, K steps, T = 2K tokens (blocks first), P parameters, M targets.
"""

import math
from dataclasses import dataclass, replace
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.credit.loss import policy_loss
from sapo.credit.objectives import OBJECTIVES, SILENT_WEIGHT, Objective
from sapo.credit.rewards import exact_match, step_match
from sapo.errors import InputError
from sapo.lab.world import SidWorld

MOST_GROUPS = 4_000_000  # rows of groups that are normalised in one go


def true_gradient(world: SidWorld, goal: str = "exact") -> Float[Tensor, "P"]:
    """grad J = sum_y pi(y) R(y) grad log pi(y); R is the match: "exact", the number of matched codes ("match"), or of
    those under a right prefix ("gated")."""
    return world.pull_back((world.probs * world.goals(goal))[:, None].expand(world.token_steps.shape))


def expected_update(
    objective: Objective | str, world: SidWorld, group_size: int, given_signal: bool = False
) -> Float[Tensor, "P"]:
    """E[g]: the expected gradient-ascent step of an objective at ratio 1 (one update a batch, no KL), over groups of G.

    Where advantages are normalised over the batch, the batch is this one group; `sampled_updates` takes larger ones.

    Args:
        given_signal: condition on groups whose advantages are not all 0, as DAPO's dynamic sampling does.

    Raises:
        InputError: an unknown name; a group size below 2; the "token" average where trajectories differ in how many
            tokens are trained.
    """
    update = torch.zeros_like(world.theta)
    for prob, case in _cases(objective, world, group_size):
        credit = case.expected_credit()
        if case.objective.credit == "trajectory":
            credit = credit[:, 0]
        by_token = _weights(case.objective, world) * case.objective.to_tokens(credit, world.token_steps)
        update += prob * world.pull_back(case.probs[:, None] * by_token)
    return update / _signal(objective, world, group_size) if given_signal else update


def second_moment(
    objective: Objective | str, world: SidWorld, group_size: int, given_signal: bool = False
) -> Float[Tensor, ""]:
    """E ||g||^2 of the update of one group. Less ||E[g]||^2 it is the variance, which n groups divide by n.

    Raises:
        InputError: as `expected_update`.
    """
    scores = _unit_scores(_named(objective), world)
    cases = _cases(objective, world, group_size)
    moment = torch.stack([prob * case.second_moment(scores) for prob, case in cases]).sum()
    return moment / _signal(objective, world, group_size) if given_signal else moment


def silent_share(objective: Objective | str, world: SidWorld, group_size: int) -> float:
    """Probability that a group gives no credit at all: every advantage of every completion is 0.

    Raises:
        InputError: as `expected_update`.
    """
    # With the outcome first a group is silent where its step credit is.
    chosen = _named(objective)
    steps = replace(chosen, extras=tuple(extra for extra in chosen.extras if extra != "outcome_first"))
    return float(sum(prob * case.silent_share() for prob, case in _cases(steps, world, group_size)))


def mixed_share(world: SidWorld, group_size: int) -> float:
    """Probability that SAPO gives the steps of one completion credit of different signs.

    A right code is credited where another completion misses it, a wrong one is blamed where another has it. So a
    completion has both unless the other G-1 all have every code that it has, or all miss every code that it misses.
    """
    share = 0.0
    for target, prob in zip(world.target_sids, world.goal_probs, strict=True):
        rows, kind = step_match(world.sids, target.expand(world.sids.shape)).bool().unique(dim=0, return_inverse=True)
        shares = _shares(kind, world.probs)
        for row, own in zip(rows, shares, strict=True):
            has_all = shares[(rows | ~row).all(1)].sum() ** (group_size - 1)
            misses_all = shares[(~rows | row).all(1)].sum() ** (group_size - 1)
            alike = own ** (group_size - 1)
            if row.any() and not row.all():
                share += float(prob * own * (1 - has_all - misses_all + alike))
    return share


def sampled_updates(
    objective: Objective | str,
    world: SidWorld,
    group_size: int,
    num_groups: int,
    generator: torch.Generator,
    groups_a_batch: int = 1,
) -> Float[Tensor, "N P"]:
    """Updates of sampled groups, normalised in batches of `groups_a_batch`: a check, and all there is for some."""
    chosen = _named(objective)
    draws = torch.multinomial(world.probs, num_groups * group_size, replacement=True, generator=generator)
    target = torch.multinomial(world.goal_probs, num_groups, replacement=True, generator=generator)
    rewards = _rewards(chosen, world.sids[draws], world.target_sids[target].repeat_interleave(group_size, 0))
    size = groups_a_batch * group_size
    advantages = torch.cat([chosen.advantages(batch, group_size).view(len(batch), -1) for batch in rewards.split(size)])
    credit = torch.einsum("yu,yup->yp", advantages, _unit_scores(chosen, world)[draws])
    return credit.view(num_groups, group_size, -1).mean(1)


def efficiency(
    update: Float[Tensor, "P"], moment: Float[Tensor, ""], gradient: Float[Tensor, "P"], groups: int = 1
) -> float:
    """(E[g] . grad J)^2 / (E ||g||^2 ||grad J||^2), between 0 and 1, of the mean g of a number of groups.

    A noisy step of the best length improves J in proportion to it: with curvature L in all directions the expected
    gain of a step of length eta is eta E[g] . grad J - eta^2 L E ||g||^2 / 2. The groups are of this one prompt. With
    many of them the noise is gone, and what is left is the squared cosine of E[g] and grad J.

    Args:
        update, moment: of one group, `expected_update` and `second_moment`.
    """
    bias_only = update @ update
    moment = bias_only + (moment - bias_only) / groups
    return float((update @ gradient) ** 2 / (moment * (gradient @ gradient)).clamp(min=1e-300))


def improvement(world: SidWorld, direction: Float[Tensor, "P"], goal: str = "exact", kl: float = 1e-3) -> float:
    """J after one step along `direction` less J before, the step so long that KL(before || after) is `kl`.

    Raises:
        InputError: a direction of length 0, or one that cannot move the policy that far.
    """
    if not direction.norm() > 0:
        raise InputError("direction is 0: no step along it has any length.")
    unit, before = direction / direction.norm(), world.log_probs(world.theta).sum(1)

    def moved(length: float) -> float:
        return float(before.exp() @ (before - world.log_probs(world.theta + length * unit).sum(1)))

    low, high = 0.0, 1.0
    while moved(high) < kl:
        low, high = high, 2 * high
        if high > 1e6:
            raise InputError(f"no step along direction changes the policy by a KL of {kl}.")
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if moved(middle) < kl else (low, middle)
    return float(world.value(goal, world.theta + high * unit) - world.value(goal))


@dataclass(frozen=True, eq=False)
class _Case:
    """An objective in a world with one target: what it pays every trajectory, in C columns, which a group of G turns
    into U advantages each.

    Probabilities may add up to less than 1; expectations are then over groups of the trajectories that have any.
    """

    objective: Objective
    probs: Float[Tensor, "Y"]
    rewards: Float[Tensor, "Y C"]
    group_size: int
    weight: float = 1.0  # of the advantages

    def expected_credit(self) -> Float[Tensor, "Y U"]:
        """E[A_u | y]."""
        parts = []
        for columns in self._columns():
            own, kind, others, shares = self._kinds(columns)
            advantages, weights = self._advantages(own[:, None], others, shares)
            parts.append(torch.einsum("m,amu->au", weights, advantages[:, :, 0])[kind])
        return torch.cat(parts, 1)

    def second_moment(self, unit_scores: Float[Tensor, "Y U P"]) -> Float[Tensor, ""]:
        """E ||g||^2 = E ||h_1||^2 / G + (G - 1) / G E[h_1 . h_2], with h_i what completion i contributes."""
        size, units = self.group_size, unit_scores.shape[1]
        total = torch.zeros((), dtype=torch.float64)
        separate = self.objective.separates_columns
        pairs = [[k, other] for k in range(units) for other in range(k, units)] if separate else [list(range(units))]
        for pair in pairs:
            columns = sorted(set(pair)) if separate else list(range(self.rewards.shape[1]))
            own, kind, others, shares = self._kinds(columns)
            scores = unit_scores[:, sorted(set(pair))]
            alone, weights = self._advantages(own[:, None], others, shares)
            same = torch.einsum("m,amu,amv->auv", weights, alone[:, :, 0], alone[:, :, 0])
            two = torch.stack(torch.meshgrid(*[torch.arange(len(own))] * 2, indexing="ij"), -1).flatten(0, 1)
            both, weights = self._advantages(own[two], others, shares)
            cross = torch.einsum("m,amu,amv->auv", weights, both[:, :, 0], both[:, :, 1]).unflatten(0, [len(own)] * 2)
            sums = torch.zeros(len(own), *scores.shape[1:], dtype=torch.float64)
            sums.index_add_(0, kind, self.probs[:, None, None] * scores)
            if separate and pair[0] != pair[1]:  # only the products of the two units; each alone is a pair of its own
                same[:, 0, 0] = same[:, 1, 1] = cross[..., 0, 0] = cross[..., 1, 1] = 0
            total += torch.einsum("y,yuv,yup,yvp->", self.probs, same[kind], scores, scores) / size
            total += torch.einsum("abuv,aup,bvp->", cross, sums, sums) * (size - 1) / size
        return total

    def silent_share(self) -> Float[Tensor, ""]:
        """Probability that all advantages are 0."""
        own, _, _, shares = self._kinds(list(range(self.rewards.shape[1])), as_sets=False)
        if self.objective.separates_columns and self.objective.baseline in ("group", "leave_one_out"):
            return shares.pow(self.group_size).sum()  # no spread in any column: all rows are one and the same
        advantages, weights = self._advantages(own[:1, None][:, :0], own, shares)
        return weights[(advantages[0] == 0).flatten(1).all(1)].sum()

    def _columns(self) -> list[list[int]]:
        """Columns of the rewards that are normalised together."""
        columns = list(range(self.rewards.shape[1]))
        return [[column] for column in columns] if self.objective.separates_columns else [columns]

    def _kinds(self, columns: list[int], as_sets: bool = True) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Distinct rows of rewards, which of them each trajectory has, and the rows of others with their shares."""
        own, kind = self.rewards[:, columns].unique(dim=0, return_inverse=True)
        if "across_steps" not in self.objective.extras or not as_sets:
            return own, kind, own, _shares(kind, self.probs)
        # Statistics over all steps at once see the row of another completion as a set of values.
        others, which = own.sort(1).values.unique(dim=0, return_inverse=True)
        return own, kind, others, _shares(which[kind], self.probs)

    def _advantages(
        self, fixed: Float[Tensor, "A F C"], others: Float[Tensor, "D C"], shares: Float[Tensor, "D"]
    ) -> tuple[Float[Tensor, "A M G U"], Float[Tensor, "M"]]:
        """Advantages of a group of F given members, which come first, and every multiset of others; its probability."""
        members = self.group_size - fixed.shape[1]
        picks = torch.tensor(list(combinations_with_replacement(range(len(others)), members)), dtype=torch.long)
        counts = torch.nn.functional.one_hot(picks, len(others)).sum(1).double()
        log_weights = math.lgamma(members + 1) - torch.lgamma(counts + 1).sum(1) + torch.xlogy(counts, shares).sum(1)
        rest = others[picks]
        step = max(1, MOST_GROUPS // max(1, rest.numel()))
        parts = []
        for some in fixed.split(step):
            shape = (len(some), len(rest), -1, -1)
            groups = torch.cat([some[:, None].expand(shape), rest.expand(shape)], 2)
            rows = groups.flatten(0, 2)
            one_number = self.objective.credit == "trajectory" and "per_level" not in self.objective.extras
            flat = rows[:, 0] if one_number else rows
            values = self.weight * self.objective.advantages(flat, self.group_size)
            parts.append(values.view(*groups.shape[:3], -1))
        return torch.cat(parts), log_weights.exp()


def _cases(objective: Objective | str, world: SidWorld, group_size: int) -> list[tuple[Float[Tensor, ""], _Case]]:
    """The objective for every target, with the probability of that target."""
    chosen = _named(objective)
    if chosen.reward in ("ranking", "best_of_beam"):
        raise InputError(
            f"the reward {chosen.reward!r} is of beams, which are no samples of the policy: no closed form."
        )
    if chosen.credit == "token":
        raise InputError("token credit depends on a value that is learned along the way: no closed form.")
    if chosen.credit == "step" and chosen.ratio in ("sequence", "sequence_sum"):
        raise InputError("a ratio of the whole sequence mixes the credit of its steps: no closed form here.")
    if chosen.baseline == "batch":  # a batch of one group
        chosen = replace(chosen, baseline="group")
    if chosen.scale in ("batch", "batch_centred"):
        chosen = replace(chosen, scale="group")
    if group_size < 2:
        raise InputError(f"group_size is {group_size}: a group-relative advantage needs at least 2 completions.")
    parts = [(chosen, 1.0)]
    if "outcome_first" in chosen.extras:  # groups with an exact match but not all, and groups without one
        parts = [(replace(chosen, reward="exact", extras=()), 1.0), (replace(chosen, extras=()), SILENT_WEIGHT)]
    cases = []
    for target, prob in zip(world.target_sids, world.goal_probs, strict=True):
        wanted = target.expand(world.sids.shape)
        for part, weight in parts:
            rewards = _rewards(part, world.sids, wanted)
            columns = rewards if rewards.dim() == 2 else rewards[:, None]
            probs = world.probs if part is parts[0][0] else world.probs * (1 - exact_match(world.sids, wanted).double())
            cases.append((prob, _Case(part, probs, columns, group_size, weight)))
    return cases


def _signal(objective: Objective | str, world: SidWorld, group_size: int) -> float:
    signal = 1 - silent_share(objective, world, group_size)
    if signal < 1e-12:
        raise InputError("given_signal: no group of this world has any signal.")
    return signal


def _named(objective: Objective | str) -> Objective:
    if isinstance(objective, Objective):
        return objective
    if objective not in OBJECTIVES:
        raise InputError(f"objective is {objective!r}; known are {', '.join(OBJECTIVES)}.")
    return OBJECTIVES[objective]


def _rewards(objective: Objective, sids: Tensor, target: Tensor) -> Tensor:
    """Every SID that the policy can name is one of the catalogue; without a catalogue, all are."""
    return objective.rewards(sids, target, torch.ones(len(sids), dtype=torch.bool)).double()


def _weights(objective: Objective, world: SidWorld) -> Float[Tensor, "Y T"]:
    """What an advantage of 1 gives each token: minus the gradient of `policy_loss`, less its mean over completions."""
    lengths = world.trained.sum(1)
    if objective.average == "token" and (lengths != lengths[0]).any():
        raise InputError(
            "the 'token' average divides by the tokens of the whole batch, and these trajectories differ in how many "
            "are trained: choose a catalogue without only children, or none."
        )
    logps = world.log_probs(world.theta).requires_grad_()
    ones, old = torch.ones_like(logps), logps.detach()
    steps, length = world.num_steps, 2 * world.num_steps
    loss = policy_loss(
        objective, logps, old, ones, world.token_steps, world.trained, num_steps=steps, beta=0.0, max_length=length
    ).loss
    return -len(logps) * torch.autograd.grad(loss, logps)[0]


def _unit_scores(objective: Objective, world: SidWorld) -> Float[Tensor, "Y U P"]:
    """The gradient that the advantage of a credit unit multiplies."""
    scores = _weights(objective, world)[..., None] * world.scores
    if objective.credit == "trajectory":
        return scores.sum(1, keepdim=True)
    return torch.stack([scores[:, world.token_steps[0] == k].sum(1) for k in range(world.num_steps)], 1)


def _shares(kind: Int[Tensor, "Y"], probs: Float[Tensor, "Y"]) -> Float[Tensor, "D"]:
    return torch.zeros(int(kind.max()) + 1, dtype=probs.dtype).index_add_(0, kind, probs)
