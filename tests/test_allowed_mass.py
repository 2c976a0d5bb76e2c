"""The mass that the allowed set has in the full softmax: where it is known, and against a plain forward pass."""

import itertools

import pytest
import torch
from test_policy import TITLES, make_policy

from sapo.data.catalog import Catalog
from sapo.decoding.logprobs import block_tokens, end_ids
from sapo.decoding.sampling import grouped_rollouts
from sapo.evaluation.allowed_mass import allowed_mass

FULL = Catalog("shop", torch.tensor(list(itertools.product(range(2), range(3)))), TITLES)  # all 6 SIDs are items


def test_uniform_logits_by_hand():
    """Every token has probability 1/V: the two codes of level 1 have 2/V, the three of level 2 3/V, and a block all
    but pad, EOS, the opening delimiter and the five codes."""
    policy = make_policy(catalog=FULL)
    with torch.no_grad():
        for parameter in policy.model.parameters():
            parameter.zero_()
    vocab = policy.model.config.vocab_size
    prompts = policy.prompts([[0, 1], [3]])
    table = allowed_mass(policy, prompts, 4, torch.Generator().manual_seed(0)).set_index("kind")
    assert table.index.tolist() == ["block", "level 1", "level 2"]
    outside = {policy.tokenizer.pad_token_id, policy.layout.think_start_id, *end_ids(policy.model)}
    assert len(outside) == 3
    assert table["mass"].tolist() == pytest.approx([(vocab - 3 - 5) / vocab, 2 / vocab, 3 / vocab])
    assert table["positions"].tolist()[1:] == [8, 8]  # 2 prompts x 4
    assert 16 <= table.loc["block", "positions"] <= 48  # two blocks of up to 3 choices in each of 8 completions


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_mass_is_the_sum_of_the_allowed_probabilities(temperature):
    """A policy that prefers something, each completion read on its own. One code of level 1 has an only child, whose
    place is no choice and does not count."""
    sids = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0]])
    policy = make_policy(1, Catalog("shop", sids, TITLES[:4]))
    layout, model, histories = policy.layout, policy.model, [[0, 1], [2]]
    prompts = policy.prompts(histories)
    found = allowed_mass(policy, prompts, 6, torch.Generator().manual_seed(0), temperature=temperature)
    batch = policy.encode(prompts)
    rollouts = grouped_rollouts(
        *(model, batch["input_ids"], batch["attention_mask"], layout, policy.trie, 6),
        block_budget=policy.block_budget,
        temperature=temperature,
        generator=torch.Generator().manual_seed(0),
        pad_id=policy.tokenizer.pad_token_id,
    )
    in_block = block_tokens(layout, model.config.vocab_size, policy.tokenizer.pad_token_id, end_ids(model))
    masses = {"block": [], "level 1": [], "level 2": []}
    for row, ids in enumerate(rollouts.completion_ids):
        prompt = batch["input_ids"][row // 6][batch["attention_mask"][row // 6].bool()]
        probs = (
            (model(torch.cat([prompt, ids])[None]).logits[0, len(prompt) - 1 : -1] / temperature).softmax(-1).detach()
        )
        for place in rollouts.sampled[row].nonzero()[:, 0].tolist():
            level = next((k for k, tokens in enumerate(layout.sid_token_ids) if ids[place] in tokens), None)
            if level is None:
                masses["block"].append(probs[place, in_block].sum())
            else:
                allowed = [layout.sid_token_ids[level][code] for code in ((0, 1), (0, 1, 2))[level]]
                masses[f"level {level + 1}"].append(probs[place, allowed].sum())
    assert found["kind"].tolist() == list(masses)
    assert found["positions"].tolist() == [len(values) for values in masses.values()]
    expected = [float(torch.stack(values).double().mean()) for values in masses.values()]
    assert found["mass"].tolist() == pytest.approx(expected, rel=1e-4)
    assert len(masses["level 2"]) < 12  # some named the only child
