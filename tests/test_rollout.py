"""Grouped rollouts: what the decoder may emit, and that its log-probabilities are those that training sees."""

from dataclasses import replace

import pytest
import torch
from worlds import CLOSE, EOS, OPEN, PAD, layout_for, random_prompts, random_sids, tiny_model

from sapo.decoding.beam_search import constrained_beam_search
from sapo.decoding.logprobs import completion_logps
from sapo.decoding.sampling import beam_rollouts, grouped_rollouts
from sapo.errors import InputError
from sapo.semantic_ids.trie import SidTrie

SIZES = (3, 4, 5)
WORDS = 6


def make_world(seed=0, sizes=SIZES, items=14):
    sids = random_sids(items, sizes, seed)
    layout = layout_for(sizes)
    vocab = int(layout.sid_ids.max()) + 1 + WORDS
    model = tiny_model(vocab, seed, scale=4.0)
    return sids, layout, SidTrie(sids, sizes), model, vocab


def sample(model, layout, trie, vocab, seed=0, group=5, **options):
    prompt, mask = random_prompts(4, 7, vocab, seed)
    options = {"block_budget": 4, "generator": torch.Generator().manual_seed(seed), "pad_id": PAD} | options
    return prompt, mask, grouped_rollouts(model, prompt, mask, layout, trie, group, **options)


