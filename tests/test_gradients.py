"""Gradients measured on a policy: directions against all completions written out, sums against all pairs of batches."""

import itertools
import math

import pytest
import torch

from sapo.credit.objectives import OBJECTIVES
from sapo.data.interactions import Rows
from sapo.data.synthetic import SyntheticCatalogue, SyntheticConfig
from sapo.decoding.sampling import Rollouts
from sapo.errors import InputError
from sapo.evaluation import gradients
from sapo.evaluation.gradients import GOALS, learns_from_given_rollouts, measure_gradients
from sapo.policy.backbone import BackboneConfig, build_backbone
from sapo.policy.policy import Policy
from sapo.policy.prompts import build_tokenizer

WORLD = SyntheticCatalogue(SyntheticConfig(num_users=30, num_items=6, branching=(2, 3), predictability=(0.8, 0.7)))


@pytest.fixture
def policy():
    """One that does not think: its completions are the six SIDs."""
    tokenizer = build_tokenizer(WORLD.catalog, ["red"])
    config = BackboneConfig(hidden_size=16, num_heads=2, intermediate_size=16, num_layers=1)
    model = build_backbone(config, tokenizer, 0).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(8)  # so that items differ in how likely they are
    return Policy(model, tokenizer, WORLD.catalog, "x", "x", block_budget=1, max_history=3, thinking=False)


def written_out(policy, prompt):
    """All completions as rollouts of one group, and the probability of each, with a graph."""
    layout, trie = policy.layout, policy.trie
    sids = WORLD.catalog.sids
    ids = torch.stack([layout.sid_token_ids[level][sids[:, level]] for level in range(2)], 1)
    read = torch.cat([prompt["input_ids"].expand(len(ids), -1), ids], 1)
    logits = policy.model(input_ids=read, attention_mask=torch.ones_like(read)).logits[:, -3:-1]
    chosen, sampled = [], []
    for level in range(2):
        allowed = trie.allowed(sids[:, :level])
        tokens = layout.sid_token_ids[level]
        logps = logits[:, level, tokens].masked_fill(~allowed, -torch.inf).log_softmax(-1)
        chosen.append(logps.gather(1, sids[:, level, None])[:, 0])
        sampled.append(allowed.sum(1) > 1)
    logps, sampled = torch.stack(chosen, 1), torch.stack(sampled, 1)
    rollouts = Rollouts(ids, torch.ones_like(sampled), logps.detach(), sampled, sids)
    return rollouts, logps.sum(1).exp()


def flat(policy, loss):
    return torch.cat([part.flatten() for part in torch.autograd.grad(loss, [*policy.model.parameters()])]).double()


@pytest.mark.parametrize("goal", GOALS)
def test_the_goals_directions_are_unbiased_gradients(policy, goal):
    """All 36 pairs of completions with their probabilities: E[h] = grad J, J = P(target) or the expected matches."""
    target = WORLD.catalog.sids[2]
    prompt = policy.encode(policy.prompts([[0, 1]]))
    rollouts, probs = written_out(policy, prompt)
    assert probs.sum().item() == pytest.approx(1, abs=1e-5)
    match = (WORLD.catalog.sids == target).float()
    worth = match.prod(1) if goal == "exact" else match.sum(1)
    expected = flat(policy, (probs * worth).sum())
    probs, found = probs.detach(), torch.zeros_like(expected)
    for pair in itertools.product(range(6), repeat=2):
        group = Rollouts(*(part[list(pair)] for part in rollouts))
        direction = gradients._direction(policy, prompt, group, target.expand(2, -1), GOALS[goal], 1.0)
        found += probs[list(pair)].prod() * direction
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_an_objectives_direction_is_that_of_its_advantages(policy):
    """SAPO gives every token 1 / (G K) of its step's advantage times the gradient of its log-probability."""
    target = WORLD.catalog.sids[[2, 2, 2]]
    prompt = policy.encode(policy.prompts([[0, 1]]))
    rollouts, _ = written_out(policy, prompt)
    some = Rollouts(*(part[[0, 2, 3]] for part in rollouts))
    match = (some.sids == target).float()
    advantages = (match - match.mean(0)) / (match.std(0) + 1e-4)
    found = gradients._direction(policy, prompt, some, target, OBJECTIVES["sapo"], 1.0)
    read = torch.cat([prompt["input_ids"].expand(3, -1), some.completion_ids], 1)
    logits = policy.model(input_ids=read, attention_mask=torch.ones_like(read)).logits[:, -3:-1]
    loss = torch.zeros(())
    for level in range(2):
        allowed = policy.trie.allowed(some.sids[:, :level])
        logps = logits[:, level, policy.layout.sid_token_ids[level]].masked_fill(~allowed, -torch.inf).log_softmax(-1)
        loss = loss + (advantages[:, level] * logps.gather(1, some.sids[:, level, None])[:, 0]).sum() / (3 * 2)
    torch.testing.assert_close(found, flat(policy, loss), rtol=1e-3, atol=1e-5)


