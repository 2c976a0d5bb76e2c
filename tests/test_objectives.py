"""The objectives and their loss: worked numbers, plain loops, and the points where two objectives are one."""

import math
from dataclasses import FrozenInstanceError, replace
from functools import partial

import pytest
import torch
from torch import Tensor
from worlds import random_sids, trie_for

from sapo.credit.advantages import trajectory_advantages
from sapo.credit.loss import policy_loss
from sapo.credit.objectives import OBJECTIVES, Objective
from sapo.errors import InputError

close = partial(torch.testing.assert_close, atol=1e-9, rtol=1e-9)
double = partial(torch.tensor, dtype=torch.float64)
RATIOS = ("token", "step", "sequence", "sequence_sum")
AVERAGES = ("sequence", "token", "constant", "step")
WIDE = 20.0  # a clip range that nothing leaves


def plain(ratio: str = "token", average: str = "sequence", **options) -> Objective:
    return Objective("match", "step", ratio=ratio, average=average, **options)


# The objectives


MEANING = {  # reward, credit, scale, ratio, average, epsilon, epsilon_high
    "grpo": ("exact", "trajectory", "group", "token", "sequence", 0.2, 0.2),
    "grpo_graded": ("graded", "trajectory", "group", "token", "sequence", 0.2, 0.2),
    "dr_grpo": ("exact", "trajectory", "none", "token", "constant", 0.2, 0.2),
    "dapo": ("exact", "trajectory", "group", "token", "token", 0.2, 0.28),
    "gspo": ("exact", "trajectory", "group", "sequence", "sequence", 3e-4, 4e-4),
    "rank_grpo": ("match", "step", "group", "step", "step", 0.06, 0.08),
    "sapo": ("match", "step", "group", "token", "step", 0.2, 0.2),
    "sapo_gated": ("gated", "step", "group", "token", "step", 0.2, 0.2),
    "grpo_step_reward": ("match", "trajectory", "group", "token", "sequence", 0.2, 0.2),
    "sapo_outcome_reward": ("exact", "step", "group", "token", "step", 0.2, 0.2),
    "sapo_sequence_mean": ("match", "step", "group", "token", "sequence", 0.2, 0.2),
    "sapo_suffix": ("gated", "step", "group", "token", "step", 0.2, 0.2),
    "sapo_fallback": ("match", "step", "group", "token", "step", 0.2, 0.2),
    "sapo_no_std": ("match", "step", "none", "token", "step", 0.2, 0.2),
    "sapo_batch_std": ("match", "step", "batch", "token", "step", 0.2, 0.2),
    "process_grpo": ("match", "step", "group", "token", "sequence", 0.2, 0.2),
    "rloo": ("exact", "trajectory", "none", "sequence_sum", "sequence", 0.2, 0.2),
    "reinforce_plus_plus": ("exact", "trajectory", "batch_centred", "token", "sequence", 0.2, 0.2),
    "rlvr": ("verified", "token", "batch", "token", "token", 0.2, 0.2),
    "gdpo": ("match", "trajectory", "batch", "token", "sequence", 0.2, 0.2),
    "vppo": ("first_error", "step", "none", "token", "step", 0.2, 0.2),
    "sign": ("sign", "trajectory", "none", "token", "sequence", 0.2, 0.2),
    "rank_reward": ("ranking", "trajectory", "group", "token", "step", 0.2, 0.2),
    "best_of_beam": ("best_of_beam", "trajectory", "group", "token", "sequence", 0.2, 0.2),
}
BASELINES = {
    "rloo": "leave_one_out",
    "gdpo": "batch",
    "sign": "none",
    "rlvr": "value",
}
WITHOUT_KL = ("dr_grpo", "dapo", "gspo", "rloo", "reinforce_plus_plus", "gdpo", "vppo", "sign")
EXTRAS = {
    "dapo": ("dynamic_sampling",),
    "grpo_graded": ("valid_bonus",),
    "gdpo": ("per_level",),
    "process_grpo": ("across_steps", "suffix_advantages"),
    "vppo": ("across_steps",),
    "sapo_suffix": ("suffix_rewards",),
    "rank_reward": ("beam_rollouts",),
    "best_of_beam": ("thinking_only",),
    "rlvr": ("kl_in_reward",),
    "sapo_fallback": ("outcome_first",),
}
OF_GROUPS = [key for key in MEANING if key != "rlvr"]  # whose advantages compare completions


def test_every_key_is_listed_here():
    assert MEANING.keys() == OBJECTIVES.keys() == REWARDS.keys()


@pytest.mark.parametrize("key", MEANING)
def test_every_key_means_what_its_paper_says(key):
    point = OBJECTIVES[key]
    fields = (point.reward, point.credit, point.scale, point.ratio, point.average, point.epsilon, point.epsilon_high)
    assert fields == MEANING[key]
    assert point.baseline == BASELINES.get(key, "group")
    assert (point.beta == 0) == (key in WITHOUT_KL)
    assert point.extras == EXTRAS.get(key, ())
    with pytest.raises(FrozenInstanceError):
        point.beta = 1.0


def test_cells_of_the_ablation_differ_in_reward_and_credit_only():
    cells = [OBJECTIVES[key] for key in ("grpo", "grpo_step_reward", "sapo_outcome_reward", "sapo")]
    assert len({(c.baseline, c.scale, c.ratio, c.epsilon, c.epsilon_high, c.beta, c.extras) for c in cells}) == 1
    assert [c.reward for c in cells] == ["exact", "match", "exact", "match"]
    assert [(c.credit, c.average) for c in cells] == [("trajectory", "sequence")] * 2 + [("step", "step")] * 2


