"""The trainer: parity with TRL's, identities between objectives, resuming, and what it refuses."""

import json
import shutil

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl.trainer import grpo_trainer
from worlds import CLOSE, EOS, OPEN, PAD, layout_for, random_sids, tiny_model

from sapo.credit.advantages import trajectory_advantages
from sapo.credit.loss import policy_loss
from sapo.credit.objectives import OBJECTIVES
from sapo.credit.rewards import ranking_reward
from sapo.decoding.beam_search import constrained_beam_search
from sapo.decoding.logprobs import forced_tokens
from sapo.decoding.sampling import grouped_rollouts
from sapo.errors import InputError
from sapo.semantic_ids.trie import SidTrie
from sapo.training import trainer as trainer_module
from sapo.training.adapters import merged
from sapo.training.config import SAPOConfig
from sapo.training.credit_metrics import weight_moved
from sapo.training.rollouts import mixed_seed
from sapo.training.trainer import SAPOTrainer

SIZES = (3, 3)
LAYOUT = layout_for(SIZES)
SIDS = random_sids(8, SIZES, 0)
VOCAB = int(LAYOUT.sid_ids.max()) + 6


@pytest.fixture(scope="module")
def tokenizer():
    tokens = {f"t{index}": index for index in range(VOCAB)}
    core = Tokenizer(models.WordLevel(tokens, unk_token="t1"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=f"t{PAD}", eos_token=f"t{EOS}", unk_token="t1", padding_side="left"
    )


@pytest.fixture
def folder(tmp_path, tokenizer):
    """A stage-2 folder: weights and config."""
    tiny_model(VOCAB, scale=2.0).save_pretrained(tmp_path / "stage2")
    tokenizer.save_pretrained(tmp_path / "stage2")
    return tmp_path / "stage2"


def load(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def dataset(rows=12):
    """Prompts of two to six words, no two alike; targets from the catalogue."""
    generator = torch.Generator().manual_seed(0)
    prompts = []
    for row in range(rows):
        words = [4 + row // 4, 4 + row % 4, *torch.randint(4, VOCAB, (row % 5,), generator=generator).tolist()]
        prompts.append(" ".join(f"t{word}" for word in words))
    return Dataset.from_dict({"prompt": prompts, "target_sid": [SIDS[row % len(SIDS)].tolist() for row in range(rows)]})


def settings(tmp_path, **options):
    return {
        "output_dir": str(tmp_path / "out"),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
    } | options


def ours(folder, tmp_path, tokenizer, rows=None, trie=None, **options):
    names = ("reward_funcs", "rollout_func", "callbacks", "optimizers", "model", "layout", "eval_dataset")
    extra = {name: options.pop(name) for name in names if name in options}
    args = SAPOConfig(**{"block_budget": 3, **settings(tmp_path, **options)})
    return SAPOTrainer(
        extra.pop("model", None) or load(folder),
        args,
        dataset() if rows is None else rows,
        tokenizer,
        extra.pop("layout", LAYOUT),
        trie or SidTrie(SIDS, SIZES),
        **extra,
    )


class Losses:
    """Records what `_compute_loss` of any trainer returns."""

    def __init__(self, trainer):
        self.values, compute = [], trainer._compute_loss

        def recording(model, inputs):
            loss = compute(model, inputs)
            self.values.append(loss.detach().item())
            return loss

        trainer._compute_loss = recording


def fixed_rollouts(prompts, trainer):
    """Ragged completions that depend on the prompts alone: blocks of 0 to 3 words, SIDs that hit now and then."""
    tokenizer, words = trainer.processing_class, list(range(int(LAYOUT.sid_ids.max()) + 1, VOCAB))
    generator = torch.Generator().manual_seed(sum(map(len, prompts)) + trainer.state.global_step)
    draw = lambda high: int(torch.randint(high, (1,), generator=generator))  # noqa: E731
    completions, masks = [], []
    for _ in prompts:
        ids, sampled = [], []
        for _ in SIZES:
            block = [words[draw(len(words))] for _ in range(draw(4))]
            ids += [OPEN, *block, CLOSE]
            sampled += [0] + [1] * len(block) + [int(len(block) < 3)]
        for level, code in enumerate(SIDS[draw(len(SIDS))].tolist()):
            ids.append(int(LAYOUT.sid_token_ids[level][code]))
            sampled.append(1)
        completions.append(ids)
        masks.append(sampled)
    return {
        "prompt_ids": tokenizer(prompts, add_special_tokens=False)["input_ids"],
        "completion_ids": completions,
        "logprobs": [[0.0] * len(ids) for ids in completions],
        "env_mask": masks,
    }


def exact_reward(completion_ids, target_sid, **columns):
    ends = [[int(t) for t in ids[-len(SIZES) :]] for ids in completion_ids]
    goals = [[int(LAYOUT.sid_token_ids[k][code]) for k, code in enumerate(sid)] for sid in target_sid]
    return [float(end == goal) for end, goal in zip(ends, goals, strict=True)]


def level_reward(level):
    def reward(completion_ids, target_sid, **columns):
        tokens = LAYOUT.sid_token_ids[level]
        return [
            float(int(ids[level - len(SIZES)]) == int(tokens[sid[level]]))
            for ids, sid in zip(completion_ids, target_sid, strict=True)
        ]

    reward.__name__ = f"level_{level}"
    return reward


@pytest.mark.parametrize(
    ("objective", "shared", "stock_settings"),
    [
        ("grpo", {"beta": 0.04}, {"loss_type": "grpo"}),
        ("dr_grpo", {"beta": 0.0}, {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        # Adam makes whole steps of gradients that are nothing but rounding, and the two round their sums differently
        (
            "gspo",
            {"beta": 0.0, "optim": "sgd", "learning_rate": 1.0},
            {"loss_type": "grpo", "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 4e-4},
        ),
        (
            "gdpo",
            {"beta": 0.0, "optim": "sgd", "learning_rate": 0.1},
            {"loss_type": "grpo", "multi_objective_aggregation": "normalize_then_sum"},
        ),
    ],
    ids=["grpo", "dr_grpo", "gspo", "gdpo"],
)
def test_parity_with_the_trainer_of_trl(objective, shared, stock_settings, folder, tmp_path, tokenizer, monkeypatch):
    """Same rollouts, ratios, KL, ragged completions, two iterations, accumulation: same losses, same weights."""
    common = {"gradient_accumulation_steps": 2, "num_iterations": 2, "max_steps": 3, **shared}
    mine = ours(
        folder, tmp_path, tokenizer, objective=objective, sid_logps="full", rollout_func=fixed_rollouts, **common
    )
    my_losses = Losses(mine)
    before = {name: value.clone() for name, value in mine.model.named_parameters()}
    orders = []
    whole = lambda batch: torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)  # noqa: E731
    prepare = mine._prepare_inputs

    def remember(batch):
        inputs = prepare(batch)
        if mine._step % 4 == 0:
            orders.append(torch.cat([whole(part) for part in mine._buffered_inputs]))
        return inputs

    mine._prepare_inputs = remember
    mine.train()

    # TRL shuffles rows; give it the order in which ours shuffled groups, so that micro-batches hold the same rows.
    def same_order(batch):
        wanted, rows = orders.pop(0), whole(batch)
        used, order = set(), []
        for row in wanted:
            index = next(i for i in range(len(rows)) if i not in used and torch.equal(rows[i], row))
            used.add(index)
            order.append(index)
        return {name: value if value.dim() == 0 else value[order] for name, value in batch.items()}

    monkeypatch.setattr("trl.trainer.grpo_trainer.shuffle_sequence_dict", same_order)
    args = GRPOConfig(
        **settings(tmp_path, **common),
        use_bias_correction_kl=False,  # the papers' k3; TRL's default multiplies it by the ratio
        bf16=False,
        gradient_checkpointing=False,
        max_completion_length=12,
        **{"scale_rewards": "group", "importance_sampling_level": "token"} | stock_settings,
    )
    stock = GRPOTrainer(
        model=load(folder),
        reward_funcs=[level_reward(0), level_reward(1)] if objective == "gdpo" else exact_reward,
        args=args,
        train_dataset=dataset(),
        processing_class=tokenizer,
        rollout_func=fixed_rollouts,
    )
    their_losses = Losses(stock)
    stock.train()

    assert len(my_losses.values) == len(their_losses.values) == 6
    assert max(map(abs, their_losses.values)) > 1e-3
    assert my_losses.values == pytest.approx(their_losses.values, abs=1e-6)
    theirs = dict(stock.model.named_parameters())
    for name, value in mine.model.named_parameters():
        torch.testing.assert_close(value, theirs[name], atol=1e-6, rtol=0)
    assert max((value - before[name]).abs().max().item() for name, value in theirs.items()) > 1e-4


def train(folder, tmp_path, tokenizer, **options):
    """Losses and final weights of a run."""
    trainer = ours(folder, tmp_path, tokenizer, **options)
    losses = Losses(trainer)
    trainer.train()
    return losses.values, torch.cat([value.flatten() for value in trainer.model.parameters()]).detach(), trainer


def first_batch(trainer):
    """Train, and return the rows and the scored completions of the first generation."""
    batches, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append((inputs, score(inputs))) or batches[-1][1]
    trainer.train()
    return batches[0]


@pytest.mark.parametrize(("pair", "beta"), [(("sapo", "rank_grpo"), {}), (("grpo", "gspo"), {"beta": 0.0})])
def test_objectives_that_coincide_at_ratio_one(pair, beta, folder, tmp_path, tokenizer):
    """One update per batch: Rank-GRPO is SAPO, GSPO is GRPO. Two updates tell them apart."""
    common = {"per_device_train_batch_size": 32, "max_steps": 2, "optim": "sgd", **beta}
    start = torch.cat([value.flatten() for value in load(folder).parameters()])
    once = [train(folder, tmp_path, tokenizer, objective=name, learning_rate=0.1, **common)[1] for name in pair]
    assert (once[0] - start).abs().max() > 1e-4
    torch.testing.assert_close(once[0], once[1], atol=1e-6, rtol=0)
    twice = [
        train(folder, tmp_path, tokenizer, objective=name, learning_rate=1.0, num_iterations=2, **common)[1]
        for name in pair
    ]
    assert (twice[0] - twice[1]).abs().max() > 1e-4


@pytest.mark.parametrize("objective", sorted(OBJECTIVES))
def test_every_objective_trains(objective, folder, tmp_path, tokenizer):
    start = torch.cat([value.flatten() for value in load(folder).parameters()])
    options = {"log_completions": True, "num_completions_to_print": 0, "reward_beams": 1}
    _, end, trainer = train(folder, tmp_path, tokenizer, objective=objective, **options)
    assert (end - start).abs().max() > 1e-4
    log = {name for entry in trainer.state.log_history for name in entry}
    wanted = {"reward", "rewards/sid_level_1/mean", "rewards/exact/mean", "step/2/length", "step/1/frac_zero_spread"}
    assert wanted <= log
    assert ("kl" in log) == (OBJECTIVES[objective].beta > 0)
    assert list((tmp_path / "out" / "completions").glob("*.parquet"))


def flat(model):
    return torch.cat([value.flatten() for value in model.parameters()]).detach()


def test_plain_gradient_descent_and_the_norm_that_is_logged(folder, tmp_path, tokenizer):
    """A parameter moves by the rate times its gradient, so that the length of the first update says what was clipped;
    the norm that is logged is from before. 0 or a huge number clips nothing, and both move alike in two updates."""
    start, ends, norms = flat(load(folder)), [], []
    options = {"optim": "sgd", "learning_rate": 0.1, "per_device_train_batch_size": 32, "rollout_func": fixed_rollouts}
    for most in (0.0, 1e9):
        _, end, trainer = train(folder, tmp_path, tokenizer, max_grad_norm=most, max_steps=2, **options)
        norms.append([entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry])
        ends.append(end)
    assert len(norms[0]) == 2  # one an update
    assert norms[0] == pytest.approx(norms[1], rel=1e-5)
    assert torch.equal(ends[0], ends[1])
    for most, length in ((0.0, norms[0][0]), (norms[0][0] / 4, norms[0][0] / 4)):
        _, end, trainer = train(folder, tmp_path, tokenizer, max_grad_norm=most, max_steps=1, **options)
        assert float((end - start).norm()) == pytest.approx(0.1 * length, rel=1e-3)
        assert trainer.state.log_history[0]["grad_norm"] == pytest.approx(norms[0][0], rel=1e-5)
    with pytest.raises(InputError, match="give 0 for gradients that are not clipped"):
        SAPOConfig(**settings(tmp_path, max_grad_norm=None))


@pytest.mark.parametrize("objective", ["grpo", "sapo", "dapo"])
def test_zero_variance_groups_are_left_out_of_the_divisor(objective, folder, tmp_path, tokenizer):
    """Without a KL the update is the usual one over the share of groups that have credit."""
    options = {
        "objective": objective, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "max_steps": 1, "beta": 0.0,
        "per_device_train_batch_size": 16, "gradient_accumulation_steps": 2,
    }  # fmt: skip
    if objective != "dapo":  # which makes its own
        options["rollout_func"] = fixed_rollouts
    start, moved = flat(load(folder)), []
    for setting in (None, "divisor"):
        trainer = ours(folder, tmp_path, tokenizer, drop_zero_variance=setting, **options)
        _, batch = first_batch(trainer)
        moved.append(flat(trainer.model) - start)
    target = torch.tensor(list(trainer._logs["extra"]["target_sid"]))  # DAPO replaces the rows that it was given
    match = (LAYOUT.parse(batch["completion_ids"]).sids == target).view(8, 4, 2)
    rewards = match if objective == "sapo" else match.all(2, keepdim=True)
    spread = rewards.any(1) & ~rewards.all(1)  # of 8 groups, for SAPO in 2 steps
    tokens = (batch["completion_mask"] * batch["tool_mask"]).view(8, -1).sum(1)
    share = spread.float().mean() if objective != "dapo" else tokens[spread[:, 0]].sum() / tokens.sum()
    assert 0 < share < 1
    assert batch["kept_share"].item() == pytest.approx(float(share))
    torch.testing.assert_close(moved[1] * share, moved[0], atol=1e-6, rtol=0)
    assert moved[0].norm() > 1e-3


def test_zero_variance_groups_are_left_out_of_the_kl(folder, tmp_path, tokenizer):
    """Left out of both, the loss is that of the other groups alone; of the KL, the divisor stays. A step's token has
    its KL where its group differs in that step."""
    options = {"per_device_train_batch_size": 32, "max_steps": 1, "rollout_func": fixed_rollouts, "beta": 0.5}
    found = {}
    for setting in ("kl", "both"):
        trainer = ours(folder, tmp_path, tokenizer, objective="grpo", drop_zero_variance=setting, **options)
        inputs, batch = first_batch(trainer)
        alive = (batch["advantages"] != 0).any(1).view(8, 4).any(1).repeat_interleave(4)
        logps = batch["ref_per_token_logps"]
        rows = [batch["advantages"], batch["token_steps"], batch["completion_mask"] * batch["tool_mask"]]
        kept = [part[alive] for part in (logps + 0.3, logps, *rows)]
        expected = policy_loss(
            trainer.objective, *kept, num_steps=2, ref_logps=logps[alive], beta=0.5, max_length=12
        ).loss
        trainer._get_per_token_logps_and_entropies = lambda *a, logps=logps, **k: (logps + 0.3, None, None)
        found[setting] = trainer._compute_loss(trainer.model, batch | {"old_per_token_logps": logps})
        assert 0 < alive.float().mean() < 1
        share = 1.0 if setting == "both" else float(alive.float().mean())
        torch.testing.assert_close(found[setting], expected * share)
    trainer = ours(folder, tmp_path, tokenizer, drop_zero_variance="kl", **options)
    inputs, batch = first_batch(trainer)
    match = LAYOUT.parse(batch["completion_ids"]).sids == torch.tensor([row["target_sid"] for row in inputs])
    for row in range(32):
        group = match[row - row % 4 :][:4]
        for k in range(2):
            uneven = bool(group[:, k].any() and not group[:, k].all())
            assert (batch["kl_mask"][row][batch["token_steps"][row] == k] == uneven).all()


def test_logged_step_metrics_are_those_of_the_batch(folder, tmp_path, tokenizer):
    trainer = ours(folder, tmp_path, tokenizer, max_steps=1)
    inputs, batch = first_batch(trainer)
    log = trainer.state.log_history[0]
    parsed = LAYOUT.parse(batch["completion_ids"]).sids
    for k in range(2):
        hits = [float(parsed[row, k] == inputs[row]["target_sid"][k]) for row in range(8)]
        assert log[f"rewards/sid_level_{k + 1}/mean"] == pytest.approx(sum(hits) / 8)
        groups = [hits[:4], hits[4:]]
        assert log[f"step/{k + 1}/frac_zero_spread"] == sum(len(set(group)) == 1 for group in groups) / 2
    # Advantages have a token axis: one value a step, and a token outside steps has none.
    steps, advantages = batch["token_steps"], batch["advantages"]
    assert advantages.shape == batch["completion_ids"].shape
    for row in range(8):
        for k in range(2):
            assert len(advantages[row][steps[row] == k].unique()) == 1
    assert (advantages[steps < 0] == 0).all()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharing_prompts_changes_no_update(checkpointing, folder, tmp_path, tokenizer):
    """Ragged prompts and completions, several groups a micro-batch, accumulation, two iterations, KL: same weights."""
    common = {
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "beta": 0.04,
        "gradient_checkpointing": checkpointing,
        "rollout_func": fixed_rollouts,
        "optim": "sgd",
        "learning_rate": 0.3,
    }
    shared, repeated = (
        train(folder, tmp_path, tokenizer, share_prompts=share, **common)[:2] for share in (True, False)
    )
    assert shared[0] == pytest.approx(repeated[0], abs=1e-6)
    assert max(map(abs, repeated[0])) > 1e-3
    torch.testing.assert_close(shared[1], repeated[1], atol=1e-6, rtol=0)
    start = torch.cat([value.flatten() for value in load(folder).parameters()])
    assert (shared[1] - start).abs().max() > 1e-3


def test_what_sampling_has_computed_is_not_computed_again(folder, tmp_path, tokenizer):
    """With two updates a batch TRL asks for the log-probabilities before the first: they come out of the rollouts."""
    options = {"num_iterations": 2, "max_steps": 2, "learning_rate": 0.0}
    trainer = ours(folder, tmp_path, tokenizer, **options)
    passes, compute = [], trainer._logps_of_chunk
    trainer._logps_of_chunk = lambda *a: passes.append(torch.is_grad_enabled()) or compute(*a)
    _, batch = first_batch(trainer)
    # the reference, the check of the start, and two updates; not the policy's own before the first
    assert passes == [False, False, True, True]
    with torch.no_grad():
        expected = trainer._logps_of(trainer.model, batch)[0]
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    torch.testing.assert_close(batch["old_per_token_logps"][mask], expected[mask], atol=1e-5, rtol=0)
    assert (expected[mask] < -0.1).any()
    # beams have no sampling probability, so theirs are computed
    beams = ours(folder, tmp_path, tokenizer, objective="rank_reward", **options)
    _, batch = first_batch(beams)
    with torch.no_grad():
        expected = beams._logps_of(beams.model, batch)[0]
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    torch.testing.assert_close(batch["old_per_token_logps"][mask], expected[mask], atol=1e-5, rtol=0)


def test_a_group_torn_between_processes_shares_nothing(folder, tmp_path, tokenizer):
    """Rows of other prompts within a group's place: each is read with its own prompt, and the numbers are the same."""
    trainer = ours(folder, tmp_path, tokenizer)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(4, VOCAB, (8, 3), generator=generator)
    completion = torch.randint(4, VOCAB, (8, 5), generator=generator)
    ids, mask = torch.cat([prompts, completion], 1), torch.ones(8, 8, dtype=torch.long)
    mask[:, 0] = torch.tensor([0, 1] * 4)
    assert trainer._group_size(ids[:, :3], mask[:, :3]) == 1
    same = ids[[0] * 4 + [4] * 4, :3]
    assert trainer._group_size(same, torch.ones_like(same)) == 4
    with torch.no_grad():
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5)[0]
        trainer.args.share_prompts = False
        expected = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5)[0]
    free = ~forced_tokens(completion, LAYOUT, trainer.trie)
    torch.testing.assert_close(logps[free], expected[free], atol=1e-5, rtol=0)
    assert free.float().mean() > 0.5
    # the full softmax leaves a choice everywhere, so it is the same everywhere
    trainer.args.sid_logps = "full"
    with torch.no_grad():
        expected = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5)[0]
        trainer.args.share_prompts = True
        logps = trainer._get_per_token_logps_and_entropies(trainer.model, ids, mask, 5)[0]
    torch.testing.assert_close(logps, expected, atol=1e-5, rtol=0)


def test_micro_batches_hold_whole_groups(folder, tmp_path, tokenizer):
    trainer = ours(folder, tmp_path, tokenizer, gradient_accumulation_steps=3, max_steps=2)
    seen = []
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda batch: seen.append(prepare(batch)) or seen[-1]
    trainer.train()
    assert len(seen) == 6
    for batch in seen:
        prompts = [
            tuple(row[mask.bool()].tolist())
            for row, mask in zip(batch["prompt_ids"], batch["prompt_mask"], strict=True)
        ]
        assert len(prompts) == 8
        assert all(prompts[row] == prompts[row - row % 4] for row in range(8))


def test_same_seed_same_weights_and_resuming_changes_nothing(folder, tmp_path, tokenizer):
    """Stopped after 2 of 4 updates and resumed: bit for bit the weights of an undisturbed run."""
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "linear"}
    _, whole, _ = train(folder, tmp_path / "a", tokenizer, **options)

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **unused):
            if state.global_step == 3:
                control.should_training_stop = True

    ours(folder, tmp_path / "b", tokenizer, callbacks=[Stop()], **options).train()
    shutil.rmtree(tmp_path / "b" / "out" / "checkpoint-3", ignore_errors=True)
    assert json.loads((tmp_path / "b/out/checkpoint-2/trainer_state.json").read_text())["global_step"] == 2
    resumed = ours(folder, tmp_path / "b", tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "b/out/checkpoint-2"))
    end = torch.cat([value.flatten() for value in resumed.model.parameters()]).detach()
    assert torch.equal(whole, end)


