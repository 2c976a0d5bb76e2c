"""Recommenders made of a policy's thoughts: what they read, what pays, and where gradients go."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_policy import CATALOG, INTERACTIONS, make_policy

from sapo.baselines import r2ec, rec_cot
from sapo.baselines.fitting import FitConfig, fit
from sapo.baselines.r2ec import R2ec
from sapo.baselines.rec_cot import RecCoT
from sapo.baselines.rec_r1 import RecR1, Retriever
from sapo.credit.advantages import trajectory_advantages
from sapo.data.catalog import Catalog
from sapo.data.interactions import Rows, Split
from sapo.decoding.logprobs import block_tokens
from sapo.errors import InputError
from sapo.policy.policy import Thoughts, think

SPLIT = INTERACTIONS.leave_one_out()
HISTORIES = [[0, 1], [5], [5, 4, 3, 2]]


def one_block(policy):
    return replace(policy, num_blocks=1, block_budget=4)


# ------------------------------------------------------------------------------------------------- what all share


@pytest.mark.parametrize("mark", [False, True])
def test_thoughts_are_read_as_one_by_one(mark):
    """Log-probabilities over what a block may hold, and the state of the last token, of texts without padding."""
    policy = make_policy()
    model = RecR1(policy, SPLIT, group_size=4)
    torch.manual_seed(0)
    drawn = model.draw(HISTORIES, 4, greedy=False)
    token = policy.tokenizer.convert_tokens_to_ids("<item>") if mark else None
    logps, states = model.read(drawn, token)
    may_stand = block_tokens(policy.layout, policy.model.config.vocab_size, policy.tokenizer.pad_token_id, [])
    may_stand[policy.tokenizer.eos_token_id] = False
    for row in range(12):
        prompt = policy.tokenizer(policy.prompts([HISTORIES[row // 4]])[0])["input_ids"]
        thought = drawn.ids[row, : drawn.lengths[row]].tolist()
        out = policy.model(torch.tensor([prompt + thought + ([token] if mark else [])]), output_hidden_states=True)
        torch.testing.assert_close(states[row], out.hidden_states[-1][0, -1], atol=1e-4, rtol=1e-4)
        for column, written in enumerate(thought):
            if drawn.sampled[row, column]:
                options = out.logits[0, len(prompt) + column - 1].masked_fill(~may_stand, float("-inf"))
                assert logps[row, column].item() == pytest.approx(options.log_softmax(0)[written].item(), abs=1e-4)


def test_forced_tokens_are_not_trained():
    """A block that holds as many words as it may is closed by force: that token's gradient is 0, like an opening's."""
    model = RecR1(one_block(make_policy()), SPLIT, group_size=4)
    torch.manual_seed(0)
    drawn = model.draw(HISTORIES, 4, greedy=False)
    logps = torch.zeros(drawn.ids.shape, requires_grad=True)
    model.thought_loss(drawn, logps, torch.ones(12)).backward()
    full = drawn.lengths == 6  # an opening, four words and a closing
    assert full.any()
    assert logps.grad[full, 5].eq(0).all()
    assert logps.grad[:, 0].eq(0).all()
    for row in range(12):  # minus the advantage over the sampled tokens of a completion, mean over the completions
        count = int(drawn.sampled[row].sum())
        assert logps.grad[row][drawn.sampled[row]].tolist() == pytest.approx([-1 / count / 12] * count)


def test_the_policy_reads_without_dropout():
    policy = make_policy()
    for module in policy.model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.5
    model = R2ec(policy, SPLIT, group_size=4).train()
    drawn = model.draw(HISTORIES)
    first, second = model.read(drawn, model.mark), model.read(drawn, model.mark)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    assert torch.equal(model.items([0, 1]), model.items([0, 1]))


def test_the_greedy_thought_is_that_of_the_policy():
    policy = make_policy()
    model = RecR1(policy, SPLIT)
    (thoughts,) = think(policy, HISTORIES)
    expected = [text.replace("<think>", "").replace("</think>", "").split() for text in thoughts.thinking]
    said = [text.split() for text in model.words(model.draw(HISTORIES))]
    assert [said[row] for row in thoughts.rows] == expected


def test_a_policy_that_does_not_think_is_refused():
    with pytest.raises(InputError, match="has not learnt to think"):
        RecR1(replace(make_policy(), thinking=False), SPLIT)


# ------------------------------------------------------------------------------------------------- Rec-R1


def test_the_retriever_by_hand():
    """Four items; popular are 2, 0, 3, 1. "steel" is in 0, 1 and 2, and shares the vector's length with other words."""
    texts = ["steel knife", "steel knife", "steel steel", "copper pot"]
    retriever = Retriever(texts, torch.tensor([2, 0, 3, 1]))
    # item 2 is steel alone; 0 and 1 are alike, so the popular one comes first; 3 has no such word
    assert retriever.rank(["steel"], 4).tolist() == [[2, 0, 1, 3]]
    assert retriever.rank(["pot pot"], 2).tolist() == [[3, 2]]
    assert retriever.rank([""], 4).tolist() == [[2, 0, 3, 1]]
    rewards = retriever.rewards(["steel"] * 4 + ["zebra"], [2, 0, 1, 3, 2])
    # ranks 1, 2 and 3: 0.1 + 1, 0.1 + 1 / log2(3), 0.1 + 1/2; a target that shares no word earns nothing
    expected = [1.1, 0.1 + 1 / math.log2(3), 0.6, 0.0, 0.0]
    np.testing.assert_allclose(rewards.numpy(), expected, atol=1e-6)


