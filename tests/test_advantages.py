"""Advantages by hand, against plain loops, and the identities that tie step credit to trajectory credit."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.credit.advantages import (
    kept_share,
    step_advantages,
    suffix_sum,
    to_tokens,
    trajectory_advantages,
    zero_variance,
)
from sapo.errors import InputError

close = partial(torch.testing.assert_close, atol=1e-9, rtol=1e-9)
SCALES = ("group", "batch", "batch_centred", "none")
BASELINES = ("group", "leave_one_out", "batch", "none")


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def sample_std(values: list[float]) -> float:
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1))


def centred(index: int, group: list[float], batch: list[float], baseline: str) -> float:
    if baseline in ("group", "leave_one_out") and max(group) == min(group):
        return 0.0
    others = [other for j, other in enumerate(group) if j != index]
    return group[index] - {
        "group": mean(group), "leave_one_out": mean(others), "batch": mean(batch), "none": 0.0
    }[baseline]  # fmt: skip


def normalised(index: int, group: list[float], batch: list[float], scale: str, baseline: str) -> float:
    """The advantage of `group[index]`: one number at a time, as a person with a calculator would. `batch` holds whole
    groups, one behind the other."""
    size = len(group)
    left = [
        centred(j, batch[first : first + size], batch, baseline)
        for first in range(0, len(batch), size)
        for j in range(size)
    ]
    divisor = {
        "group": sample_std(group) + 1e-4,
        "batch": sample_std(batch) + 1e-4,
        "batch_centred": sample_std(left) + 1e-4,
        "none": 1.0,
    }[scale]
    return centred(index, group, batch, baseline) / divisor


def oracle(rewards: list[list[float]], size: int, scale: str, baseline: str, across_steps: bool) -> list[list[float]]:
    steps = range(len(rewards[0]))
    result = []
    for i, row in enumerate(rewards):
        first = i // size * size
        members = rewards[first : first + size]
        result.append([])
        for k in steps:
            if across_steps:
                group = [value for member in members for value in member]
                batch = [value for member in rewards for value in member]
                index = (i - first) * len(row) + k
            else:
                group, batch, index = [member[k] for member in members], [member[k] for member in rewards], i - first
            result[-1].append(normalised(index, group, batch, scale, baseline))
    return result


def random_rewards(prompts: int, size: int, steps: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prompts * size, steps, generator=generator, dtype=torch.float64)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_against_loops(data):
    prompts, size, steps = data.draw(st.tuples(st.integers(1, 3), st.integers(2, 5), st.integers(1, 4)))
    scale, baseline, across = data.draw(st.tuples(st.sampled_from(SCALES), st.sampled_from(BASELINES), st.booleans()))
    reward = st.sampled_from([0.0, 1.0, 0.6, 0.1, -2.5])  # few values: groups without spread are common
    rows = st.lists(reward, min_size=steps, max_size=steps)
    rewards = data.draw(st.lists(rows, min_size=prompts * size, max_size=prompts * size))
    values = torch.tensor(rewards, dtype=torch.float64)
    expected = torch.tensor(oracle(rewards, size, scale, baseline, across), dtype=torch.float64)
    close(step_advantages(values, size, scale, baseline, across), expected)
    if not across:
        for k in range(steps):
            close(trajectory_advantages(values[:, k], size, scale, baseline), expected[:, k])


def test_one_right_of_four():
    rewards = torch.tensor([1.0, 0, 0, 0], dtype=torch.float64)
    # mean 1/4; sum of squares (9 + 3) / 16 = 3/4; sample std sqrt(3/4 / 3) = 1/2, and 3/4 over it is 3/2
    close(trajectory_advantages(rewards, 4), torch.tensor([0.75, -0.25, -0.25, -0.25], dtype=torch.float64) / 0.5001)
    # Dr. GRPO keeps the numerator
    close(trajectory_advantages(rewards, 4, scale="none"), rewards - 0.25)
    # RLOO: the hit is compared with (0 + 0 + 0) / 3, each miss with (1 + 0 + 0) / 3
    leave_one_out = trajectory_advantages(rewards, 4, scale="none", baseline="leave_one_out")
    close(leave_one_out, torch.tensor([1, -1 / 3, -1 / 3, -1 / 3], dtype=torch.float64))


def test_pooled_over_steps_and_per_step():
    """The worked example of process supervision, and SAPO on the same data."""
    rewards = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    # Pooled: mean 1/4, squares (9 + 1 + 1 + 1) / 16 over 3 = 1/4, std 1/2: (3/4) / (1/2) and (-1/4) / (1/2)
    pooled = step_advantages(rewards, 2, across_steps=True)
    close(pooled, torch.tensor([[0.75, -0.25], [-0.25, -0.25]], dtype=torch.float64) / 0.5001)
    # its suffix sum is the advantage of a token: 3/2 - 1/2 = 1 and -1/2 - 1/2 = -1 in step 1
    torch.testing.assert_close(
        suffix_sum(pooled), torch.tensor([[1.0, -0.5], [-1.0, -0.5]], dtype=torch.float64), atol=1e-3, rtol=0
    )
    # Per step: (1, 0) has mean 1/2 and std sqrt(1/2); (0, 0) has no spread.
    root = math.sqrt(0.5)
    close(
        step_advantages(rewards, 2),
        torch.tensor([[0.5, 0], [-0.5, 0]], dtype=torch.float64) / (root + 1e-4),
    )


@pytest.mark.parametrize("baseline", ["group", "leave_one_out"])
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_no_spread_is_exactly_zero(scale, baseline, dtype):
    """The float mean of 0.6s differs from 0.6; over 1e-4 that is an advantage. The other groups keep theirs."""
    for size in range(2, 20):
        rewards = torch.full((2 * size, 2), 0.6, dtype=dtype)
        rewards[-1, 1] = 0.0  # one value of the second group in the second step
        advantages = step_advantages(rewards, size, scale, baseline)
        assert (advantages[:size] == 0).all()
        assert (advantages[:, 0] == 0).all()
        assert (advantages[size:, 1] != 0).all()
        assert (trajectory_advantages(rewards[:, 0], size, scale, baseline) == 0).all()
        assert (step_advantages(rewards[:size], size, scale, baseline, across_steps=True) == 0).all()


@pytest.mark.parametrize("scale", SCALES)
def test_a_batch_without_spread_is_exactly_zero(scale):
    """The float mean of 24 times 0.1 is not 0.1 either."""
    rewards = torch.full((24, 2), 0.1)
    rewards[0, 1] = 0.0
    advantages = step_advantages(rewards, 4, scale, "batch")
    assert (advantages[:, 0] == 0).all()
    assert (advantages[:, 1] != 0).all()


@pytest.mark.parametrize("baseline", ["batch", "none"])
def test_a_baseline_of_another_kind_keeps_equal_groups(baseline):
    """A group of ones beside one of zeros: the batch, or nothing, is what they are compared with."""
    rewards = torch.tensor([1.0, 1.0, 0.0, 0.0])
    expected = [0.5, 0.5, -0.5, -0.5] if baseline == "batch" else [1.0, 1.0, 0.0, 0.0]
    assert trajectory_advantages(rewards, 2, scale="none", baseline=baseline).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_at_least_float32(dtype):
    advantages = step_advantages(random_rewards(2, 4, 3).to(dtype), 4)
    assert advantages.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_equal_step_rewards_give_trajectory_advantages(scale, baseline):
    outcome = random_rewards(3, 4, 1)[:, 0]
    advantages = step_advantages(outcome[:, None].repeat(1, 5), 4, scale, baseline)
    for k in range(5):
        close(advantages[:, k], trajectory_advantages(outcome, 4, scale, baseline))


@pytest.mark.parametrize("baseline", BASELINES[:3])
@pytest.mark.parametrize("scale", SCALES)
def test_shift_and_scale(scale, baseline):
    rewards = random_rewards(3, 4, 2)
    advantages = step_advantages(rewards, 4, scale, baseline)
    close(step_advantages(rewards + 7, 4, scale, baseline), advantages)
    tripled = step_advantages(3 * rewards, 4, scale, baseline)
    if scale == "none":
        close(tripled, 3 * advantages)
    else:  # s / (s + 1e-4) against 3s / (3s + 1e-4)
        torch.testing.assert_close(tripled, advantages, atol=0, rtol=2e-3)


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("scale", SCALES)
def test_order_does_not_matter(scale, baseline):
    rewards = random_rewards(3, 4, 2)
    advantages = step_advantages(rewards, 4, scale, baseline)
    within = torch.tensor([2, 0, 3, 1, 4, 5, 7, 6, 11, 8, 9, 10])  # members within their groups
    between = torch.tensor([8, 9, 10, 11, 0, 1, 2, 3, 4, 5, 6, 7])  # whole groups
    for order in (within, between):
        close(step_advantages(rewards[order], 4, scale, baseline), advantages[order])


def test_only_batch_statistics_see_other_prompts():
    rewards = random_rewards(2, 4, 2)
    other = torch.cat([rewards[:4], 10 * rewards[4:]])
    for baseline in ("group", "leave_one_out"):
        close(step_advantages(rewards, 4, baseline=baseline)[:4], step_advantages(other, 4, baseline=baseline)[:4])
    assert not torch.allclose(step_advantages(rewards, 4, "batch")[:4], step_advantages(other, 4, "batch")[:4])


def test_over_the_spread_of_what_is_left():
    """Two easy prompts of rewards (10, 9) and (1, 0): about their group's mean all are 1/2 away, so the std is that of
    four halves, sqrt(1/3); over all four rewards it would be that of the prompts."""
    rewards = torch.tensor([10.0, 9, 1, 0], dtype=torch.float64)
    half = 0.5 / (math.sqrt(1 / 3) + 1e-4)
    expected = torch.tensor([half, -half, half, -half], dtype=torch.float64)
    close(trajectory_advantages(rewards, 2, "batch_centred"), expected)
    close(trajectory_advantages(rewards, 2, "batch"), (rewards - rewards.mean()).sign().new_tensor([0.5, -0.5] * 2)
          / (math.sqrt((25 + 16 + 16 + 25) / 3) + 1e-4))  # fmt: skip
    # twice as far with the other member's reward for a baseline, and so is the std
    twice = 1 / (2 * math.sqrt(1 / 3) + 1e-4)
    close(trajectory_advantages(rewards, 2, "batch_centred", "leave_one_out"), expected / half * twice)


def test_zero_variance_is_of_a_group_and_a_step():
    rewards = torch.tensor([[1.0, 0], [1, 1], [0, 0], [0, 0]])  # spread in step 2 of the first group alone
    silent = zero_variance(step_advantages(rewards, 2), 2)
    assert silent.tolist() == [[True, False]] * 2 + [[True, True]] * 2
    # against the batch's mean, 1/2 in step 1 and 1/4 in step 2, equal rewards of a group are credit too
    assert not zero_variance(step_advantages(rewards, 2, baseline="batch"), 2).any()
    # a quarter of the four pairs of group and step is left; by 3, 1, 1 and 3 tokens a completion, 1 of 8
    assert kept_share(silent, torch.ones(4, 2)).item() == 0.25
    assert kept_share(silent, torch.tensor([[3.0, 1], [3, 1], [1, 3], [1, 3]])).item() == 0.125
    assert kept_share(torch.ones(4, 2, dtype=torch.bool), torch.ones(4, 2)).item() == 1  # nothing to divide by


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_leave_one_out_is_the_centred_one_stretched(scale, size):
    rewards = random_rewards(3, size, 2)
    leave_one_out = step_advantages(rewards, size, scale, "leave_one_out")
    close(leave_one_out, step_advantages(rewards, size, scale) * size / (size - 1))
    close(leave_one_out.view(3, size, 2).sum(1), torch.zeros(3, 2, dtype=torch.float64))


def test_one_step_across_steps_is_the_same():
    rewards = random_rewards(3, 4, 1)
    close(step_advantages(rewards, 4, across_steps=True), step_advantages(rewards, 4))


def test_layout_in_memory_does_not_matter():
    """Rewards stacked by level and transposed, and one outcome reward expanded to all steps."""
    levels = random_rewards(2, 3, 4).T.contiguous()
    outcome = levels[0][:, None].expand(6, 4)
    for rewards in (levels.T, outcome):
        for across in (False, True):
            close(
                step_advantages(rewards, 3, across_steps=across),
                step_advantages(rewards.clone().contiguous(), 3, across_steps=across),
            )


@pytest.mark.parametrize("group_size", [1, 0, -2, 4, 7])
def test_groups_must_be_whole_and_plural(group_size):
    with pytest.raises(InputError, match=f"group_size.*{group_size}"):
        step_advantages(torch.zeros(6, 2), group_size)
    with pytest.raises(InputError, match=f"group_size.*{group_size}"):
        trajectory_advantages(torch.zeros(6), group_size)


def test_unknown_words_are_named():
    with pytest.raises(InputError, match=r"'std'.*'group', 'batch', 'batch_centred' or 'none'"):
        step_advantages(torch.zeros(4, 2), 2, scale="std")
    with pytest.raises(InputError, match=r"'mean'.*'leave_one_out'"):
        step_advantages(torch.zeros(4, 2), 2, baseline="mean")


def test_suffix_sum_by_hand():
    # DCG of hits at ranks 1 and 3: 1/log2(2) + 1/log2(4) = 1.5, then 0.5 from rank 2 and from rank 3, then 0
    gains = torch.tensor([[1.0, 0.0, 0.5, 0.0], [1.0, 2.0, 4.0, 8.0]])
    assert suffix_sum(gains).tolist() == [[1.5, 0.5, 0.5, 0.0], [15.0, 14.0, 12.0, 8.0]]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_to_tokens_against_a_loop(data):
    rows, steps, length = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(0, 8)))
    token_steps = data.draw(
        st.lists(st.lists(st.integers(-1, steps - 1), min_size=length, max_size=length), min_size=rows, max_size=rows)
    )
    values = random_rewards(rows, 1, steps)
    tokens = to_tokens(values, torch.tensor(token_steps, dtype=torch.long).reshape(rows, length))
    assert tokens.shape == (rows, length)
    assert tokens.dtype == values.dtype
    for i, row in enumerate(token_steps):
        for t, step in enumerate(row):
            assert tokens[i, t] == (0 if step == -1 else values[i, step])


def test_outside_steps_is_zero_whatever_the_values():
    """0 x inf would not be."""
    tokens = to_tokens(torch.tensor([[float("inf"), 2.0]]), torch.tensor([[-1, 1, -1]]))
    assert tokens.tolist() == [[0.0, 2.0, 0.0]]