def test_values_are_learned_beside_the_policy(folder, tmp_path, tokenizer):
    trainer = ours(folder, tmp_path, tokenizer, objective="rlvr", max_steps=1)
    inputs, batch = first_batch(trainer)
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    target = torch.tensor([row["target_sid"] for row in inputs])
    hit = (LAYOUT.parse(batch["completion_ids"]).sids == target).all(1)
    # The head starts at 0 and the policy at its reference, so there is neither a value nor a divergence yet: the
    # advantage of a token n trained tokens before the end is .95^n of the reward, whitened, and so is the return.
    assert not batch["old_values"].any()
    after = mask.flip(1).cumsum(1).flip(1) - 1
    expected = torch.where(mask, 10 * hit[:, None] * 0.95**after, 0.0)
    torch.testing.assert_close(batch["returns"], expected, atol=1e-4, rtol=0)
    white = (expected[mask] - expected[mask].mean()) / expected[mask].std()
    torch.testing.assert_close(batch["advantages"][mask], white, atol=1e-3, rtol=0)
    log = trainer.state.log_history[0]
    assert log["value/mean"] == 0
    assert log["kl"] < 1e-6
    assert log["value/loss"] == pytest.approx((batch["returns"][mask] / 10).square().mean().item() / 2, rel=1e-4)
    # One update of the values and none of the policy; more of them fit the returns.
    policy = torch.cat([value.flatten() for value in trainer.model.parameters()]).detach().clone()
    whole = [torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], 1) for what in ("ids", "mask")]
    losses = [
        trainer.critic.learn(*whole, batch["returns"], trainer.critic(*whole, mask.shape[1]).detach(), mask, mask.sum())
        for _ in range(60)
    ]
    assert losses[0] < log["value/loss"]
    assert losses[-1] < 0.5 * losses[0]
    assert torch.equal(policy, torch.cat([value.flatten() for value in trainer.model.parameters()]))