def test_hits_beyond_the_thousandth_earn_nothing():
    texts = ["steel"] * 1002
    retriever = Retriever(texts, torch.arange(1002))
    rewards = retriever.rewards(["steel"] * 2, [999, 1000])
    assert rewards.tolist() == [pytest.approx(0.1 + 1 / math.log2(1001)), 0.0]


def test_a_query_is_paid_for_its_own_target(monkeypatch):
    """Two histories of G = 2 queries; the knife (3) comes after one, the mitt (5) after the other."""
    model = RecR1(make_policy(), SPLIT, group_size=2)
    logps = torch.zeros(4, 3, requires_grad=True)
    monkeypatch.setattr(model, "read", lambda drawn, mark=None: (logps, None))
    rows = Rows(["u", "v"], [[0], [1]], [5, 3])
    drawn = model.draw(rows.history, 2, greedy=False)
    drawn = drawn._replace(ids=drawn.ids[:, :3], sampled=torch.ones(4, 3, dtype=torch.bool))
    monkeypatch.setattr(model, "draw", lambda *arguments, **options: drawn)
    monkeypatch.setattr(model, "words", lambda drawn: ["steel", "oven", "steel", "oven"])
    split = Split("leave_one_out", ["u", "v"], [[0, 1], [1, 0]], rows, rows, rows, "")
    model.loss(split, [1, 0], FitConfig("reward")).backward()  # the history of the knife is the first of the batch
    # one item alone says steel, one alone says oven: rewards 1.1, 0 and 0, 1.1; half of 1.1 over their std and 1e-4
    advantage = 0.55 / (1.1 / math.sqrt(2) + 1e-4)
    # a token: minus the advantage over the three of a completion, mean over the four completions
    expected = torch.tensor([-advantage, advantage, advantage, -advantage])[:, None].expand(4, 3) / 12
    torch.testing.assert_close(logps.grad, expected)


