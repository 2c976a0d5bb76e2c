"""Steps that travel in token rewards come back as they were."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import CLOSE, OPEN, layout_for

from sapo.errors import InputError
from sapo.integrations.step_codes import decode_steps, encode_steps


def test_codes_by_hand():
    # <think> a </think> <think> </think> <a_1> <b_2>, a line break after each block, one token of padding
    layout = layout_for((3, 3))
    line, word = 20, 21
    ids = torch.tensor([[OPEN, word, CLOSE, line, OPEN, CLOSE, line, 5, 9, 0]])
    steps = layout.token_steps(ids)
    assert steps.tolist() == [[0, 0, 0, -1, 1, 1, -1, 0, 1, -1]]
    rewards = torch.tensor([[0.0, 0, 0, 0, 0, 0, 0, 1, 0, 0]])
    values = encode_steps(steps, rewards, 2)
    first, second, none = (2 + 128) * 2.0**-20, (3 + 128) * 2.0**-20, (1 + 128) * 2.0**-20
    assert values.tolist() == [[0, 0, first, none, 0, second, none, 1 + first, second, none]]
    found = decode_steps(values)
    assert found.num_steps == 2
    assert torch.equal(found.steps, steps)
    assert torch.equal(found.rewards, rewards)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_what_goes_in_comes_out(data):
    rows, width, num_steps = (data.draw(st.integers(1, most)) for most in (4, 12, 15))
    draw = lambda low, high: data.draw(st.lists(st.integers(low, high), min_size=rows * width, max_size=rows * width))  # noqa: E731
    steps = torch.tensor(draw(-1, num_steps - 1)).view(rows, width)
    rewards = torch.tensor(draw(-7, 7)).view(rows, width).float()
    rewards[:, :-1] *= steps[:, :-1] != steps[:, 1:]  # what is paid ends a run, as SID tokens do
    values = encode_steps(steps, rewards, num_steps)
    padded = torch.nn.functional.pad(values, (0, 3))
    found = decode_steps(padded)
    assert found.num_steps == num_steps
    assert torch.equal(found.steps[:, :width], steps)
    assert (found.steps[:, width:] == -1).all()
    assert torch.equal(found.rewards[:, :width], rewards)
    assert (values.sum(1) - rewards.sum(1)).abs().max() < 2e-3 * width


def test_other_rewards_are_refused():
    steps = torch.tensor([[0, 0, 1, 0, 1]])
    rewards = torch.tensor([[0.0, 0, 0, 1, 0]])
    values = encode_steps(steps, rewards, 2)
    for bad in (rewards, torch.zeros(1, 5), values - 0.01, values.bfloat16(), values * 0.5, -values):
        with pytest.raises(InputError, match=r"carry no steps.*use_kl_in_reward"):
            decode_steps(bad)
    for arguments in ((steps, rewards * 0.5, 2), (steps, rewards, 1), (steps, rewards * 8, 2), (steps, rewards, 16)):
        with pytest.raises(InputError, match="cannot be coded"):
            encode_steps(*arguments)