def test_how_an_update_is_cut_does_not_change_what_values_learn(folder, tmp_path, tokenizer):
    """Rows of few trained tokens and of many, whole or one by one: the gradient of the mean over all tokens."""
    gradients = []
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCAB, (4, 9), generator=generator)
    returns, mask = 10 * torch.rand(4, 6, generator=generator), torch.ones(4, 6, dtype=torch.bool)
    mask[:2, 1:] = False
    for cuts in (1, 4):
        trainer = ours(folder, tmp_path, tokenizer, objective="rlvr")
        critic = trainer.critic
        torch.nn.init.normal_(critic.head.weight, generator=torch.Generator().manual_seed(1))
        critic.accelerator.gradient_state._set_sync_gradients(False)  # no step: the gradients stay
        for part in torch.arange(4).chunk(cuts):
            old = critic(ids[part], torch.ones_like(ids[part]), 6).detach()
            critic.learn(ids[part], torch.ones_like(ids[part]), returns[part], old, mask[part], mask.sum())
        critic.accelerator.gradient_state._set_sync_gradients(True)
        gradients.append(torch.cat([value.grad.flatten() for value in critic.parameters() if value.grad is not None]))
    assert gradients[0].abs().max() > 1e-3
    assert (gradients[0] - gradients[1]).norm() < 1e-5 * gradients[0].norm()


