"""Stages 1 and 2: what they train on, and that the same seed gives the same weights, stopped or not."""

import shutil
from dataclasses import replace

import pandas as pd
import pytest
import torch
from test_policy import CATALOG, INTERACTIONS, make_policy
from transformers import TrainerCallback, TrainingArguments

from sapo.data.interactions import Interactions
from sapo.errors import InputError
from sapo.policy.prompts import split_words
from sapo.training import sft
from sapo.training.examples import IGNORED, Examples, collate
from sapo.training.progress import tidy_log
from sapo.training.sft import SFTConfig, train_supervised
from sapo.training.traces import NodeDescriptors

SPLIT = INTERACTIONS.leave_one_out()  # training sequences [0, 1] and [5, 4, 3]
TREE = NodeDescriptors(CATALOG, 2)


def texts(policy, example):
    answer = [token for token in example["labels"] if token != IGNORED]
    prompt = example["input_ids"][: len(example["input_ids"]) - len(answer)]
    assert example["input_ids"][len(prompt) :] == answer  # the loss sees the answer and nothing of the prompt
    return policy.tokenizer.decode(prompt), policy.tokenizer.decode(answer)


def test_stage_1_trains_next_items_of_training_sequences_only():
    policy = make_policy()
    rows = Examples(policy, SPLIT, "next_item", length=60, seed=0)
    seen = {texts(policy, rows[index]) for index in range(60)}
    # one window a sequence: the first item is the prompt, the others are learnt; held-out items 2, 3 (user u) and 2, 1
    # (user v) do not appear behind their histories
    assert seen == {
        ("<bos> <a_0> <b_0>", "<a_0> <b_1>"),
        ("<bos> <a_1> <b_1>", "<a_1> <b_1> <a_1> <b_0>"),
    }


def test_stage_1_translates_between_sids_and_titles():
    policy = make_policy()
    rows = Examples(policy, SPLIT, "next_item", length=200, seed=0, title_share=1.0)
    seen = {texts(policy, rows[index]) for index in range(200)}
    assert ("<bos> <a_1> <b_0> <title>", "steel kitchen knife <eos>") in seen
    assert ("<bos> <item> steel kitchen knife", "<a_1> <b_0> <eos>") in seen
    assert len(seen) == 12  # both directions of six items


def test_alignment_adds_titles_of_what_comes_next_and_histories_of_titles():
    """LC-Rec's families: half next items, a quarter translations, a quarter across; no two prompts mean two things."""
    policy = make_policy()
    rows = Examples(policy, SPLIT, "alignment", length=1500, seed=0, title_share=0.25)
    found = [texts(policy, rows[index]) for index in range(1500)]
    seen = set(found)
    # user v's training sequence is 5, 4, 3: <a_1> <b_1> "copper kitchen pot", ...; held-out targets are in neither
    titles = {item: " ".join(split_words(CATALOG.titles[item])) for item in range(6)}
    sids = {item: "<a_{}> <b_{}>".format(*CATALOG.sids[item].tolist()) for item in range(6)}
    across = {
        (f"<bos> {sids[0]} <item>", f"{titles[1]} <eos>"),
        (f"<bos> {sids[5]} <item>", f"{titles[4]} <eos>"),
        (f"<bos> {sids[5]} {sids[4]} <item>", f"{titles[3]} <eos>"),
        (f"<bos> <title> {titles[0]}", f"{sids[1]} <eos>"),
        (f"<bos> <title> {titles[5]}", f"{sids[4]} <eos>"),
        (f"<bos> <title> {titles[5]} <title> {titles[4]}", f"{sids[3]} <eos>"),
    }
    single = {(f"<bos> {sids[i]} <title>", f"{titles[i]} <eos>") for i in range(6)}
    single |= {(f"<bos> <item> {titles[i]}", f"{sids[i]} <eos>") for i in range(6)}
    following = {("<bos> <a_0> <b_0>", "<a_0> <b_1>"), ("<bos> <a_1> <b_1>", "<a_1> <b_1> <a_1> <b_0>")}
    assert seen == across | single | following
    for group, share in ((across, 0.25), (single, 0.25), (following, 0.5)):  # within four standard errors
        assert abs(sum(one in group for one in found) / 1500 - share) < 4 * (share * (1 - share) / 1500) ** 0.5


def test_a_batch_of_examples_is_its_examples():
    """Texts of different lengths, which the tokenizer reads together: none gets another's tokens, or padding."""
    rows = Examples(make_policy(), SPLIT, "alignment", length=40, seed=0, title_share=0.25)
    indices = [7, 3, *range(39, 10, -1), 3]
    assert rows.__getitems__(indices) == [rows[index] for index in indices]


