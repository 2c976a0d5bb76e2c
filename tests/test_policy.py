"""Policies on disk, the splits they refuse, and what `recommend` returns."""

import itertools
import json
from dataclasses import replace

import pytest
import torch

from sapo.data.catalog import Catalog
from sapo.data.interactions import Interactions
from sapo.errors import InputError
from sapo.policy.backbone import BackboneConfig, build_backbone
from sapo.policy.policy import Policy, recommend, think
from sapo.policy.prompts import CompactWording, build_tokenizer, sid_text, split_words

TITLES = [
    "red garden hose",
    "blue garden hose",
    "garden rake 40 cm",
    "steel kitchen knife",
    "kitchen towel",
    "oven mitt",
]
CATALOG = Catalog("shop", torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 1]]), TITLES)
INTERACTIONS = Interactions(["u", "v"], [[0, 1, 2, 3], [5, 4, 3, 2, 1]], 6)


def make_policy(seed=0, catalog=CATALOG):
    words = {word for title in catalog.titles for word in split_words(title)}
    tokenizer = build_tokenizer(catalog, sorted(words))
    model = build_backbone(BackboneConfig(hidden_size=16, num_heads=2, intermediate_size=16), tokenizer, seed)
    with torch.no_grad():  # random logits that prefer something
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(8)
    split = INTERACTIONS.leave_one_out()
    return Policy(model, tokenizer, catalog, split.name, split.data_hash, block_budget=3, max_history=3)


def test_prompts_are_the_last_items_oldest_first():
    # items 2, 3, 5 have the codes (0, 2), (1, 0), (1, 1)
    assert (
        CompactWording(CATALOG, max_history=3).ask([0, 2, 3, 5], thinking=True)
        == "<bos> <a_0> <b_2> <a_1> <b_0> <a_1> <b_1>"
    )
    assert sid_text(CATALOG, 2) == "<a_0> <b_2>"
    assert split_words("Garden rake, 40 cm (XL)") == ["garden", "rake", "cm", "xl"]


def test_tokens_survive_a_round_trip_and_unknown_words_do_not_break_it():
    tokenizer = make_policy().tokenizer
    text = "<bos> <a_0> <b_2> <think> garden </think> <a_1> <b_0>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text  # delimiters and SID tokens are ordinary tokens: decoding shows them
    assert tokenizer.decode(ids, skip_special_tokens=True) == text.removeprefix("<bos> ")
    assert tokenizer("zebra")["input_ids"] == [tokenizer.unk_token_id]