def test_queries_learn_to_find_the_target():
    """Item 3, the steel knife, always comes next. Sampled queries say so more and more."""
    policy = one_block(make_policy())
    with torch.no_grad():  # a policy without preferences
        for weights in policy.model.parameters():
            weights.mul_(0.2)
    rows = Rows(["u"] * 8, [[0], [1], [2], [4], [5], [0, 1], [1, 2], [4, 5]], [3] * 8)
    split = Split("leave_one_out", ["u"], [[0, 1, 2, 4, 5, 3]], rows, rows, rows, "")
    model = RecR1(policy, split, group_size=8)

    def mean_reward():
        torch.manual_seed(1)
        drawn = model.draw(rows.history, 32, greedy=False)
        return model.retriever.rewards(model.words(drawn), [3] * 256).mean().item()

    before = mean_reward()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(split, [*range(8)], FitConfig("reward")).backward()
        optimizer.step()
    assert before < 0.5
    assert mean_reward() > 0.9
    assert model.rank(rows.history, 1).flatten().tolist() == [3] * 8


# ------------------------------------------------------------------------------------------------- R2ec


def test_rewards_by_hand():
    """Cosines 1, 0.6 and 0 at temperature 0.5; 0.95 NDCG + 0.05 share."""
    model = R2ec(make_policy(), SPLIT, temperature=0.5)
    model.table = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]])
    users = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    total = math.exp(2) + math.exp(1.2) + 1
    expected = [0.95 + 0.05 * math.exp(2) / total, 0.95 / math.log2(3) + 0.05 * math.exp(1.2) / total]
    np.testing.assert_allclose(model.rewards(users, torch.tensor([0, 1])).numpy(), expected, atol=1e-6)


def test_tied_items_share_the_better_rank(monkeypatch):
    """Cosines 1, 0.6, 0.6 and 0, and ranks that count down to the second: 1, 2, 2, and a last one for nothing."""
    monkeypatch.setattr(r2ec, "DEEPEST", 2)
    model = R2ec(make_policy(), SPLIT, temperature=0.5)
    model.table = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [0.0, 1.0]])
    weights = np.exp([2, 1.2, 1.2, 0])
    gains = np.array([1, 1 / math.log2(3), 1 / math.log2(3), 0])
    rewards = model.rewards(torch.tensor([[1.0, 0.0]] * 4), torch.arange(4))
    np.testing.assert_allclose(rewards.numpy(), 0.95 * gains + 0.05 * weights / weights.sum(), atol=1e-6)


def test_ndcg_ends_at_the_thousandth(monkeypatch):
    monkeypatch.setattr(r2ec, "NDCG_SHARE", 1)
    model = R2ec(make_policy(), SPLIT)
    model.table = torch.linspace(1, 0, 1002)[:, None]  # item i is at rank i + 1
    rewards = model.rewards(torch.ones(2, 1), torch.tensor([999, 1000]))
    assert rewards.tolist() == [pytest.approx(1 / math.log2(1001)), 0.0]


@pytest.mark.parametrize("share", [1, 0.95])
def test_equal_ranks_without_the_items_share_teach_nothing(monkeypatch, share):
    """Three thoughts that put the target second: the share of the items alone tells them apart."""
    monkeypatch.setattr(r2ec, "NDCG_SHARE", share)
    model = R2ec(make_policy(), SPLIT, group_size=3)
    angles = torch.tensor([0.1, 0.2, 0.3])
    states = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    logps = torch.zeros(3, 3, requires_grad=True)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0], [-0.6, -0.8], [-0.8, -0.6]])
    monkeypatch.setattr(model, "read", lambda drawn, mark: (logps, states))
    monkeypatch.setattr(model, "items", lambda which: vectors[which])
    rows = Rows(["u"], [[0]], [1])
    drawn = model.draw(rows.history, 3, greedy=False)
    drawn = drawn._replace(ids=drawn.ids[:, :3], sampled=torch.ones(3, 3, dtype=torch.bool))
    monkeypatch.setattr(model, "draw", lambda *arguments, **options: drawn)
    split = Split("leave_one_out", ["u"], [[0, 1]], rows, rows, rows, "")
    model.loss(split, [0], FitConfig("reward")).backward()
    # a token's gradient is a multiple of its thought's advantage: exactly 0 where that is
    assert logps.grad.eq(0).all() == (share == 1)


