"""Step credit where the policy decides how many steps there are: closed forms, and every ordered group written out."""

import itertools
import math

import pytest
import torch

from sapo.errors import InputError
from sapo.lab.varying_steps import OneOrTwoSteps, expected_update, relative_bias

POLICY = OneOrTwoSteps(right_first=0.3, goes_on=0.6, right_second=0.8)
close = torch.testing.assert_close


def written_out(policy: OneOrTwoSteps, size: int, absent: str) -> list[float]:
    """Ordered groups, one number at a time."""
    first, on, second = policy.right_first, policy.goes_on, policy.right_second
    completions = [  # (probability, reward 1, reward 2 or None, slopes of the three logits)
        (
            (first if a else 1 - first) * ((second if b else 1 - second) * on if b is not None else 1 - on),
            a,
            b,
            (a - first, (b is not None) - on, 0 if b is None else b - second),
        )
        for a, b in itertools.product((0, 1), (None, 0, 1))
    ]
    total = [0.0, 0.0, 0.0]
    for group in itertools.product(completions, repeat=size):
        prob = math.prod(member[0] for member in group)
        mean_first = sum(member[1] for member in group) / size
        counted = [member[2] or 0 for member in group if member[2] is not None or absent == "zero"]
        for _, a, b, slopes in group:
            own = a - mean_first
            has_second = b is not None or absent == "zero"
            later = (b or 0) - sum(counted) / len(counted) if has_second else 0.0
            for which, credit in enumerate((own + later, own + later, later)):
                total[which] += prob * credit * slopes[which] / size
    return total


@pytest.mark.parametrize("absent", ["left_out", "zero"])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_against_every_group(size, absent):
    assert expected_update(POLICY, size, absent).tolist() == pytest.approx(written_out(POLICY, size, absent), abs=1e-12)


@pytest.mark.parametrize("size", [2, 8])
def test_going_on_is_never_credited_for_what_comes_after(size):
    """A completion that goes on has, on average, as good a step 2 as the others that do: credit 0.

    Step 2's own choice is compared with all n that have one, itself included, which leaves 1 - 1/n of it. With p that
    it is taken and n - 1 binomial over the other G - 1, p (1 - E[1/n]) = p - (1 - (1 - p)^G) / G.
    """
    update = expected_update(POLICY, size)
    own_second = (0.6 - (1 - 0.4**size) / size) * 0.8 * 0.2
    assert update.tolist() == pytest.approx([(1 - 1 / size) * 0.3 * 0.7, 0.0, own_second], abs=1e-12)
    # what it should be: .6 x .4 x .8 for the decision
    assert POLICY.gradient().tolist() == pytest.approx([0.21, 0.192, 0.096])
    assert relative_bias(POLICY, size) > 0.6


@pytest.mark.parametrize("size", [2, 3, 8])
def test_no_bias_where_k_is_fixed(size):
    always = OneOrTwoSteps(0.3, 1.0, 0.8)
    for policy, absent in ((always, "left_out"), (always, "zero"), (POLICY, "zero")):
        close(expected_update(policy, size, absent), (1 - 1 / size) * policy.gradient(), atol=1e-12, rtol=0)
        assert relative_bias(policy, size, absent) == pytest.approx(0, abs=1e-12)


def test_the_gradient_is_that_of_autograd():
    logits = torch.tensor([0.3, 0.6, 0.8], dtype=torch.float64).logit().requires_grad_()
    first, on, second = logits.sigmoid()
    close(POLICY.gradient(), torch.autograd.grad(first + on * second, logits)[0])
    assert float(POLICY.probs.sum()) == pytest.approx(1)


def test_bad_input():
    with pytest.raises(InputError, match=r"goes_on is 1\.5"):
        OneOrTwoSteps(0.5, 1.5, 0.5)
    with pytest.raises(InputError, match="at least 2"):
        expected_update(POLICY, 1)
    with pytest.raises(InputError, match="'left_out' or 'zero'"):
        expected_update(POLICY, 2, "skip")
    with pytest.raises(InputError, match="nothing to learn"):
        relative_bias(OneOrTwoSteps(1.0, 1.0, 0.0), 2)
