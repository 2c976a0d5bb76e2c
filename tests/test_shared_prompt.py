"""Prompts that are read once give what reading every row alone gives: log-probabilities, gradients, decoding."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    BambaConfig,
    BambaForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from worlds import EOS, PAD, layout_for, random_prompts, random_sids, tiny_model

from sapo.decoding.beam_search import constrained_beam_search
from sapo.decoding.prompt_cache import PromptCache
from sapo.decoding.sampling import beam_rollouts, grouped_rollouts
from sapo.decoding.shared_prefix import PackedGroups, can_share_prompts, share_prompts, sharing_prompts
from sapo.errors import InputError
from sapo.semantic_ids.trie import SidTrie

VOCAB = 40
SMALL = {
    "vocab_size": VOCAB,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 32,
    "pad_token_id": PAD,
    "eos_token_id": EOS,
    "bos_token_id": None,
}
BUILDERS = {
    "qwen": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, num_key_value_heads=2, head_dim=8)),
    "qwen, windows": lambda: Qwen3ForCausalLM(
        Qwen3Config(
            **SMALL, num_key_value_heads=4, head_dim=8, use_sliding_window=True, sliding_window=3, max_window_layers=1
        )
    ),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, num_key_value_heads=1)),
    "gemma, windows": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **SMALL,
            num_key_value_heads=2,
            head_dim=8,
            sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
}


def build(name):
    torch.manual_seed(0)
    model = BUILDERS[name]()
    with torch.no_grad():  # so that a wrong key would change something
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def batch(lengths, completion_lengths, group, right=False, seed=0):
    """Prompts padded on the left (or right), and completions on the right, of the given lengths."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randint(4, VOCAB, shape, generator=generator)  # noqa: E731
    lengths, completion_lengths = torch.tensor(lengths), torch.tensor(completion_lengths)
    width, longest = int(lengths.max()), int(completion_lengths.max())
    places = torch.arange(width)
    mask = places < lengths[:, None] if right else places >= width - lengths[:, None]
    written = torch.arange(longest) < completion_lengths[:, None]
    assert len(completion_lengths) == group * len(lengths)
    return draw(*mask.shape).masked_fill(~mask, PAD), mask, draw(*written.shape).masked_fill(~written, PAD), written


def row_by_row(model, prompts, mask, ids, written):
    """Logits that predict each completion token, every row read on its own: no padding, no sharing, no cache."""
    group = len(ids) // len(prompts)
    logits = []
    for row, (completion, kept) in enumerate(zip(ids, written, strict=True)):
        start = prompts[row // group][mask[row // group]]
        whole = torch.cat([start, completion[kept]])
        logits.append(model(whole[None], use_cache=False).logits[0, len(start) - 1 : -1])
    return torch.cat(logits)


def chosen(logits, ids, written):
    return logits.log_softmax(-1).gather(1, ids[written][:, None])[:, 0]


def gradient(model, logps):
    model.zero_grad()
    (logps * torch.linspace(1, 2, len(logps))).sum().backward()  # of one sign: equal tokens must not cancel
    return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


def check_update(model, prompts, mask, ids, written):
    alone = chosen(row_by_row(model, prompts, mask, ids, written), ids, written)
    expected = gradient(model, alone)
    share_prompts(model)
    packed = PackedGroups(prompts, mask, ids, written)
    together = chosen(packed.logits(model, packed.predictor[written]), ids, written)
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=0)
    got = gradient(model, together)
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    assert expected.norm() > 0.01
    # each prompt stands once in what the model reads, and the last token of a completion, which predicts nothing, not
    assert packed.input_ids.shape == (1, int(mask.sum()) + int(written.sum()) - int(written.any(1).sum()))


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_an_update_is_that_of_prompts_repeated(name, checkpointing):
    model = build(name).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    check_update(model, *batch([7, 2, 5], [4, 1, 6, 3, 3, 2], 2))


@pytest.mark.parametrize("name", ["qwen", "llama"])
def test_an_update_where_sums_of_weights_are_not_to_be_had(name, monkeypatch):
    """As on a GPU: the keys of prompts are copied beside those of completions."""
    monkeypatch.setattr("sapo.decoding.shared_prefix.can_join", lambda *_: False)
    check_update(build(name).train(), *batch([7, 2, 5], [4, 1, 6, 3, 3, 2], 2))


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_an_update_of_any_shape(data):
    prompts = data.draw(st.integers(1, 4))
    group = data.draw(st.integers(1, 4))
    lengths = data.draw(st.lists(st.integers(1, 9), min_size=prompts, max_size=prompts))
    completions = data.draw(st.lists(st.integers(0, 6), min_size=prompts * group, max_size=prompts * group))
    right, seed = data.draw(st.booleans()), data.draw(st.integers(0, 99))
    if not sum(completions):
        completions[0] = 1
    check_update(build("qwen").train(), *batch(lengths, completions, group, right, seed))