TARGET = [4, 0, 7]
PREDICTED = [[4, 0, 7], [4, 0, 6], [4, 1, 7], [3, 0, 7], [3, 1, 6], [-1, -1, -1]]  # the last is malformed
IN_CATALOGUE = [True, True, False, True, False, False]
OUTCOME = [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]
MATCH = [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [0.0] * 3, [0.0] * 3]
GATED = [[1.0, 1.0, 1.0], [1.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3, [0.0] * 3]
REWARDS = {
    **dict.fromkeys(["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_plus_plus"], OUTCOME),
    "sign": [2 * reward - 1 for reward in OUTCOME],
    "rlvr": [10 * reward for reward in OUTCOME],
    "grpo_graded": [1.1, 0.6, 0.25, 0.1, 0.0, 0.0],  # 2^-(3 - m) for m > 0 leading codes, and 0.1 where valid
    **dict.fromkeys(["rank_grpo", "sapo", "sapo_sequence_mean", "sapo_fallback", "process_grpo", "gdpo"], MATCH),
    **dict.fromkeys(["sapo_no_std", "sapo_batch_std"], MATCH),
    "sapo_gated": GATED,
    "sapo_suffix": [[3.0, 2.0, 1.0], [2.0, 1.0, 0.0], [1.0, 0.0, 0.0], [0.0] * 3, [0.0] * 3, [0.0] * 3],
    "vppo": [[1.0] * 3, [0.5, 0.5, 0.0], [0.5, 0.0, 0.0], [0.0] * 3, [0.0] * 3, [0.0] * 3],
    "grpo_step_reward": [3.0, 2.0, 2.0, 2.0, 0.0, 0.0],  # the sum over the steps
    "sapo_outcome_reward": [[reward] * 3 for reward in OUTCOME],
    # six beams, the first hits: the others are punished by 1 / log2(rank + 2), as a share of the sum over all six
    "rank_reward": [1.0, *(-1 / math.log2(r + 2) / sum(1 / math.log2(q + 2) for q in range(6)) for r in range(1, 6))],
    "best_of_beam": [3.0, 2.0, 2.0, 2.0, 0.0, 0.0],  # of a beam of one
}


def pay(key, predicted, target, in_catalogue, group_size=4):
    """Rewards; a completion's beam holds its own SID alone."""
    return OBJECTIVES[key].rewards(predicted, target, in_catalogue, group_size, predicted[:, None])


@pytest.mark.parametrize("key", REWARDS)
def test_rewards_by_hand(key):
    target = torch.tensor([TARGET] * len(PREDICTED))
    rewards = pay(key, torch.tensor(PREDICTED), target, torch.tensor(IN_CATALOGUE), 6)
    torch.testing.assert_close(rewards, torch.tensor(REWARDS[key]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (("exact", "trajectory", ("per_level",)), "per_level needs trajectory credit and a step reward"),
        (("match", "step", ("per_level",)), "per_level needs trajectory credit"),
        (("match", "trajectory", ("across_steps",)), "across_steps needs step credit"),
        (("match", "trajectory", ("suffix_rewards",)), "suffix_rewards needs step credit"),
        (("match", "step", ("valid_bonus",)), "valid_bonus needs an outcome reward"),
        (("exact", "trajectory", ("kl_in_reward",)), "kl_in_reward needs token credit"),
        (("first_error", "step", ("outcome_first",)), "outcome_first needs step credit of matches"),
        (("exact", "token", ()), "credit 'token' with baseline 'group'"),
        (("match", "step", ("outcome_first", "across_steps")), "no other extra"),
    ],
)
def test_extras_that_would_do_nothing_are_refused(fields, message):
    reward, credit, extras = fields
    with pytest.raises(InputError, match=message):
        Objective(reward, credit, extras=extras)


def test_rewards_that_need_more_than_a_completion_say_so():
    codes = torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3, dtype=torch.long), torch.ones(4, dtype=torch.bool)
    with pytest.raises(InputError, match="'ranking' needs group_size"):
        OBJECTIVES["rank_reward"].rewards(*codes)
    with pytest.raises(InputError, match="'best_of_beam' needs beams"):
        OBJECTIVES["best_of_beam"].rewards(*codes)


@pytest.mark.parametrize("key", MEANING)
def test_malformed_completions_get_nothing(key):
    """Also under a real trie, which finds no row of -1."""
    sids = random_sids(20, (3, 4, 5), seed=0)
    malformed = torch.full((20, 3), -1)
    rewards = pay(key, malformed, sids, trie_for(sids, (3, 4, 5)).contains(malformed))
    nothing = -1 if key == "sign" else 0  # which has no baseline to compare with, and punishes every failure
    assert (rewards == nothing).all()
    if key in OF_GROUPS:
        assert (OBJECTIVES[key].advantages(rewards, 4) == nothing).all()


def test_gates_pay_only_under_a_right_prefix():
    """Two rollouts, (right, wrong, right) and (wrong, wrong, right): the last step tells them apart only when gated."""
    predicted, target = torch.tensor([[4, 1, 7], [4, 0, 7]]), torch.tensor([[4, 0, 7]] * 2)
    in_catalogue = torch.tensor([True, True])
    root = math.sqrt(0.5) + 1e-4  # sample std of (0, 1)
    for key, last in (("sapo", [0.0, 0.0]), ("sapo_gated", [-0.5 / root, 0.5 / root])):
        point = OBJECTIVES[key]
        advantages = point.advantages(point.rewards(predicted, target, in_catalogue), 2)
        torch.testing.assert_close(advantages, torch.tensor([[0.0, -0.5 / root, last[0]], [0.0, 0.5 / root, last[1]]]))


def advantages_of(key, rewards, group_size):
    return OBJECTIVES[key].advantages(double(rewards), group_size)


def test_rloo_by_hand():
    """The mean of the other three is 0 for the hit and 1/3 for a miss."""
    close(advantages_of("rloo", [1.0, 0, 0, 0], 4), double([1.0, -1 / 3, -1 / 3, -1 / 3]))
    # Dr. GRPO's times G / (G - 1)
    close(advantages_of("rloo", [1.0, 0, 1, 0], 4), 4 / 3 * advantages_of("dr_grpo", [1.0, 0, 1, 0], 4))


