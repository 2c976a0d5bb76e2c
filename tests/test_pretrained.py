"""Policies that start from somebody's language model: tokens, wording, examples, decoding, and all stages."""

import json
from collections import Counter
from dataclasses import replace

import pandas as pd
import pytest
import torch
from checkpoints import checkpoint
from safetensors.torch import load_file
from test_experiments import TINY
from test_sft import stub_looks

from sapo.cli.data import RowsForVerl
from sapo.data.catalog import Catalog
from sapo.data.interactions import Interactions
from sapo.decoding.logprobs import completion_logps, end_ids, forced_tokens
from sapo.decoding.sampling import grouped_rollouts
from sapo.decoding.shared_prefix import PackedGroups
from sapo.errors import InputError
from sapo.experiments.folders import supervised_folder
from sapo.experiments.run_folder import Job
from sapo.experiments.runner import run
from sapo.integrations.rows import write_rows
from sapo.policy.backbone import Pretrained, add_item_tokens, load_pretrained
from sapo.policy.chat import SYSTEM, ChatWording
from sapo.policy.policy import Policy, recommend
from sapo.policy.prompts import CompactWording
from sapo.training import examples
from sapo.training.adapters import adapted, item_rows, merged, rows_alone
from sapo.training.examples import IGNORED, ChatExamples, NextItems
from sapo.training.sft import SFTConfig, train_supervised
from sapo.training.traces import NodeDescriptors

CATALOG = Catalog(
    "shop",
    torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1], [1, 1]]),
    ["Garden rake", "Garden hose", "Steel pot", "Copper pot", ""],
    categories=["garden", "garden", "kitchen", "kitchen", "kitchen"],
)
SPLIT = Interactions(["u", "v"], [[0, 1, 2, 3], [4, 2, 3, 1, 0]], 5).leave_one_out()  # trains on [0, 1] and [4, 2, 3]
KINDS = ("qwen", "llama", "gemma")
TEXTS = [*CATALOG.titles, "The user took these items, oldest first", "Which item comes next? Give its semantic ID."] * 4


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: checkpoint(kind, TEXTS, tmp_path_factory.mktemp(kind)) for kind in KINDS}


@pytest.fixture
def make(folders):
    def policy(kind="qwen", **settings):
        model, tokenizer = load_pretrained(Pretrained(str(folders[kind])))
        add_item_tokens(model, tokenizer, CATALOG)
        defaults = {"block_budget": 5, "max_history": 3, "chat": True}
        return Policy(model.eval(), tokenizer, CATALOG, SPLIT.name, SPLIT.data_hash, **defaults | settings)

    return policy


# ----------------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("kind", KINDS)
def test_item_tokens_are_ordinary_and_start_at_the_mean(folders, kind):
    model, tokenizer = load_pretrained(Pretrained(str(folders[kind])))
    known, before = len(tokenizer), model.get_input_embeddings().weight.detach().clone()
    assert len(before) == known + 24
    ids = add_item_tokens(model, tokenizer, CATALOG)
    # <think>, </think>, <a_0>, <a_1>, <b_0>, <b_1>; and a padding token for Llama, which has none
    assert ids == list(range(known, known + 6 + (kind == "llama")))
    for module in (model.get_input_embeddings(), model.get_output_embeddings()):
        assert len(module.weight) == len(tokenizer) == model.config.vocab_size  # rows of no token are gone
        torch.testing.assert_close(
            module.weight[known:], module.weight[:known].mean(0).expand(len(ids), -1), rtol=1e-6, atol=1e-7
        )
    assert torch.equal(model.get_input_embeddings().weight[:known], before[:known])
    text = "<think>a rake</think><a_1><b_0>"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"], skip_special_tokens=True) == text
    assert tokenizer.pad_token_id is not None
    assert add_item_tokens(model, tokenizer, CATALOG) == []  # a second time there is nothing to teach