@pytest.mark.parametrize("name", BUILDERS)
def test_a_cache_read_in_any_pieces_predicts_the_same(name):
    model = build(name).eval()
    prompts, mask, ids, written = batch([6, 1, 4], [5, 3, 6, 1, 2, 6], 2)
    lengths = written.sum(1)
    with torch.no_grad(), sharing_prompts(model):
        expected = torch.zeros(*ids.shape, VOCAB)
        expected[written] = row_by_row(model, prompts, mask, ids, written)
        cache = PromptCache(model, prompts, mask)
        torch.testing.assert_close(cache.logits.repeat_interleave(2, 0), expected[:, 0], atol=1e-5, rtol=0)
        cache.start(2, ids.shape[1])
        generator, seen = torch.Generator().manual_seed(1), 0
        while (cache.lengths < lengths).any():
            rows = (cache.lengths < lengths) & (torch.rand(6, generator=generator) < 0.6)
            until = torch.minimum(cache.lengths + torch.randint(1, 4, (6,), generator=generator), lengths)
            if rows.any():
                logits = cache.read(ids, until, rows)
                predicts = until[rows] < lengths[rows]  # the last token of a row predicts nothing that we know
                at = rows.nonzero()[:, 0][predicts], until[rows][predicts]
                torch.testing.assert_close(logits[predicts], expected[at], atol=1e-5, rtol=0)
                seen += len(at[0])
        assert seen > 6