def test_process_grpo_by_hand():
    """Step rewards (1, 0) and (0, 0): mean 1/4 and sample std 1/2 of all four; (1.5, -.5), (-.5, -.5) are then summed
    from each step on."""
    one = 0.75 / (0.5 + 1e-4)
    none = -0.25 / (0.5 + 1e-4)
    close(
        advantages_of("process_grpo", [[1.0, 0], [0, 0]], 2), double([[one + none, none], [2 * none, none]])
    )  # (1, -.5), (-1, -.5)


def test_gdpo_by_hand():
    """Levels (1, 1, 0, 0) and (1, 0, 0, 0), group of 4: what summing first would give is another number."""
    rewards = [[1.0, 1], [1, 0], [0, 0], [0, 0]]
    first, second = 0.5 / (math.sqrt(1 / 3) + 1e-4), 0.75 / (0.5 + 1e-4)  # sample stds .5774 and .5
    sums = double([first + second, first - second / 3, -first - second / 3, -first - second / 3])
    close(advantages_of("gdpo", rewards, 4), sums / (sums.std() + 1e-4))
    torch.testing.assert_close(
        advantages_of("gdpo", rewards, 4), double([1.3320, 0.2061, -0.7691, -0.7691]), atol=2e-4, rtol=0
    )
    summed_first = advantages_of("grpo_step_reward", [2.0, 1, 0, 0], 4)
    torch.testing.assert_close(summed_first, double([1.3054, 0.2611, -0.7833, -0.7833]), atol=2e-4, rtol=0)
    # its last step is over the batch: a second group with more spread shrinks the first
    wide = advantages_of("gdpo", [*rewards, [1.0, 0], [1, 0], [1, 0], [0, 1]], 4)[:4]
    assert not torch.allclose(wide, advantages_of("gdpo", rewards, 4))


def test_vppo_by_hand():
    """K = 5, one right, one right for 2 steps: response means 1 and 2/5 x 1/2 = .2, group mean .6, no std."""
    rewards = OBJECTIVES["vppo"].rewards(
        torch.tensor([[0] * 5, [0, 0, 1, 0, 0]]), torch.zeros(2, 5, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    )
    close(
        OBJECTIVES["vppo"].advantages(rewards.double(), 2), double([[0.4] * 5, [-0.1, -0.1, -0.6, -0.6, -0.6]])
    )  # the good prefix of a wrong answer is punished too, for the group does better


def test_reinforce_plus_plus_normalises_over_the_batch():
    """Rewards (1, 0 | 1, 1), less their group's mean: 1/2, -1/2, 0, 0, of sample std sqrt(1/6)."""
    found = advantages_of("reinforce_plus_plus", [1.0, 0, 1, 1], 2)
    close(found, double([0.5, -0.5, 0, 0]) / (math.sqrt(1 / 6) + 1e-4))
    # an unrelated prompt changes the first group's advantages: now four halves, sqrt(1/3)
    close(advantages_of("reinforce_plus_plus", [1.0, 0, 0, 1], 2)[0], double(0.5 / (math.sqrt(1 / 3) + 1e-4)))
    # TRL's RLOO subtracts the other's reward instead, (1, -1, 0, 0) of mean 0 and sample std sqrt(2/3), and adds 1e-4
    torch.testing.assert_close(found, double([1.0, -1, 0, 0]) / (math.sqrt(2 / 3) + 1e-4), atol=0, rtol=2e-4)


def test_scales_of_sapo_by_hand():
    """Groups of 2: step 1 is right once in each, step 2 once in the first and twice in the second.

    Over the batch, step 1 has two ones of four, sample std sqrt(1/3), and step 2 three, sqrt(3/4 / 3) = 1/2.
    """
    rewards = [[1.0, 1], [0, 0], [1, 1], [0, 1]]
    close(advantages_of("sapo_no_std", rewards, 2), double([[0.5, 0.5], [-0.5, -0.5], [0.5, 0], [-0.5, 0]]))
    one, two = 0.5 / (math.sqrt(1 / 3) + 1e-4), 0.5 / (0.5 + 1e-4)
    close(advantages_of("sapo_batch_std", rewards, 2), double([[one, two], [-one, -two], [one, 0], [-one, 0]]))


def test_beams_leave_nothing_on_what_they_share():
    """Four beams that share the thought and the first code. The hit is the second: its other two codes are forced, of
    the others none. Rewards -.3904, 1, -.1952, -.1681; the advantages add up to 0."""
    point = OBJECTIVES["rank_reward"]
    target = torch.tensor([[1, 1, 1]] * 4)
    beams = torch.tensor([[1, 0, 0], [1, 1, 1], [1, 2, 0], [1, 0, 1]])
    rewards = point.rewards(beams, target, torch.ones(4, dtype=torch.bool), 4).double()
    assert rewards.tolist() == pytest.approx([-0.3904, 1, -0.1952, -0.1681], abs=1e-4)
    steps = torch.tensor([[0, 0, 1, 2, 0, 1, 2]] * 4)  # four tokens of thought, then the SID
    sid = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 1], [1, 1, 1]])
    mask = torch.cat([torch.zeros(4, 4, dtype=torch.long), sid], 1)  # as `beam_rollouts` has it
    tokens = point.to_tokens(point.advantages(rewards, 4), steps)

    def gradient(objective: Objective) -> Tensor:
        logps = torch.zeros(4, 7, dtype=torch.float64).requires_grad_()
        policy_loss(objective, logps, logps.detach(), tokens, steps, mask, num_steps=3, beta=0.0).loss.backward()
        return logps.grad

    found = gradient(point)
    close(found, -tokens * mask / 3 / 4)  # one weight for every token that was a choice
    close(found[:, 4].sum(), double(0.0))
    assert (found[:, :4] == 0).all()
    # By the mean over each beam's own tokens the hit gives its A to the first code, and the others, of -A in all, a
    # third of theirs: 2/3 of the hit's own stay on what says nothing about it.
    close(gradient(replace(point, average="sequence"))[:, 4].sum(), -2 / 3 * tokens[1, 4] / 4)


