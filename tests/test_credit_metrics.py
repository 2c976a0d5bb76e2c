"""Numbers of a batch of two groups, counted by hand."""

import pytest
import torch

from sapo.credit.objectives import OBJECTIVES
from sapo.training.credit_metrics import credit_metrics, no_spread, own_credit

# Two prompts of two completions, K = 2. The first prompt's first completion has step 1 right, its second step 2; of the
# second prompt's, both have everything right.
MATCH = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
ADVANTAGES = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [0.0, 0.0], [0.0, 0.0]])
LENGTHS = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 4.0], [2.0, 2.0]])
TRAINED = torch.tensor([[3.0, 1.0], [1.0, 1.0], [2.0, 0.0], [2.0, 2.0]])


def test_a_batch_by_hand():
    found = credit_metrics(MATCH, ADVANTAGES, MATCH, LENGTHS, TRAINED, group_size=2)
    assert found == pytest.approx(
        {
            "reward": 6 / 4,  # 1, 1, 2, 2
            "reward_std": (1 / 3) ** 0.5,  # four halves squared over three
            "frac_reward_zero_std": 1.0,  # of sums: 1, 1 and 2, 2
            "frac_zero_credit": 0.5,  # the second group
            "signs_differ": 0.5,  # the first two completions
            "exact/frac_zero_spread": 1.0,  # 0, 0 and 1, 1
            "response_length": 16 / 4,
            # shares of tokens against halves: (3/4, 1/4) moves 1/4; (1/2, 1/2) nothing, twice. Of (1, 0) one step alone
            # is trained, by half under the step mean: half of |1 - 1/2|
            "weight_moved": (0.25 + 0 + 0.25 + 0) / 4,
            "rewards/sid_level_1/mean": 0.75,
            "step/1/frac_zero_spread": 0.5,
            "step/1/length": 2.0,
            "step/1/trained": 2.0,
            "rewards/sid_level_2/mean": 0.75,
            "step/2/frac_zero_spread": 0.5,
            "step/2/length": 2.0,
            "step/2/trained": 1.0,
            # the first group's advantages follow its matches, and the second has none
            "step/1/own_credit": 1.0,
            "step/2/own_credit": 1.0,
        }
    )


def test_rewards_and_advantages_of_trajectories():
    outcome = MATCH.prod(1)
    found = credit_metrics(outcome, torch.zeros(4, 1), MATCH, LENGTHS, TRAINED, group_size=2)
    assert (found["reward"], found["frac_zero_credit"], found["signs_differ"]) == (0.5, 1.0, 0.0)
    assert "step/1/own_credit" not in found  # nothing is credited


# All four of two steps, so that they are independent; and a group whose first step says nothing.
EVERY = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
HALF = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [1.0, 0.0]])


@pytest.mark.parametrize(
    ("key", "match", "shares"),
    [
        ("sapo", EVERY, [1, 1]),
        # sums 1, 1, 2, 0: about their mean 0, 0, 1, -1, of square sum 2; about its own, step 1 is halves, of square sum
        # 1, and their product sums to 1/2 + 1/2: 1 / (1 x 2)
        ("grpo_step_reward", EVERY, [1 / 2, 1 / 2]),
        # the exact match 0, 0, 1, 0: square sum 9/16 + 3/16 = 3/4, product with step 1 1/2: 1/4 / (1 x 3/4)
        ("grpo", EVERY, [1 / 3, 1 / 3]),
        # all of the sum's spread is step 2's: nothing of step 1's credit is its own
        ("grpo_step_reward", HALF, [0, 1]),
        ("grpo_step_reward", torch.cat([EVERY, HALF]), [1 / 4, 3 / 4]),
        ("sapo", HALF, [torch.nan, 1]),
        ("sapo", torch.cat([EVERY, HALF]), [1, 1]),
    ],
)
def test_own_credit_by_hand(key, match, shares):
    point, target = OBJECTIVES[key], torch.ones(match.shape, dtype=torch.long)
    rewards = point.rewards(match.long(), target, torch.ones(len(match), dtype=torch.bool))
    advantages = point.advantages(rewards, 4).view(len(match), -1)
    torch.testing.assert_close(own_credit(advantages, match, 4), torch.tensor(shares).float(), equal_nan=True)


def test_no_spread_is_of_a_group_and_a_column():
    assert no_spread(MATCH, 2).tolist() == [[0, 0], [1, 1]]
    assert no_spread(MATCH, 4).tolist() == [[0, 0]]