def test_stage_2_thinks_about_the_target():
    policy = make_policy()
    rows = Examples(policy, SPLIT, "thinking", length=100, seed=0, traces=TREE)
    seen = {texts(policy, rows[index]) for index in range(100)}
    assert {prompt for prompt, _ in seen} == {
        "<bos> <a_0> <b_0>",
        "<bos> <a_1> <b_1>",
        "<bos> <a_1> <b_1> <a_1> <b_1>",
    }
    for _, answer in seen:
        ids = torch.tensor([policy.tokenizer(answer)["input_ids"]])
        parsed = policy.layout.parse(ids)
        assert parsed.well_formed.all()
        thoughts = policy.wording.blocks(TREE.trace(parsed.sids[0].tolist()))
        assert answer == f"{thoughts} {' '.join(answer.split()[-3:-1])} <eos>"


def test_long_sequences_are_cut_to_the_length_of_a_prompt():
    policy = make_policy()  # shows 3 items
    long = Interactions(["w"], [[0, 1, 2, 3, 4, 5, 0, 1, 2]], 6).leave_one_out()
    rows = Examples(policy, long, "next_item", length=50, seed=0)
    lengths = {len(rows[index]["input_ids"]) for index in range(50)}
    assert max(lengths) == 1 + 2 * 4  # <bos> and four items of two codes: three shown before the last target
    ends = {
        texts(policy, rows[index])[1].split()[-2:][0] + texts(policy, rows[index])[1].split()[-1] for index in range(50)
    }
    assert len(ends) > 2  # windows end anywhere in the sequence


def test_rows_depend_on_seed_and_index_alone():
    policy = make_policy()
    make = lambda seed: Examples(policy, SPLIT, "thinking", 20, seed, TREE)  # noqa: E731
    assert [make(0)[i] for i in range(20)] == [make(0)[i] for i in reversed(range(20))][::-1]
    assert [make(0)[i] for i in range(20)] != [make(1)[i] for i in range(20)]


def test_a_stage_that_goes_on_sees_what_follows():
    policy = make_policy()
    whole = Examples(policy, SPLIT, "alignment", 20, 0, title_share=0.25)
    second = Examples(policy, SPLIT, "alignment", 10, 0, title_share=0.25, first=10)
    assert [second[i] for i in range(10)] == [whole[i] for i in range(10, 20)]


def test_bad_settings_say_so():
    policy = make_policy()
    with pytest.raises(InputError, match="needs traces"):
        Examples(policy, SPLIT, "thinking", 1, 0)
    single = Interactions(["u"], [[0, 1, 2]], 6).leave_one_out()
    with pytest.raises(InputError, match="no training row"):
        Examples(policy, single, "next_item", 1, 0)


def test_collate_pads_on_the_right_and_ignores_padding():
    batch = collate([{"input_ids": [5, 6], "labels": [IGNORED, 6]}, {"input_ids": [7], "labels": [7]}], pad_id=0)
    assert batch["input_ids"].tolist() == [[5, 6], [7, 0]]
    assert batch["labels"].tolist() == [[IGNORED, 6], [7, IGNORED]]
    assert batch["attention_mask"].tolist() == [[1, 1], [1, 0]]


def weights(policy):
    return torch.cat([parameter.detach().flatten() for parameter in policy.model.parameters()])


CONFIG = SFTConfig(updates=8, batch_size=4, learning_rate=1e-2)


def test_training_learns_and_repeats(tmp_path):
    first, second = make_policy(), make_policy()
    log = train_supervised(first, SPLIT, SFTConfig(updates=60, batch_size=8), "thinking", tmp_path / "a", 0, TREE)
    losses = [entry["loss"] for entry in log if "loss" in entry]
    assert losses[-1] < losses[0] / 2
    train_supervised(second, SPLIT, SFTConfig(updates=60, batch_size=8), "thinking", tmp_path / "b", 0, TREE)
    assert torch.equal(weights(first), weights(second))


def test_resuming_changes_nothing(tmp_path, monkeypatch):
    whole, half, resumed = make_policy(), make_policy(), make_policy()
    train_supervised(whole, SPLIT, CONFIG, "next_item", tmp_path / "a", 0)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **unused):
            if state.global_step == 5:  # checkpoints fall on updates 2, 4, 6, 8
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft, "StopAtNonFiniteLoss", Stop)
        with pytest.raises(KeyboardInterrupt):
            train_supervised(half, SPLIT, CONFIG, "next_item", tmp_path / "b", 0)
    assert (tmp_path / "b" / "checkpoint-4").is_dir()
    train_supervised(resumed, SPLIT, CONFIG, "next_item", tmp_path / "b", 0, resume=True)
    assert torch.equal(weights(whole), weights(resumed))


