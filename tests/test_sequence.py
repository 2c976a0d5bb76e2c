"""Recommenders that read item by item: what each is made of, by hand or by loops, and the loop that fits them."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sapo.baselines.caser import Caser
from sapo.baselines.cooccurrence import CoOccurrence
from sapo.baselines.fitting import FitConfig, fit
from sapo.baselines.gru4rec import GRU4Rec
from sapo.baselines.hstu import HSTU
from sapo.baselines.rearec import ReaRec
from sapo.baselines.sasrec import SASRec
from sapo.baselines.sequence import loss_of, negatives
from sapo.data.interactions import Interactions
from sapo.errors import InputError

ITEMS = 12
MODELS = {
    "SASRec": lambda: SASRec(ITEMS, max_history=6, size=8, heads=2),
    "GRU4Rec": lambda: GRU4Rec(ITEMS, max_history=6, size=8, hidden=10),
    "Caser": lambda: Caser(ITEMS, ["ann", "bob"], max_history=6, window=3, size=8, horizontal=3, vertical=2),
    "HSTU": lambda: HSTU(ITEMS, max_history=6, size=8, heads=2),
    "ReaRec": lambda: ReaRec(ITEMS, max_history=6, size=8, heads=2),
}


@pytest.fixture(params=MODELS)
def model(request):
    torch.manual_seed(0)
    model = MODELS[request.param]().eval()
    if request.param in ("Caser", "ReaRec"):  # whose rows start so small that nothing would show
        for weights in model.parameters():
            weights.data.normal_()
    return model


# ------------------------------------------------------------------------------------------------- what all promise


@settings(max_examples=30, deadline=None)
@given(st.data())
@pytest.mark.parametrize("name", MODELS)
def test_a_state_knows_nothing_of_what_comes_later(name, data):
    model = MODELS[name]().eval()
    item = st.integers(0, ITEMS - 1)
    history = data.draw(st.lists(item, min_size=2, max_size=6))
    at = data.draw(st.integers(1, len(history) - 1))
    items = torch.tensor([history, history])
    items[1, at:] = torch.tensor([data.draw(item) for _ in history[at:]])
    states = model(items, torch.zeros(2, dtype=torch.long))
    torch.testing.assert_close(states[0, :at], states[1, :at])


def test_padding_changes_nothing(model):
    """A short history beside a long one, and alone."""
    histories = [[3, 1], [5, 3, 1, 2, 9, 4]]
    items, users = model.tensors(histories, ["ann", "bob"])
    assert items[0].tolist() == [3, 1, *[ITEMS] * 4]
    alone = model(items[:1, :2], users[:1])
    torch.testing.assert_close(model(items, users)[0, :2], alone[0])
    together, single = model.rank(histories, 12, ["ann", "bob"]), model.rank(histories[:1], 12, ["ann"])
    assert together[0].tolist() == single[0].tolist()
    assert sorted(together[0].tolist()) == list(range(12))


def test_the_order_and_every_item_of_a_history_matter(model):
    users = torch.ones(4, dtype=torch.long)
    items = torch.tensor([[1, 2, 3], [1, 3, 2], [2, 2, 3], [1, 2, 4]])
    states = model(items, users)[:, -1]
    for other in states[1:]:
        assert not torch.allclose(states[0], other, atol=1e-4)


def test_long_histories_are_read_from_their_ends(model):
    long = [1, 2, 3, 4, 5, 6, 7, 8]
    assert model.rank([long], 12).tolist() == model.rank([long[-6:]], 12).tolist()


def test_bad_questions_say_so(model):
    with pytest.raises(InputError, match="k is 13; there are 12 items"):
        model.rank([[1]], 13)
    with pytest.raises(InputError, match="a history is empty"):
        model.rank([[1], []], 3)


@pytest.mark.parametrize("kind", ["softmax", "bce"])
@pytest.mark.parametrize("name", ["SASRec", "Caser"])
def test_the_loss_of_a_split_by_hand(name, kind):
    """Of histories of three the last four items are an example, three positions with their targets, and its user is
    known; what is told from them lies outside the whole sequence: of six items five are in it, so it can only be 5 for
    ann and 0 for bob, while the last four items alone would leave another."""
    whole = [[0, 1, 2, 3, 4], [3, 3, 3], [5, 4, 3, 2, 1]]
    split = Interactions(["ann", "eve", "bob"], [[*sequence, 0, 0] for sequence in whole], 6).leave_one_out()
    torch.manual_seed(0)
    users = ["ann", "eve", "bob"]
    model = {"SASRec": SASRec, "Caser": Caser}[name](6, users, max_history=3, size=8).eval()
    for weights in model.parameters():
        weights.data.normal_()
    with torch.no_grad():
        states = model(torch.tensor([[4, 3, 2], [1, 2, 3]]), torch.tensor([3, 1]))
        scores = (states @ model.table().T).double().numpy()
        losses = [model.loss(split, [2, 0], FitConfig(kind)).item() for _ in range(5)]
    places = [
        (row, at, target) for row, targets in enumerate(([3, 2, 1], [2, 3, 4])) for at, target in enumerate(targets)
    ]
    if kind == "softmax":
        expected = [np.log(np.exp(scores[row, at]).sum()) - scores[row, at, target] for row, at, target in places]
    else:
        other = [0, 5]
        expected = [
            np.log1p(np.exp(-scores[row, at, target])) + np.log1p(np.exp(scores[row, at, other[row]]))
            for row, at, target in places
        ]
    assert losses == pytest.approx([np.mean(expected)] * 5, rel=1e-5)  # negatives are drawn five times


def silence(*layers):
    """They say 0."""
    for layer in layers:
        layer.weight.data.zero_()
        layer.bias.data.zero_()


def says_its_bias(layer):
    """A dense layer after a ReLU that lets nothing through."""
    layer.weight.data.zero_()
    layer.bias.data.fill_(-1)


def without_values(block):
    """Attention of ReaRec to nothing: the last third of what it makes are values."""
    block.attend.weight.data[-8:] = 0
    block.attend.bias.data[-8:] = 0


# a place: whose rates are set to 0, and what makes the places of the same rate silent in a block
DROPOUTS = {
    "SASRec, inputs": (lambda model: [*model.blocks], "dropout", None),
    "SASRec, attention": (lambda model: [model], "dropout", lambda block: silence(block.outer)),
    "SASRec, end of the net": (
        lambda model: [model],
        "dropout",
        lambda block: (silence(block.value), says_its_bias(block.inner)),
    ),
    "GRU4Rec": (lambda model: [], "dropout", None),
    "Caser": (lambda model: [], "dropout", None),
    "HSTU, inputs": (lambda model: [*model.blocks], "dropout", None),
    "HSTU, gated": (lambda model: [model], "dropout", None),
    "ReaRec, inputs": (lambda model: [*model.blocks], "dropout", None),
    "ReaRec, end of attention": (
        lambda model: [model],
        "input_dropout",
        lambda block: (without_values(block), silence(block.outer)),
    ),
    "ReaRec, end of the net": (lambda model: [model], "input_dropout", lambda block: silence(block.out)),
}


@pytest.mark.parametrize("place", DROPOUTS)
def test_each_place_drops_while_training_and_then_only(place, monkeypatch):
    """One place at a time: the others' rates are 0, or what they would drop is 0 already."""
    owners, rate, quiet = DROPOUTS[place]
    torch.manual_seed(0)
    model = MODELS[place.split(",")[0]]()
    for weights in model.parameters():
        weights.data.normal_()
    for owner in owners(model):
        monkeypatch.setattr(owner, rate, 0.0)
    for block in model.blocks if quiet else ():
        quiet(block)
    items, users = torch.tensor([[1, 2, 3, 4, 5, 6]] * 8), torch.ones(8, dtype=torch.long)
    assert not torch.allclose(model.train()(items, users), model(items, users), atol=1e-2)
    assert torch.equal(model.eval()(items, users), model(items, users))