def test_values_are_judged_in_evaluation_too(folder, tmp_path, tokenizer):
    trainer = ours(folder, tmp_path, tokenizer, objective="rlvr", eval_dataset=dataset(4), per_device_eval_batch_size=8)
    metrics = trainer.evaluate()
    assert metrics["eval_value/mean"] == 0  # nothing is learned yet, nor by this
    assert all(parameter.grad is None for parameter in trainer.critic.parameters())


@pytest.mark.parametrize("stop", [3, 4, 7])
def test_a_run_is_resumed_in_the_epoch_it_was_stopped_in(stop, folder, tmp_path, tokenizer):
    """12 rows are three updates of 4 prompts: stopped after the first epoch, within the second, in the third."""
    options = {"rollout_func": None, "max_steps": 9, "save_strategy": "steps", "save_steps": 1}
    weights, read = [], []
    for number in range(2):
        trainer = ours(folder, tmp_path / str(number), tokenizer, **options)
        compute, seen = trainer._generate_and_score_completions, {}

        def record(inputs, trainer=trainer, compute=compute, seen=seen):
            seen[trainer.state.global_step] = [row["prompt"] for row in inputs[::4]]
            return compute(inputs)

        trainer._generate_and_score_completions = record
        trainer.train(resume_from_checkpoint=str(tmp_path / f"0/out/checkpoint-{stop}") if number else None)
        weights.append(torch.cat([value.flatten() for value in trainer.model.parameters()]).detach())
        read.append(seen)
    undisturbed, resumed = read
    assert sorted(resumed) == list(range(stop, 9))
    assert resumed == {step: undisturbed[step] for step in resumed}
    assert len({tuple(prompts) for prompts in undisturbed.values()}) == 9  # each epoch has an order of its own
    assert torch.equal(*weights)


