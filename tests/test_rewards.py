"""Rewards by hand, and against loops over single codes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.credit.rewards import (
    best_of_beam,
    exact_match,
    first_error,
    graded_match,
    ranking_reward,
    step_match,
)
from sapo.errors import InputError

TARGET = [4, 0, 7]
CASES = [  # predicted, exact, match, gated, graded
    ([4, 0, 7], 1.0, [1, 1, 1], [1, 1, 1], 1.0),  # all three: 2^0
    ([4, 0, 6], 0.0, [1, 1, 0], [1, 1, 0], 0.5),  # two leading codes: 2^-1
    ([4, 1, 7], 0.0, [1, 0, 1], [1, 0, 0], 0.25),  # one leading code: 2^-2; the last is right under a wrong parent
    ([3, 0, 7], 0.0, [0, 1, 1], [0, 0, 0], 0.0),  # no leading code, although two are right
    ([3, 1, 6], 0.0, [0, 0, 0], [0, 0, 0], 0.0),
    ([-1, -1, -1], 0.0, [0, 0, 0], [0, 0, 0], 0.0),  # malformed
]


@pytest.mark.parametrize(("predicted", "exact", "match", "gated", "graded"), CASES)
def test_by_hand(predicted, exact, match, gated, graded):
    pair = torch.tensor([predicted]), torch.tensor([TARGET])
    assert exact_match(*pair).tolist() == [exact]
    assert step_match(*pair).tolist() == [match]
    assert step_match(*pair, gated=True).tolist() == [gated]
    assert graded_match(*pair).tolist() == [graded]


@settings(max_examples=80, deadline=None)
@given(st.data())
def test_against_loops(data):
    steps = data.draw(st.integers(1, 5))
    rows = st.lists(st.integers(0, 2), min_size=steps, max_size=steps)
    guesses = st.lists(st.integers(-1, 2), min_size=steps, max_size=steps)
    pairs = data.draw(st.lists(st.tuples(guesses, rows), min_size=1, max_size=6))
    predicted, target = (torch.tensor(side) for side in zip(*pairs, strict=True))
    exact, graded = exact_match(predicted, target), graded_match(predicted, target)
    match, gated = step_match(predicted, target), step_match(predicted, target, gated=True)
    assert {value.dtype for value in (exact, graded, match, gated)} == {torch.float32}
    for i, (guess, truth) in enumerate(pairs):
        leading = 0
        while leading < steps and guess[leading] == truth[leading]:
            leading += 1
        assert match[i].tolist() == [float(a == b) for a, b in zip(guess, truth, strict=True)]
        assert gated[i].tolist() == [1.0] * leading + [0.0] * (steps - leading)
        assert graded[i] == (0.0 if leading == 0 else 1 / 2 ** (steps - leading))
        assert exact[i] == float(leading == steps)
        value = first_error(predicted, target)[i].tolist()
        assert value == ([1.0] * steps if leading == steps else [0.5] * leading + [0.0] * (steps - leading))


def test_ranking_reward_by_hand():
    """Four beams, the second hits: 1 / log2(r + 2) is 1, .6309, .5, .4307, together 2.5616."""
    got = ranking_reward(torch.tensor([0.0, 1, 0, 0, 0, 0, 0, 0]), 4)
    torch.testing.assert_close(got[:4], torch.tensor([-0.3904, 1.0, -0.1952, -0.1681]), atol=1e-4, rtol=0)
    assert got[4:].tolist() == [0.0] * 4  # without a hit nobody is punished
    with pytest.raises(InputError, match="whole groups"):
        ranking_reward(torch.zeros(6), 4)


def test_best_of_beam_by_hand():
    """Positions count, prefixes do not; a wider beam never pays less; one beam pays the summed matches."""
    beams = torch.tensor([[[0, 1, 2], [3, 1, 0], [0, 5, 0]], [[1, 1, 1], [-1, -1, -1], [-1, -1, -1]]])
    target = torch.tensor([[0, 5, 0], [2, 2, 2]])
    assert best_of_beam(beams, target).tolist() == [3.0, 0.0]
    assert best_of_beam(beams[:, :2], target).tolist() == [1.0, 0.0]
    assert best_of_beam(beams[:, :1], target).tolist() == step_match(beams[:, 0], target).sum(1).tolist()