@pytest.mark.parametrize("place", ["SASRec, inside the net", "ReaRec, attention"])
def test_dropout_before_dropout(place):
    """Of one unit, and of the weight of the only item: half of the time they are dropped, and then nothing is added to
    a state. The dropout behind them alone would have to take all eight parts of a state: one time in 256."""
    torch.manual_seed(0)
    of_rearec = place.startswith("ReaRec")
    model = (ReaRec if of_rearec else SASRec)(ITEMS, size=8, layers=1, heads=1, dropout=0.5)
    for weights in model.parameters():
        weights.data.normal_()
    block, states = model.blocks[0], torch.randn(1000, 1, 8)
    if of_rearec:
        silence(block.outer)
        last, read = block.out, lambda: block(states, torch.ones(1000, 1, 1, 1, dtype=torch.bool), None)[0]
    else:
        silence(block.value)
        says_its_bias(block.inner)
        block.inner.bias.data[0] = 1  # one unit gets through
        last, read = block.outer, lambda: block(states)
    last.bias.data.zero_()
    training = read()
    block.eval()
    later = read()
    silence(last)
    nothing = read()
    shares = [torch.isclose(said, nothing).all(-1).float().mean() for said in (training, later)]
    assert 0.4 < shares[0] < 0.6  # one sd of a share of 1000 is 0.016
    assert shares[1] == 0