def test_items_are_read_anew_every_second_loss():
    """Weights move before every loss, so that a table shows when it was made."""
    model = R2ec(make_policy(), SPLIT, group_size=2, refresh=2)
    calls, read_all_items = [], model.read_all_items
    model.read_all_items = lambda: calls.append(1) or read_all_items()
    model.loss(SPLIT, [0, 1], FitConfig("softmax"))
    assert not calls  # it needs no table, and does not count
    fresh = []
    for _ in range(5):
        with torch.no_grad():
            for weights in model.parameters():
                weights.mul_(1.1)
        model.loss(SPLIT, [0, 1], FitConfig("reward"))
        fresh.append(torch.allclose(model.table, model.items(range(6)), atol=1e-5))
    # before the five losses the count is 0, 1, 2, 3 and 4: even three times
    assert fresh == [True, False, True, False, True]
    assert len(calls) == 3


def test_the_best_thought_alone_moves_its_user_towards_the_target(monkeypatch):
    """Two histories of G = 2 thoughts. The share is among the targets of the batch, its advantage that of the group."""
    model = R2ec(make_policy(), SPLIT, group_size=2, temperature=0.5)
    angles = torch.tensor([0.1, 1.2, 0.3, 0.9])
    states = torch.stack([angles.cos(), angles.sin()], 1).requires_grad_()
    logps = torch.zeros(4, 3, requires_grad=True)
    vectors = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.8, 0.6], [-1.0, 0.0], [0.0, -1.0]])
    monkeypatch.setattr(model, "read", lambda drawn, mark: (logps, states))
    monkeypatch.setattr(model, "items", lambda which: vectors[which])
    rows = Rows(["u", "v"], [[0], [1]], [1, 0])
    drawn = model.draw(rows.history, 2, greedy=False)
    drawn = drawn._replace(ids=drawn.ids[:, :3], sampled=torch.ones(4, 3, dtype=torch.bool))
    monkeypatch.setattr(model, "draw", lambda *arguments, **options: drawn)
    split = Split("leave_one_out", ["u", "v"], [[0, 1], [1, 0]], rows, rows, rows, "")
    loss = model.loss(split, [0, 1], FitConfig("reward"))
    loss.backward()

    targets = torch.tensor([1, 1, 0, 0])
    model.table = vectors
    rewards = model.rewards(states.detach(), targets)
    advantages = trajectory_advantages(rewards, 2)
    best = [1, 2]  # the second thought of the first history lies near item 1, the first of the other near item 0
    assert rewards.view(2, 2).argmax(1).tolist() == [1, 0]
    among = vectors[[0, 1]]
    user = states.detach()[best].requires_grad_()
    unit = user / user.norm(dim=1, keepdim=True)
    share = (unit @ among.T / 0.5).log_softmax(-1)[[0, 1], [1, 0]]
    (expected,) = torch.autograd.grad(-(share * advantages[best]).mean(), user)
    torch.testing.assert_close(states.grad[best], expected)
    assert states.grad[[0, 3]].eq(0).all()
    # tokens: minus the advantage over the three of a completion, mean over the completions
    torch.testing.assert_close(logps.grad, (-advantages / 3 / 4)[:, None].expand(4, 3))


def test_it_learns_to_match_and_reads_items_anew():
    """Cycle 0, 1, 2, 3, 4, 0: what comes next is another item than any in the history."""
    rows = Rows(["u"] * 5, [[item] for item in range(5)], [(item + 1) % 5 for item in range(5)])
    split = Split("leave_one_out", ["u"], [[0, 1, 2, 3, 4, 0]], rows, rows, rows, "")
    model = R2ec(make_policy(), split, group_size=4)
    fit(model, split, FitConfig("softmax", epochs=60, patience=60, batch_size=5, learning_rate=1e-2), seed=0)
    assert model.rank(rows.history, 1).flatten().tolist() == rows.target
    table = model.table.clone()
    fit(model, split, FitConfig("reward", epochs=3, batch_size=5, learning_rate=1e-3), seed=0)
    model.rank(rows.history, 1)
    assert not torch.equal(model.table, table)
    torch.testing.assert_close(model.table, model.items(range(6)).detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model.table.norm(dim=1), torch.ones(6))


