"""What normalising at a fixed step costs where the policy decides how many steps there are, computed exactly.

A completion takes step 1, decides whether to go on, and takes step 2 if so. Each step is right or wrong and pays 1 or
0, and J is the expected sum. The three parameters are the logits of the three choices. Credit is normalised at each
step index over the group, without a std, and a choice is credited with its own step and the later one:

    absent "left_out"   the mean at step 2 is over the completions that have one
    absent "zero"       a step that was not taken is a step that pays 0, so that K = 2 is fixed

With K fixed, by the second rule or because every completion goes on, E[g] is (1 - 1/G) grad J. Under the first rule
what is subtracted depends on the decision: going on costs a completion what step 2 pays on average, so the decision is
never credited for it (https://github.com/verl-project/verl/issues/7244).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from sapo.credit.advantages import step_advantages, suffix_sum
from sapo.errors import InputError

# (step 1 is right, goes on, step 2 is right): the six completions
OUTCOMES = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 1, 1], [1, 1, 1]], dtype=torch.float64)


@dataclass(frozen=True)
class OneOrTwoSteps:
    """A policy by the probabilities of its three choices.

    Args:
        right_first, right_second: that a step is right, where it is taken.
        goes_on: that there is a second step. At 1 the decision is none, and K is 2.

    Raises:
        InputError: a number outside [0, 1].
    """

    right_first: float
    goes_on: float
    right_second: float

    def __post_init__(self) -> None:
        for name in ("right_first", "goes_on", "right_second"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name} is {getattr(self, name)}; a probability lies between 0 and 1.")

    @property
    def choices(self) -> Float[Tensor, "3"]:
        return torch.tensor([self.right_first, self.goes_on, self.right_second], dtype=torch.float64)

    @property
    def probs(self) -> Float[Tensor, "6"]:
        """Of the six completions of `OUTCOMES`."""
        taken = torch.where(OUTCOMES == 1, self.choices, 1 - self.choices)
        taken[OUTCOMES[:, 1] == 0, 2] = 1.0  # nothing is chosen there
        return taken.prod(1)

    @property
    def scores(self) -> Float[Tensor, "6 3"]:
        """Gradient of the log-probability of each choice by its own logit."""
        scores = OUTCOMES - self.choices
        scores[OUTCOMES[:, 1] == 0, 2] = 0.0
        return scores

    def gradient(self) -> Float[Tensor, "3"]:
        """grad J, with J = `right_first` + `goes_on` x `right_second`."""
        first, on, second = self.choices
        return torch.stack([first * (1 - first), on * (1 - on) * second, on * second * (1 - second)])


def expected_update(policy: OneOrTwoSteps, group_size: int, absent: str = "left_out") -> Float[Tensor, "3"]:
    """E[g], over all groups of G completions.

    Raises:
        InputError: a group size below 2; another rule for absent steps.
    """
    if group_size < 2:
        raise InputError(f"group_size is {group_size}: a group-relative advantage needs at least 2 completions.")
    if absent not in ("left_out", "zero"):
        raise InputError(f"absent is {absent!r}; use 'left_out' or 'zero'.")
    update = torch.zeros(3, dtype=torch.float64)
    for members, prob in _groups(policy, group_size):
        rewards = OUTCOMES[members][:, [0, 2]]
        advantages = step_advantages(rewards, group_size, scale="none")
        if absent == "left_out":
            goes_on = OUTCOMES[members, 1]
            mean = rewards[:, 1].sum() / goes_on.sum().clamp(min=1)
            advantages[:, 1] = goes_on * (rewards[:, 1] - mean)
        credit = suffix_sum(advantages)[:, [0, 0, 1]]  # the decision to go on ends step 1
        update += prob * (credit * policy.scores[members]).mean(0)
    return update


def relative_bias(policy: OneOrTwoSteps, group_size: int, absent: str = "left_out") -> float:
    """||E[g] - (1 - 1/G) grad J|| / ||(1 - 1/G) grad J||: 0 where the expected update is the gradient, but for the
    factor that any group mean brings because a completion is compared with itself too.

    Raises:
        InputError: as `expected_update`; a policy at which grad J is 0.
    """
    update = expected_update(policy, group_size, absent)
    wanted = (1 - 1 / group_size) * policy.gradient()
    if not wanted.norm() > 0:
        raise InputError(f"{policy} has nothing to learn: the gradient of its expected reward is 0.")
    return float((update - wanted).norm() / wanted.norm())


def _groups(policy: OneOrTwoSteps, group_size: int) -> Iterator[tuple[list[int], float]]:
    """Every multiset of G completions, and its probability."""
    probs = policy.probs.tolist()
    for members in combinations_with_replacement(range(len(probs)), group_size):
        counts = [members.count(outcome) for outcome in range(len(probs))]
        orders = math.factorial(group_size) // math.prod(map(math.factorial, counts))
        yield list(members), orders * math.prod(prob**count for prob, count in zip(probs, counts, strict=True))
