"""SAPO in verl: on its batches, with its advantage and loss functions. `make test-verl` makes the environment."""

import asyncio
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import checkpoint

from sapo.credit.advantages import step_advantages, to_tokens
from sapo.credit.loss import policy_loss
from sapo.credit.objectives import OBJECTIVES
from sapo.credit.rewards import step_match
from sapo.data.catalog import Catalog
from sapo.errors import InputError
from sapo.policy.backbone import Pretrained, add_item_tokens, load_pretrained

pytest.importorskip("verl", reason="verl needs an older transformers: make test-verl")

import verl
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import DictConfigWrap
from verl.experimental.reward_loop.reward_manager import get_reward_manager_cls
from verl.trainer.ppo.core_algos import ADV_ESTIMATOR_REGISTRY, agg_loss, get_adv_estimator_fn
from verl.trainer.ppo.ray_trainer import compute_advantage
from verl.trainer.ppo.utils import need_reference_policy
from verl.trainer.ppo.v1.utils import compute_advantage_for_multi_trajectories
from verl.utils.config import validate_config
from verl.workers.rollout.replica import TokenOutput

from sapo.integrations import verl as ours

CATALOG = Catalog(
    "shop",
    torch.tensor([[0, 0, 0], [0, 1, 0], [0, 1, 1], [1, 0, 0], [1, 1, 0], [1, 1, 2]]),
    [f"thing {index}" for index in range(6)],
)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = checkpoint("qwen", CATALOG.titles * 5, tmp_path_factory.mktemp("qwen"))
    model, tokenizer = load_pretrained(Pretrained(str(folder)))
    add_item_tokens(model, tokenizer, CATALOG)
    return tokenizer


@pytest.fixture(scope="module")
def layout(tokenizer):
    return ours.layout_of(tokenizer)


def completions(layout, rows, seed=0):
    """Ragged completions, a few malformed, with which of their tokens were sampled."""
    rng = np.random.default_rng(seed)
    found = []
    for row in range(rows):
        ids, mask = [], []
        for _ in range(layout.blocks - (row % 7 == 6)):  # a block short now and then
            words = rng.integers(30, 200, size=rng.integers(0, 5)).tolist()
            ids += [layout.think_start_id, *words, layout.think_end_id, layout.separator_id]
            mask += [0, *[1] * len(words), int(rng.integers(2)), 0]
        sid = CATALOG.sids[int(rng.integers(CATALOG.num_items))].tolist()
        ids += [int(layout.sid_token_ids[level][code]) for level, code in enumerate(sid)]
        found.append((ids, [*mask, 1, 1, int(rng.integers(2))]))
    return found


def batch(layout, tokenizer, groups=3, size=4, seed=0):
    """A batch as verl's trainers make it, padded, in an order in which groups are torn; and what we made it of."""
    rows = completions(layout, groups * size, seed)
    targets = [CATALOG.sids[row // size].tolist() for row in range(len(rows))]
    prompts = [f"p{row // size}" for row in range(len(rows))]
    width = max(len(ids) for ids, _ in rows) + 3
    pad = tokenizer.pad_token_id
    responses = torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows])
    response_mask = torch.tensor([mask + [0] * (width - len(mask)) for _, mask in rows])
    written = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows])
    coded = [ours.coded_rewards(layout, ids, target)[0] for (ids, _), target in zip(rows, targets, strict=True)]
    scores = torch.tensor([row + [0.0] * (width - len(row)) for row in coded])
    order = torch.from_numpy(np.random.default_rng(1).permutation(len(rows)))
    data = DataProto.from_dict(
        tensors={
            "responses": responses[order],
            "prompts": torch.zeros(len(rows), 2, dtype=torch.long),
            "attention_mask": torch.cat([torch.ones(len(rows), 2, dtype=torch.long), written], 1)[order],
            "response_mask": response_mask[order],
            "token_level_rewards": scores[order],
        },
        non_tensors={"uid": np.array([prompts[row] for row in order], dtype=object)},
    )
    return data, order, responses, response_mask, written, torch.tensor(targets)


@pytest.mark.parametrize("compute", ["legacy", "v1"])
def test_advantages_on_its_batches_are_ours(compute, layout, tokenizer):
    data, order, responses, mask, written, targets = batch(layout, tokenizer)
    config = OmegaConf.create({"adv_estimator": "step_aligned_tokens"})
    if compute == "v1":
        keys = [f"{uid}_{row}_0" for row, uid in enumerate(data.non_tensor_batch["uid"])]
        data = compute_advantage_for_multi_trajectories(data, keys, "step_aligned_tokens", config=config)
    else:
        data = compute_advantage(data, "step_aligned_tokens", config=config)
    parsed = layout.parse(responses.masked_fill(written == 0, -1))
    predicted = parsed.sids.masked_fill(~parsed.well_formed[:, None], -1)
    match = step_match(predicted, targets)
    steps = layout.token_steps(responses.masked_fill(written == 0, -1))
    expected = to_tokens(step_advantages(match, 4), steps) * mask
    assert (expected != 0).any()
    torch.testing.assert_close(data.batch["advantages"], expected[order], rtol=1e-6, atol=1e-6)
    assert not data.batch["advantages"][mask[order] == 0].any()  # padding, forced tokens
    on_sid = layout.read(responses).is_sid[order] & (data.batch["response_mask"] == 1)
    assert data.batch["advantages"][on_sid].abs().sum() > 0  # SID tokens carry credit