def test_suffix_credit_by_hand():
    """Leading matches 2 and 0 of 3: sums from step k on (2, 1, 0) and (0, 0, 0), each step normalised over the two."""
    root = math.sqrt(0.5)
    expected = [1 / (2 * root + 1e-4), 0.5 / (root + 1e-4), 0.0]
    close(advantages_of("sapo_suffix", [[2.0, 1, 0], [0, 0, 0]], 2), double([expected, [-value for value in expected]]))


def test_outcome_first_by_hand():
    """A group with a hit gets the outcome's advantage at both steps; one without, half of each step's own."""
    with_hit, without = [[1.0, 1], [1, 0], [0, 0], [0, 1]], [[1.0, 0], [1, 0], [0, 0], [0, 1]]
    hit, miss = 0.75 / (0.5 + 1e-4), -0.25 / (0.5 + 1e-4)  # mean 1/4, sample std 1/2
    even = 0.5 * 0.5 / (math.sqrt(1 / 3) + 1e-4)  # half of (1, 1, 0, 0) less 1/2, over sample std .577
    expected = [[hit, hit], *[[miss, miss]] * 3]
    expected += [[even, 0.5 * miss], [even, 0.5 * miss], [-even, 0.5 * miss], [-even, 0.5 * hit]]
    close(advantages_of("sapo_fallback", with_hit + without, 4), double(expected))


def random_codes(rows: int, steps: int, seed: int, size: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Predictions and targets of groups of 4 with some matches, and whether a prediction is in the catalogue."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(size, (rows // 4, steps), generator=generator).repeat_interleave(4, 0)
    miss = torch.rand(rows, steps, generator=generator) < 0.4
    predicted = torch.where(miss, (target + 1) % size, target)
    return predicted, target, torch.rand(rows, generator=generator) < 0.5


def test_token_credit_says_where_it_comes_from():
    with pytest.raises(InputError, match="generalized_advantages"):
        OBJECTIVES["rlvr"].advantages(torch.zeros(4), 4)


@pytest.mark.parametrize("key", OF_GROUPS)
def test_shapes_from_rewards_to_tokens(key):
    point = OBJECTIVES[key]
    rewards = pay(key, *random_codes(16, 3, seed=1))
    advantages = point.advantages(rewards, 4)
    assert advantages.shape == ((16, 3) if point.credit == "step" else (16,))
    assert rewards.shape == ((16, 3) if point.credit == "step" or key == "gdpo" else (16,))
    steps = torch.tensor([[0, 0, -1, 1, 2, -1]]).repeat(16, 1)
    tokens = point.to_tokens(advantages, steps)
    for i in range(16):
        for t, step in enumerate(steps[i].tolist()):
            if point.credit == "step":  # a token outside the steps gets no credit
                assert tokens[i, t] == (0 if step < 0 else advantages[i, step])
            else:  # all T tokens get the one advantage
                assert tokens[i, t] == advantages[i]


def test_outcome_reward_with_step_credit_is_the_trajectory_advantage_at_every_step():
    codes = random_codes(24, 3, seed=2)
    point, grpo = OBJECTIVES["sapo_outcome_reward"], OBJECTIVES["grpo"]
    advantages = point.advantages(point.rewards(*codes), 4)
    expected = grpo.advantages(grpo.rewards(*codes), 4)
    assert advantages.abs().sum() > 1
    for k in range(3):
        torch.testing.assert_close(advantages[:, k], expected)


# The loss by hand


# Two completions, K = 2. w is the ratio; the masked tokens would change every number.
STEPS = torch.tensor([[0, 0, 0, 1, -1, 1], [0, 1, 1, -1, -1, -1]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 0], [0, 1, 1, 0, 0, 0]])
W = double([[1.1, 0.9, 1.0, 1.1, 1.0, 5.0], [7.0, 0.9, 1.1, 1.0, 1.0, 1.0]])
A = double([[2.0, 2.0, 2.0, -1.0, 4.0, 9.0], [9.0, 3.0, 3.0, 9.0, 9.0, 9.0]])
# w A of the trained tokens: 2.2, 1.8, 2.0 | -1.1 | 4.0 outside the steps, and 2.7, 3.3 in step 2 of the other


@pytest.mark.parametrize(
    ("average", "options", "expected"),
    [
        ("sequence", {}, (8.9 / 5 + 6.0 / 2) / 2),
        ("token", {}, 14.9 / 7),
        ("token", {"num_tokens": 10.0}, 14.9 / 10),
        ("token", {"num_tokens": torch.tensor(20)}, 14.9 / 20),
        ("token", {"num_tokens": 2.5}, 14.9 / 2.5),
        ("constant", {"max_length": 10}, (8.9 / 10 + 6.0 / 10) / 2),
        # step means 2.0 and -1.1 in the first; nothing trained (adds 0) and 3.0 in the second; always over K = 2
        ("step", {}, ((2.0 - 1.1) / 2 + (0 + 3.0) / 2) / 2),
    ],
)
def test_averages(average, options, expected):
    loss, metrics = policy_loss(plain(average=average), W.log(), W.log() * 0, A, STEPS, MASK, num_steps=2, **options)
    assert loss.item() == pytest.approx(-expected, abs=1e-12)
    assert loss.dtype == torch.float64
    assert metrics["nothing_trained"] == 0
    of_booleans = policy_loss(
        plain(average=average), W.log(), W.log() * 0, A, STEPS, MASK.bool(), num_steps=2, **options
    )
    assert of_booleans.loss == loss


def test_whole_numbers_are_numbers():
    """A count of tokens is an int, and so is a weight of 0 or 1; the checked signatures take them."""
    zero = torch.zeros_like(A)
    loss = partial(policy_loss, logps=zero, old_logps=zero, advantages=A, token_steps=STEPS, mask=MASK, num_steps=2)
    point = plain(average="token")
    close(loss(point, num_tokens=7).loss, loss(point, num_tokens=7.0).loss)
    close(loss(point, beta=1, ref_logps=zero - 1).loss, loss(point, beta=1.0, ref_logps=zero - 1).loss)
    assert plain(epsilon=10, epsilon_high=10, beta=0) == plain(epsilon=10.0, epsilon_high=10.0, beta=0.0)