def test_a_run_with_values_is_resumed_with_them(folder, tmp_path, tokenizer):
    options = {"objective": "rlvr", "max_steps": 4, "save_strategy": "steps", "save_steps": 2, "num_iterations": 2}
    _, whole, undisturbed = train(folder, tmp_path / "a", tokenizer, **options)
    resumed = ours(folder, tmp_path / "b", tokenizer, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-2"))
    assert torch.equal(whole, torch.cat([value.flatten() for value in resumed.model.parameters()]).detach())
    for one, other in zip(undisturbed.critic.parameters(), resumed.critic.parameters(), strict=True):
        assert torch.equal(one, other)
    (tmp_path / "a/out/checkpoint-2/critic.pt").unlink()
    with pytest.raises(InputError, match=r"no critic\.pt"):
        ours(folder, tmp_path / "c", tokenizer, **options).train(
            resume_from_checkpoint=str(tmp_path / "a/out/checkpoint-2")
        )


def test_the_weight_that_the_step_mean_moves():
    """1, 2 and 4 trained tokens: 1/3 each instead of 1/7, 2/7, 4/7; an empty step's share is lost."""
    counts = torch.tensor([[1.0, 2, 4], [2, 2, 2], [3, 0, 0], [0, 0, 0]])
    moved = weight_moved(counts)
    assert moved.tolist() == pytest.approx([(4 + 1 + 5) / 21 / 2, 0, 2 / 3 / 2, 0])


def test_given_reward_functions_are_added(folder, tmp_path, tokenizer):
    """A constant reward changes no advantage; one that only some completions get does."""

    def constant(completion_ids, **columns):
        return [5.0] * len(completion_ids)

    def short(completion_ids, **columns):
        return [float(len(ids) < 8) for ids in completion_ids]

    common = {"max_steps": 1, "per_device_train_batch_size": 32}
    _, plain, _ = train(folder, tmp_path, tokenizer, **common)
    _, shifted, trainer = train(folder, tmp_path, tokenizer, reward_funcs=constant, **common)
    torch.testing.assert_close(plain, shifted, atol=2e-6, rtol=0)
    assert trainer.state.log_history[0]["rewards/constant/mean"] == 5
    _, shaped, _ = train(folder, tmp_path, tokenizer, reward_funcs=short, **common)
    assert (plain - shaped).abs().max() > 1e-5
    with pytest.raises(InputError, match="2 numbers for 1 reward"):
        ours(folder, tmp_path, tokenizer, reward_funcs=short, reward_weights=[1.0, 2.0])


def test_best_of_beam_pays_thoughts_for_what_a_beam_after_them_finds(folder, tmp_path, tokenizer):
    trainer = ours(folder, tmp_path, tokenizer, objective="best_of_beam", reward_beams=2, max_steps=1, beta=0.0)
    model, (inputs, batch) = load(folder), first_batch(trainer)
    ids = batch["completion_ids"]
    thought = LAYOUT.read(ids).in_block
    rewards = []
    for row in range(8):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        start = torch.cat([prompt, ids[row][thought[row]]])[None]
        trie = SidTrie(SIDS, SIZES)
        beams = constrained_beam_search(model, start, torch.ones_like(start), trie, LAYOUT.sid_token_ids, 2)
        target = torch.tensor(inputs[row]["target_sid"])
        rewards.append(float((beams.sids[0] == target).sum(1).max()))
    expected = trajectory_advantages(torch.tensor(rewards), 4)
    torch.testing.assert_close(batch["advantages"], expected[:, None].expand(ids.shape))
    assert not (batch["tool_mask"].bool() & ~thought).any()  # only thinking is trained
    assert (batch["tool_mask"].bool() & thought).any()


def test_beam_groups_are_one_thought_and_punished_by_rank(folder, tmp_path, tokenizer):
    trainer = ours(folder, tmp_path, tokenizer, objective="rank_reward", max_steps=1)
    inputs, batch = first_batch(trainer)
    sids = LAYOUT.parse(batch["completion_ids"]).sids
    exact = (sids == torch.tensor([row["target_sid"] for row in inputs])).all(1).float()
    for group in (slice(0, 4), slice(4, 8)):
        assert len(sids[group].unique(dim=0)) == 4  # four items, none twice
        ids = batch["completion_ids"][group]
        assert len(ids.masked_fill(~LAYOUT.read(ids).in_block, -1).unique(dim=0)) == 1
    expected = trajectory_advantages(ranking_reward(exact, 4), 4)
    torch.testing.assert_close(batch["advantages"], expected[:, None].expand(batch["advantages"].shape))
    with pytest.raises(InputError, match="leave rollout_func out"):
        ours(folder, tmp_path, tokenizer, objective="rank_reward", rollout_func=fixed_rollouts)


def test_dynamic_sampling_fills_the_batch_with_groups_that_have_spread(folder, tmp_path, tokenizer):
    trainer = ours(folder, tmp_path, tokenizer, objective="dapo", max_steps=2, per_device_train_batch_size=16)
    spreads = []
    score = trainer._generate_and_score_completions

    def recording(inputs):
        batch = score(inputs)
        credit = batch["advantages"].abs().amax(1).view(-1, 4)  # not 0 where, and only where, a group has spread
        spreads.append((credit.amax(1) > 0).float().mean().item())
        return batch

    trainer._generate_and_score_completions = recording
    trainer.train()
    assert max(spreads) > 0.5  # of 4 groups; about 1 of 3 prompts has one at random
    for spread, log in zip(spreads, trainer.state.log_history, strict=False):
        assert log["dynamic_sampling/share_with_spread"] == pytest.approx(spread)
        assert 1 <= log["dynamic_sampling/rounds"] <= 4
        assert 16 <= log["rollouts"] <= 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"drop_zero_variance": "loss"}, "drop_zero_variance is 'loss'; use 'divisor', 'kl', 'both' or None"),
        ({"drop_zero_variance": "kl", "beta": 0.0}, "beta=0 means there is none"),
        ({"drop_zero_variance": "divisor", "objective": "rlvr"}, "compares no groups"),
    ],
)
def test_leaving_out_what_is_not_there(options, message, tmp_path):
    with pytest.raises(InputError, match=message):
        SAPOConfig(**settings(tmp_path, **options))


