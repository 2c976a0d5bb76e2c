"""Contrastive inference against scores of whole texts read one by one, and by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_policy import make_policy

from sapo.decoding.beam_search import Beams
from sapo.policy.contrast import CANDIDATES, contrast, score_sids, standardised
from sapo.policy.policy import recommend, search, think

HISTORIES = [[0, 1], [5, 4, 3]]


@pytest.fixture
def policy():
    policy = make_policy()
    with torch.no_grad():  # so that what it prefers shows
        policy.model.get_input_embeddings().weight.mul_(20)
    return policy


def one_by_one(policy, text, sid):
    """Log-probability of a SID after a text: at each level the softmax over codes that lead to an item."""
    ids = policy.tokenizer(text)["input_ids"]
    total, sids = 0.0, policy.catalog.sids.tolist()
    for level, code in enumerate(sid):
        logits = policy.model(torch.tensor([ids])).logits[0, -1]
        tokens = policy.layout.sid_token_ids[level]
        rivals = {tokens[other[level]].item() for other in sids if other[:level] == sid[:level]}
        own = tokens[code].item()
        total += (logits[own] - logits[sorted(rivals)].logsumexp(0)).item()
        ids = [*ids, own]
    return total


def test_scores_are_those_of_whole_texts(policy):
    every = policy.catalog.sids.unique(dim=0)
    texts = ["<bos> <a_0> <b_1>", "<bos> <think> steel </think> <think> knife </think>"]
    found = score_sids(policy, texts, every.expand(2, -1, -1))
    for row, text in enumerate(texts):
        expected = [one_by_one(policy, text, sid) for sid in every.tolist()]
        np.testing.assert_allclose(found[row].numpy(), expected, atol=1e-4)
        assert sum(map(math.exp, expected)) == pytest.approx(1, abs=1e-5)


def test_candidates_are_scored_in_three_contexts(policy):
    """All SIDs are candidates here; without a history the prompt is <bos> alone."""
    policy.contrast = 0.7
    (thoughts,) = think(policy, HISTORIES)
    found = search(policy, thoughts, num_beams=4, k=4)
    for row, user in enumerate(thoughts.rows):
        prompt, thought = policy.prompts([HISTORIES[user]])[0], thoughts.thinking[row]
        assert thought.startswith("<think>")
        every = policy.catalog.sids.unique(dim=0).tolist()
        texts = (f"{prompt} {thought}", f"<bos> {thought}", prompt)
        scores = np.array([[one_by_one(policy, text, sid) for sid in every] for text in texts])
        z = (scores - scores.mean(1, keepdims=True)) / scores.std(1, keepdims=True)
        final = z[0] - 0.7 * (z[1] - z[2])
        best = np.argsort(-final)[:4]
        assert found.sids[row].tolist() == [every[at] for at in best]
        np.testing.assert_allclose(found.scores[row].numpy(), final[best], atol=1e-3)
    answers = recommend(policy, HISTORIES, num_beams=4, k=4)
    assert torch.equal(answers.sids[thoughts.rows], found.sids)
    assert len(policy.catalog.sids) < CANDIDATES


def test_without_weight_or_thought_nothing_changes(policy):
    plain = recommend(policy, HISTORIES, num_beams=4, k=4)
    unthinking = recommend(policy, HISTORIES, num_beams=4, k=4, thinking=False)
    (thoughts,) = think(policy, HISTORIES)
    found = Beams(plain.sids[thoughts.rows], plain.scores[thoughts.rows])
    assert torch.equal(contrast(policy, found, thoughts.prompts, thoughts.thinking, 0.0).sids, found.sids)
    policy.contrast = 0.0  # the order of the wider search, here of all SIDs
    wide = recommend(replace(policy, contrast=None), HISTORIES, num_beams=10, k=4)
    assert torch.equal(recommend(policy, HISTORIES, num_beams=4, k=4).sids, wide.sids)
    policy.contrast = 1.0
    assert not torch.equal(recommend(policy, HISTORIES, num_beams=4, k=4).sids, plain.sids)
    assert torch.equal(recommend(policy, HISTORIES, num_beams=4, k=4, thinking=False).sids, unthinking.sids)


def test_standardised_by_hand():
    """Mean 2 and deviation sqrt(2/3) of 1, 2, 3; equal scores are 0, not a number, and so is a single one."""
    nothing = float("-inf")
    scores = torch.tensor([[1.0, 2.0, 3.0, nothing], [5.0, 5.0, nothing, nothing], [-1.0, nothing, nothing, nothing]])
    z = standardised(scores, scores > nothing)
    side = 1 / math.sqrt(2 / 3)
    torch.testing.assert_close(z, torch.tensor([[-side, 0.0, side, 0.0], [0.0] * 4, [0.0] * 4]))