def test_the_loss_summed_over_tokens_is_the_step_mean(layout, tokenizer):
    """With verl's `seq-mean-token-sum`: loss and gradient of `policy_loss` of SAPO at ratio 1, without KL."""
    data, order, responses, mask, written, targets = batch(layout, tokenizer, seed=5)
    data = compute_advantage(data, "step_aligned", config=OmegaConf.create({}))
    logps = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    theirs, own = logps[order].clone().requires_grad_(), logps.clone().requires_grad_()
    ratio = (theirs - theirs.detach()).exp()
    loss = agg_loss(-data.batch["advantages"] * ratio, data.batch["response_mask"], "seq-mean-token-sum")
    loss.backward()
    steps = layout.token_steps(responses.masked_fill(written == 0, -1))
    parsed = layout.parse(responses.masked_fill(written == 0, -1))
    match = step_match(parsed.sids.masked_fill(~parsed.well_formed[:, None], -1), targets)
    advantages = to_tokens(step_advantages(match, 4), steps)
    found = policy_loss(
        OBJECTIVES["sapo"], own, own.detach(), advantages, steps, mask.bool(), num_steps=layout.num_steps, beta=0
    )
    found.loss.backward()
    assert own.grad.abs().sum() > 0
    torch.testing.assert_close(loss, found.loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(theirs.grad, own.grad[order], rtol=1e-5, atol=1e-7)


def test_what_cannot_be_credited_is_refused(layout, tokenizer):
    data, *_ = batch(layout, tokenizer)
    estimator = get_adv_estimator_fn("step_aligned")
    rewards, mask, index = (
        data.batch["token_level_rewards"],
        data.batch["response_mask"],
        data.non_tensor_batch["uid"],
    )
    with pytest.raises(InputError, match="use_kl_in_reward"):
        estimator(token_level_rewards=rewards - 0.001, response_mask=mask, index=index)
    with pytest.raises(InputError, match="group"):
        estimator(token_level_rewards=rewards, response_mask=mask, index=np.arange(len(mask)))
    with pytest.raises(InputError, match="is no SID of 3 codes"):
        ours.coded_rewards(layout, [1], "<a_0><b_1>")


def test_the_reward_manager_says_what_a_batch_holds(layout, tokenizer):
    data, order, responses, _, written, targets = batch(layout, tokenizer)
    truths = np.array([{"ground_truth": targets[row].tolist()} for row in order], dtype=object)
    data.non_tensor_batch["reward_model"] = truths
    manager = get_reward_manager_cls("step_match")(OmegaConf.create({}), tokenizer)
    scores = [asyncio.run(manager.run_single(data[row : row + 1])) for row in range(len(data))]
    rewards = type(manager).assemble_rm_scores(data, [score["reward_score"] for score in scores])
    assert torch.equal(rewards, data.batch["token_level_rewards"])
    parsed = layout.parse(responses.masked_fill(written == 0, -1))
    exact = (parsed.sids == targets).all(1) & parsed.well_formed
    assert [score["reward_extra_info"]["exact"] for score in scores] == exact[order].float().tolist()


class Server:
    """Answers as verl's server does: what stops or is allowed is obeyed, everything else is drawn."""

    def __init__(self, layout, seed=0):
        self.rng, self.layout, self.calls = np.random.default_rng(seed), layout, []

    async def generate(self, prompt_ids, sampling_params, **options):
        self.calls.append((list(prompt_ids), sampling_params, options))
        if allowed := sampling_params.get("allowed_token_ids"):
            ids = [int(self.rng.choice(allowed))]
        else:
            most = sampling_params["max_tokens"]
            ids = self.rng.integers(30, 200, size=self.rng.integers(0, most + 1)).tolist()
            if len(ids) < most:
                ids.append(self.layout.think_end_id)
        return TokenOutput(token_ids=ids, log_probs=[-0.5] * len(ids))


def test_the_agent_loop_writes_blocks_and_an_item(layout, tokenizer, tmp_path):
    CATALOG.save(tmp_path)
    config = OmegaConf.create(
        {"actor_rollout_ref": {"rollout": {"response_length": 40, "prompt_length": 100}}, "data": {}}
    )
    server = Server(layout)
    make = lambda **options: ours.StepAlignedLoop(  # noqa: E731
        trainer_config=DictConfigWrap(config),
        server_manager=server,
        tokenizer=tokenizer,
        processor=None,
        dataset_cls=None,
        data_config=DictConfigWrap(config.data),
        data=str(tmp_path),
        **options,
    )
    loop = make()
    # 40 tokens, less 3 x (two delimiters and a line break) and 3 codes
    assert loop.block_budget == (40 - 9 - 3) // 3 == 9
    hits, widths = 0, set()
    for row in range(40):
        target = CATALOG.sids[row % 6].tolist()
        truth = "".join(f"<{'abc'[level]}_{code}>" for level, code in enumerate(target))
        prompt = [{"role": "user", "content": "what comes next?"}]
        asked = loop.run({"temperature": 1.0}, raw_prompt=prompt, reward_model={"ground_truth": truth}, priority=row)
        output = loop.loop.run_until_complete(asked)
        ids, mask = output.response_ids, output.response_mask
        assert len(ids) == len(mask) == len(output.response_logprobs) == len(output.token_rewards) <= 40
        parsed = layout.parse(torch.tensor([ids]))
        assert parsed.well_formed.all()
        assert loop.trie.contains(parsed.sids).all()
        match = (parsed.sids[0] == torch.tensor(target)).float()
        assert output.reward_score == match.sum()
        hits += int(match.all())
        for token, sampled, logp in zip(ids, mask, output.response_logprobs, strict=True):
            forced = token in (layout.think_start_id, layout.separator_id)
            assert not (sampled and forced)
            assert logp == (-0.5 if sampled else 0.0)
        # item 3 has the only code under <a_1><b_0>
        if parsed.sids[0, :2].tolist() in ([0, 0], [1, 0]):
            assert mask[-1] == 0
        fields = output.as_dict()
        assert fields["rm_scores"].tolist() == pytest.approx(output.token_rewards)
        assert "token_rewards" not in fields
        assert "reward_score" not in fields
        widths.add(len(ids))
    assert hits
    assert len(widths) > 5
    never = {layout.think_start_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    assert all(set(params.get("logit_bias", never)) == never for _, params, _ in server.calls)
    opened = loop._before_block([50, 51, layout.think_start_id, layout.separator_id])
    assert opened == [50, 51]  # a template that opens a block leaves that to the loop
    said = [layout.think_start_id, 60, layout.think_end_id, 61]
    assert loop._before_block(said) == said
    assert all("stop_token_ids" in params or "allowed_token_ids" in params for _, params, _ in server.calls)
    gated = make(gated=True).run({}, raw_prompt=prompt, reward_model={"ground_truth": [5, 1, 0]})
    assert loop.loop.run_until_complete(gated).reward_score == 0  # under a wrong first code nothing is paid
    with pytest.raises(InputError, match="3 blocks of 20 tokens do not fit a response of 40"):
        make(block_budget=20)


def test_a_tokenizer_without_items_is_refused(tmp_path):
    _, plain = load_pretrained(Pretrained(str(checkpoint("qwen", CATALOG.titles, tmp_path / "plain"))))
    with pytest.raises(InputError, match="lacks <think>"):
        ours.layout_of(plain)


def test_verl_finds_it_by_the_environment():
    code = "import verl; from verl.trainer.ppo.core_algos import get_adv_estimator_fn as f; print(f('step_aligned'))"
    environment = os.environ | {"VERL_USE_EXTERNAL_MODULES": "sapo.integrations.verl"}
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=False)
    assert "step_aligned" in answer.stdout, answer.stderr[-1500:]


def test_the_example_has_options_that_verl_knows():
    root = Path(__file__).resolve().parent.parent / "docs" / "verl"
    words = (
        (root / "train.sh").read_text().split("main_ppo", 1)[1].replace("\\\n", " ").replace('"$policy"', "p").split()
    )
    assert len(words) > 15
    with initialize_config_dir(str(Path(verl.__file__).parent / "trainer" / "config"), version_base=None):
        config = compose("ppo_trainer", overrides=words)  # an option that it does not know raises
    validate_config(config, use_reference_policy=need_reference_policy(config), use_critic=False)
    assert config.algorithm.adv_estimator in ADV_ESTIMATOR_REGISTRY
    assert config.actor_rollout_ref.actor.loss_agg_mode == "seq-mean-token-sum"
    loops = OmegaConf.load(root / "agent_loop.yaml")
    assert loops[0].name == config.actor_rollout_ref.rollout.agent.default_agent_loop
    assert loops[0]._target_ == f"{ours.StepAlignedLoop.__module__}.{ours.StepAlignedLoop.__qualname__}"
