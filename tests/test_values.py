"""Advantages from a learned value, by hand."""

from functools import partial

import pytest
import torch
from torch import Tensor

from sapo.credit.gae import generalized_advantages, token_rewards, value_loss, whiten

double = partial(torch.tensor, dtype=torch.float64)
close = partial(torch.testing.assert_close, atol=1e-12, rtol=0)
ALL = torch.ones(1, 3, dtype=torch.bool)


def test_the_reward_is_on_the_last_trained_token_and_the_divergence_on_all():
    logps, reference = double([[-1.0, -2, -3, -4]]), double([[-1.5, -2, -2, -9]])
    mask = torch.tensor([[True, True, True, False]])  # the last token was forced
    rewards = token_rewards(double([10.0]), logps, reference, mask, beta=0.1)
    # -.1 x (-1 + 1.5), 0, 10 - .1 x (-3 + 2)
    close(rewards, double([[-0.05, 0.0, 10.1, 0.0]]))
    assert not token_rewards(double([10.0]), logps, reference, torch.zeros_like(mask), beta=0.1).any()


def test_generalized_advantages_by_hand():
    """Surprises 0 + 2 - 1 = 1, 0 + 4 - 2 = 2, 10 - 4 = 6; each advantage is its surprise and half of the next."""
    found = generalized_advantages(double([[0.0, 0, 10]]), double([[1.0, 2, 4]]), ALL, trace=0.5)
    close(found.advantages, double([[3.5, 5.0, 6.0]]))  # 1 + 5 / 2, 2 + 6 / 2, 6
    close(found.returns, double([[4.5, 7.0, 10.0]]))
    discounted = generalized_advantages(double([[0.0, 0, 10]]), double([[1.0, 2, 4]]), ALL, discount=0.5, trace=0.5)
    close(discounted.advantages, double([[0.375, 1.5, 6.0]]))  # 0 + .25 x 1.5, 0 + .25 x 6, 6


def test_without_values_and_decay_the_advantage_is_the_return():
    zeros = torch.zeros(1, 3, dtype=torch.float64)
    found = generalized_advantages(double([[1.0, 2, 10]]), zeros, ALL, trace=1.0)
    close(found.advantages, double([[13.0, 12.0, 10.0]]))
    close(found.returns, found.advantages)


def test_a_perfect_value_leaves_nothing_to_credit():
    found = generalized_advantages(double([[1.0, 2, 10]]), double([[13.0, 12, 10]]), ALL)
    assert not found.advantages.any()


def test_tokens_that_are_not_trained_are_skipped():
    """Whatever they hold, the rest is as if they were not there."""
    mask = torch.tensor([[True, False, True, True, False]])
    nan = float("nan")
    rewards, values = double([[0.0, nan, 0, 10, nan]]), double([[1.0, nan, 2, 4, nan]])
    found = generalized_advantages(rewards, values, mask, trace=0.5)
    close(found.advantages, double([[3.5, 0.0, 5.0, 6.0, 0.0]]))
    close(found.returns, double([[4.5, 0.0, 7.0, 10.0, 0.0]]))


def test_no_gradient_flows_from_advantages_into_values():
    values = double([[1.0, 2, 4]]).requires_grad_()
    found = generalized_advantages(double([[0.0, 0, 10]]), values, ALL)
    assert not found.advantages.requires_grad
    assert not found.returns.requires_grad


def test_whitened_over_trained_tokens():
    mask = torch.tensor([[True, True, False], [True, False, False]])
    white = whiten(double([[1.0, 2, 99], [3.0, 99, 99]]), mask)  # mean 2, sample variance 1
    torch.testing.assert_close(white, double([[-1.0, 0, 0], [1.0, 0, 0]]), atol=1e-7, rtol=0)
    assert not whiten(double([[1.0, 2, 3]]), torch.tensor([[True, False, False]])).any()
    equal = torch.full((1, 7), 0.6)  # whose float mean is not 0.6
    assert not whiten(equal, torch.ones(1, 7, dtype=torch.bool)).any()


@pytest.mark.parametrize(
    ("value", "old", "wanted", "slope"),
    [
        # half of (value - 1)^2, unless the value has moved by more than .2 towards the return of 1
        (0.1, 0.0, 0.405, -0.9),
        (0.5, 0.0, 0.32, 0.0),  # held at .2: (.2 - 1)^2 / 2 is the larger, and does not move
        (-0.5, 0.0, 1.125, -1.5),  # moved away: pulled back in full
    ],
)
def test_value_loss_by_hand(value, old, wanted, slope):
    values = double([[value, 7.0]]).requires_grad_()
    loss = value_loss(values, double([[1.0, 0]]), double([[old, 0]]), torch.tensor([[1, 0]]), clip=0.2)
    close(loss, double(wanted))
    loss.backward()
    close(values.grad, double([[slope, 0.0]]))


def test_value_loss_of_nothing_has_a_graph():
    values: Tensor = double([[1.0]]).requires_grad_()
    loss = value_loss(values, double([[3.0]]), double([[0.0]]), torch.tensor([[False]]), clip=0.2)
    loss.backward()
    assert loss == 0
    assert values.grad == 0