def stub_looks(monkeypatch, losses):
    """Validation losses that are said instead of computed, one a look."""
    told = iter(losses)

    def look(self, *args, **unused):
        loss = next(told)
        self.log({"eval_loss": loss})
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, {"eval_loss": loss})
        return {"eval_loss": loss}

    monkeypatch.setattr(sft.SupervisedTrainer, "evaluate", look)


def test_a_stage_ends_without_gain_and_keeps_the_best_weights(tmp_path, monkeypatch):
    """Looks at updates 2, 4, 6, 8: the second is the best, and the fourth the second in a row without gain."""
    config = SFTConfig(updates=20, batch_size=4, learning_rate=1e-2, schedule="linear", validate_every=2, patience=2)
    stopped, through = make_policy(), make_policy()
    with monkeypatch.context() as patch:
        stub_looks(patch, [3.0, 1.0, 2.0, 1.5])
        log = train_supervised(stopped, SPLIT, config, "next_item", tmp_path / "a", 0)
    assert log[-1]["step"] == 8
    seen = {}

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model, **unused):
            seen[state.global_step] = torch.cat([value.detach().flatten() for value in model.parameters()])

    with monkeypatch.context() as patch:
        patch.setattr(sft, "StopAtNonFiniteLoss", Watch)
        train_supervised(
            through, SPLIT, replace(config, validate_every=None, patience=None), "next_item", tmp_path / "b", 0
        )
    assert torch.equal(weights(stopped), seen[4])
    assert not torch.equal(seen[4], seen[8])
    found = tidy_log(log)
    assert found[found["metric"] == "eval_loss"][["step", "value"]].values.tolist() == [
        [2, 3],
        [4, 1],
        [6, 2],
        [8, 1.5],
    ]


@pytest.mark.parametrize("losses", [[3.0, 1.0, 2.0, 1.5], [3.0, 4.0, 1.0, 2.0, 0.5, 2.0, 1.0]])
@pytest.mark.parametrize("at", [3, 5, 7, 8])
def test_a_stage_that_ends_early_resumes_to_the_same(tmp_path, monkeypatch, losses, at):
    """Stopped within an interval, and at the very look that ends it (update 8 of the first case)."""
    config = SFTConfig(updates=20, batch_size=4, learning_rate=1e-2, validate_every=2, patience=2)
    whole, half, resumed = make_policy(), make_policy(), make_policy()
    with monkeypatch.context() as patch:
        stub_looks(patch, losses)
        log = train_supervised(whole, SPLIT, config, "next_item", tmp_path / "a", 0)

    class Stop(TrainerCallback):
        def on_step_begin(self, args, state, control, **unused):
            if state.global_step == at:
                raise KeyboardInterrupt

        def on_train_end(self, args, state, control, **unused):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft, "StopAtNonFiniteLoss", Stop)
        stub_looks(patch, losses)
        with pytest.raises(KeyboardInterrupt):
            train_supervised(half, SPLIT, config, "next_item", tmp_path / "b", 0)
    kept = max(int(folder.name.split("-")[1]) for folder in (tmp_path / "b").glob("checkpoint-*"))
    with monkeypatch.context() as patch:
        stub_looks(patch, losses[kept // 2 :])
        again = train_supervised(resumed, SPLIT, config, "next_item", tmp_path / "b", 0, resume=True)
    assert torch.equal(weights(whole), weights(resumed))
    pd.testing.assert_frame_equal(tidy_log(log), tidy_log(again))


@pytest.mark.parametrize("moved", [True, False])
def test_the_best_weights_are_found_where_the_folder_is(tmp_path, monkeypatch, moved):
    """Stopped after update 7, moved, resumed at 6. Losses 3, 1, 2, 1.5: the fourth look ends it, the second is best."""
    config = SFTConfig(updates=20, batch_size=4, learning_rate=1e-2, validate_every=2, patience=2)
    whole, half, resumed = make_policy(), make_policy(), make_policy()
    with monkeypatch.context() as patch:
        stub_looks(patch, [3.0, 1.0, 2.0, 1.5])
        train_supervised(whole, SPLIT, config, "next_item", tmp_path / "a", 0)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **unused):
            if state.global_step == 7:
                raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sft, "StopAtNonFiniteLoss", Stop)
        stub_looks(patch, [3.0, 1.0, 2.0])
        with pytest.raises(KeyboardInterrupt):
            train_supervised(half, SPLIT, config, "next_item", tmp_path / "b", 0)
    there = (tmp_path / "b").rename(tmp_path / "c")
    if not moved:
        shutil.rmtree(there / "checkpoint-4")
    with monkeypatch.context() as patch:
        stub_looks(patch, [1.5])
        if not moved:
            with pytest.raises(InputError, match="checkpoint-4, whose weights were the best, is gone: remove"):
                train_supervised(resumed, SPLIT, config, "next_item", there, 0, resume=True)
            return
        train_supervised(resumed, SPLIT, config, "next_item", there, 0, resume=True)
    assert torch.equal(weights(whole), weights(resumed))