def test_refusals(folder, tmp_path, tokenizer):
    make = lambda **options: ours(folder, tmp_path, tokenizer, **options)  # noqa: E731
    with pytest.raises(InputError, match=r"2511\.20347.*2605\.17648"):
        make(loss_type="sapo")
    with pytest.raises(InputError, match="contradicts objective='dr_grpo'"):
        make(objective="dr_grpo", scale_rewards="group")
    with pytest.raises(InputError, match="contradicts objective='grpo'"):
        make(objective="grpo", epsilon=0.3)
    with pytest.raises(InputError, match="has no KL"):
        make(objective="dapo", beta=0.1)
    with pytest.raises(InputError, match="plain k3"):
        make(use_bias_correction_kl=True)
    with pytest.raises(InputError, match="known are"):
        make(objective="nonsense")
    with pytest.raises(InputError, match="2 prompts x 4 completions"):
        make(per_device_train_batch_size=9)
    with pytest.raises(InputError, match=r"max_completion_length is 99.*make 12"):
        make(max_completion_length=99)
    with pytest.raises(InputError, match="ends without EOS"):
        make(mask_truncated_completions=True)
    with pytest.raises(InputError, match="multiple of 2"):
        make(save_strategy="steps", save_steps=3, num_iterations=2)
    with pytest.raises(InputError, match="max_steps is 3, but rollouts are made every 2 updates"):  # saved there too
        make(save_strategy="steps", save_steps=2, num_iterations=2)
    with pytest.raises(InputError, match=r"save_steps is 0\.5"):
        make(save_strategy="steps", save_steps=0.5, num_iterations=2)
    with pytest.raises(InputError, match="3 micro-batches a generation and gradient_accumulation_steps 2"):
        make(steps_per_generation=3, gradient_accumulation_steps=2)
    with pytest.raises(InputError, match="12 rows, fewer than the 25 prompts"):
        make(per_device_train_batch_size=100)
    with pytest.raises(InputError, match="sid_logps is 'tree'"):
        make(sid_logps="tree")
    with pytest.raises(InputError, match=r"top_p=0\.9 has no effect"):
        make(top_p=0.9)
    with pytest.raises(InputError, match=r"K = 2 levels.*the catalogue has K = 3"):
        make(trie=SidTrie(random_sids(5, (2, 2, 2), 0), (2, 2, 2)))
    with pytest.raises(InputError, match="lacks the columns"):
        make(rows=Dataset.from_dict({"prompt": ["t5"]}))
    with pytest.raises(InputError, match="built in memory"):
        make(model=tiny_model(VOCAB))
    with pytest.raises(InputError, match="num_generations is 1: a group-relative advantage needs at least 2"):
        make(num_generations=1, per_device_train_batch_size=8)
    for engine in ("use_vllm", "use_transformers_continuous_batching"):
        with pytest.raises(InputError, match=r"nothing holds to K closed blocks.*rollout_func"):
            make(**{engine: True})
    with pytest.raises(InputError, match="rollout_prompts is 0"):
        make(rollout_prompts=0)
    with pytest.raises(InputError, match=r"'rlvr' copies the policy.*leave lora_rank out"):
        make(objective="rlvr", lora_rank=2)
    with pytest.raises(InputError, match="num_generations is 0"):
        make(num_generations=0)
    with pytest.raises(InputError, match="num_generations_eval is 1"):
        make(num_generations_eval=1)
    with pytest.raises(InputError, match="leave rollout_func out"):
        make(objective="dapo", rollout_func=fixed_rollouts)
    with pytest.raises(InputError, match="leave reward_funcs out"):
        make(objective="sapo_fallback", reward_funcs=exact_reward)
    assert make(objective="grpo", scale_rewards=True).args.scale_rewards == "group"  # TRL's other spelling


def test_rollouts_in_portions_are_those_of_each_portion(folder, tmp_path, tokenizer):
    """Five prompts, two at a time, from one generator."""
    trainer = ours(folder, tmp_path, tokenizer, rollout_prompts=2)
    prompts = list(dataset()["prompt"])[:5]
    found = trainer.sample(prompts, 3, (7, 1))
    generator = torch.Generator().manual_seed(mixed_seed(7, 1))
    rows = 0
    for start in (0, 2, 4):
        batch = tokenizer(prompts[start : start + 2], return_tensors="pt", padding=True)
        part = grouped_rollouts(
            trainer.model,
            batch["input_ids"],
            batch["attention_mask"],
            LAYOUT,
            trainer.trie,
            3,
            block_budget=3,
            generator=generator,
            pad_id=PAD,
        )
        width = part.completion_ids.shape[1]
        for name in ("completion_ids", "completion_mask", "sampled"):
            assert torch.equal(getattr(found, name)[rows : rows + len(part.sids), :width], getattr(part, name))
        torch.testing.assert_close(found.logps[rows : rows + len(part.sids), :width], part.logps)
        assert not found.completion_mask[rows : rows + len(part.sids), width:].any()
        rows += len(part.sids)
    assert rows == len(found.sids) == 15


