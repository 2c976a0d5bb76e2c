"""Beam search against transformers' own, and against enumeration of the whole catalogue."""

import itertools

import pytest
import torch
from transformers import GenerationConfig
from worlds import EOS, PAD, layout_for, random_prompts, random_sids, tiny_model

from sapo.decoding.beam_search import constrained_beam_search
from sapo.errors import InputError
from sapo.semantic_ids.trie import SidTrie

CASES = [((5, 6), 20, 4), ((4, 6, 5), 60, 10), ((3, 4, 3, 4), 80, 7), ((3, 3, 2, 3, 2), 60, 10)]


def all_scores(model, prompt, mask, sids, layout, normalize, trie):
    """Brute force: the score of every distinct SID after every prompt, each by its own forward passes."""
    unique = sids.unique(dim=0)
    scores = torch.zeros(len(prompt), len(unique))
    for row, (ids, keep) in enumerate(zip(prompt, mask, strict=True)):
        for column, sid in enumerate(unique):
            tokens = ids[keep.bool()]
            for level, code in enumerate(sid.tolist()):
                logits = model(tokens[None]).logits[0, -1].float()
                token_ids = layout.sid_token_ids[level]
                if normalize == "trie":
                    allowed = trie.allowed(sid[None, :level])[0]
                    logp = logits[token_ids].masked_fill(~allowed, float("-inf")).log_softmax(-1)[code]
                else:
                    logp = logits.log_softmax(-1)[token_ids[code]]
                scores[row, column] += logp
                tokens = torch.cat([tokens, token_ids[code][None]])
    return unique, scores


@pytest.mark.parametrize(("sizes", "items", "beams"), CASES)
@pytest.mark.parametrize("seed", [0, 1])
def test_equals_generate_of_transformers(sizes, items, beams, seed):
    sids = random_sids(items, sizes, seed)
    trie, layout = SidTrie(sids, sizes), layout_for(sizes)
    vocab = int(layout.sid_ids.max()) + 6
    model = tiny_model(vocab, seed)
    prompt, mask = random_prompts(6, 9, vocab, seed)
    ours = constrained_beam_search(model, prompt, mask, trie, layout.sid_token_ids, beams)
    width = prompt.shape[1]

    def callback(batch, ids):
        tokens = ids[width:].tolist()
        codes = [t - int(layout.sid_token_ids[d][0]) for d, t in enumerate(tokens)]
        allowed = trie.allowed(torch.tensor([codes], dtype=torch.long).view(1, len(codes)))[0]
        # A beam that transformers keeps although its score is -inf has left the tree; it may go anywhere.
        return layout.sid_token_ids[len(codes)][allowed].tolist() or [PAD]

    config = GenerationConfig(
        num_beams=beams,
        num_return_sequences=beams,
        max_new_tokens=len(sizes),
        min_new_tokens=len(sizes),
        do_sample=False,
        length_penalty=0.0,
        early_stopping=False,
        pad_token_id=PAD,
        eos_token_id=EOS,
        return_dict_in_generate=True,
        output_scores=True,
    )
    theirs = model.generate(prompt, attention_mask=mask, generation_config=config, prefix_allowed_tokens_fn=callback)
    their_scores = theirs.sequences_scores.view(len(prompt), beams)
    first = torch.tensor([int(ids[0]) for ids in layout.sid_token_ids])
    their_sids = theirs.sequences.view(len(prompt), beams, -1)[..., width:] - first
    exist = ours.scores > float("-inf")
    assert exist.sum() > len(prompt)
    torch.testing.assert_close(ours.scores[exist], their_scores[exist], atol=1e-4, rtol=1e-5)
    assert (ours.sids[exist] == their_sids[exist]).all()
    assert trie.contains(ours.sids[exist]).all()


@pytest.mark.parametrize("normalize", ["full", "trie"])
def test_a_beam_as_wide_as_the_catalogue_ranks_it_exactly(normalize):
    sizes = (3, 4, 3)
    sids = random_sids(15, sizes, 3)
    trie, layout = SidTrie(sids, sizes), layout_for(sizes)
    vocab = int(layout.sid_ids.max()) + 4
    model = tiny_model(vocab, 3)
    prompt, mask = random_prompts(3, 6, vocab, 3)
    beams = constrained_beam_search(model, prompt, mask, trie, layout.sid_token_ids, 40, normalize=normalize)
    unique, scores = all_scores(model, prompt, mask, sids, layout, normalize, trie)
    order = scores.argsort(1, descending=True)
    torch.testing.assert_close(beams.scores[:, : len(unique)], scores.gather(1, order), atol=1e-4, rtol=1e-5)
    assert (beams.sids[:, : len(unique)] == unique[order]).all()
    # 40 places, fewer SIDs: what is left does not exist
    assert (beams.sids[:, len(unique) :] == -1).all()
    assert beams.scores[:, len(unique) :].isneginf().all()
    if normalize == "trie":  # over the whole catalogue the probabilities of the allowed set sum to 1
        torch.testing.assert_close(beams.scores.exp().sum(1), torch.ones(3), atol=1e-4, rtol=0)


def test_step_fn_replaces_the_model():
    sizes = (3, 3)
    sids = torch.tensor(list(itertools.product(range(3), range(3))))
    trie, layout = SidTrie(sids, sizes), layout_for(sizes)
    vocab = int(layout.sid_ids.max()) + 1
    model = tiny_model(vocab)
    prompt, mask = random_prompts(4, 5, vocab, 0)

    def step(rows, tokens):
        inputs = torch.cat([prompt[rows], tokens], 1)
        keep = torch.cat([mask[rows], torch.ones_like(tokens)], 1)
        return model(inputs, attention_mask=keep, position_ids=(keep.cumsum(1) - 1).clamp(min=0)).logits[:, -1]

    with_cache = constrained_beam_search(model, prompt, mask, trie, layout.sid_token_ids, 5)
    with_step = constrained_beam_search(None, prompt, mask, trie, layout.sid_token_ids, 5, step_fn=step)
    assert (with_cache.sids == with_step.sids).all()
    torch.testing.assert_close(with_cache.scores, with_step.scores, atol=1e-4, rtol=1e-5)


def test_num_return_is_the_head_of_the_list_and_is_checked():
    sizes = (3, 3)
    sids = random_sids(9, sizes, 0)
    trie, layout = SidTrie(sids, sizes), layout_for(sizes)
    model = tiny_model(20)
    prompt, mask = random_prompts(2, 4, 10, 0)
    five = constrained_beam_search(model, prompt, mask, trie, layout.sid_token_ids, 5)
    two = constrained_beam_search(model, prompt, mask, trie, layout.sid_token_ids, 5, num_return=2)
    assert (five.sids[:, :2] == two.sids).all()
    with pytest.raises(InputError, match="num_return is 6"):
        constrained_beam_search(model, prompt, mask, trie, layout.sid_token_ids, 5, num_return=6)
    with pytest.raises(InputError, match="K = 1 levels"):
        constrained_beam_search(model, prompt, mask, trie, layout.sid_token_ids[:1], 5)
    with pytest.raises(InputError, match=r"sizes \(3, 2\)"):
        constrained_beam_search(model, prompt, mask, trie, [layout.sid_token_ids[0], layout.sid_token_ids[1][:2]], 5)


def test_broken_weights_say_so():
    sizes = (3, 3)
    model = tiny_model(20)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    trie = SidTrie(random_sids(9, sizes, 0), sizes)
    prompt, mask = random_prompts(2, 4, 10, 0)
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        constrained_beam_search(model, prompt, mask, trie, layout_for(sizes).sid_token_ids, 5)