def test_empty_steps_still_divide():
    """One trained token in the first of four steps: 3 / 4."""
    zero = double([[0.0]])
    loss = policy_loss(
        plain(average="step"), zero, zero, double([[3.0]]), torch.tensor([[0]]), MASK[:1, :1], num_steps=4
    )
    assert loss.loss.item() == -0.75


def test_micro_batches_add_up_when_told_the_count():
    whole = policy_loss(plain(average="token"), W.log(), W.log() * 0, A, STEPS, MASK, num_steps=2).loss
    parts = [
        policy_loss(
            plain(average="token"), *(x[i : i + 1] for x in (W.log(), W.log() * 0, A, STEPS, MASK)),
            num_steps=2, num_tokens=7.0,
        ).loss
        for i in range(2)
    ]  # fmt: skip
    close(sum(parts), whole)


@pytest.mark.parametrize(
    ("ratio", "terms", "gradient"),
    [
        # ratios 2, 1/2 in step 1 and 4 in step 2; A = 1, sequence mean over three tokens
        ("token", 2 + 0.5 + 4, [2, 0.5, 4]),
        # geometric means sqrt(2 x 1/2) = 1 and 4: each token of a step carries half of twice 1
        ("step", 1 + 1 + 4, [1, 1, 4]),
        # cube root of 2 x 1/2 x 4
        ("sequence", 3 * 4 ** (1 / 3), [4 ** (1 / 3)] * 3),
    ],
)
def test_ratio_units(ratio, terms, gradient):
    # a fourth token is not trained: it belongs to no geometric mean
    logps = double([[2.0, 0.5, 4.0, 1e6]]).log().requires_grad_()
    steps, mask = torch.tensor([[0, 0, 1, 1]]), torch.tensor([[1, 1, 1, 0]])
    point = plain(ratio=ratio, epsilon=WIDE, epsilon_high=WIDE)
    loss = policy_loss(point, logps, torch.zeros_like(logps), torch.ones_like(logps), steps, mask, num_steps=2).loss
    assert loss.item() == pytest.approx(-terms / 3, rel=1e-12)
    loss.backward()
    assert logps.grad[0].tolist() == pytest.approx([-g / 3 for g in gradient] + [0], rel=1e-12)


@pytest.mark.parametrize(
    ("w", "a", "term", "slope", "outside"),
    [  # the range is [0.8, 1.28]; slope is d term / d log-probability
        (1.5, 1.0, 1.28, 0.0, 1),
        (1.5, -1.0, -1.5, -1.5, 0),  # a bad token that became likelier: the pessimistic side keeps its slope
        (0.5, 1.0, 0.5, 0.5, 0),
        (0.5, -1.0, -0.8, 0.0, 1),
        (1.25, 1.0, 1.25, 1.25, 0),  # clipped had the range been symmetric
        (0.75, -2.0, -1.6, 0.0, 1),
        (1.0, -3.0, -3.0, -3.0, 0),
    ],
)
@pytest.mark.parametrize("ratio", RATIOS)
def test_clipping(ratio, w, a, term, slope, outside):
    """With one token the three units are the same."""
    logps = double([[w]]).log().requires_grad_()
    point = plain(ratio=ratio, epsilon=0.2, epsilon_high=0.28)
    zero = torch.zeros_like(logps)
    loss, metrics = policy_loss(point, logps, zero, double([[a]]), zero.long(), zero == 0, num_steps=1)
    assert loss.item() == pytest.approx(-term)
    loss.backward()
    assert logps.grad.item() == pytest.approx(-slope)
    assert metrics["clip_ratio/region_mean"] == outside


def test_a_pooled_ratio_is_clipped_as_one():
    """Log-ratios 0.5 and -0.1: token 2 alone is within [0.8, 1.2], the mean exp(0.2) = 1.22 is not."""
    steps, ones = torch.tensor([[0, 0]]), torch.ones(1, 2, dtype=torch.float64)
    for ratio, kept in (("token", [0.0, -math.exp(-0.1) / 2]), ("step", [0.0, 0.0]), ("sequence", [0.0, 0.0])):
        logps = double([[0.5, -0.1]]).requires_grad_()
        policy_loss(plain(ratio=ratio), logps, 0 * ones, ones, steps, ones.bool(), num_steps=1).loss.backward()
        assert logps.grad[0].tolist() == pytest.approx(kept)


@pytest.mark.parametrize("ratio", ["step", "sequence"])
def test_pooled_ratios_ignore_which_token_moved(ratio):
    logps, old = double([[0.3, -0.2, 0.1, 0.4]]), torch.zeros(1, 4, dtype=torch.float64)
    swapped = logps[:, [1, 0, 3, 2]]
    steps = torch.tensor([[0, 0, 1, 1]])
    losses = [
        policy_loss(plain(ratio=ratio), x, old, old + 1, steps, steps >= 0, num_steps=2).loss for x in (logps, swapped)
    ]
    close(losses[0], losses[1])


# KL to the reference


PI, REF = double([0.5, 0.3, 0.2]), double([0.2, 0.5, 0.3])


def kl_term(policy: Tensor, reference: Tensor) -> Tensor:
    """The KL part of the loss for each of three outcomes, drawn as completions of one token."""
    zero = torch.zeros(1, 1, dtype=torch.float64)
    return torch.stack(
        [
            policy_loss(
                plain(), policy[y].log().view(1, 1), policy[y].detach().log().view(1, 1), zero, zero.long(), zero == 0,
                num_steps=1, ref_logps=reference[y].log().view(1, 1), beta=1.0,
            ).loss
            for y in range(3)
        ]
    )  # fmt: skip


def test_expected_k3_is_the_divergence():
    expected = sum(p * math.log(p / q) for p, q in zip(PI.tolist(), REF.tolist(), strict=True))
    terms = kl_term(PI, REF)
    assert (terms >= 0).all()
    assert (PI * terms).sum().item() == pytest.approx(expected, rel=1e-12)  # KL(policy || reference)
    reverse = sum(q * math.log(q / p) for p, q in zip(PI.tolist(), REF.tolist(), strict=True))
    assert abs(expected - reverse) > 1e-3  # the other direction is another number