def test_rollouts_in_lower_precision_score_as_the_update_does(folder, tmp_path, tokenizer):
    trainer = ours(folder, tmp_path, tokenizer, bf16=True, max_steps=2)
    losses = Losses(trainer)
    trainer.train()
    assert all(np.isfinite(losses.values))
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kl[0] < 1e-6
    assert trainer.model.dtype == torch.float32  # weights stay


def test_batches_without_credit_are_warned_of_once(folder, tmp_path, tokenizer, monkeypatch, caplog):
    """Exact match is never right, so that nothing is trained; the run goes on and loses nothing."""
    monkeypatch.setattr(trainer_module, "SILENT_BATCHES", 3)
    rows = dataset()
    never = SIDS[0].tolist()

    def wrong(prompts, trainer):
        found = fixed_rollouts(prompts, trainer)
        others = [sid for sid in SIDS.tolist() if sid != never]
        for row, ids in enumerate(found["completion_ids"]):
            sid = others[row % len(others)]
            ids[-len(SIZES) :] = [int(LAYOUT.sid_token_ids[level][code]) for level, code in enumerate(sid)]
        return found

    targets = Dataset.from_dict({"prompt": list(rows["prompt"]), "target_sid": [never] * len(rows)})
    options = {"objective": "grpo", "beta": 0.0, "rollout_func": wrong, "max_steps": 6, "weight_decay": 0.0}
    trainer = ours(folder, tmp_path, tokenizer, rows=targets, **options)
    before = {name: value.clone() for name, value in trainer.model.state_dict().items()}
    with caplog.at_level("WARNING", logger=trainer_module.__name__):
        trainer.train()
    said = [record.message for record in caplog.records if "gave no completion any credit" in record.message]
    assert len(said) == 1
    assert "'grpo', 4 completions" in said[0]
    assert trainer.state.global_step == 6
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(value, before[name])


def test_adapters_are_trained_against_the_model_without_them(folder, tmp_path, tokenizer):
    before = load(folder).state_dict()
    trainer = ours(folder, tmp_path, tokenizer, lora_rank=2, learning_rate=1e-2, beta=1e-3, max_steps=4)
    assert trainer.ref_model is None
    trainer.train()
    kl = [row["kl"] for row in trainer.state.log_history if "kl" in row]
    assert kl[0] < 1e-6 < kl[-1]
    model = merged(trainer.accelerator.unwrap_model(trainer.model))
    for name, after in model.state_dict().items():
        moved = (after - before[name]).double()
        assert torch.linalg.matrix_rank(moved, rtol=1e-4) <= 2 if "proj" in name else moved.abs().max() == 0


def test_the_reference_is_not_spread_over_the_gpus_that_are_seen(folder, tmp_path, tokenizer, monkeypatch):
    asked, load_model = [], grpo_trainer.create_model_from_path

    def recorded(path, **settings):
        asked.append(settings)
        return load_model(path, **settings)

    monkeypatch.setattr(grpo_trainer, "create_model_from_path", recorded)
    ours(folder, tmp_path, tokenizer, beta=1e-3)
    monkeypatch.setattr("sapo.common.distributed.in_parts", lambda: True)
    ours(folder, tmp_path, tokenizer, beta=1e-3)
    assert ["device_map" in settings for settings in asked] == [False, True]
    assert asked[1]["device_map"] is None


def test_adapters_start_from_the_seed(folder, tmp_path, tokenizer):
    """And from nothing that was drawn before."""
    starts = []
    for number, seed in enumerate((0, 0, 1)):
        torch.rand(number + 1)
        trainer = ours(folder, tmp_path / str(number), tokenizer, lora_rank=2, seed=seed)
        starts.append(
            torch.cat([value.flatten() for name, value in trainer.model.named_parameters() if "lora_A" in name])
        )
    assert torch.equal(starts[0], starts[1])
    assert not torch.equal(starts[0], starts[2])


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ([0] * (len(SIZES) + 1), "row 5: target_sid is .*the catalogue has K"),
        ([0] * (len(SIZES) - 1), "row 5: target_sid is .*the catalogue has K"),
        ([-1] * len(SIZES), "row 5: target_sid .* is no SID of the catalogue"),  # would pay malformed completions
        ([size - 1 for size in SIZES], "row 5: target_sid .* is no SID of the catalogue"),
        ([99] * len(SIZES), "row 5: target_sid .* is no SID of the catalogue"),
    ],
)
@pytest.mark.parametrize("part", ["train_dataset", "eval_dataset"])
def test_every_target_is_checked_before_training(part, target, message, folder, tmp_path, tokenizer):
    good = dataset()
    sids = SIDS[(torch.tensor([size - 1 for size in SIZES]) != SIDS).any(1)]
    targets = [sids[row % len(sids)].tolist() for row in range(len(good))]
    targets[5] = target
    bad = Dataset.from_dict({"prompt": list(good["prompt"]), "target_sid": targets})
    fine = Dataset.from_dict({"prompt": list(good["prompt"]), "target_sid": [sids[0].tolist()] * len(good)})
    parts = {"rows": bad} if part == "train_dataset" else {"rows": fine, "eval_dataset": bad}
    with pytest.raises(InputError, match=f"{part}, {message}"):
        ours(folder, tmp_path, tokenizer, trie=SidTrie(sids, SIZES), **parts)


def test_a_dataset_of_nothing_or_of_numbers_is_refused(folder, tmp_path, tokenizer):
    with pytest.raises(InputError, match="train_dataset has no rows"):
        ours(folder, tmp_path, tokenizer, rows=Dataset.from_dict({"prompt": [], "target_sid": []}))
    with pytest.raises(InputError, match="row 0: target_sid is 1"):
        ours(folder, tmp_path, tokenizer, rows=Dataset.from_dict({"prompt": ["t5"] * 4, "target_sid": [1] * 4}))


def test_evaluation_scores_the_eval_dataset_with_the_same_objective(folder, tmp_path, tokenizer):
    options = {"num_generations_eval": 2, "per_device_eval_batch_size": 8}
    trainer = ours(folder, tmp_path, tokenizer, eval_dataset=dataset(8), **options)
    first, again = trainer.evaluate(), trainer.evaluate()
    assert first["eval_loss"] == again["eval_loss"]
    seeds, seed_of = [], trainer._seed
    trainer._seed = lambda purpose: seeds.append(seed_of(purpose)) or seeds[-1]
    trainer.evaluate()
    assert len(seeds) == len(set(seeds)) == 2  # 16 completions, 8 a batch: each with draws of its own
    match = [first[f"eval_rewards/sid_level_{k + 1}/mean"] for k in range(len(SIZES))]
    assert first["eval_reward"] == pytest.approx(sum(match), abs=1e-6)  # SAPO's reward, summed over the levels
    assert 0 < sum(match) < len(SIZES)