def test_sums_are_means_over_pairs_of_different_batches():
    """g of 4 batches over 3 parameters, h likewise; pairs b != c written out."""
    generator = torch.Generator().manual_seed(0)
    g, h = (torch.randn(4, 3, generator=generator, dtype=torch.float64) + 1 for _ in range(2))
    of_objective, of_goal = gradients._Sums(3), gradients._Sums(3)
    for direction, gradient in zip(g, h, strict=True):
        of_objective.add(direction, {"exact": gradient})
        of_goal.add(gradient, {})
    found = gradients._measures(of_objective, of_objective.with_goal["exact"], of_goal, 4)
    pairs = [(b, c) for b in range(4) for c in range(4) if b != c]
    cross = torch.stack([g[b] * h[c] for b, c in pairs]).mean(0)
    own, goal = (sum(float(of[b] @ of[c]) for b, c in pairs) / len(pairs) for of in (g, h))
    along, size = float(cross.sum()), float(g.square().sum(1).mean())
    assert found["along"] == pytest.approx(along)
    assert found["size"] == pytest.approx(size)
    assert found["worth"] == pytest.approx(along**2 / size)
    assert found["signal"] == pytest.approx(own / size)
    assert found["cosine"] == pytest.approx(along / math.sqrt(own * goal))
    adam = float((cross / g.square().mean(0).sqrt()).sum())
    assert found["adam_worth"] == pytest.approx(adam**2 / 3)


def test_the_same_seed_measures_the_same_and_ratios_do_not_count(policy):
    """On samples of the policy itself every importance ratio is 1, so that GSPO's unit of it changes nothing."""
    rows = Rows(["a", "b", "c"], [[0, 1], [3], [2, 4]], [1, 2, 5])
    how = {"prompts": 4, "group_size": 4, "batches": 3, "seed": 5}
    one, two = (measure_gradients(policy, rows, ["sapo", "grpo", "gspo"], **how) for _ in range(2))
    assert one.equals(two)
    assert list(one["goal"]) == ["exact", "match"] * 3
    by_name = one.set_index(["objective", "goal"])
    assert by_name.loc["gspo"].to_numpy() == pytest.approx(by_name.loc["grpo"].to_numpy(), rel=1e-4)
    assert all(parameter.grad is None for parameter in policy.model.parameters())


def test_what_cannot_be_measured_is_refused(policy):
    rows = Rows(["a"], [[0]], [1])
    assert learns_from_given_rollouts("sapo")
    others = [name for name in OBJECTIVES if not learns_from_given_rollouts(name)]
    assert others == ["dapo", "rlvr", "rank_reward", "best_of_beam"]  # chooses samples, learns values, looks at beams
    with pytest.raises(InputError, match="dapo: not learnt from samples of the policy alone"):
        measure_gradients(policy, rows, ["dapo"], prompts=1, group_size=2, batches=2, seed=0)
    with pytest.raises(InputError, match="batches is 1 and group_size 4"):
        measure_gradients(policy, rows, ["sapo"], prompts=1, group_size=4, batches=1, seed=0)
    with pytest.raises(InputError, match="unknown objective 'sapa'"):
        measure_gradients(policy, rows, ["sapa"], prompts=1, group_size=4, batches=2, seed=0)