def test_k3_is_flat_at_the_reference():
    logits = REF.log().requires_grad_()
    (REF * kl_term(logits.softmax(0), REF)).sum().backward()
    close(logits.grad, torch.zeros(3, dtype=torch.float64))


def test_kl_is_averaged_like_the_policy_term():
    """Reference / policy = 2 on all trained tokens of step 1 of the first row, 1 elsewhere: k3 = 2 - log 2 - 1."""
    k3 = 1 - math.log(2)
    ref = torch.where(STEPS == 0, math.log(2.0), 0.0).double() * (MASK > 0) + 3.0 * (MASK == 0)
    zero = torch.zeros_like(ref)
    for average, expected in (
        ("sequence", 3 / 5 / 2),  # three of five tokens, in one of two rows
        ("token", 3 / 7),
        ("constant", 3 / 10 / 2),
        ("step", 1 / 2 / 2),  # the whole of one of two steps, in one of two rows
    ):
        loss, metrics = policy_loss(
            plain(average=average), zero, zero, zero, STEPS, MASK, num_steps=2, ref_logps=ref, beta=0.5, max_length=10
        )
        assert loss.item() == pytest.approx(0.5 * k3 * expected)
        assert metrics["kl"] == pytest.approx(k3 * 3 / 7)


def test_a_kl_that_is_in_the_reward_is_not_in_the_loss_too():
    zero = torch.zeros(2, 6, dtype=torch.float64)
    loss, metrics = policy_loss(OBJECTIVES["rlvr"], zero, zero, A, STEPS, MASK, num_steps=2, ref_logps=zero + 1)
    in_loss = replace(OBJECTIVES["grpo"], average="token", beta=0.05)
    more, same = policy_loss(in_loss, zero, zero, A, STEPS, MASK, num_steps=2, ref_logps=zero + 1)
    assert metrics["kl"] == same["kl"] == pytest.approx(math.e - 2)  # logged either way
    close(more - loss, double(0.05 * (math.e - 2)))


def test_beta_is_the_objectives_own_unless_given():
    zero = torch.zeros(2, 6, dtype=torch.float64)
    loss = partial(policy_loss, logps=zero, old_logps=zero, advantages=A, token_steps=STEPS, mask=MASK, num_steps=2)
    point = replace(plain(), beta=0.25)
    own, given, none = loss(point, ref_logps=zero + 1), loss(point, ref_logps=zero + 1, beta=0.5), loss(point, beta=0.0)
    close(given.loss - none.loss, 2 * (own.loss - none.loss))
    assert own.loss > none.loss
    with pytest.raises(InputError, match=r"beta is 0\.25.*ref_logps"):
        loss(point)
    with pytest.raises(InputError, match="max_length"):
        loss(plain(average="constant"))


def test_what_leaves_zero_variance_groups_out_by_hand():
    """Two completions of one token in each of K = 2 steps; A = 3 in step 1 of the first, 0 elsewhere. Of the four
    (completion, step) one has credit. Reference / policy = 2 everywhere, so k3 = 1 - log 2 at every token."""
    zero, steps = torch.zeros(2, 2, dtype=torch.float64), torch.tensor([[0, 1]] * 2)
    k3, credit = 1 - math.log(2), torch.tensor([[True, False], [False, False]])
    loss = partial(
        policy_loss, plain(average="step"), zero, zero, 3.0 * credit.double(), steps, steps >= 0, num_steps=2,
        ref_logps=zero + math.log(2), beta=0.1,
    )  # fmt: skip
    assert loss().loss.item() == pytest.approx(-3 / 4 + 0.1 * k3)
    assert loss(kept_share=0.25).loss.item() == pytest.approx(-3 + 0.4 * k3)
    assert loss(kl_mask=credit).loss.item() == pytest.approx(-3 / 4 + 0.1 * k3 / 4)
    both = loss(kept_share=torch.tensor(0.25), kl_mask=credit)
    assert both.loss.item() == pytest.approx(-3 + 0.1 * k3)  # of the one that has credit alone
    assert both.metrics["kl"] == pytest.approx(k3)  # logged of all


# Masks


def random_batch(seed: int, rows: int = 4, length: int = 7, steps: int = 3, dtype=torch.float64) -> dict[str, Tensor]:
    """Ragged, off-policy on both sides of the clip range, forced tokens, tokens outside the steps, an empty step."""
    generator = torch.Generator().manual_seed(seed)
    normal = lambda: torch.randn(rows, length, generator=generator, dtype=torch.float64)  # noqa: E731
    logps = -1 - normal().abs()
    token_steps = torch.randint(-1, steps, (rows, length), generator=generator)
    mask = torch.rand(rows, length, generator=generator) < 0.7
    mask[0] &= token_steps[0] != 0
    return {
        "logps": logps.to(dtype),
        "old_logps": (logps + 0.3 * normal()).to(dtype),
        "ref_logps": (logps + 0.5 * normal()).to(dtype),
        "advantages": normal().to(dtype),
        "token_steps": token_steps,
        "mask": mask,
    }


def evaluate(point: Objective, batch: dict[str, Tensor], steps: int = 3, **options) -> tuple[Tensor, Tensor, dict]:
    """Loss, gradient and metrics."""
    batch = batch | {"logps": batch["logps"].clone().requires_grad_()}
    loss, metrics = policy_loss(point, **batch, num_steps=steps, max_length=16, **options)
    loss.backward()
    return loss.detach(), batch["logps"].grad, metrics