def forward_logits(model, prompt, mask, rollouts, group):
    """Logits that predict each completion token, with every row read on its own, without padding or cache."""
    width = rollouts.completion_ids.shape[1]
    logits = torch.zeros(*rollouts.completion_ids.shape, model.config.vocab_size)
    for row in range(len(rollouts.completion_ids)):
        start = prompt[row // group][mask[row // group].bool()]
        done = rollouts.completion_ids[row][rollouts.completion_mask[row]]
        output = model(torch.cat([start, done])[None]).logits[0]
        logits[row, : len(done)] = output[len(start) - 1 : len(start) - 1 + len(done)]
    assert width == logits.shape[1]
    return logits


def training_logps(model, prompt, mask, rollouts, layout, trie, **options):
    """What training makes of five completions a prompt."""
    logits = forward_logits(model, prompt, mask, rollouts, 5).flatten(0, 1)
    every = torch.ones_like(rollouts.completion_mask)
    return completion_logps(logits, rollouts.completion_ids, every, layout, trie, pad_id=PAD, eos_ids=[EOS], **options)


@pytest.mark.parametrize("budget", [0, 1, 4, (1, 3, 2)])
def test_completions_have_the_layout_and_name_items(budget):
    _, layout, trie, model, vocab = make_world()
    _, _, out = sample(model, layout, trie, vocab, block_budget=budget)
    parsed = layout.parse(out.completion_ids.masked_fill(~out.completion_mask, PAD))
    assert parsed.well_formed.all()
    assert (parsed.sids == out.sids).all()
    assert trie.contains(out.sids).all()
    steps = layout.token_steps(out.completion_ids)
    budgets = [budget] * 3 if isinstance(budget, int) else budget
    for k in range(3):
        words = ((steps == k) & out.completion_mask).sum(1) - 3  # without both delimiters and the SID token
        assert words.max() <= budgets[k]
    # inside blocks: no pad, EOS, opening delimiter or SID token
    reading = layout.read(out.completion_ids)
    inside = out.completion_ids[reading.in_block & ~reading.is_open & ~reading.is_close & out.completion_mask]
    assert not torch.isin(inside, torch.cat([layout.sid_ids, torch.tensor([PAD, EOS, OPEN, CLOSE])])).any()


@pytest.mark.parametrize("blocks", [0, 1])
@pytest.mark.parametrize("beams", [False, True])
def test_systems_that_think_in_one_block_or_not_at_all(blocks, beams):
    """Layout, items, and log-probabilities are as of K blocks; a block before the whole SID belongs to no step."""
    _, layout, trie, model, vocab = make_world(3)
    layout = replace(layout, num_blocks=blocks)
    prompt, mask = random_prompts(4, 7, vocab, 3)
    rollouts = beam_rollouts if beams else grouped_rollouts
    generator = torch.Generator().manual_seed(0)
    out = rollouts(model, prompt, mask, layout, trie, 5, block_budget=6, generator=generator, pad_id=PAD)
    parsed = layout.parse(out.completion_ids.masked_fill(~out.completion_mask, PAD))
    assert parsed.well_formed.all()
    assert torch.equal(parsed.sids, out.sids)
    assert trie.contains(out.sids).all()
    reading = layout.read(out.completion_ids)
    assert (layout.token_steps(out.completion_ids)[reading.in_block] == -1).all()
    assert (reading.in_block.any(1) == bool(blocks)).all()
    again = training_logps(model, prompt, mask, out, layout, trie)
    if beams:  # of which only the thought was sampled; their order is that of the search without a thought
        found = constrained_beam_search(model, prompt, mask, trie, layout.sid_token_ids, 5, normalize="full")
        assert blocks or torch.equal(found.sids.flatten(0, 1), out.sids)
        assert torch.equal(out.logps[reading.is_sid], torch.zeros(20 * 3))
    else:
        torch.testing.assert_close(out.logps[out.sampled], again[out.sampled], atol=1e-4, rtol=1e-4)


def test_blocks_may_mention_items_where_the_layout_lets_them():
    _sids, layout, trie, model, vocab = make_world()
    layout = replace(layout, sid_in_blocks=True)
    prompt, mask, out = sample(model, layout, trie, vocab, group=40)
    reading = layout.read(out.completion_ids)
    mentioned = reading.in_block & out.completion_mask & torch.isin(out.completion_ids, layout.sid_ids)
    assert mentioned.any()
    parsed = layout.parse(out.completion_ids.masked_fill(~out.completion_mask, PAD))
    assert parsed.well_formed.all()  # a mention is text of its block, no step of the answer
    assert torch.equal(parsed.sids, out.sids)
    assert (layout.token_steps(out.completion_ids)[mentioned] == reading.block[mentioned]).all()
    # and its log-probability is that of a set that holds the SID tokens too
    logits = forward_logits(model, prompt, mask, out, 40)
    row, column = (index[0].item() for index in mentioned.nonzero(as_tuple=True))
    options = torch.ones(vocab, dtype=torch.bool)
    options[[PAD, EOS, OPEN]] = False
    logps = logits[row, column].masked_fill(~options, float("-inf")).log_softmax(0)
    assert out.logps[row, column].item() == pytest.approx(logps[out.completion_ids[row, column]].item(), abs=1e-5)


def test_forced_positions_are_exactly_those_with_one_choice():
    sids, layout, trie, model, vocab = make_world()
    _, _, out = sample(model, layout, trie, vocab, seed=2)
    forced = 0
    for row in range(len(out.completion_ids)):
        words, depth, codes = 0, 0, []
        for column, token in enumerate(out.completion_ids[row].tolist()):
            if not out.completion_mask[row, column]:
                assert not out.sampled[row, column]
                continue
            if token == OPEN:
                choices, words = 1, 0
            elif depth == 0 and token not in layout.sid_ids.tolist():
                choices = 1 if words == 4 else 2
                words += 1
                assert (token == CLOSE) or choices == 2  # the budget leaves nothing but the closing delimiter
            else:
                choices = len({tuple(s[: depth + 1]) for s in sids.tolist() if s[:depth] == codes})
                codes.append(token - int(layout.sid_token_ids[depth][0]))
                depth += 1
            assert bool(out.sampled[row, column]) == (choices > 1)
            if choices == 1:
                forced += 1
                assert out.logps[row, column] == 0
    assert forced > 60  # the 3 openings of each of the 20 rows at least


@pytest.mark.parametrize("sid_logps", ["trie", "full"])
@pytest.mark.parametrize("min_words", [0, 2])
def test_logps_of_sampling_equal_those_of_training(sid_logps, min_words):
    _, layout, trie, model, vocab = make_world(1)
    options = {"min_block_tokens": min_words, "sid_logps": sid_logps, "temperature": 0.7}
    prompt, mask, out = sample(model, layout, trie, vocab, **options)
    again = training_logps(model, prompt, mask, out, layout, trie, **options)
    torch.testing.assert_close(out.logps[out.sampled], again[out.sampled], atol=1e-4, rtol=1e-4)
    reading = layout.read(out.completion_ids)
    if sid_logps == "trie":
        assert (again[reading.is_open] == 0).all()
    for k in range(3):
        words = ((reading.block == k) & reading.in_block & ~reading.is_open & ~reading.is_close).sum(1)
        assert (words >= min_words).all()


def test_allowed_probabilities_sum_to_one():
    """Put every allowed token in turn at a position of a completion: its probabilities make 1."""
    _, layout, trie, model, vocab = make_world(4)
    prompt, mask, out = sample(model, layout, trie, vocab, group=2)
    logits = forward_logits(model, prompt, mask, out, 2)
    first_word, last_code = 1, int(out.completion_mask[0].sum()) - 1
    everywhere = torch.ones_like(out.completion_mask[:1])
    score = lambda ids: completion_logps(logits[0], ids[None], everywhere, layout, trie, pad_id=PAD, eos_ids=[EOS])[0]  # noqa: E731
    words = [t for t in range(vocab) if t not in {PAD, EOS, OPEN, CLOSE, *layout.sid_ids.tolist()}]
    total = 0.0
    for token in words:
        ids = out.completion_ids[0].clone()
        ids[first_word] = token
        total += score(ids)[first_word].exp().item()
    # closing at once is the one other choice; it empties the block, so it is scored from the logits directly
    allowed = torch.tensor([CLOSE, *words])
    close = logits[0, first_word][allowed].log_softmax(0)[0].exp().item()
    assert total + close == pytest.approx(1, abs=1e-5)
    total = 0.0
    for code in torch.where(trie.allowed(out.sids[:1, :2])[0])[0]:
        ids = out.completion_ids[0].clone()
        ids[last_code] = layout.sid_token_ids[2][code]
        total += score(ids)[last_code].exp().item()
    assert total == pytest.approx(1, abs=1e-5)


def test_frequencies_follow_the_policy():
    """The first code after empty blocks: 4,000 draws against the exact softmax, within 4 standard errors."""
    sids, layout, trie, model, vocab = make_world(5)
    prompt, mask = random_prompts(1, 5, vocab, 5)
    generator = torch.Generator().manual_seed(0)
    out = grouped_rollouts(model, prompt, mask, layout, trie, 4000, block_budget=0, generator=generator, pad_id=PAD)
    blocks = torch.tensor([[OPEN, CLOSE] * 3])
    logits = model(torch.cat([prompt, blocks], 1)).logits[0, -1]
    used = sids[:, 0].unique()
    exact = logits[layout.sid_token_ids[0][used]].softmax(0)
    seen = torch.stack([(out.sids[:, 0] == code).float().mean() for code in used])
    error = (exact * (1 - exact) / 4000).sqrt()
    assert ((seen - exact).abs() < 4 * error).all()


def test_same_seed_same_rollouts_and_greedy_needs_none():
    _, layout, trie, model, vocab = make_world()
    first, second, other = (
        sample(model, layout, trie, vocab, generator=torch.Generator().manual_seed(s))[2] for s in (7, 7, 8)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first.sids, other.sids)
    greedy = sample(model, layout, trie, vocab, generator=None, greedy=True)[2]
    groups = greedy.completion_ids.view(4, 5, -1)
    assert (groups == groups[:, :1]).all()  # all of a group take the same most likely tokens


def test_tokens_of_other_engines_are_scored_by_the_full_softmax():
    _, layout, trie, _model, vocab = make_world()
    ids = torch.tensor([[EOS, OPEN, PAD, CLOSE, int(layout.sid_token_ids[1][0])]])
    logits = torch.randn(1, 5, vocab, generator=torch.Generator().manual_seed(0))
    scores = completion_logps(
        logits[0], ids, torch.ones_like(ids, dtype=torch.bool), layout, trie, pad_id=PAD, eos_ids=[EOS]
    )[0]
    full = logits.log_softmax(-1)[0].gather(1, ids.T)[:, 0]
    assert scores[1] == 0
    torch.testing.assert_close(scores[[0, 2, 4]], full[[0, 2, 4]])
    assert scores[3] > full[3]  # closing is allowed, and fewer rivals make it likelier
    assert torch.isfinite(scores).all()


def test_bad_settings_say_so():
    _, layout, trie, model, vocab = make_world()
    with pytest.raises(InputError, match="2 numbers for 3 blocks"):
        sample(model, layout, trie, vocab, block_budget=(1, 2))
    with pytest.raises(InputError, match="below min_block_tokens 5"):
        sample(model, layout, trie, vocab, min_block_tokens=5)
    other = SidTrie(torch.tensor([[0, 0], [1, 1]]), (2, 2))
    with pytest.raises(InputError, match=r"K = 3 levels.*the catalogue has K = 2"):
        sample(model, layout, other, vocab)
    with pytest.raises(InputError, match="temperature is 0"):
        sample(model, layout, trie, vocab, temperature=0)


def test_a_block_that_can_only_close_is_forced_to():
    """A vocabulary of SID tokens and delimiters alone: the closing delimiter is no choice."""
    _, layout, trie, *_ = make_world()
    vocab = int(layout.sid_ids.max()) + 1
    model = tiny_model(vocab)
    _, _, out = sample(model, layout, trie, vocab)
    inside = layout.read(out.completion_ids).in_block
    assert not out.sampled[inside].any()
    assert (out.logps[inside] == 0).all()
    with pytest.raises(InputError, match="no word for a block"):
        sample(model, layout, trie, vocab, min_block_tokens=1)


def test_beam_rollouts_are_one_thought_and_its_likeliest_items():
    _, layout, trie, model, vocab = make_world()
    prompt, mask = random_prompts(4, 7, vocab, 0)
    options = {"block_budget": 4, "pad_id": PAD}
    generator = torch.Generator().manual_seed(0)
    out = beam_rollouts(model, prompt, mask, layout, trie, 5, generator=generator, **options)
    thought = layout.read(out.completion_ids).in_block & out.completion_mask
    parsed = layout.parse(out.completion_ids.masked_fill(~out.completion_mask, PAD))
    assert parsed.well_formed.all()
    assert torch.equal(parsed.sids, out.sids)
    # the thought is the one that sampling draws with the same seed
    generator.manual_seed(0)
    drafts = grouped_rollouts(model, prompt, mask, layout, trie, 1, generator=generator, **options)
    for row in range(4):
        group = slice(5 * row, 5 * row + 5)
        words = [ids[kept].tolist() for ids, kept in zip(out.completion_ids[group], thought[group], strict=True)]
        assert len({tuple(ids) for ids in words}) == 1
        kept = layout.read(drafts.completion_ids[row : row + 1]).in_block[0]
        assert words[0] == drafts.completion_ids[row][kept].tolist()
        # and the SIDs are those of beam search after it, best first, on a prompt of its own
        start = torch.cat([prompt[row][mask[row].bool()], drafts.completion_ids[row][kept]])[None]
        beams = constrained_beam_search(model, start, torch.ones_like(start), trie, layout.sid_token_ids, 5)
        assert torch.equal(beams.sids[0], out.sids[group])
    # what is trained: codes that had a rival. The thought is the same for all beams, as the prompt is.
    assert thought.any()
    assert not out.sampled[thought].any()
    assert (out.logps == 0).all()
    for level in range(3):
        at = (layout.read(out.completion_ids).sid_index == level) & layout.read(out.completion_ids).is_sid
        rivals = trie.allowed(out.sids[:, :level]).sum(1) > 1
        assert torch.equal(out.sampled[at], rivals)
    with pytest.raises(InputError, match="group of 99 beams"):
        beam_rollouts(model, prompt, mask, layout, trie, 99, generator=generator, **options)


@pytest.mark.parametrize("sid_logps", ["trie", "full"])
@pytest.mark.parametrize(("min_words", "temperature"), [(0, 1.0), (2, 0.7)])
def test_gradients_of_log_probabilities_are_those_of_masked_softmaxes(sid_logps, min_words, temperature):
    """Against autograd through each token's own masked softmax; places that are left out get 0 and no gradient."""
    _, layout, trie, model, vocab = make_world(6)
    prompt, mask, out = sample(model, layout, trie, vocab, min_block_tokens=min_words, block_budget=5)
    ids, at = out.completion_ids, out.sampled.clone()
    at[0] = False  # a completion that nothing is asked of
    logits = forward_logits(model, prompt, mask, out, 5).detach()[at]
    options = {
        "pad_id": PAD,
        "eos_ids": [EOS],
        "min_block_tokens": min_words,
        "temperature": temperature,
        "sid_logps": sid_logps,
    }
    weights = torch.randn(int(at.sum()), generator=torch.Generator().manual_seed(0))

    mine = logits.clone().requires_grad_()
    values = completion_logps(mine * 1.0, ids, at, layout, trie, **options)
    assert not values[~at].any()
    loss = (values[at] * weights).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()  # the gradient has taken the place of the logits

    theirs = logits.clone().requires_grad_()
    reading, expected = layout.read(ids), []
    words = torch.ones(vocab, dtype=torch.bool)
    words[[PAD, EOS, OPEN, *layout.sid_ids.tolist()]] = False
    for number, (row, column) in enumerate(at.nonzero().tolist()):
        allowed = torch.ones(vocab, dtype=torch.bool)
        if sid_logps == "trie" and reading.in_block[row, column]:
            allowed = words.clone()
            opened = max(c for c in range(column) if reading.is_open[row, c])
            allowed[CLOSE] = column - opened - 1 >= min_words
        elif sid_logps == "trie":
            level = int(reading.sid_index[row, column])
            allowed = torch.zeros(vocab, dtype=torch.bool)
            codes = trie.allowed(out.sids[row : row + 1, :level])[0]
            allowed[layout.sid_token_ids[level][codes]] = True
        masked = (theirs[number] / temperature).masked_fill(~allowed, float("-inf"))
        expected.append(masked.log_softmax(0)[ids[row, column]])
    expected = torch.stack(expected)
    torch.testing.assert_close(values[at], expected, atol=1e-5, rtol=1e-5)
    (expected * weights).sum().backward()
    torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-5, rtol=1e-5)

    # the same batch many times, more than one piece of the softmax, gives the same
    times = 1 + 2**19 // logits.numel()
    many = logits.repeat(times, 1).requires_grad_()
    values = completion_logps(many * 1.0, ids.repeat(times, 1), at.repeat(times, 1), layout, trie, **options)
    torch.testing.assert_close(values[at.repeat(times, 1)], expected.repeat(times), atol=1e-5, rtol=1e-5)
    (values[at.repeat(times, 1)] * weights.repeat(times)).sum().backward()
    torch.testing.assert_close(many.grad, mine.grad.repeat(times, 1), atol=1e-6, rtol=1e-5)

    # of half precision, the gradient is computed in full and rounded at the end
    half, full = (logits.bfloat16().to(dtype).requires_grad_() for dtype in (torch.bfloat16, torch.float32))
    for each in (half, full):
        (completion_logps(each * 1.0, ids, at, layout, trie, **options)[at] * weights).sum().backward()
    assert torch.equal(half.grad, full.grad.bfloat16())
