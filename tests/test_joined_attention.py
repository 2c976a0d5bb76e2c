"""Attention to a prompt's keys and to one's own is that to both in one row."""

import pytest
import torch

from sapo.decoding.joined_attention import can_join, joined_attention


def states(heads, key_heads, dtype=torch.float64, prompts=2, group=3, width=5, time=4, size=8):
    """Queries, keys and values of completions, keys and values of prompts."""
    generator = torch.Generator().manual_seed(0)
    rows = prompts * group
    shapes = [(rows, heads, time, size), *2 * [(rows, key_heads, time, size)], *2 * [(prompts, key_heads, width, size)]]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def written_out(query, own_key, own_value, shared_key, shared_value, lengths, scaling):
    """Row by row, head by head, token by token: a softmax over the keys that the token may see."""
    rows, heads, time, _ = query.shape
    group, repeats = rows // len(lengths), heads // own_key.shape[1]
    result = []
    for row in range(rows):
        prompt, length = row // group, int(lengths[row // group])
        for head in range(heads):
            h = head // repeats
            for t in range(time):
                keys = torch.cat([shared_key[prompt, h, :length], own_key[row, h, : t + 1]])
                values = torch.cat([shared_value[prompt, h, :length], own_value[row, h, : t + 1]])
                result.append((keys @ query[row, head, t] * scaling).softmax(0) @ values)
    return torch.stack(result).view(rows, heads, time, -1)


@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)])
@pytest.mark.parametrize("lengths", [[5, 5], [5, 1]])
def test_output_and_gradients_are_those_of_one_softmax(heads, lengths):
    inputs, lengths = states(*heads), torch.tensor(lengths)
    mine = joined_attention(inputs[:3], inputs[3:], lengths, 0.7)
    theirs = written_out(*inputs, lengths, 0.7)
    torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=0)
    weights = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1), dtype=mine.dtype)
    got, expected = (torch.autograd.grad((output * weights).sum(), inputs) for output in (mine, theirs))
    for one, other in zip(got, expected, strict=True):
        assert other.norm() > 0.1
        torch.testing.assert_close(one, other, atol=1e-12, rtol=0)


def test_half_precision_agrees_to_a_few_of_its_last_places():
    """bfloat16 has 8 bits: one in the last place is 0.4 to 0.8 % of a value."""
    half = states(4, 2, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in half]
    lengths = torch.tensor([5, 3])
    mine, theirs = (joined_attention(x[:3], x[3:], lengths, 0.35) for x in (half, exact))
    assert mine.dtype == torch.bfloat16
    torch.testing.assert_close(mine.double(), theirs, atol=0.02, rtol=0.02)
    got = torch.autograd.grad(mine.double().pow(2).sum(), half)
    expected = torch.autograd.grad(theirs.pow(2).sum(), exact)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == torch.bfloat16
        assert (one.double() - other).norm() <= 0.02 * other.norm()


def test_what_it_cannot_take():
    query, key, value = states(2, 2)[:3]
    assert can_join([query, key, value], 0.0)
    assert not can_join([query, key, value], 0.1)  # dropout
    assert not can_join([query, key.float(), value], 0.0)
    assert not can_join([query.to("meta"), key, value], 0.0)  # another device
