"""Step-aligned credit in verl (tested with 0.9.1), which finds this module by an environment variable:

    VERL_USE_EXTERNAL_MODULES=sapo.integrations.verl python -m verl.trainer.main_ppo \\
        algorithm.adv_estimator=step_aligned actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum ...

What it registers:

    advantage estimator  step_aligned         A_k, divided by K and by the trained tokens of step k: with the loss
                                              summed over tokens, the mean over a step's tokens and over steps
                         step_aligned_tokens  A_k at every token of step k, for other ways to average
    agent loop           step_aligned         K blocks, each closed at its budget, then K codes of the catalogue's trie
    reward manager       step_match           the same rewards, for completions of other loops

Ratios and KL are of the full softmax there: verl knows nothing of the tokens that a decoder allowed. SAPO in verl's own
`policy_loss.loss_mode` is another method (Soft Adaptive Policy Optimization, arXiv 2511.20347).
"""

import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopBase, AgentLoopOutput
from verl.experimental.agent_loop.agent_loop import register as register_loop
from verl.experimental.reward_loop.reward_manager import register as register_manager
from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase
from verl.trainer.ppo.core_algos import register_adv_est
from verl.utils.profiler import simple_timer

from sapo.credit.advantages import step_advantages, to_tokens
from sapo.credit.rewards import step_match
from sapo.data.catalog import Catalog
from sapo.decoding.layout import ReasoningLayout
from sapo.errors import InputError
from sapo.integrations.step_codes import decode_steps, encode_steps
from sapo.policy.prompts import THINK_END, THINK_START
from sapo.semantic_ids.trie import SidTrie

_SID = re.compile(r"<([a-z])_(\d+)>")


def layout_of(tokenizer: Any) -> ReasoningLayout:
    """The layout of a tokenizer that knows delimiters and SID tokens, as those of policies do.

    Raises:
        InputError: a tokenizer without them, or with gaps in them.
    """
    vocabulary = tokenizer.get_vocab()
    codes: dict[str, dict[int, int]] = defaultdict(dict)
    for token, index in vocabulary.items():
        if found := _SID.fullmatch(token):
            codes[found[1]][int(found[2])] = index
    levels = sorted(codes)
    whole = all(sorted(codes[level]) == list(range(len(codes[level]))) for level in levels)
    named = "".join(levels) == "abcdefghijklmnopqrstuvwxyz"[: len(levels)]
    if len(levels) < 2 or not whole or not named or not {THINK_START, THINK_END} <= set(vocabulary):
        raise InputError(
            "the tokenizer lacks <think>, </think>, or SID tokens <a_0>, <a_1>, ..., <b_0>, ...: train from a policy's "
            "folder of `sapo run --preset paper`, whose tokenizer has them."
        )
    line = tokenizer(f"{THINK_END}\n{THINK_START}", add_special_tokens=False)["input_ids"][1:-1]
    return ReasoningLayout(
        len(levels),
        vocabulary[THINK_START],
        vocabulary[THINK_END],
        [torch.tensor([codes[level][code] for code in range(len(codes[level]))]) for level in levels],
        sid_in_blocks=True,
        separator_id=line[0] if len(line) == 1 else None,
    )


def coded_rewards(
    layout: ReasoningLayout, response: Sequence[int], truth: str | Sequence[int], gated: bool = False
) -> tuple[list[float], list[float]]:
    """Rewards of a response's tokens with its steps in them, and the reward of each step, 0 for a malformed response.

    Args:
        truth: the target's SID, as text or as K codes.
        gated: pay a step only if all before it are right too.
    """
    ids = torch.tensor([list(response)])
    steps, parsed = layout.token_steps(ids), layout.parse(ids)
    codes = [int(code) for _, code in _SID.findall(truth)] if isinstance(truth, str) else [int(code) for code in truth]
    if len(codes) != layout.num_steps:
        raise InputError(f"the ground truth {truth!r} is no SID of {layout.num_steps} codes.")
    predicted = parsed.sids.masked_fill(~parsed.well_formed[:, None], -1)
    match = step_match(predicted, torch.tensor([codes]), gated=gated)
    reading = layout.read(ids)
    rewards = torch.zeros(ids.shape)
    for step in range(layout.num_steps):
        rewards += match[:, step, None] * (reading.is_sid & (reading.sid_index == step))
    return encode_steps(steps, rewards, layout.num_steps)[0].tolist(), match[0].tolist()