@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_masked_positions_may_hold_anything(ratio, average):
    point, batch = plain(ratio, average, beta=0.1), random_batch(0)
    loss, gradient, metrics = evaluate(point, batch)
    assert (gradient[~batch["mask"]] == 0).all()
    assert gradient[batch["mask"]].abs().sum() > 0
    for logps, old, ref in [
        (-math.inf, -math.inf, -math.inf),
        (-math.inf, 0.0, 0.0),
        (0.0, -math.inf, math.inf),
        (math.nan, math.nan, math.nan),
        (1e30, -1e30, 0.0),
    ]:
        strange = dict(batch)
        for name, value in (("logps", logps), ("old_logps", old), ("ref_logps", ref), ("advantages", 1e30)):
            strange[name] = batch[name].masked_fill(~batch["mask"], value)
        same_loss, same_gradient, same_metrics = evaluate(point, strange)
        close(same_loss, loss)
        close(same_gradient, gradient)
        assert same_metrics == pytest.approx(metrics)


@pytest.mark.parametrize("key", MEANING)
def test_nothing_trained(key):
    batch = random_batch(1) | {"mask": torch.zeros(4, 7, dtype=torch.bool)}
    batch["logps"][0, 0] = -math.inf
    # evaluate calls backward: there is a graph
    loss, gradient, metrics = evaluate(OBJECTIVES[key], batch, num_tokens=0.0)
    assert loss == 0
    assert (gradient == 0).all()
    assert metrics["nothing_trained"] == 1
    assert all(math.isfinite(value) for value in metrics.values())
    assert sum(metrics[f"step/{k}/credit_mass"] for k in (1, 2, 3)) == 0


def test_a_completion_without_trained_tokens_adds_nothing_but_counts():
    """Two rows with A = 1, one of them all forced: half of 1."""
    zero, steps = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([[0, 0, 1], [0, 0, 1]])
    mask = torch.tensor([[1, 1, 1], [0, 0, 0]])
    for average in ("sequence", "step"):
        loss = policy_loss(plain(average=average), zero, zero, zero + 1, steps, mask, num_steps=2).loss
        assert loss.item() == pytest.approx(-0.5)


# Credit mass


def test_credit_mass_by_hand():
    zero = torch.zeros(2, 6, dtype=torch.float64)
    mass = lambda point, a: [  # noqa: E731
        policy_loss(point, zero, zero, a, STEPS, MASK, num_steps=2, max_length=10).metrics[f"step/{k}/credit_mass"]
        for k in (1, 2)
    ]
    # |A| of trained tokens inside steps: 2, 2, 2 in step 1, and 1 | 3, 3 in step 2; the 4 outside is in neither.
    # sequence: weights 1/5/2 and 1/2/2: 6/10 against 1/10 + 6/4
    assert mass(plain(average="sequence"), A) == pytest.approx([0.6 / 2.2, 1.6 / 2.2])
    # token and constant: equal weights, 6 against 1 + 6
    assert mass(plain(average="token"), A) == pytest.approx([6 / 13, 7 / 13])
    assert mass(plain(average="constant"), A) == pytest.approx([6 / 13, 7 / 13])
    # step: every step mean has weight 1/2/2: 2 against 1 + 3
    assert mass(plain(average="step"), A) == pytest.approx([2 / 6, 4 / 6])
    assert mass(plain(average="step"), 0 * A) == [0, 0]


def test_step_mean_gives_equal_credit_equal_mass_whatever_the_lengths():
    zero, steps = torch.zeros(1, 10, dtype=torch.float64), torch.tensor([[0] * 8 + [1] * 2])
    for average, share in (("sequence", 0.8), ("step", 0.5)):
        metrics = policy_loss(plain(average=average), zero, zero, zero - 1, steps, steps >= 0, num_steps=2).metrics
        assert metrics["step/1/credit_mass"] == pytest.approx(share)


# Loops


def slow_loss(
    point: Objective,
    batch: dict[str, list],
    steps: int,
    beta: float,
    max_length: int | None = None,
    num_tokens: float | None = None,
) -> float:
    """The definition, one token at a time."""
    rows, terms = range(len(batch["logps"])), {}
    for i in rows:
        trained = [t for t, m in enumerate(batch["mask"][i]) if m]
        for t in trained:
            units = {
                "token": [t],
                "step": [u for u in trained if batch["token_steps"][i][u] == batch["token_steps"][i][t]],
                "sequence": trained,
                "sequence_sum": trained,
            }
            moved = [batch["logps"][i][u] - batch["old_logps"][i][u] for u in units[point.ratio]]
            shared = 1 if point.ratio == "sequence_sum" else len(moved)
            w, a = math.exp(math.fsum(moved) / shared), batch["advantages"][i][t]
            clipped = min(max(w, 1 - point.epsilon), 1 + point.epsilon_high)
            r = math.exp(batch["ref_logps"][i][t] - batch["logps"][i][t])
            terms[i, t] = -min(w * a, clipped * a) + beta * (r - math.log(r) - 1)
    if point.average == "token":
        return math.fsum(terms.values()) / (num_tokens or len(terms))
    total = 0.0
    for i in rows:
        mine = {t: term for (row, t), term in terms.items() if row == i}
        if point.average == "constant":
            total += math.fsum(mine.values()) / max_length
        elif point.average == "sequence" and mine:
            total += math.fsum(mine.values()) / len(mine)
        elif point.average == "step":
            for k in range(steps):
                inside = [term for t, term in mine.items() if batch["token_steps"][i][t] == k]
                total += math.fsum(inside) / len(inside) / steps if inside else 0.0
    return total / len(rows)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("average", AVERAGES)
@pytest.mark.parametrize("ratio", RATIOS)
def test_loss_and_gradient_against_loops(ratio, average, seed):
    point, batch = plain(ratio, average, epsilon=0.1, epsilon_high=0.25), random_batch(10 + seed)
    if ratio == "step":  # a token outside the steps has no step to share a ratio with
        batch["mask"] &= batch["token_steps"] >= 0
    num_tokens = [None, 31.0][seed % 2]
    loss, gradient, metrics = evaluate(point, batch, beta=0.3, num_tokens=num_tokens)
    assert 0 < metrics["clip_ratio/region_mean"] < 1
    values = {name: value.tolist() for name, value in batch.items()}
    slow = partial(slow_loss, point, steps=3, beta=0.3, max_length=16, num_tokens=num_tokens)
    assert loss.item() == pytest.approx(slow(values), abs=1e-12)
    for i, row in enumerate(values["logps"]):
        for t, logp in enumerate(row):
            around = []
            for row[t] in (logp + 1e-6, logp - 1e-6):
                around.append(slow(values))
            row[t] = logp
            assert gradient[i, t].item() == pytest.approx((around[0] - around[1]) / 2e-6, abs=1e-7)