def test_looks_are_at_the_next_items_of_validation_rows(tmp_path):
    """The loss of a look is the mean over all their SID tokens, computed here without the trainer."""
    policy = make_policy()
    config = SFTConfig(updates=1, batch_size=2, learning_rate=0.0, validate_every=1)
    log = train_supervised(policy, SPLIT, config, "thinking", tmp_path, 0, TREE)
    # users u and v: 0 1 | 2 | 3 and 5 4 3 | 2 | 1 train, validate, test
    assert (SPLIT.valid.history, SPLIT.valid.target) == ([[0, 1], [5, 4, 3]], [2, 2])
    losses = []
    for history, target in zip(SPLIT.valid.history, SPLIT.valid.target, strict=True):
        prompt = policy.tokenizer(policy.prompts([history])[0], add_special_tokens=False)["input_ids"]
        answer = policy.tokenizer(policy.wording.name(target), add_special_tokens=False)["input_ids"]
        assert len(answer) == 2
        with torch.no_grad():
            logits = policy.model(input_ids=torch.tensor([prompt + answer])).logits[0]
        losses += [-logits.log_softmax(1)[len(prompt) - 1 + k, token].item() for k, token in enumerate(answer)]
    looked = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert looked == [pytest.approx(sum(losses) / 4, abs=1e-5)]
    first = replace(config, validate_rows=1)
    log = train_supervised(policy, SPLIT, first, "thinking", tmp_path / "one", 0, TREE)
    of_one = [pytest.approx(sum(some) / 2, abs=1e-5) for some in (losses[:2], losses[2:])]
    assert next(entry["eval_loss"] for entry in log if "eval_loss" in entry) in of_one


def test_patience_needs_looks_and_looks_need_rows(tmp_path):
    with pytest.raises(InputError, match="patience is 3, and validate_every says nothing"):
        replace(CONFIG, patience=3)
    with pytest.raises(InputError, match="warmup is 8, of 8 updates"):
        replace(CONFIG, warmup=8)
    for bad in ({"patience": 0, "validate_every": 2}, {"validate_every": 0}, {"updates": 0}):
        with pytest.raises(InputError, match=f"{next(iter(bad))} of a supervised stage is 0; at least 1"):
            replace(CONFIG, **bad)
    bare = replace(SPLIT, valid=SPLIT.valid.take([]))
    with pytest.raises(InputError, match="no validation row"):
        train_supervised(make_policy(), bare, replace(CONFIG, validate_every=1), "next_item", tmp_path, 0)


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    policy = make_policy()
    with torch.no_grad():
        policy.model.model.embed_tokens.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match=r"the loss is nan at update 1.*lower learning rate"):
        train_supervised(policy, SPLIT, CONFIG, "next_item", tmp_path, 0)


def test_the_loss_without_padding_is_that_of_transformers(tmp_path):
    """Ragged examples, prompts of other lengths: same mean, same gradient, and only real tokens are read."""
    policy = make_policy()
    model, vocabulary = policy.model, len(policy.tokenizer)
    generator = torch.Generator().manual_seed(0)
    examples = []
    for length, prompt in ((5, 2), (9, 4), (3, 1), (9, 8)):
        ids = torch.randint(4, vocabulary, (length,), generator=generator).tolist()
        examples.append({"input_ids": ids, "labels": [IGNORED] * prompt + ids[prompt:]})
    batch = collate(examples, policy.tokenizer.pad_token_id)
    trainer = sft.SupervisedTrainer(model, TrainingArguments(str(tmp_path), report_to="none", use_cpu=True))
    read = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: read.append(inputs[0].numel()))

    def gradient(loss):
        model.zero_grad()
        loss.backward()
        return torch.cat([parameter.grad.flatten() for parameter in model.parameters()])

    mine = trainer.compute_loss(model, batch)
    theirs = model(**batch).loss
    assert mine.item() == pytest.approx(theirs.item(), abs=1e-6)
    assert read == [5 + 9 + 3 + 9, 4 * 9]
    expected, got = gradient(theirs), gradient(mine)
    assert (got - expected).norm() <= 1e-5 * expected.norm()
    # 3 + 5 + 2 + 1 labels here; with accumulation the divisor is the number of them in the whole update
    assert trainer.compute_loss(model, batch, num_items_in_batch=24).item() == pytest.approx(mine.item() * 11 / 24)