@register_adv_est("step_aligned_tokens")
def step_aligned_tokens(
    token_level_rewards: Float[Tensor, "B T"],
    response_mask: Tensor,
    index: np.ndarray,
    config: Any = None,
    **others: Any,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """A_k at every trained token of step k, normalised over the completions of a prompt (arXiv 2605.17648).

    Args:
        token_level_rewards: with steps in them (`encode_steps`).
        index: which prompt each row is of.

    Returns:
        Advantages, twice: verl also asks for returns.

    Raises:
        InputError: rewards without steps; a prompt with a single completion.
    """
    advantages, _, _ = _advantages(token_level_rewards, response_mask, index)
    return advantages, advantages


@register_adv_est("step_aligned")
def step_aligned(
    token_level_rewards: Float[Tensor, "B T"],
    response_mask: Tensor,
    index: np.ndarray,
    config: Any = None,
    **others: Any,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    """The same, divided by K and by how many tokens of step k are trained: summed over tokens it is the step mean."""
    advantages, steps, num_steps = _advantages(token_level_rewards, response_mask, index)
    trained = response_mask.bool()
    counts = torch.stack([((steps == k) & trained).sum(1) for k in range(num_steps)], 1)
    advantages = advantages / (num_steps * to_tokens(counts.to(advantages.dtype), steps).clamp(min=1))
    return advantages, advantages


def _advantages(
    values: Float[Tensor, "B T"], mask: Tensor, index: np.ndarray
) -> tuple[Float[Tensor, "B T"], Tensor, int]:
    steps, rewards, num_steps = decode_steps(values)
    by_step = torch.stack([(rewards * (steps == k)).sum(1) for k in range(num_steps)], 1)
    groups: dict[Any, list[int]] = defaultdict(list)
    for row, prompt in enumerate(index.tolist()):
        groups[prompt].append(row)
    advantages = torch.zeros_like(by_step)
    for rows in groups.values():
        advantages[rows] = step_advantages(by_step[rows], len(rows))
    return to_tokens(advantages, steps) * mask.to(values.dtype), steps, num_steps


class StepAlignedOutput(AgentLoopOutput):
    """What a loop hands to verl, with a reward for every token of the response in place of one at its end."""

    token_rewards: list[float]

    def as_dict(self) -> dict[str, Any]:
        """For verl's batches."""
        output: dict[str, Any] = super().as_dict()
        output["rm_scores"] = torch.tensor(output.pop("token_rewards"), dtype=torch.float32)
        return output


@register_loop("step_aligned")
class StepAlignedLoop(AgentLoopBase):
    """Writes in the form of `sapo.decoding.sampling`, by calls of verl's server: a call a block, and one a code that
    has rivals. Of a block, EOS, padding and the opening delimiter are kept out by a bias of their logits.

    Args:
        data, sids: folder of TSV files, and which of its SIDs the catalogue has.
        block_budget: most tokens of a block; an equal share of the response length where None.
        gated: pay a step only if all before it are right too.
    """

    def __init__(
        self,
        *args: Any,
        data: str,
        sids: str = "sids",
        block_budget: int | None = None,
        gated: bool = False,
        **options: Any,
    ):
        super().__init__(*args, **options)
        catalog = Catalog.load(data, sids)
        self.layout, self.gated = layout_of(self.tokenizer), gated
        self.trie = SidTrie(catalog.sids, catalog.level_sizes)
        self.trie.check_levels([len(ids) for ids in self.layout.sid_token_ids])
        never = {self.layout.think_start_id, self.tokenizer.eos_token_id, self.tokenizer.pad_token_id} - {None}
        self.kept_out = dict.fromkeys(sorted(never), -100.0)
        room = self.rollout_config.response_length - self.layout.longest([0] * self.layout.num_steps)
        self.block_budget = room // self.layout.num_steps if block_budget is None else block_budget
        if not 1 <= self.block_budget * self.layout.num_steps <= room:
            raise InputError(
                f"{self.layout.num_steps} blocks of {self.block_budget} tokens do not fit a response of "
                f"{self.rollout_config.response_length}."
            )

    async def run(self, sampling_params: dict[str, Any], **row: Any) -> StepAlignedOutput:
        """A completion for one row of the data set, whose `reward_model` holds the ground truth."""
        layout = self.layout
        metrics: dict[str, Any] = {}
        prompt = self._before_block(await self.ct_build_initial_tokens(list(row["raw_prompt"])))
        written = _Written(self.server_manager, prompt, sampling_params, row)
        with simple_timer("generate_sequences", metrics):
            for _ in range(layout.blocks):
                written.force(layout.think_start_id)
                last = await written.sample(
                    max_tokens=self.block_budget,
                    stop_token_ids=[layout.think_end_id],
                    ignore_eos=True,
                    logit_bias=self.kept_out,
                )
                if last != layout.think_end_id:
                    written.force(layout.think_end_id)
                if layout.separator_id is not None:
                    written.force(layout.separator_id)
            node = torch.zeros(1, dtype=torch.long)
            for level, ids in enumerate(layout.sid_token_ids):
                codes, nodes = (part[0] for part in self.trie.children(node, level))
                tokens = ids[codes[codes >= 0]].tolist()
                if len(tokens) == 1:
                    written.force(tokens[0])
                    chosen = tokens[0]
                else:
                    chosen = await written.sample(max_tokens=1, allowed_token_ids=tokens, ignore_eos=True)
                node = nodes[codes >= 0][tokens.index(chosen)][None]
        coded, match = coded_rewards(layout, written.ids, row["reward_model"]["ground_truth"], self.gated)
        metrics.setdefault("num_preempted", -1)
        return StepAlignedOutput(
            prompt_ids=prompt,
            response_ids=written.ids,
            response_mask=written.mask,
            response_logprobs=written.logps if written.has_logps else None,
            num_turns=2,
            metrics=metrics,
            reward_score=sum(match),
            token_rewards=coded,
            extra_fields={"turn_scores": [], "tool_rewards": [], "reward_extra_info": _extra(match)},
        )

    def _before_block(self, prompt: list[int]) -> list[int]:
        """A prompt up to the block that its template opens; the loop opens all blocks itself."""
        if self.layout.think_start_id not in prompt:
            return prompt
        last = len(prompt) - 1 - prompt[::-1].index(self.layout.think_start_id)
        return prompt if self.tokenizer.decode(prompt[last + 1 :]).strip() else prompt[:last]


class _Written:
    """A response in the making."""

    def __init__(self, server: Any, prompt: list[int], sampling: dict[str, Any], row: dict[str, Any]):
        from uuid import uuid4

        self.server, self.prompt, self.sampling = server, prompt, sampling
        self.options = {"request_id": uuid4().hex, "priority": int(row.get("priority", 0))}
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.logps: list[float] = []
        self.has_logps = True

    def force(self, token: int) -> None:
        """A token that was no choice."""
        self.ids.append(token)
        self.mask.append(0)
        self.logps.append(0.0)

    async def sample(self, **limits: Any) -> int:
        """Tokens of the server; returns the last."""
        output = await self.server.generate(
            prompt_ids=self.prompt + self.ids, sampling_params=self.sampling | limits, **self.options
        )
        self.ids += output.token_ids
        self.mask += [1] * len(output.token_ids)
        self.has_logps &= output.log_probs is not None
        self.logps += output.log_probs or [0.0] * len(output.token_ids)
        return int(self.ids[-1])


@register_manager("step_match")
class StepMatchManager(RewardManagerBase):
    """Rewards of completions that other loops wrote, for trainers that assemble the rewards of a batch."""

    def __init__(self, config: Any, tokenizer: Any, compute_score: Any = None, **options: Any):
        super().__init__(config, tokenizer, compute_score)
        self.layout = layout_of(tokenizer)

    async def run_single(self, data: DataProto) -> dict[str, Any]:
        """A list of token rewards, as `reward_score`, and the match of each step."""
        item = data[-1:][0]
        response = item.batch["responses"]
        length = int(item.batch["attention_mask"][-len(response) :].sum())
        truth = item.non_tensor_batch["reward_model"]["ground_truth"]
        coded, match = coded_rewards(self.layout, response[:length].tolist(), truth)
        return {"reward_score": coded, "reward_extra_info": _extra(match)}

    @classmethod
    def assemble_rm_scores(cls, data: DataProto, scores: list[list[float]]) -> Tensor:
        """(B, T) of the lists that `run_single` returned."""
        rewards = torch.zeros(data.batch["responses"].shape, dtype=torch.float32)
        for row, coded in enumerate(scores):
            rewards[row, : len(coded)] = torch.tensor(coded)
        return rewards


def _extra(match: list[float]) -> dict[str, float]:
    """What verl logs."""
    return {f"step_{k}": value for k, value in enumerate(match, start=1)} | {"exact": float(all(match))}
