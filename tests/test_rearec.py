"""ReaRec: latent steps by loops, both losses by hand, and a pattern that needs a step more than the encoder has."""

import math
import random

import numpy as np
import pytest
import torch

from sapo.baselines.fitting import FitConfig, fit
from sapo.baselines.rearec import ReaRec
from sapo.data.interactions import Rows, Split
from sapo.errors import InputError
from sapo.evaluation.evaluate import ranking_metrics

ITEMS = 9


def make(**options):
    torch.manual_seed(1)
    settings = {"max_history": 5, "size": 4, "layers": 1, "heads": 2, "feed_forward": 3} | options
    model = ReaRec(ITEMS, **settings).eval().double()
    for weights in model.parameters():  # which start so small that nothing would show
        weights.data += 0.5 * torch.randn(weights.shape)
    return model


def normed(x, norm):
    x = (x - x.mean()) / math.sqrt(x.var() + 1e-5)
    return norm.weight.detach().numpy() * x + norm.bias.detach().numpy()


def test_steps_by_loops():
    """The last state and a step's embedding go in behind the items, which keep their places; all norms come after."""
    model = make(steps=2)
    block, history = model.blocks[0], [3, 7, 3]
    linear = lambda layer, x: layer.weight.detach().numpy() @ x + layer.bias.detach().numpy()  # noqa: E731
    gelu = lambda x: np.array([v * (1 + math.erf(v / math.sqrt(2))) / 2 for v in x])  # noqa: E731

    def encode(inputs):
        rows = [normed(x, model.norm) for x in inputs]
        parts = [linear(block.attend, x) for x in rows]  # query, key and value of 4 each
        states = []
        for i, row in enumerate(rows):
            heads = []
            for head in (slice(0, 2), slice(2, 4)):
                scores = [parts[i][0:4][head] @ parts[j][4:8][head] / math.sqrt(2) for j in range(i + 1)]
                shares = np.exp(scores) / np.exp(scores).sum()
                heads.append(sum(share * parts[j][8:12][head] for j, share in enumerate(shares)))
            mixed = normed(row + linear(block.out, np.concatenate(heads)), block.after_attention)
            net = linear(block.outer, gelu(linear(block.inner, mixed)))
            states.append(normed(mixed + net, block.after_net))
        return states

    inputs = [
        (model.items.weight[item] + model.positions.weight[at]).detach().numpy() for at, item in enumerate(history)
    ]
    expected = [encode(inputs)[-1]]
    for step in model.steps.weight.detach().numpy():
        inputs.append(expected[-1] + step)
        expected.append(encode(inputs)[-1])
    items = torch.tensor([[*history, ITEMS, ITEMS], [1, 2, 3, 4, 5]])  # beside a longer history
    thoughts = model.think(*model.read(items))[0]
    np.testing.assert_allclose(thoughts.detach().numpy(), np.stack(expected), atol=1e-9)


def test_the_mean_recommends_in_erl_and_the_last_state_in_prl():
    histories = [[3, 7, 3], [1, 2, 3, 4, 5]]
    for way, state in (("erl", lambda thoughts: thoughts.mean(1)), ("prl", lambda thoughts: thoughts[:, -1])):
        model = make(steps=2, way=way)
        thoughts = model.think(*model.read(model.tensors(histories, [])[0]))
        expected = (state(thoughts) @ model.items.weight[:ITEMS].T).argsort(descending=True)
        assert model.rank(histories, ITEMS).tolist() == expected.tolist()


def test_without_steps_it_is_the_encoder():
    model = make(steps=0)
    items = model.tensors([[3, 7, 3]], [])[0]
    states, memory = model.read(items)
    assert torch.equal(model.think(states, memory), states[:, -1:])
    target = torch.tensor([4])
    expected = -(states[:, -1] @ model.items.weight[:ITEMS].T).log_softmax(-1)[0, 4]
    for way in ("erl", "prl"):
        model.way = way
        torch.testing.assert_close(model.loss_of(states[:, -1:], None, target), expected)


STATES = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]], [[0.5, -1.0], [2.0, 0.0], [0.0, 0.0]]]).double()
TARGET = torch.tensor([2, 0])


def two_wide(**options):
    """A model of three items with the embeddings (1, 0), (0, 1) and (1, 1)."""
    model = ReaRec(3, size=2, heads=1, **options).double()
    model.items.weight.data[:3] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    return model


def log_softmax(x):
    x = np.asarray(x)
    return x - np.log(np.exp(x).sum())


def scores(state):
    """Of the items (1, 0), (0, 1) and (1, 1)."""
    a, b = float(state[0]), float(state[1])
    return np.array([a, b, a + b])


def test_erl_by_hand():
    """K = 2, T = 1/2: cross-entropy of the mean, less 0.3 times the mean of six divergences."""
    model = two_wide(steps=2, temperature=0.5, diversity=0.3)
    expected = []
    for states, target in zip(STATES.numpy(), TARGET.tolist(), strict=True):
        logps = [log_softmax(scores(state) / 0.5) for state in states]
        apart = [(np.exp(logps[s]) * (logps[s] - logps[t])).sum() for s in range(3) for t in range(3) if s != t]
        expected.append(-log_softmax(scores(states.mean(0)) / 0.5)[target] - 0.3 * np.mean(apart))
    assert model.loss_of(STATES, None, TARGET).item() == pytest.approx(np.mean(expected))