def test_a_stopped_fit_reads_items_anew_when_it_would_have(tmp_path):
    """Three losses an epoch, and a table for two: after a stop between epochs the table is one loss old."""
    rows = Rows(["u"] * 5, [[item] for item in range(5)], [(item + 1) % 5 for item in range(5)])
    split = Split("leave_one_out", ["u"], [[0, 1, 2, 3, 4, 0]], rows, rows, rows, "")
    config = FitConfig("reward", epochs=2, batch_size=2, learning_rate=1e-2)
    whole, stopped, resumed = (R2ec(make_policy(), split, group_size=4, refresh=2) for _ in range(3))
    expected = fit(whole, split, config, seed=0)
    loss, stopped.loss = stopped.loss, lambda *given: 1 / 0 if stopped.count == 4 else loss(*given)
    with pytest.raises(ZeroDivisionError):
        fit(stopped, split, config, seed=0, checkpoint=tmp_path / "fit.pt")
    log = fit(resumed, split, config, seed=0, checkpoint=tmp_path / "fit.pt")
    assert [(row["epoch"], row["loss"], row["ndcg@10"]) for row in log] == [
        (row["epoch"], row["loss"], row["ndcg@10"]) for row in expected
    ]
    assert all(torch.equal(one, other) for one, other in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_an_item_is_its_sid_and_title():
    model = R2ec(make_policy(), SPLIT)
    assert model.texts[2] == "<bos> <a_0> <b_2> <title> garden rake cm <item>"


# ------------------------------------------------------------------------------------------------- RecCoT


def test_the_users_tower_reads_the_thought_and_thinks_once(monkeypatch):
    policy, asked = make_policy(), []
    said = {(0, 1): "garden rake", (4, 3, 2): "kitchen knife", (5,): "hose garden"}  # words of two titles are known

    def say(policy, histories, **options):
        asked.extend(map(tuple, histories))
        thoughts = [f"<think> {said[tuple(history)]} </think>" for history in histories]
        return [Thoughts([*range(len(thoughts))], None, [], thoughts)]

    monkeypatch.setattr(rec_cot, "think", say)
    torch.manual_seed(0)
    model = RecCoT(policy, SPLIT, size=8, dropout=0.0).eval()
    found = model.users(HISTORIES)
    model.users(HISTORIES)
    # the last three items are shown to the policy; each history is thought about once
    assert sorted(asked) == sorted(said)
    states = []
    for history in HISTORIES:
        items, nobody = model.sequence.tensors([history], [""])
        states.append(model.sequence(items, nobody)[0, -1])
    vectors = torch.from_numpy(model.text.encode([said[tuple(history[-3:])] for history in HISTORIES])).float()
    assert len(vectors.unique(dim=0)) == 3
    assert (vectors.norm(dim=1) > 0.9).all()
    torch.testing.assert_close(found, torch.stack(states) + vectors @ model.thought.weight.T)
    torch.manual_seed(0)
    blind = RecCoT(policy, SPLIT, size=8, dropout=0.0, explained=False).eval()
    torch.testing.assert_close(blind.users(HISTORIES), torch.stack(states))  # the same towers, to the weight
    torch.testing.assert_close(blind.table(), model.table())
    assert blind.policy is None
    with pytest.raises(InputError, match="nobody thinks"):
        blind.explain(HISTORIES)
    assert "thought.weight" not in blind.state_dict()


def test_products_of_the_towers_by_hand(monkeypatch):
    """An item is its embedding and what its text adds; the products rank, and the loss is of each row's own target."""
    model = RecCoT(make_policy(), SPLIT, size=2)
    model.of_items = torch.tensor([[4.0, 0.0], [0.0, 0.0], [3.0, 1.0], [0.0, 0.0], [2.0, 1.0], [0.0, 0.0]])
    model.item.weight = torch.nn.Parameter(torch.tensor([[0.0, 2.0], [1.0, 0.0]]))  # (a, b) adds (2b, a)
    with torch.no_grad():
        model.sequence.items.weight[:6] = torch.tensor([[1, 0], [0, 1], [2, 0], [3, 0], [0, 0], [-1, -1]])
    assert model.table().tolist() == [[1, 4], [0, 1], [4, 3], [3, 0], [2, 2], [-1, -1]]
    users = {(0,): [1.0, 0.0], (1,): [0.0, 1.0]}
    monkeypatch.setattr(model, "users", lambda histories: torch.tensor([users[tuple(items)] for items in histories]))
    # products 1, 0, 4, 3, 2, -1 of the first user and 4, 1, 3, 0, 2, -1 of the second
    assert model.best([[0], [1]], ["", ""], 6).tolist() == [[2, 3, 4, 0, 1, 5], [0, 2, 4, 1, 3, 5]]
    rows = Rows(["u"] * 3, [[1], [0], [0]], [1, 4, 3])
    split = Split("leave_one_out", ["u"], [[0, 1]], rows, rows, rows, "")
    # examples 2 and 0: the first user's item 3 has 3, the second's item 1 has 1; all products are -1 to 4 either way
    expected = math.log(sum(math.exp(product) for product in range(-1, 5))) - (3 + 1) / 2
    assert model.loss(split, [2, 0], FitConfig()).item() == pytest.approx(expected)


@pytest.mark.parametrize("explained", [True, False])
def test_a_thought_that_says_what_comes_next_is_learnt(monkeypatch, explained):
    """Targets are drawn by chance, and thoughts are their titles. New histories are asked about twice, with thoughts of
    two different targets: who does not read them answers the same twice, and at most one answer is right."""
    titles = [f"{colour} {thing}" for colour in ("red", "blue", "green") for thing in ("hose", "knife")]
    policy, told = make_policy(catalog=Catalog("shop", CATALOG.sids, titles)), {}

    def say(policy, histories, **options):
        thoughts = [f"<think> {titles[told[history]]} </think>" for history in histories]
        return [Thoughts([*range(len(thoughts))], None, [], thoughts)]

    monkeypatch.setattr(rec_cot, "think", say)
    seen = [[one, other] for one in range(6) for other in range(6)]
    rows = Rows(["u"] * 36, seen, np.random.default_rng(0).integers(6, size=36).tolist())
    split = Split("leave_one_out", ["u"], seen[:1], rows, rows, rows, "")
    told |= zip(map(tuple, seen), rows.target, strict=True)
    torch.manual_seed(0)
    model = RecCoT(policy, split, size=16, explained=explained)
    fit(model, split, FitConfig(epochs=40, patience=40, batch_size=12, learning_rate=1e-2), seed=0)
    new = [[one, other, one] for one, other in seen]
    right = []
    for shift in (1, 2):
        targets = [(target + shift) % 6 for target in rows.target]
        told |= zip(map(tuple, new), targets, strict=True)
        asked = RecCoT(policy, split, size=16, explained=explained)  # it has not thought after the new histories
        asked.load_state_dict(model.state_dict())
        right.append(asked.rank(new, 1)[:, 0] == torch.tensor(targets))
    if explained:
        assert torch.cat(right).float().mean() > 0.8
    else:
        assert not (right[0] & right[1]).any()


def test_the_policy_stays_as_it_is():
    policy = make_policy()
    before = [weights.clone() for weights in policy.model.parameters()]
    model = RecCoT(policy, SPLIT, size=8)
    fit(model, SPLIT, FitConfig(epochs=3, batch_size=2), seed=0)
    assert all(torch.equal(old, weights) for old, weights in zip(before, policy.model.parameters(), strict=True))
    assert sorted(model.rank(HISTORIES, 6)[0].tolist()) == list(range(CATALOG.num_items))