def test_gradient_weight_of_a_token_on_policy():
    """A / |y_k| / K / B with the step mean, whatever the ratio unit; |y_k| counts trained tokens."""
    batch = random_batch(3)
    batch["old_logps"] = batch["logps"]
    for ratio in RATIOS[:2]:
        # inside a step all tokens have one advantage
        values = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        batch["advantages"] = plain().to_tokens(values, batch["token_steps"])
        _, gradient, _ = evaluate(plain(ratio, "step"), batch, beta=0.0)
        for i in range(4):
            for t in range(7):
                step = int(batch["token_steps"][i, t])
                length = int((batch["mask"][i] & (batch["token_steps"][i] == step)).sum())
                trained = batch["mask"][i, t] and step >= 0
                weight = float(values[i, step]) / length / 3 / 4 if trained else 0.0
                assert gradient[i, t].item() == pytest.approx(-weight, abs=1e-12)


def test_rloo_is_reinforce_with_whole_sequences():
    """On policy, a token's gradient is A / B whatever the length: the loss is A x the sequence's own ratio. GRPO's
    divides by the length."""
    batch = random_batch(3)
    batch["old_logps"] = batch["logps"]
    batch["advantages"] = torch.randn(4, 1, generator=torch.Generator().manual_seed(0)).double().expand(4, 7)
    _, gradient, _ = evaluate(OBJECTIVES["rloo"], batch)
    close(gradient, -batch["advantages"] * batch["mask"] / 4)
    _, averaged, _ = evaluate(OBJECTIVES["grpo"], batch, beta=0.0)
    close(averaged * batch["mask"].sum(1, keepdim=True), gradient)


# Points where two objectives are one


def whole_path(key: str, codes: tuple[Tensor, Tensor, Tensor], batch: dict[str, Tensor], steps: int, **changes):
    """Rewards, advantages, tokens, loss and gradient of an objective on given rollouts."""
    point = replace(OBJECTIVES[key], **changes)
    advantages = point.advantages(point.rewards(*codes), 4)
    tokens = point.to_tokens(advantages, batch["token_steps"]).to(batch["logps"].dtype)
    return evaluate(point, batch | {"advantages": tokens}, steps)[:2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("key", ["sapo", "sapo_gated", "sapo_outcome_reward", "rank_grpo"])
def test_with_one_step_sapo_is_grpo(key, dtype):
    for seed in range(5):
        codes, batch = random_codes(16, 1, seed), random_batch(seed, rows=16, steps=1, dtype=dtype)
        batch["mask"] &= batch["token_steps"] == 0  # every trained token lies in the step
        same = {"ratio": "token", "epsilon": 0.2, "epsilon_high": 0.2}  # Rank-GRPO has its own ratio and clip
        ours, theirs = whole_path(key, codes, batch, 1, **same), whole_path("grpo", codes, batch, 1)
        assert theirs[1].abs().max() > 1e-3
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other, atol=1e-7, rtol=0)


def test_outcome_reward_with_step_credit_is_grpo_with_the_step_mean():
    codes, batch = random_codes(16, 3, seed=4), random_batch(4, rows=16)
    batch["mask"] &= batch["token_steps"] >= 0
    ours, theirs = (
        whole_path("sapo_outcome_reward", codes, batch, 3),
        whole_path("grpo", codes, batch, 3, average="step"),
    )
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, atol=1e-7, rtol=0)


@pytest.mark.parametrize(("one", "other"), [("gspo", "grpo"), ("rank_grpo", "sapo")])
def test_ratio_units_coincide_on_policy_only(one, other):
    codes, batch = random_codes(16, 3, seed=5), random_batch(5, rows=16)
    batch["mask"] &= batch["token_steps"] >= 0
    for on_policy in (True, False):
        rollouts = batch | ({"old_logps": batch["logps"]} if on_policy else {})
        gradients = [whole_path(key, codes, rollouts, 3, beta=0.0)[1] for key in (one, other)]
        difference = (gradients[0] - gradients[1]).abs().max()
        assert difference < 1e-9 if on_policy else difference > 1e-3


def test_longer_responses():
    """Twice the tokens: twice the loss under a constant, the same under the sequence mean."""
    zero, steps = torch.zeros(1, 8, dtype=torch.float64), torch.zeros(1, 8, dtype=torch.long)
    for average, factor in (("constant", 2), ("sequence", 1), ("step", 1)):
        short, long = (
            policy_loss(plain(average=average), zero, zero, zero + 1, steps, (steps + torch.arange(8)) < n,
                        num_steps=1, max_length=8).loss
            for n in (4, 8)
        )  # fmt: skip
        close(long, factor * short)


def test_dr_grpo_is_centred_and_unscaled():
    rewards = torch.tensor([1.0, 0.0, 0.0, 0.0])
    assert OBJECTIVES["dr_grpo"].advantages(rewards, 4).tolist() == [0.75, -0.25, -0.25, -0.25]
    close(OBJECTIVES["grpo"].advantages(rewards, 4), trajectory_advantages(rewards, 4))


def test_bfloat16_log_probabilities():
    """Weights, and with them the loss, are float32: 300 equal tokens are not countable in bfloat16."""
    ones = torch.ones(1, 300)
    zero = torch.zeros(1, 300, dtype=torch.bfloat16)
    for average in AVERAGES:
        loss = policy_loss(plain(average=average), zero, zero, ones, ones.long() - 1, ones > 0, num_steps=1,
                           max_length=300).loss  # fmt: skip
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(-1, abs=1e-5)