def test_what_pushes_apart_moves_the_first_distribution_alone():
    """d KL(p || q) / d scores of p = p (log p - log q - KL), and nothing through q."""
    model = two_wide(steps=1, diversity=1.0)
    states = STATES[:1, :2].clone().requires_grad_()
    (gradient,) = torch.autograd.grad(model.loss_of(states, None, TARGET[:1]), states)
    model.diversity = 0.0
    (without,) = torch.autograd.grad(model.loss_of(states, None, TARGET[:1]), states)
    table = np.array([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    for s, t in ((0, 1), (1, 0)):
        p, q = (log_softmax(scores(STATES[0, k])) for k in (s, t))
        divergence = (np.exp(p) * (p - q)).sum()
        by_scores = np.exp(p) * (p - q - divergence)
        expected = -by_scores @ table / 2  # the mean of two pairs, and it is subtracted
        np.testing.assert_allclose((gradient - without)[0, s].numpy(), expected, atol=1e-9)


def test_prl_by_hand():
    """K = 2, T = 1/2, anneal 3: temperatures 4.5, 1.5 and 0.5; noisy steps are told from those of the batch."""
    model = two_wide(way="prl", steps=2, temperature=0.5, anneal=3.0)
    noisy = STATES + torch.tensor([0.25, -0.5])
    parts = [
        [-log_softmax(scores(state) / T)[target] for state, T in zip(states, (4.5, 1.5, 0.5), strict=True)]
        for states, target in zip(STATES.numpy(), TARGET.tolist(), strict=True)
    ]
    first, second, last = np.mean(parts, axis=0)
    told = [
        -log_softmax([float(noisy[row, k] @ STATES[other, k]) / 0.5 for other in range(2)])[row]
        for k in (1, 2)
        for row in range(2)
    ]
    expected = last + (first + second) / 2
    assert model.loss_of(STATES, None, TARGET).item() == pytest.approx(expected)
    assert model.loss_of(STATES, noisy, TARGET).item() == pytest.approx(expected + np.mean(told))


def test_the_loss_of_rows_is_that_of_their_thoughts():
    """PRL reads the noisy steps, ERL does not."""
    rows = Rows(["u", "v"], [[3, 7, 3], [1, 2]], [4, 8])
    split = Split("leave_one_out", ["u", "v"], [[3, 7, 3, 4], [1, 2, 8]], rows, rows, rows, "")
    for way in ("erl", "prl"):
        model = make(steps=2, way=way, noise=0.1)
        read = model.read(model.tensors(rows.history, [])[0])
        torch.manual_seed(4)
        noisy = model.think(*read, 0.1) if way == "prl" else None
        expected = model.loss_of(model.think(*read), noisy, torch.tensor(rows.target))
        torch.manual_seed(4)
        assert model.loss(split, [0, 1], FitConfig()).item() == pytest.approx(expected.item())
    assert expected.item() != pytest.approx(model.loss_of(model.think(*read), None, torch.tensor(rows.target)).item())


def test_noise_goes_into_the_steps_and_comes_from_torch():
    model = make(steps=2)
    read = model.read(model.tensors([[3, 7, 3]], [])[0])
    clean = model.think(*read)
    torch.manual_seed(5)
    noisy = model.think(*read, 0.01)
    torch.manual_seed(5)
    assert torch.equal(noisy, model.think(*read, 0.01))
    assert torch.equal(noisy[:, 0], clean[:, 0])
    assert 0 < (noisy - clean).abs().max() < 0.1


def pointers(count, slots, seed):
    """A user's cells say where each slot points, the last item names a slot; next comes the place two pointers on."""
    draw = random.Random(seed)
    rows = Rows([], [], [])
    for user in range(count):
        to, start = [draw.randrange(slots) for _ in range(slots)], draw.randrange(slots)
        cells = [slot * slots + to[slot] for slot in range(slots)]
        draw.shuffle(cells)
        rows.user.append(str(user))
        rows.history.append([*cells, slots * slots + start])
        rows.target.append(slots * slots + slots + to[to[start]])
    return rows


@pytest.mark.parametrize(("steps", "low", "high"), [(0, 0.0, 0.65), (1, 0.95, 1.0)])
def test_a_step_follows_a_pointer_that_the_encoder_cannot(steps, low, high):
    """One layer follows one pointer. A latent step goes through it again, and follows the second."""
    slots = 6
    train, test = pointers(6000, slots, 0), pointers(500, slots, 1)
    sequences = [[*history, target] for history, target in zip(train.history, train.target, strict=True)]
    split = Split("leave_one_out", train.user, sequences, train, test, test, "")
    options = {"size": 32, "layers": 1, "heads": 1, "feed_forward": 8, "dropout": 0.0, "input_dropout": 0.0}
    torch.manual_seed(0)
    model = ReaRec(slots * slots + 2 * slots, max_history=slots + 1, steps=steps, **options)
    fit(model, split, FitConfig(epochs=12, learning_rate=3e-3, validate_every=3), seed=0)
    found = ranking_metrics(model.rank(test.history, 1), torch.tensor(test.target), (1,))["recall@1"]
    assert low <= found <= high


def test_an_unknown_way_says_so():
    with pytest.raises(InputError, match="way is 'xrl'; erl or prl fits"):
        ReaRec(ITEMS, way="xrl")