def test_an_engine_that_marks_nothing_as_forced_trains_no_forced_token(folder, tmp_path, tokenizer):
    """Opening delimiters and only children are read off the ids; everything else counts as sampled."""

    def without_marks(prompts, trainer):
        return {name: value for name, value in fixed_rollouts(prompts, trainer).items() if name != "env_mask"}

    trainer = ours(folder, tmp_path, tokenizer, rollout_func=without_marks, max_steps=1)
    batches, score = [], trainer._generate_and_score_completions
    trainer._generate_and_score_completions = lambda inputs: batches.append(score(inputs)) or batches[-1]
    trainer.train()
    ids, sampled = batches[0]["completion_ids"], batches[0]["tool_mask"].bool()
    assert not sampled[ids == OPEN].any()
    assert sampled[ids == CLOSE].all()
    known = {tuple(sid[:depth]) for sid in SIDS.tolist() for depth in range(len(SIZES) + 1)}
    for row in range(len(ids)):
        codes = LAYOUT.parse(ids[row : row + 1]).sids[0].tolist()
        for level, code in enumerate(codes):
            column = (ids[row] == LAYOUT.sid_token_ids[level][code]).nonzero().item()
            children = sum((*codes[:level], other) in known for other in range(SIZES[level]))
            assert bool(sampled[row, column]) == (children > 1)


def test_a_reference_that_is_not_the_policy_is_refused(folder, tmp_path, tokenizer):
    model = load(folder)
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    with pytest.raises(InputError, match="differ before the first update"):
        ours(folder, tmp_path, tokenizer, model=model).train()


def test_dropout_is_off_in_attention_too(tmp_path, tokenizer):
    """Transformers keeps the rate of attention dropout as a number, which TRL's switch does not see."""
    model = tiny_model(VOCAB, scale=2.0)
    model.config.attention_dropout = 0.3
    model.save_pretrained(tmp_path / "stage2")
    assert load(tmp_path / "stage2").model.layers[0].self_attn.attention_dropout == 0.3
    _, _, trainer = train(tmp_path / "stage2", tmp_path, tokenizer, max_steps=1)  # with dropout, the start would differ
    assert trainer.model.model.layers[0].self_attn.attention_dropout == 0


def test_settings_can_be_used_twice(folder, tmp_path, tokenizer):
    args = SAPOConfig(**settings(tmp_path, max_steps=1))
    for _ in range(2):
        trainer = SAPOTrainer(load(folder), args, dataset(), tokenizer, LAYOUT, SidTrie(SIDS, SIZES))
        assert trainer.max_completion_length == 2 * 8 + 3 * 2
    assert args.max_completion_length is None
    assert args.reward_weights is None


def test_generations_of_one_update_differ(folder, tmp_path, tokenizer):
    """Three generations an update, each with a random stream of its own."""
    trainer = ours(folder, tmp_path, tokenizer, steps_per_generation=1, gradient_accumulation_steps=3, max_steps=2)
    seeds = []
    sample = trainer.sample
    trainer.sample = lambda prompts, size, seed: seeds.append(seed) or sample(prompts, size, seed)
    trainer.train()
    assert len(seeds) == len(set(seeds)) == 6


def test_a_short_last_update_of_an_epoch_shifts_no_seed(folder, tmp_path, tokenizer):
    """12 rows are 6 micro-batches: updates of 4 and of 2. A resumed run counts from the update, and so does this."""
    options = {"steps_per_generation": 1, "gradient_accumulation_steps": 4, "max_steps": 3}
    trainer = ours(folder, tmp_path, tokenizer, **options)
    seeds, sample = [], trainer.sample
    trainer.sample = lambda prompts, size, seed: seeds.append(seed[1:3]) or sample(prompts, size, seed)
    trainer.train()
    assert seeds == [(0, 0), (0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (2, 0), (2, 1), (2, 2), (2, 3)]


def test_broken_weights_say_so(folder, tmp_path, tokenizer):
    trainer = ours(folder, tmp_path, tokenizer, beta=0.0)
    with torch.no_grad():
        trainer.model.lm_head.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        trainer.train()


def test_a_loss_that_is_not_finite_stops_the_run(folder, tmp_path, tokenizer):
    trainer = ours(folder, tmp_path, tokenizer)
    compute = trainer._get_per_token_logps_and_entropies

    def broken(*args, **options):
        logps, *rest = compute(*args, **options)
        return (logps * float("nan") if logps.requires_grad else logps), *rest

    trainer._get_per_token_logps_and_entropies = broken
    with pytest.raises(FloatingPointError, match="lower learning rate"):
        trainer.train()


def test_the_methods_of_trl_that_we_override_are_where_we_expect_them():
    """A TRL that moved one of these would silently train something else."""
    import inspect

    expected = {
        "_generate_and_score_completions": ["self", "inputs"],
        "_calculate_rewards": ["self", "inputs", "prompts", "completions", "completion_ids_list"],
        "_compute_loss": ["self", "model", "inputs"],
        "_prepare_inputs": ["self", "generation_batch"],
    }
    for name, parameters in expected.items():
        assert list(inspect.signature(getattr(GRPOTrainer, name)).parameters) == parameters, name
    first = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)[:6]
    assert first == ["self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size"]
    source = inspect.getsource(GRPOTrainer._generate)
    assert 'extra_fields.pop("env_mask", None)' in source
    assert "self.rollout_func(prompts, self)" in source
    assert "current_gradient_accumulation_steps" in inspect.getsource(GRPOTrainer._compute_loss)
    for name in ("_metrics", "_logs", "_buffered_inputs", "_step"):
        assert f"self.{name}" in inspect.getsource(GRPOTrainer)


def test_the_module_lists_what_it_overrides():
    """Every method of ours that TRL's or transformers' trainer has too stands in the docstring, and no other."""
    theirs = {name for name in vars(SAPOTrainer) if hasattr(GRPOTrainer, name) and not name.startswith("__")}
    assert trainer_module.__doc__ is not None
    listed = {line.split()[0] for line in trainer_module.__doc__.splitlines() if line.startswith("    ")}
    assert listed == theirs