def test_half_precision_trains_the_same_weights_roughly(monkeypatch):
    """bfloat16 rounds products to three digits; weights and validation stay in float32."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True})  # it is right where it is slow, too
    sequences = [[(start + step) % ITEMS for step in range(6)] for start in range(ITEMS)]
    split = Interactions([f"u{start}" for start in range(ITEMS)], sequences, ITEMS).leave_one_out()
    logs = []
    for half in (False, True):
        torch.manual_seed(0)
        model = SASRec(ITEMS, max_history=6, size=16, dropout=0.0)
        log = fit(model, split, FitConfig(epochs=30, batch_size=4, half=half), seed=0)
        logs.append(torch.tensor([row["loss"] for row in log]))
        assert {weights.dtype for weights in model.parameters()} == {torch.float32}
    assert logs[0][-1] < logs[0][0] / 2
    torch.testing.assert_close(logs[1], logs[0], atol=0.03, rtol=0.03)
    assert not torch.equal(logs[0], logs[1])


@pytest.mark.parametrize(
    ("capabilities", "expected"),
    [
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": True, "amx_bf16": False}, True),
        ({"avx2": True, "avx512_f": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, False),
    ],
)
def test_half_precision_waits_for_a_processor_with_instructions_for_it(monkeypatch, capabilities, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    split = Interactions(["ann"], [[0, 1, 2, 3, 4]], ITEMS).leave_one_out()
    model, seen = SASRec(ITEMS, max_history=6, size=8, dropout=0.0), []
    loss = model.loss
    model.loss = lambda *args: seen.append(torch.is_autocast_enabled("cpu")) or loss(*args)
    fit(model, split, FitConfig(epochs=1, half=True), seed=0)
    fit(model, split, FitConfig(epochs=1, half=False), seed=0)
    assert seen == [expected, False]


def test_an_epoch_may_be_a_part_of_the_examples_and_the_start_a_candidate():
    sequences = [[(start + step) % ITEMS for step in range(6)] for start in range(ITEMS)]
    split = Interactions([f"u{start}" for start in range(ITEMS)], sequences, ITEMS).leave_one_out()
    torch.manual_seed(0)
    model, seen = SASRec(ITEMS, max_history=6, size=16, dropout=0.0), []
    loss = model.loss
    model.loss = lambda split, examples, config: seen.extend(examples) or loss(split, examples, config)
    log = fit(model, split, FitConfig(epochs=3, batch_size=2, examples=5), seed=0)
    assert len(seen) == 3 * 5
    assert len({*seen}) > 5  # drawn anew
    assert [row["updates"] for row in log] == [3, 6, 9]
    fit(model, split, FitConfig(epochs=40, patience=40, batch_size=4, learning_rate=3e-3), seed=0)
    reached = {name: weights.clone() for name, weights in model.state_dict().items()}
    log = fit(model, split, FitConfig(epochs=2, learning_rate=1.0, keep_start=True), seed=0)
    assert [row["epoch"] for row in log] == [0, 1, 2]
    assert math.isnan(log[0]["loss"])
    assert log[0]["ndcg@10"] > max(row["ndcg@10"] for row in log[1:])
    assert all(torch.equal(reached[name], weights) for name, weights in model.state_dict().items())


class Stopped(Exception):
    """What ends a fit in a test."""


@pytest.mark.parametrize("stop", [1, 2, 5], ids="at epoch {}".format)
@pytest.mark.parametrize(
    "how",
    [{}, {"validate_every": 2}, {"schedule": "linear", "keep_start": True}],
    ids=["validated often", "validated every other epoch", "linear, from the start"],
)
def test_a_fit_that_was_stopped_goes_on_to_the_same_weights(stop, how, tmp_path):
    """Dropout, negatives and batches are drawn as if nothing had happened, and the best weights so far are known."""
    sequences = [[(start + step) % ITEMS for step in range(6)] for start in range(ITEMS)]
    split = Interactions([f"u{start}" for start in range(ITEMS)], sequences, ITEMS).leave_one_out()
    config = FitConfig("bce", epochs=6, patience=2, batch_size=4, learning_rate=0.02, **how)
    file = tmp_path / "checkpoints" / "fit.pt"

    def fresh():
        torch.manual_seed(0)
        return SASRec(ITEMS, max_history=6, size=16, dropout=0.5)

    def stopping(split, examples, config):
        if model.begun == 3 * (stop - 1) + 1:  # twelve examples are three batches: this is within epoch `stop`
            raise Stopped
        model.begun += 1
        return loss(split, examples, config)

    whole = fresh()
    expected = fit(whole, split, config, seed=0)
    model = fresh()
    loss, model.loss, model.begun = model.loss, stopping, 0
    with pytest.raises(Stopped):
        fit(model, split, config, seed=0, checkpoint=file)
    assert file.is_file() == (stop > config.validate_every or config.keep_start)
    resumed = fresh()
    log = fit(resumed, split, config, seed=0, checkpoint=file)
    assert timeless(log) == timeless(expected)
    assert [row["seconds"] for row in log] == sorted(row["seconds"] for row in log)
    again = fresh()  # nothing is left to do
    again.loss = None
    assert timeless(fit(again, split, config, seed=0, checkpoint=file)) == timeless(expected)
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name])
        assert torch.equal(weights, again.state_dict()[name])


def timeless(log):
    """Rows without seconds; before the first update there is no loss, and what is not a number equals nothing."""
    return [{name: value for name, value in row.items() if name != "seconds" and value == value} for row in log]


def test_a_checkpoint_of_another_fit_is_refused(tmp_path):
    split = Interactions(["u", "v"], [[0, 1, 2, 3], [4, 5, 6, 7]], ITEMS).leave_one_out()
    file = tmp_path / "fit.pt"
    fit(SASRec(ITEMS, size=8), split, FitConfig(epochs=1), seed=0, checkpoint=file)
    with pytest.raises(InputError, match=r"fit\.pt is no checkpoint of this fit; remove it, and the fit starts over"):
        fit(SASRec(ITEMS, size=16), split, FitConfig(epochs=1), seed=0, checkpoint=file)

    def refused():
        return pytest.raises(InputError, match=r"fit\.pt is no checkpoint of this fit")

    for epochs, rate, seed in ((2, 1e-3, 0), (1, 1.0, 0), (1, 1e-3, 1)):
        with refused():
            fit(SASRec(ITEMS, size=8), split, FitConfig(epochs=epochs, learning_rate=rate), seed, checkpoint=file)
    other = Interactions(["u", "v"], [[0, 1, 2, 3], [4, 5, 6, 8]], ITEMS).leave_one_out()
    with refused():
        fit(SASRec(ITEMS, size=8), other, FitConfig(epochs=1), seed=0, checkpoint=file)
    for content in (b"", b"not weights", file.read_bytes()[:1000], {"model": 1}, [1], torch.ones(2)):
        if isinstance(content, bytes):
            file.write_bytes(content)
        else:
            torch.save(content, file)
        with refused():
            fit(SASRec(ITEMS, size=8), split, FitConfig(epochs=1), seed=0, checkpoint=file)


def test_settings_of_a_fit_are_checked():
    split = Interactions(["u"], [[0, 1, 2, 3]], ITEMS).leave_one_out()
    with pytest.raises(InputError, match="SASRec has no loss 'reward'; it knows softmax, bce"):
        fit(SASRec(ITEMS), split, FitConfig("reward"), seed=0)
    with pytest.raises(InputError, match="ReaRec has no loss 'bce'"):
        fit(ReaRec(ITEMS), split, FitConfig("bce"), seed=0)
    for name in ("examples", "batch_size", "epochs"):
        with pytest.raises(InputError, match=f"{name} is 0; at least 1 fits"):
            FitConfig(**{name: 0})
    with pytest.raises(InputError, match="schedule is 'cosine'; constant or linear fits"):
        FitConfig(schedule="cosine")


def test_a_rate_rises_and_falls_with_the_updates_of_all_epochs(monkeypatch):
    """20 updates: a tenth of them are two, so 1/2 and 1 of the rate; 18 more fall by 1/19 each, from 18/19 to 1/19."""
    sequences = [[(start + step) % ITEMS for step in range(6)] for start in range(ITEMS)]
    split = Interactions([f"u{start}" for start in range(ITEMS)], sequences, ITEMS).leave_one_out()
    config, rates = FitConfig(epochs=5, patience=5, batch_size=3, learning_rate=0.19, schedule="linear"), []
    step = torch.optim.Adam.step

    def watched(self):
        rates.append(self.param_groups[0]["lr"])
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    fit(SASRec(ITEMS, size=8), split, config, seed=0)
    assert rates == pytest.approx([0.095, 0.19, *(0.01 * rest for rest in range(18, 0, -1))])
    rates.clear()
    fit(SASRec(ITEMS, size=8), split, replace(config, epochs=4, examples=6), seed=0)  # eight updates: one of them rises
    assert rates == pytest.approx([0.19 * rest / 8 for rest in range(8, 0, -1)])


def test_adam_is_as_the_settings_say(monkeypatch):
    sequences = [[(start + step) % ITEMS for step in range(6)] for start in range(ITEMS)]
    split = Interactions([f"u{start}" for start in range(ITEMS)], sequences, ITEMS).leave_one_out()
    seen, step = [], torch.optim.Adam.step

    def watched(self):
        (group,) = self.param_groups
        seen.append((type(self), group["lr"], group["betas"], group["weight_decay"], len(group["params"])))
        step(self)

    monkeypatch.setattr(torch.optim.Adam, "step", watched)
    model = SASRec(ITEMS, size=8)
    config = FitConfig(epochs=1, batch_size=ITEMS, learning_rate=0.01, beta2=0.75, weight_decay=0.125)
    fit(model, split, config, seed=0)
    # all weights; AdamW, which shrinks weights beside its updates, would have no penalty
    assert seen == [(torch.optim.Adam, 0.01, (0.9, 0.75), 0.125, len([*model.parameters()]))]


def test_validation_reads_as_many_rows_as_it_is_told():
    """Three of twelve, the same for every seed, whose targets come first, second and not at all among ten: an NDCG@10
    of (1 + 1 / log2(3) + 0) / 3. All twelve where no number is given."""
    sequences = [[(start + step) % ITEMS for step in range(6)] for start in range(ITEMS)]
    split = Interactions([f"u{start}" for start in range(ITEMS)], sequences, ITEMS).leave_one_out()
    target = dict(zip(split.valid.user, split.valid.target, strict=True))
    history = dict(zip(split.valid.user, split.valid.history, strict=True))
    seen = []

    def rank(histories, k, users):
        seen.append(users)
        assert histories == [history[user] for user in users]
        others = [[item for item in range(ITEMS) if item != target[user]][:k] for user in users]
        for place, (user, row) in enumerate(zip(users[:2], others, strict=False)):
            row.insert(place, target[user])
        return torch.tensor([row[:k] for row in others])

    for seed in (0, 1):
        model = SASRec(ITEMS, size=8)
        model.rank = rank
        log = fit(model, split, FitConfig(epochs=2, valid_rows=3), seed=seed)
        assert [row["ndcg@10"] for row in log] == pytest.approx([(1 + 1 / math.log2(3)) / 3] * 2)
    assert len({*seen[0]}) == 3
    assert seen == [split.valid.sample(3).user] * 4
    fit(model, split, FitConfig(epochs=1), seed=0)
    assert seen[-1] == split.valid.user


# ------------------------------------------------------------------------------------------------- SASRec


def normed(x, eps):
    return (x - x.mean()) / np.sqrt(x.var() + eps)


def test_sasrec_by_loops():
    """One block, two heads; norms at their start have weight 1 and bias 0."""
    torch.manual_seed(1)
    model = SASRec(ITEMS, max_history=5, size=4, layers=1, heads=2).eval().double()
    history = [3, 7, 3]
    block = model.blocks[0]
    weights = {name: value.detach().numpy() for name, value in block.named_parameters()}
    linear = lambda name, x: weights[f"{name}.weight"] @ x + weights[f"{name}.bias"]  # noqa: E731
    # positions count back: the last item has position 0, the first of three 2
    x = [
        model.items.weight[item].detach().numpy() * 2 + model.positions.weight[2 - at].detach().numpy()  # sqrt(4) = 2
        for at, item in enumerate(history)
    ]
    queries = [normed(row, 1e-8) for row in x]
    expected = []
    for i in range(3):
        heads = []
        for head in (slice(0, 2), slice(2, 4)):
            query = linear("query", queries[i])[head]
            scores = np.array([query @ linear("key", x[j])[head] / math.sqrt(2) for j in range(i + 1)])
            shares = np.exp(scores) / np.exp(scores).sum()
            heads.append(sum(share * linear("value", x[j])[head] for j, share in enumerate(shares)))
        state = queries[i] + np.concatenate(heads)  # around the attention goes the normed query
        inner = normed(state, 1e-8)
        expected.append(normed(inner + linear("outer", np.maximum(linear("inner", inner), 0)), 1e-8))
    states = model(torch.tensor([history]), torch.zeros(1, dtype=torch.long))[0]
    np.testing.assert_allclose(states.detach().numpy(), np.stack(expected), atol=1e-9)


# ------------------------------------------------------------------------------------------------- GRU4Rec


def test_gru4rec_by_loops():
    torch.manual_seed(1)
    model = GRU4Rec(ITEMS, max_history=5, size=3, hidden=4).eval().double()
    assert not [name for name, _ in model.recurrent.named_parameters() if "bias" in name]
    into, round_ = (w.detach().numpy() for w in (model.recurrent.weight_ih_l0, model.recurrent.weight_hh_l0))
    sigmoid = lambda x: 1 / (1 + np.exp(-x))  # noqa: E731
    state = np.zeros(4)
    for item in (3, 7, 3):
        read = (into @ model.items.weight[item].detach().numpy()).reshape(3, 4)
        kept = (round_ @ state).reshape(3, 4)
        reset, update = sigmoid(read[0] + kept[0]), sigmoid(read[1] + kept[1])
        state = (1 - update) * np.tanh(read[2] + reset * kept[2]) + update * state
    expected = model.dense.weight.detach().numpy() @ state + model.dense.bias.detach().numpy()
    states = model(torch.tensor([[3, 7, 3]]), torch.zeros(1, dtype=torch.long))[0]
    np.testing.assert_allclose(states[-1].detach().numpy(), expected, atol=1e-9)


# ------------------------------------------------------------------------------------------------- Caser


@pytest.mark.parametrize("history", [[3], [3, 7], [1, 3, 7, 3]])  # windows of one, two and three items
def test_caser_by_loops(history):
    torch.manual_seed(1)
    model = Caser(ITEMS, ["ann"], max_history=5, window=3, size=4, horizontal=2, vertical=2).eval().double()
    window = history[-3:]
    rows = [np.zeros(4)] * (3 - len(window)) + [model.items.weight[item].detach().numpy() for item in window]
    said = []
    for height, filters in enumerate(model.across, start=1):
        for weight, bias in zip(filters.weight.detach().numpy()[:, 0], filters.bias.detach().numpy(), strict=True):
            answers = [
                (weight * np.stack(rows[top : top + height])).sum() + bias
                for top in range(4 - height)
                if top + height > 3 - len(window)  # a place that holds nothing but padding says nothing
            ]
            said.append(max(0, *answers, 0))
    for weight, bias in zip(model.along.weight.detach().numpy()[:, 0, :, 0], model.along.bias, strict=True):
        said += list(weight @ np.stack(rows) + bias.item())
    dense = np.maximum(model.dense.weight.detach().numpy() @ said + model.dense.bias.detach().numpy(), 0)
    user = model.people.weight[1].detach().numpy()
    states = model(torch.tensor([history]), torch.ones(1, dtype=torch.long))[0, -1].detach().numpy()
    np.testing.assert_allclose(states, [*dense, *user, 1], atol=1e-9)


def test_caser_knows_its_users_and_treats_all_others_alike():
    torch.manual_seed(0)
    model = Caser(ITEMS, ["ann", "bob"], window=3, size=8).eval()
    model.scores.weight.data.normal_()
    model.people.weight.data[1:].normal_()
    ranked = model.rank([[1, 2]] * 4, 12, ["ann", "bob", "carl", "dora"]).tolist()
    assert ranked[2] == ranked[3] == model.rank([[1, 2]], 12)[0].tolist()
    assert ranked[0] != ranked[1] != ranked[2]
    assert not model.people.weight[0].any()


# ------------------------------------------------------------------------------------------------- HSTU


def hstu_block(size=4, heads=2):
    torch.manual_seed(1)
    model = HSTU(ITEMS, max_history=5, size=size, layers=1, heads=heads).eval().double()
    model.blocks[0].project.data.normal_()
    model.blocks[0].bias.data.normal_()
    return model.blocks[0]


def test_hstu_by_loops():
    block = hstu_block()
    x = np.random.default_rng(0).normal(size=(3, 4))
    silu = lambda z: z / (1 + np.exp(-z))  # noqa: E731
    gate, value, query, key = np.split(
        silu(np.stack([normed(row, 1e-6) for row in x]) @ block.project.detach().numpy()), 4, axis=1
    )
    bias, expected = block.bias.detach().numpy(), []
    for i in range(3):
        heads = []
        for head in (slice(0, 2), slice(2, 4)):
            weights = [silu(query[i, head] @ key[j, head] + bias[i - j]) / 5 for j in range(i + 1)]  # 5: the longest
            heads.append(sum(weight * value[j, head] for j, weight in enumerate(weights)))
        gated = gate[i] * normed(np.concatenate(heads), 1e-6)
        expected.append(x[i] + block.out.weight.detach().numpy() @ gated + block.out.bias.detach().numpy())
    np.testing.assert_allclose(block(torch.tensor(x)[None])[0].detach().numpy(), np.stack(expected), atol=1e-9)


def test_the_first_block_of_hstu_reads_items_and_positions():
    """sqrt(4) = 2 times an item's embedding, and that of its position, counted from the oldest item that is read; where
    a shorter history is padded there is nothing."""
    torch.manual_seed(1)
    model = HSTU(ITEMS, max_history=3, size=4, layers=1).eval()
    for weights in model.parameters():
        weights.data.normal_()
    read = []
    model.blocks[0].register_forward_pre_hook(lambda block, inputs: read.append(inputs[0]))
    items, users = model.tensors([[9, 3, 7, 3], [5]], ["", ""])  # of four items the last three are read
    model(items, users)
    item, position, expected = model.items.weight, model.positions.weight, torch.zeros(2, 3, 4)
    for at, number in enumerate((3, 7, 3)):
        expected[0, at] = 2 * item[number] + position[at]
    expected[1, 0] = 2 * item[5] + position[0]
    torch.testing.assert_close(read, [expected])


def test_how_hstu_starts():
    """Standard deviations: of items .02, of positions 1 / sqrt(D), whatever the length. What is cut off, at -2 and 2,
    is more than ten of them away."""
    torch.manual_seed(0)
    model = HSTU(500, max_history=200, size=64)
    assert model.items.weight[:500].std().item() == pytest.approx(0.02, rel=0.02)
    assert model.positions.weight.std().item() == pytest.approx(1 / 8, rel=0.03)
    assert not model.items.weight[500].any()


def test_hstu_has_no_softmax_and_a_gate():
    block = hstu_block()
    states = torch.randn(1, 3, 4, dtype=torch.double)
    before = block(states)
    block.bias.data += 1  # the same for all scores of a row: a softmax would not see it
    assert not torch.allclose(block(states), before)
    block.project.data[:, :4] = 0  # U
    torch.testing.assert_close(block(states), states + block.out.bias)


def test_hstu_scores_are_cosines_over_the_temperature():
    torch.manual_seed(0)
    model = HSTU(ITEMS, size=8, temperature=0.05).eval()
    states = model(torch.tensor([[1, 2]]), torch.zeros(1, dtype=torch.long))
    torch.testing.assert_close(states.norm(dim=-1), torch.full((1, 2), 20.0))
    torch.testing.assert_close(model.table().norm(dim=-1), torch.ones(ITEMS))


# ------------------------------------------------------------------------------------------------- losses and fitting


def test_losses_by_hand(monkeypatch):
    torch.manual_seed(0)
    model = GRU4Rec(3, size=2, hidden=2).eval()
    sequences = [[0, 1, 2], [2, 2]]
    items, users = model.tensors([s[:-1] for s in sequences], ["", ""])
    targets, _ = model.tensors([s[1:] for s in sequences], ["", ""])
    scores = (model(items, users) @ model.table().T).detach().numpy()
    pairs = [(0, 0, 1), (0, 1, 2), (1, 0, 2)]  # row, position, target; the padded position of row 1 is none
    expected = np.mean([np.log(np.exp(scores[b, t]).sum()) - scores[b, t, y] for b, t, y in pairs])
    assert loss_of(model, items, users, targets, sequences, "softmax").item() == pytest.approx(expected, abs=1e-6)
    monkeypatch.setattr("sapo.baselines.sequence.negatives", lambda *_: torch.tensor([2, 0, 1]))
    drawn = zip(pairs, (2, 0, 1), strict=True)
    expected = np.mean(
        [np.log1p(np.exp(-scores[b, t, y])) + np.log1p(np.exp(scores[b, t, other])) for (b, t, y), other in drawn]
    )
    assert loss_of(model, items, users, targets, sequences, "bce").item() == pytest.approx(expected, abs=1e-6)


def test_negatives_are_uniform_over_what_the_training_sequence_does_not_hold():
    torch.manual_seed(0)
    real = torch.ones(2, 3000, dtype=torch.bool)
    real[1, 5:] = False
    drawn = negatives(real, [[0, 1, 1], [5]], 6)
    assert len(drawn) == 3005
    counts = torch.bincount(drawn[:3000], minlength=6)
    assert counts[:2].tolist() == [0, 0]
    assert (counts[2:] / 750 - 1).abs().max() < 0.15  # 4 sd of a count of 750 are 95
    assert 5 not in drawn[3000:].tolist()


def pairs_decide(users=400, seed=1):
    """What follows is decided by two items together: 4 if they are the same, else 5, and either item alone says
    nothing."""
    rng = np.random.default_rng(seed)
    sequences = []
    for _ in range(users):  # of different lengths, so that places say nothing either
        pairs = rng.integers(0, 2, (rng.integers(2, 6), 2)).tolist()
        sequences.append([item for a, b in pairs for item in (a, 2 + b, 4 + (a != b))] + [0])
    return Interactions([f"u{n}" for n in range(users)], sequences, 8)  # two items that nobody takes


@pytest.mark.parametrize(
    ("kind", "settings", "rate", "epochs"),
    [
        (SASRec, {"size": 64, "heads": 2}, 1e-3, 80),
        (GRU4Rec, {"size": 32}, 5e-3, 40),
        (Caser, {"size": 32}, 5e-3, 40),
        (HSTU, {"size": 64}, 3e-3, 70),
    ],
)
def test_what_two_items_say_together_is_learnt(kind, settings, rate, epochs):
    """Who adds up what each says can be right for three of the four pairs at most (0.75, one sd 0.02)."""
    split = pairs_decide().leave_one_out()
    torch.manual_seed(0)
    model = kind(8, split.users if kind is Caser else (), dropout=0.0, **settings)
    fit(model, split, FitConfig(epochs=epochs, patience=epochs, batch_size=32, learning_rate=rate), seed=0)
    history, targets = split.valid.history, torch.tensor(split.valid.target)
    assert (model.rank(history, 1)[:, 0] == targets).float().mean() > 0.8
    ranked = CoOccurrence().fit(split.sequences, 8).rank(history, 8)
    counted = ranked[(ranked == 4) | (ranked == 5)].view(-1, 2)[:, 0]  # the first of the two
    assert 0.4 < (counted == targets).float().mean() < 0.6  # its counts differ by chance, and decide at random


@pytest.mark.parametrize("loss", ["softmax", "bce"])
def test_the_same_seed_gives_the_same_model_and_the_best_epoch_is_kept(loss):
    split = pairs_decide(100).leave_one_out()
    models, histories = [], []
    for _ in range(2):
        torch.manual_seed(3)
        models.append(SASRec(8, max_history=5, size=8))
        before = torch.get_rng_state()
        histories.append(fit(models[-1], split, FitConfig(loss, epochs=6, patience=2, learning_rate=0.1), seed=1))
        assert torch.equal(torch.get_rng_state(), before)
    assert timeless(histories[0]) == timeless(histories[1])
    for one, other in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(one, other)
    scores = [row["ndcg@10"] for row in histories[0]]
    assert len(scores) <= 6
    if len(scores) < 6:  # it stopped after two validations without a better one
        assert max(scores[-2:]) <= max(scores[:-2])


def test_fitting_refuses_what_cannot_be_fitted():
    split = Interactions(["a"], [[0, 1, 2]], 10).leave_one_out()
    with pytest.raises(InputError, match="no training sequence holds two items"):
        fit(SASRec(10), split, FitConfig(), seed=0)
    with pytest.raises(InputError, match="holds every item"):
        negatives(torch.ones(1, 2, dtype=torch.bool), [[0, 1, 2]], 3)
    model = SASRec(10)
    model.items.weight.data.fill_(math.nan)
    with pytest.raises(FloatingPointError, match="the loss is nan in epoch 1"):
        fit(model, Interactions(["a"], [[0, 1, 2, 3]], 10).leave_one_out(), FitConfig(), seed=0)