@pytest.mark.parametrize("name", BUILDERS)
def test_rows_can_be_copied_and_become_prompts(name):
    """Two thoughts a prompt, three continuations of chosen ones: what beams do."""
    model = build(name).eval()
    prompts, mask, ids, written = batch([6, 3], [4, 2, 3, 4], 2)
    more = torch.randint(4, VOCAB, (12, 2), generator=torch.Generator().manual_seed(2))
    with torch.no_grad(), sharing_prompts(model):
        cache = PromptCache(model, prompts, mask)
        cache.start(2, 4)
        cache.extend_prompts(cache.read(ids, written.sum(1)))
        cache.start(3, 2)
        cache.read(more, torch.full((12,), 1))
        chosen_rows = torch.tensor([[2, 0, 0], [1, 1, 1], [0, 1, 2], [2, 2, 0]])
        cache.select(chosen_rows)
        order = (torch.arange(4)[:, None] * 3 + chosen_rows).flatten()
        continued = torch.stack([more[order, 0], more[:, 1]], 1)
        logits = cache.read(continued, torch.full((12,), 2))
        for row in range(12):
            thought = row // 3
            start = prompts[thought // 2][mask[thought // 2]]
            whole = torch.cat([start, ids[thought][written[thought]], continued[row]])
            torch.testing.assert_close(logits[row], model(whole[None]).logits[0, -1], atol=1e-5, rtol=0)


def test_nothing_read_is_a_copy_of_the_prompt():
    model = build("qwen").eval()
    prompts, mask, ids, _ = batch([3, 2], [2, 2, 2, 2], 2)
    with torch.no_grad(), sharing_prompts(model):
        cache = PromptCache(model, prompts, mask)
        cache.start(2, 2)
        cache.extend_prompts(cache.logits.repeat_interleave(2, 0))
        cache.start(1, 2)
        logits = cache.read(ids, torch.full((4,), 2))
        for row in range(4):
            whole = torch.cat([prompts[row // 2][mask[row // 2]], ids[row]])
            torch.testing.assert_close(logits[row], model(whole[None]).logits[0, -1], atol=1e-5, rtol=0)


def test_other_layers_are_refused():
    model = BambaForCausalLM(
        BambaConfig(
            vocab_size=VOCAB,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            attn_layer_indices=[1],
            num_key_value_heads=2,
            intermediate_size=16,
            mamba_n_heads=4,
            mamba_d_head=8,
            mamba_d_state=8,
        )
    )
    assert not can_share_prompts(model)
    with pytest.raises(InputError, match="BambaForCausalLM cannot share prompts"):
        share_prompts(model)


def test_other_attention_than_a_softmax_of_scores_is_refused():
    capped = Gemma2ForCausalLM(Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8))
    assert capped.config.attn_logit_softcapping == 50
    sinks = GptOssForCausalLM(GptOssConfig(**SMALL, num_key_value_heads=2, head_dim=8, num_local_experts=2))
    for model in (capped, sinks):
        assert not can_share_prompts(model)
        with pytest.raises(InputError, match="cannot share prompts"):
            share_prompts(model)
    capped.config.attn_logit_softcapping = None
    assert can_share_prompts(capped)


def test_a_prompt_of_nothing_is_refused():
    model = build("qwen")
    prompts, mask, ids, written = batch([3, 2], [2, 2], 1)
    mask[1] = False
    share_prompts(model)
    with pytest.raises(InputError, match="a prompt has no tokens"):
        PackedGroups(prompts, mask, ids, written).logits(model, torch.tensor([0]))
    with pytest.raises(InputError, match="a prompt has no tokens"):
        PromptCache(model, prompts, mask)


def test_other_attention_is_refused_before_it_looks_at_everything():
    model = build("qwen")
    prompts, mask, ids, written = batch([3, 2], [2, 2], 1)
    with pytest.raises(InputError, match=r"attention is 'sdpa'.*share_prompts"):
        PackedGroups(prompts, mask, ids, written).logits(model, torch.tensor([0]))
    with pytest.raises(InputError, match="share_prompts"):
        PromptCache(model, prompts, mask)


def test_nothing_of_it_is_saved_or_left_behind(tmp_path):
    model = build("qwen").train()
    with sharing_prompts(model):
        assert model.config._attn_implementation == "shared_prompt"
        assert not model.training
        model.save_pretrained(tmp_path)
    assert model.config._attn_implementation == "sdpa"
    assert model.training
    assert "shared_prompt" not in (tmp_path / "config.json").read_text()
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "qwen3"


class TokensRead:
    """Counts what goes through the first layer of a model."""

    def __init__(self, model):
        self.count = 0
        model.get_input_embeddings().register_forward_hook(self.add)

    def add(self, module, inputs, output):
        self.count += inputs[0].numel()


def test_finished_rollouts_and_prompts_of_beams_read_nothing_more():
    """Counted, not timed: a prompt is read once, a rollout until it needs no more choices."""
    sizes = (3, 4)
    layout, trie = layout_for(sizes), SidTrie(random_sids(9, sizes, 0), sizes)
    vocab = int(layout.sid_ids.max()) + 7
    model = tiny_model(vocab, scale=2.0)
    prompts, mask = random_prompts(3, 6, vocab, 0)
    read = TokensRead(model)
    options = {"block_budget": 4, "generator": torch.Generator().manual_seed(0), "pad_id": PAD}
    out = grouped_rollouts(model, prompts, mask, layout, trie, 8, **options)
    lengths = out.completion_mask.sum(1)
    assert lengths.min() < lengths.max()  # some ended early
    # all but the last SID token is read, and not even the one before where the last is an only child of every row
    assert read.count == int(mask.sum()) + int(lengths.sum()) - len(lengths)
    read.count = 0
    beams = constrained_beam_search(model, prompts, mask, trie, layout.sid_token_ids, 5)
    used = int((trie.allowed(torch.zeros(1, 0, dtype=torch.long))).sum())
    assert read.count == int(mask.sum()) + 3 * min(5, used)  # beams of the first level that exist
    assert beams.sids.shape == (3, 5, 2)
    read.count = 0
    out = beam_rollouts(model, prompts, mask, layout, trie, 5, **options)
    thoughts = (layout.read(out.completion_ids).in_block & out.completion_mask).sum(1)[::5]
    assert read.count == int(mask.sum()) + int(thoughts.sum()) + 3 * min(5, used)


def test_a_prompts_rollouts_do_not_depend_on_who_else_is_there():
    sizes = (3, 4)
    layout, trie = layout_for(sizes), SidTrie(random_sids(9, sizes, 0), sizes)
    vocab = int(layout.sid_ids.max()) + 7
    model = tiny_model(vocab, scale=2.0)
    prompts, mask = random_prompts(4, 6, vocab, 0)
    options = {"block_budget": (2, 3), "pad_id": PAD}
    together, alone = (
        grouped_rollouts(
            model, prompts[:n], mask[:n], layout, trie, 3, generator=torch.Generator().manual_seed(5), **options
        )
        for n in (4, 1)
    )
    width = alone.completion_ids.shape[1]
    assert torch.equal(together.completion_ids[:3, :width], alone.completion_ids)
    torch.testing.assert_close(together.logps[:3, :width], alone.logps, atol=1e-5, rtol=0)


def test_half_precision_ranks_nearly_the_same():
    sizes = (4, 5, 3)
    layout, trie = layout_for(sizes), SidTrie(random_sids(30, sizes, 0), sizes)
    vocab = int(layout.sid_ids.max()) + 4
    model = tiny_model(vocab, scale=4.0)
    prompts, mask = random_prompts(5, 8, vocab, 1)
    full = constrained_beam_search(model, prompts, mask, trie, layout.sid_token_ids, 10)
    half = constrained_beam_search(model.bfloat16(), prompts, mask, trie, layout.sid_token_ids, 10)
    assert half.scores.dtype == torch.float32
    torch.testing.assert_close(half.scores, full.scores, atol=0.15, rtol=0)
    assert (half.sids[:, 0] == full.sids[:, 0]).all(-1).float().mean() >= 0.8
    assert trie.contains(half.sids.flatten(0, 1)).all()