def test_what_cannot_be_loaded_is_refused_in_words(folders, tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json: a model's folder does"):
        load_pretrained(Pretrained(str(tmp_path)))
    pickled = tmp_path / "pickled"
    pickled.mkdir()
    for path in folders["qwen"].iterdir():
        (pickled / path.name).write_bytes(path.read_bytes())
    (pickled / "model.safetensors").unlink()
    torch.save(load_file(folders["qwen"] / "model.safetensors"), pickled / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_pretrained(Pretrained(str(pickled)))
    with pytest.raises(InputError, match="lora_rank 0"):
        Pretrained("x", lora_rank=0)


def test_code_of_a_checkpoint_is_not_run(folders, tmp_path):
    for path in folders["qwen"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.Model"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\nclass Model: pass\n")
    with pytest.raises(InputError, match="no language model that can be loaded"):
        load_pretrained(Pretrained(str(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_generation_settings_of_a_checkpoint_change_nothing(make, folders, tmp_path):
    plain = recommend(make(), [[0, 1], [2]], 4, 4)
    for path in folders["qwen"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    settings = {"do_sample": True, "temperature": 7.0, "suppress_tokens": list(range(300)), "max_new_tokens": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(settings | {"num_beams": 3, "repetition_penalty": 9.0}))
    model, tokenizer = load_pretrained(Pretrained(str(tmp_path)))
    add_item_tokens(model, tokenizer, CATALOG)
    policy = Policy(model.eval(), tokenizer, CATALOG, "x", "y", 5, 3, chat=True)
    other = recommend(policy, [[0, 1], [2]], 4, 4)
    assert other.thinking == plain.thinking
    assert torch.equal(other.scores, plain.scores)
    policy.save(tmp_path / "saved")
    kept = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert not {"temperature", "suppress_tokens", "repetition_penalty", "max_new_tokens"} & set(kept)


def test_weights_are_told_apart_by_their_files(folders, tmp_path):
    here = Pretrained(str(folders["qwen"])).content
    assert here == Pretrained(str(folders["qwen"])).content != Pretrained(str(folders["llama"])).content
    for path in folders["qwen"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    assert Pretrained(str(tmp_path)).content == here  # wherever they lie
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(bytes(weights))
    assert Pretrained(str(tmp_path)).content != here


# ---------------------------------------------------------------------------------------------------------- wording


def test_a_question_goes_through_the_chat_template(make):
    question = (
        "The user took these items, oldest first: <a_0><b_1>, <a_1><b_0>, <a_1><b_1>. Which item comes next? "
        "Think in 2 steps, from what kind of item it is to which one, and then give its semantic ID."
    )
    history = [0, 1, 2, 3]  # of which three are shown
    assert make("qwen").prompts([history]) == [
        f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    ]
    assert make("llama").prompts([history]) == [
        f"<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n{SYSTEM}<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{question}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    ]
    assert make("gemma").prompts([history]) == [  # whose template has no system's turn
        f"<bos><start_of_turn>user\n{SYSTEM}\n\n{question}<end_of_turn>\n<start_of_turn>model\n"
    ]
    at_once = make("qwen").prompts([history], thinking=False)[0]
    assert "Think" not in at_once
    assert "then" not in at_once
    assert make("qwen", thinking=False).prompts([history]) == [at_once]


def test_the_command_writes_rows_of_its_own_split_alone(make, tmp_path, capsys):
    world = Job(TINY, "").world
    data = tmp_path / "shop"
    world.catalog.save(data)
    world.synthetic.interactions.save(data)
    model, tokenizer = make("qwen").model, make("qwen").tokenizer
    add_item_tokens(model, tokenizer, world.catalog)
    split = world.split
    policy = Policy(model, tokenizer, Catalog.load(data), split.name, split.data_hash, 4, 5, chat=True)
    policy.save(tmp_path / "policy")
    command = RowsForVerl(data, tmp_path / "policy", tmp_path / "rows.parquet", "valid")
    command()
    assert capsys.readouterr().out.strip() == str(tmp_path / "rows.parquet")
    assert len(pd.read_parquet(tmp_path / "rows.parquet")) == len(split.valid)
    replace(policy, data_hash="other").save(tmp_path / "policy")
    with pytest.raises(InputError, match="its training rows may hold these targets"):
        command()


def test_templates_that_open_a_block_leave_it_to_the_decoder(make):
    policy = make("qwen")
    usual = policy.prompts([[0]])[0]
    policy.tokenizer.chat_template = policy.tokenizer.chat_template.replace("assistant\n", "assistant\n<think>\n")
    assert "<think>" in policy.tokenizer.chat_template
    assert policy.prompts([[0]])[0] == usual
    policy.tokenizer.chat_template = None
    plain = policy.prompts([[0]])[0]
    assert plain.startswith(SYSTEM)
    assert plain.endswith("\n\nAnswer:\n")


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_has_the_layout(make, kind):
    policy = make(kind)
    answer = policy.wording.blocks(["Something for the garden.", ""]) + policy.wording.name(1)
    assert answer == "<think>\nSomething for the garden.\n</think>\n<think>\n</think>\n<a_0><b_1>"
    ids = policy.encode([answer])["input_ids"]
    parsed = policy.layout.parse(ids)
    assert parsed.well_formed.all()
    assert parsed.sids.tolist() == [[0, 1]]
    steps = policy.layout.token_steps(ids)[0].tolist()
    after = [index for index, token in enumerate(ids[0].tolist()) if token == policy.layout.think_end_id]
    assert [ids[0, index + 1].item() for index in after] == [policy.layout.separator_id] * 2
    assert [steps[index + 1] for index in after] == [-1, -1]  # a line break belongs to no step
    assert steps.count(-1) == 2
    assert steps[-2:] == [0, 1]


def test_a_tokenizer_without_the_tokens_of_items_is_refused(folders):
    _, tokenizer = load_pretrained(Pretrained(str(folders["qwen"])))
    with pytest.raises(InputError, match=r"does not keep .*add_item_tokens"):
        ChatWording(CATALOG, 3, tokenizer)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_for_verl_ask_what_the_policy_asks(make, kind, tmp_path):
    """verl puts their messages through the same template."""
    policy = make(kind)
    write_rows(policy, SPLIT.train, tmp_path / "rows.parquet")
    table = pd.read_parquet(tmp_path / "rows.parquet")
    asked = [
        policy.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        for messages in table["prompt"]
    ]
    assert asked == policy.prompts(SPLIT.train.history, thinking=True)
    assert [row["ground_truth"] for row in table["reward_model"]] == ["<a_0><b_1>", "<a_1><b_0>", "<a_1><b_1>"]
    assert set(table["data_source"]) == {"shop"}
    policy.tokenizer.chat_template = None
    with pytest.raises(InputError, match="asks through a chat template"):
        write_rows(policy, SPLIT.train, tmp_path / "none.parquet")
    assert not (tmp_path / "none.parquet").exists()


# --------------------------------------------------------------------------------------------------------- decoding


@pytest.mark.parametrize("kind", KINDS)
def test_rollouts_write_the_format_and_score_as_the_model_does(make, kind):
    policy = make(kind)
    batch = policy.encode(policy.prompts([[0, 1], [2, 3, 1]]))
    rollouts = grouped_rollouts(
        policy.model,
        batch["input_ids"],
        batch["attention_mask"],
        policy.layout,
        policy.trie,
        4,
        block_budget=[5, 2],
        generator=torch.Generator().manual_seed(0),
        pad_id=policy.tokenizer.pad_token_id,
    )
    ids, mask = rollouts.completion_ids, rollouts.completion_mask
    assert policy.layout.parse(ids).well_formed.all()
    assert mask.sum(1).max() <= policy.layout.longest([5, 2]) == 5 + 2 + 3 * 2 + 2
    assert rollouts.sampled.sum(1).min() > 0
    reading = policy.layout.read(ids)
    assert (reading.is_separator.sum(1) == 2).all()
    assert not rollouts.sampled[reading.is_separator].any()
    forced = forced_tokens(ids, policy.layout, policy.trie)
    assert not (rollouts.sampled & forced).any()
    outside = mask & ~reading.in_block & ~reading.is_sid
    assert torch.equal(outside, reading.is_separator)  # nothing else is written
    packed = PackedGroups(batch["input_ids"], batch["attention_mask"].bool(), ids, mask)
    logps = completion_logps(
        packed.logits(policy.model, packed.predictor[mask]),
        ids,
        mask,
        policy.layout,
        policy.trie,
        pad_id=policy.tokenizer.pad_token_id,
        eos_ids=end_ids(policy.model),
    )
    assert (logps[reading.is_separator] == 0).all()
    torch.testing.assert_close(logps[rollouts.sampled], rollouts.logps[rollouts.sampled], rtol=1e-4, atol=1e-4)


def test_an_end_token_does_not_stand_in_a_block(make):
    policy = make("gemma")
    end = policy.tokenizer.eos_token_id
    assert end in end_ids(policy.model)
    with torch.no_grad():
        policy.model.get_input_embeddings().weight[end] *= 50  # tied to the head: the model loves to end
    found = recommend(policy, [[0, 1], [2]], 4, 4)
    assert not any(policy.tokenizer.eos_token in thought for thought in found.thinking)
    assert all(thought.count("<think>") == 2 for thought in found.thinking)


def test_a_policy_comes_back_as_it_was(make, tmp_path):
    policy = make("llama", block_budget=4)
    before = recommend(policy, [[0, 1], [2]], 4, 4)
    policy.save(tmp_path / "policy")
    after = recommend(Policy.load(tmp_path / "policy", CATALOG, "cpu"), [[0, 1], [2]], 4, 4)
    assert after.thinking == before.thinking
    assert torch.equal(after.sids, before.sids)
    assert torch.equal(after.scores, before.scores)
    assert isinstance(Policy.load(tmp_path / "policy", CATALOG, "cpu").wording, ChatWording)
    assert not isinstance(policy.wording, CompactWording)


# --------------------------------------------------------------------------------------------------------- examples


def pieces(policy, example):
    learnt = [token for token in example["labels"] if token != IGNORED]
    first = len(example["input_ids"]) - len(learnt)
    assert example["input_ids"][first:] == learnt
    return policy.tokenizer.decode(example["input_ids"][:first]), policy.tokenizer.decode(learnt)


def test_stage_1_goes_through_the_streams_of_the_fork_once_an_epoch(make):
    policy = make("gemma")
    # training rows: u 0 -> 1; v 4 -> 2 and 4, 2 -> 3. Item 4 has no title.
    rows, items, end = [([0], 1), ([4], 2), ([4, 2], 3)], [0, 1, 2, 3], "<end_of_turn>"
    total = 5 * len(rows) + 3 * len(items)
    data = ChatExamples(policy, SPLIT, "next_item", 2 * total, 0)
    wording = policy.wording
    expected = Counter()
    for history, target in rows:
        title, name = CATALOG.titles[target], wording.name(target)
        expected[wording.ask(history, thinking=False), name + end] += 1
        expected[wording.ask_by_titles(history), name + end] += 1
        expected[wording.ask_for_title(history, by_titles=False), title + end] += 1
        expected[wording.ask_for_title(history, by_titles=True), title + end] += 1
        both = [f"{wording.name(item)} {CATALOG.titles[item]}".strip() for item in (*history, target)]
        expected["<bos>", "; ".join(both) + end] += 1
    for item in items:
        expected[wording.ask_title_of(item), CATALOG.titles[item] + end] += 1
        expected[wording.ask_sid_of(item), wording.name(item) + end] += 1
        expected["<bos>", f"{wording.name(item)} {CATALOG.titles[item]}{end}"] += 1
    for epoch in (0, 1):
        seen = Counter(pieces(policy, data[epoch * total + index]) for index in range(total))
        assert seen == expected
    order = [[pieces(policy, data[epoch * total + index]) for index in range(total)] for epoch in (0, 1)]
    assert order[0] != order[1]
    goes_on = ChatExamples(policy, SPLIT, "next_item", total, 0, first=total)
    assert [pieces(policy, goes_on[index]) for index in range(total)] == order[1]


def test_looks_ask_as_stage_1_teaches(make):
    policy = make("qwen")
    rows = NextItems(policy, SPLIT.valid)
    expected = [
        (policy.wording.ask(history, thinking=False), policy.wording.name(target) + policy.tokenizer.eos_token)
        for history, target in zip(SPLIT.valid.history, SPLIT.valid.target, strict=True)
    ]
    assert [pieces(policy, rows[index]) for index in range(len(rows))] == expected
    assert len(expected) == 2


def test_held_out_targets_are_in_no_example(make):
    policy = make("qwen")
    tree = NodeDescriptors(CATALOG, 2)
    told = set()
    for task in ("next_item", "thinking"):
        data = ChatExamples(policy, SPLIT, task, 60, 0, tree)
        told |= {pieces(policy, data[index]) for index in range(60)}
    for history in ([0, 1], [4, 2, 3], [0, 1, 2], [4, 2, 3, 1]):  # of validation and test rows
        for ask in (policy.wording.ask_by_titles(history), policy.wording.ask(history, True)):
            assert not any(prompt == ask for prompt, _ in told)


def test_stage_2_thinks_in_blocks_before_the_sid(make):
    policy = make("qwen")
    tree = NodeDescriptors(CATALOG, 2)
    data = ChatExamples(policy, SPLIT, "thinking", 3, 0, tree)
    seen = {pieces(policy, data[index]) for index in range(3)}
    assert seen == {
        (
            policy.wording.ask(history, thinking=True),
            policy.wording.blocks(tree.of_row(history, target)) + policy.wording.name(target) + "<|im_end|>",
        )
        for history, target in [([0], 1), ([4], 2), ([4, 2], 3)]
    }


def test_the_first_token_is_learnt_by_nobody_and_long_examples_lose_their_beginning(make, monkeypatch):
    policy = make("qwen")  # without a token to begin with
    monkeypatch.setattr(examples, "LONGEST", 7)
    data = ChatExamples(policy, SPLIT, "next_item", 27, 0)
    for index in range(27):
        example = data[index]
        assert len(example["input_ids"]) == len(example["labels"]) <= 7
        assert example["labels"][0] == IGNORED
        assert example["input_ids"][-1] == example["labels"][-1] == policy.tokenizer.eos_token_id


def test_tasks_that_do_not_fit_are_refused(make):
    policy = make("qwen")
    with pytest.raises(InputError, match="LC-Rec"):
        ChatExamples(policy, SPLIT, "alignment", 1, 0)
    with pytest.raises(InputError, match="needs traces"):
        ChatExamples(policy, SPLIT, "thinking", 1, 0)
    lonely = Interactions(["u"], [[0, 1, 2]], 5).leave_one_out()
    with pytest.raises(InputError, match="no training row"):
        ChatExamples(policy, lonely, "next_item", 1, 0)


# --------------------------------------------------------------------------------------------- parts that are trained


def weights(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_rows_alone_leave_everything_else_as_it_is(make, tmp_path):
    policy = make("llama")  # whose head is not tied
    before, rows = weights(policy.model), item_rows(policy)
    with rows_alone(policy.model, rows):
        config = SFTConfig(updates=4, batch_size=8, learning_rate=1e-2, weight_decay=0.0)
        train_supervised(policy, SPLIT, config, "next_item", tmp_path, 0)
    others = [row for row in range(len(policy.tokenizer)) if row not in rows]
    for name, after in weights(policy.model).items():
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(after[others], before[name][others])
            learnt = rows if name == "lm_head.weight" else policy.layout.sid_ids.tolist()  # stage 1 does not think
            assert (after[learnt] != before[name][learnt]).any(1).all()
        else:
            assert torch.equal(after, before[name])
    assert all(parameter.requires_grad for parameter in policy.model.parameters())
    assert len(rows) == 6


@pytest.mark.parametrize("kind", ["qwen", "llama"])
def test_adapters_move_weights_by_matrices_of_their_rank(make, kind, tmp_path):
    policy = make(kind)
    before, rows = weights(policy.model), item_rows(policy)
    config = SFTConfig(updates=4, batch_size=8, learning_rate=1e-2)
    train_supervised(policy, SPLIT, config, "next_item", tmp_path, 0, lora_rank=2)
    assert set(weights(policy.model)) == set(before)  # merged: a plain model again
    others = [row for row in range(len(policy.tokenizer)) if row not in rows]
    for name, after in weights(policy.model).items():
        moved = (after - before[name]).double()
        if name == "model.embed_tokens.weight":
            assert torch.equal(after[others], before[name][others])
            assert moved[rows].abs().sum(1).min() > 0
        elif name.endswith("proj.weight"):
            assert 0 < torch.linalg.matrix_rank(moved, rtol=1e-4) <= 2
        elif name == "lm_head.weight":  # its own table in Llama: rows of tokens that are learnt move apart
            assert torch.equal(after[others], before[name][others])
            assert len(after[policy.layout.sid_ids].unique(dim=0)) == len(policy.layout.sid_ids)
        else:
            assert moved.abs().sum() == 0


@pytest.mark.parametrize("kind", ["qwen", "llama"])
def test_the_best_adapters_are_kept(make, kind, tmp_path, monkeypatch):
    """Two runs whose second look is the best end with its weights, wherever they end; not with those of the third."""
    found = []
    for patience, losses in ((1, [2.0, 1.0, 3.0]), (2, [2.0, 1.0, 3.0, 3.0]), (1, [2.0, 1.0, 0.5, 3.0])):
        policy, config = make(kind), SFTConfig(9, batch_size=8, learning_rate=1e-2, validate_every=1, patience=patience)
        with monkeypatch.context() as patch:
            stub_looks(patch, losses)
            log = train_supervised(policy, SPLIT, config, "next_item", tmp_path / str(len(found)), 0, lora_rank=2)
        assert log[-1]["step"] == len(losses)
        found.append(weights(policy.model))
    second, again, third = found
    assert all(torch.equal(value, again[name]) for name, value in second.items())
    for name, value in second.items():
        trained = name.endswith(("proj.weight", "embed_tokens.weight", "lm_head.weight"))
        assert torch.equal(value, third[name]) != trained, name


def test_merged_adapters_compute_what_the_model_with_them_did(make):
    policy = make("qwen")
    ids = policy.encode(policy.prompts([[0, 1]]))["input_ids"]
    model = adapted(policy, 3, seed=0).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2, generator=torch.Generator().manual_seed(1))
        inside = model(input_ids=ids).logits
        plain = merged(model)
        torch.testing.assert_close(plain(input_ids=ids).logits, inside, rtol=1e-4, atol=1e-4)
    assert merged(plain) is plain


# ------------------------------------------------------------------------------------------------------- all stages


@pytest.mark.parametrize(("kind", "rank"), [("qwen", None), ("llama", 2), ("gemma", None)])
def test_a_checkpoint_goes_through_all_stages(kind, rank, tmp_path):
    job = Job(TINY, str(tmp_path / "out"))
    texts = job.world.catalog.titles * 3 + ["The user took these items, oldest first"] * 5
    start = Pretrained(str(checkpoint(kind, texts, tmp_path / kind)), row_updates=2, lora_rank=rank)
    recipe = replace(
        TINY,
        preset="tiny",
        backbone=start,
        stage1=replace(TINY.stage1, updates=4),
        stage2=replace(TINY.stage2, updates=4),
        stage3=replace(TINY.stage3, updates=2, learning_rates=(1e-3,)),
        seeds=(0,),
        objectives=("sapo", "grpo"),
        ablations=(),
        systems=("MiniOneRec",) if kind == "qwen" else (),
    )
    turns = [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}]
    (tmp_path / "said.jsonl").write_text(json.dumps({"messages": turns}))
    job = Job(recipe, str(tmp_path / "out"), conversations=str(tmp_path / "said.jsonl"))
    assert (
        supervised_folder(job, 0, "stage2").path
        != supervised_folder(replace(job, conversations=None), 0, "stage2").path
    )
    results = run(job, workers=1)
    methods = {"stage2", "stage2_no_thinking", "sapo", "grpo"} | set(recipe.systems)
    of_methods = results[results["metric"] == "ndcg@10"].set_index("method")["value"]
    assert methods <= set(of_methods.index)
    folder = supervised_folder(job, 0, "stage2").policy
    policy = Policy.load(folder, job.world.catalog, "cpu")
    assert isinstance(policy.wording, ChatWording)
    assert type(policy.model).__name__.lower().startswith(kind)
    assert not list(folder.glob("*.bin"))
    assert list(folder.glob("*.safetensors"))
    assert not list(tmp_path.glob("out/**/checkpoint-*"))
    found = recommend(policy, job.world.split.test.history[:3], 10, 10)
    assert policy.trie.contains(found.sids[found.scores > float("-inf")]).all()


def test_systems_of_compact_prompts_are_refused(folders, tmp_path):
    recipe = replace(TINY, backbone=Pretrained(str(folders["qwen"])), systems=("MiniOneRec", "R2ec"))
    with pytest.raises(InputError, match=r"R2ec.*small models"):
        run(Job(recipe, str(tmp_path)), workers=1)