def test_the_same_seed_builds_the_same_weights_and_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second, other = (make_policy(seed).model.state_dict() for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def check_same(before, after):
    """A policy that is loaded computes on a GPU where there is one, which rounds otherwise."""
    assert torch.equal(before.sids, after.sids)
    torch.testing.assert_close(before.scores, after.scores, atol=1e-6, rtol=0)
    assert before.thinking == after.thinking


def test_a_saved_policy_recommends_the_same(tmp_path):
    policy = make_policy()
    policy.save(tmp_path / "policy")
    loaded = Policy.load(tmp_path / "policy", CATALOG)
    histories = [[0, 1], [3], [5, 4, 3, 2]]
    before, after = recommend(policy, histories, 5, 5), recommend(loaded, histories, 5, 5)
    check_same(before, after)
    weights = loaded.model.state_dict()
    assert all(torch.equal(weights[name].cpu(), values) for name, values in policy.model.state_dict().items())
    assert (loaded.split, loaded.data_hash, loaded.max_history) == (policy.split, policy.data_hash, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["policy"]  # nothing partial is left


def test_generation_settings_of_a_checkpoint_change_nothing(tmp_path):
    policy = make_policy()
    policy.save(tmp_path / "policy")
    hostile = {
        "do_sample": True,
        "temperature": 50.0,
        "repetition_penalty": 9.0,
        "num_beams": 2,
        "max_new_tokens": 1,
        "suppress_tokens": policy.layout.sid_ids.tolist(),
        "forced_eos_token_id": policy.tokenizer.eos_token_id,
    }
    (tmp_path / "policy" / "generation_config.json").write_text(json.dumps(hostile))
    loaded = Policy.load(tmp_path / "policy", CATALOG)
    assert loaded.model.generation_config.repetition_penalty == 9.0  # it was read
    before, after = recommend(policy, [[0, 1], [3]], 5, 5), recommend(loaded, [[0, 1], [3]], 5, 5)
    check_same(before, after)


def test_loading_refuses_what_does_not_fit(tmp_path):
    make_policy().save(tmp_path / "policy")
    with pytest.raises(InputError, match="is no policy folder"):
        Policy.load(tmp_path, CATALOG)
    deeper = Catalog("deep", torch.cat([CATALOG.sids, CATALOG.sids[:, :1]], 1), TITLES)
    with pytest.raises(InputError, match=r"K = 2 levels.*'deep' has 3"):
        Policy.load(tmp_path / "policy", deeper)
    other = Catalog("other", CATALOG.sids, TITLES[::-1])
    with pytest.raises(InputError, match="'shop'; 'other' has other items"):
        Policy.load(tmp_path / "policy", other)
    (tmp_path / "policy" / "sapo.json").write_text('{"split": ')
    with pytest.raises(InputError, match=r"sapo\.json is damaged"):
        Policy.load(tmp_path / "policy", CATALOG)


@pytest.mark.parametrize("item", [-1, CATALOG.num_items])
def test_a_history_holds_items_of_the_catalogue(item):
    with pytest.raises(InputError, match=f"history 1 is .*{item}.*the items of this catalogue are 0"):
        recommend(make_policy(), [[0], [0, item]], num_beams=2, k=2)


def test_a_policy_is_refused_on_another_split_and_on_other_data():
    policy, split = make_policy(), INTERACTIONS.leave_one_out()
    policy.check_split(split)
    with pytest.raises(InputError, match=r"trained on split 'leave_one_out'.*not on 'published_test'"):
        policy.check_split(replace(split, name="published_test"))
    changed = Interactions(["u", "v"], [[0, 1, 2, 3], [5, 4, 3, 2, 0]], 6).leave_one_out()
    with pytest.raises(InputError, match="Train one for this split"):
        policy.check_split(changed)


@pytest.mark.parametrize("normalize", ["full", "trie"])
def test_recommend_ranks_the_catalogue_by_the_score_after_the_thinking(normalize):
    """Brute force: prompt, thinking and each SID in one forward pass without cache, log-probabilities summed."""
    policy = make_policy(3)
    history = [0, 4, 2]
    got = recommend(policy, [history], 6, 6, normalize=normalize)
    start = policy.prompts([history])[0] + " " + got.thinking[0]
    unique = CATALOG.sids.unique(dim=0)
    scores = []
    for sid in unique.tolist():
        tokens = [int(policy.layout.sid_token_ids[level][code]) for level, code in enumerate(sid)]
        ids = torch.tensor([policy.tokenizer(start)["input_ids"] + tokens])
        logits = policy.model(ids).logits[0, -3:-1].float()
        total = 0.0
        for level in range(2):
            options = policy.layout.sid_token_ids[level]
            if normalize == "trie":
                allowed = policy.trie.allowed(torch.tensor([sid[:level]], dtype=torch.long).view(1, level))[0]
                total += logits[level, options].masked_fill(~allowed, float("-inf")).log_softmax(0)[sid[level]].item()
            else:
                total += logits[level].log_softmax(0)[tokens[level]].item()
        scores.append(total)
    order = torch.tensor(scores).argsort(descending=True)
    assert torch.equal(got.sids[0, :5], unique[order])  # 5 distinct SIDs
    torch.testing.assert_close(got.scores[0, :5], torch.tensor(scores)[order], atol=1e-4, rtol=0)
    assert got.sids[0, 5].tolist() == [-1, -1]  # the sixth place does not exist
    assert got.scores[0, 5].isneginf()


def test_a_batch_gives_what_one_by_one_gives():
    policy = make_policy(1)
    histories = [[0], [1, 2, 3], [4, 5], [2, 2, 2, 2, 2]]
    together = recommend(policy, histories, 5, 5, batch_size=3)
    for row, history in enumerate(histories):
        alone = recommend(policy, [history], 5, 5)
        assert alone.thinking[0] == together.thinking[row]
        assert torch.equal(alone.sids[0], together.sids[row])
        torch.testing.assert_close(alone.scores[0], together.scores[row], atol=1e-4, rtol=0)


def test_thinking_is_greedy_has_k_blocks_and_can_be_left_out():
    policy = make_policy(2)
    drafts = list(think(policy, [[0, 1]]))
    assert drafts[0].thinking[0].count("<think>") == drafts[0].thinking[0].count("</think>") == 2
    answer = recommend(policy, [[0, 1]], 3, 3)
    assert answer.thinking == [drafts[0].thinking[0]]
    assert not answer.scores.requires_grad  # no graph grows from user to user
    plain = list(think(policy, [[0, 1]], thinking=False))
    assert plain[0].thinking == [""]
    prompt = policy.tokenizer(policy.prompts([[0, 1]])[0])["input_ids"]
    assert plain[0].cache.prompt_lengths.tolist() == [len(prompt)]
    with pytest.raises(InputError, match="10 beams return at most 10"):
        recommend(policy, [[0]], num_beams=10, k=11)


def test_reachable_sids_are_exactly_the_catalogue():
    policy = make_policy()
    wide = recommend(policy, [[0, 1]], 20, 20)
    found = {tuple(sid) for sid in wide.sids[0].tolist() if sid[0] >= 0}
    assert found == {tuple(sid) for sid in CATALOG.sids.tolist()}
    assert found < set(itertools.product(range(2), range(3)))  # the trie forbids (1, 2)
