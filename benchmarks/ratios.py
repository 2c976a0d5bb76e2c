"""Ours against what a user would run instead, one case a row of the table.

Both sides do the same work and their results are compared in the same run; a row is `equal` only if that holds.
"""

import copy
import functools
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    PrefixConstrainedLogitsProcessor,
    PrinterCallback,
    TrainerCallback,
)
from transformers.trainer_callback import TrainerControl, TrainerState
from trl import GRPOConfig, GRPOTrainer
from trl.trainer.utils import selective_log_softmax

from benchmarks.world import CLOSE, EOS, OPEN, PAD, World
from sapo.credit.advantages import step_advantages, to_tokens
from sapo.credit.loss import policy_loss
from sapo.credit.objectives import OBJECTIVES
from sapo.decoding.beam_search import Beams, constrained_beam_search
from sapo.decoding.logprobs import completion_logps, forced_tokens
from sapo.decoding.sampling import Rollouts, grouped_rollouts
from sapo.decoding.shared_prefix import PackedGroups, share_prompts
from sapo.semantic_ids.trie import SidTrie
from sapo.training.config import SAPOConfig
from sapo.training.trainer import SAPOTrainer

CLOSE_ENOUGH = 1e-5  # of log-probabilities and parameters, and relative of gradients, in float32
BETA = 1e-3  # of the KL term, which costs a reference policy on both sides


@dataclass(frozen=True)
class Case:
    """One comparison.

    Args:
        ours, theirs: do the work once; what they return is what `equal` compares.
        seconds: reads the time off a result that measured itself; None to time the call.
        tensors: whether memory is that of tensors, and worth measuring.
    """

    what: str
    against: str
    ours: Callable[[], Any]
    theirs: Callable[[], Any]
    equal: Callable[[], bool]
    seconds: Callable[[Any], float] | None = None
    tensors: bool = True


def update_case(world: World, sharing_alone: bool = False) -> Case:
    """Log-probabilities, loss and gradients of one batch of groups.

    Theirs takes the log-softmax of TRL, or, to see what sharing alone does, ours.
    """
    sizes, model = world.sizes, world.model
    layout, trie = world.layout(sizes.steps), world.trie(sizes.items, sizes.steps)
    prompts = world.prompts(sizes.prompts, sizes.prompt_tokens)
    mask = torch.ones_like(prompts)
    rollouts = sample(world, sizes.steps)
    ids, written = rollouts.completion_ids, rollouts.completion_mask
    steps = layout.token_steps(ids).masked_fill(~written, -1)
    rewards = torch.rand(len(ids), sizes.steps, generator=torch.Generator().manual_seed(3))
    advantages = step_advantages(rewards, sizes.group_size)
    advantages = to_tokens(advantages.to(ids.device), steps)
    at = written & ~forced_tokens(ids, layout, trie)

    def logps(shared: bool) -> Tensor:
        if shared:
            share_prompts(model)
            packed = PackedGroups(prompts, mask.bool(), ids, written)
            logits = packed.logits(model, packed.predictor[at])
        else:
            model.set_attn_implementation("sdpa")
            rows = prompts.repeat_interleave(sizes.group_size, 0)
            attend = torch.cat([torch.ones_like(rows), written.long()], 1)
            logits = model(
                input_ids=torch.cat([rows, ids], 1),
                attention_mask=attend,
                position_ids=(attend.cumsum(1) - 1).clamp(min=0),
                use_cache=False,
                logits_to_keep=ids.shape[1] + 1,
            ).logits[:, :-1]
            if not sharing_alone:
                return selective_log_softmax(logits, ids)
            logits = logits[at]
        return completion_logps(logits, ids, at, layout, trie, pad_id=PAD, eos_ids=[EOS], sid_logps="full")

    def update(shared: bool) -> tuple[Tensor, Tensor]:
        model.train()
        model.zero_grad()
        values = logps(shared)
        policy_loss(
            OBJECTIVES["sapo"],
            values,
            values.detach(),
            advantages,
            steps,
            rollouts.sampled,
            num_steps=sizes.steps,
            ref_logps=values.detach(),
        ).loss.backward()
        gradient = torch.cat([parameter.grad.flatten().float() for parameter in model.parameters()])
        return values.detach(), gradient

    def equal() -> bool:
        (mine, my_gradient), (theirs, their_gradient) = update(True), update(False)
        apart = (mine - theirs)[rollouts.sampled].abs().max()
        relative = (my_gradient - their_gradient).norm() / their_gradient.norm()
        return bool(apart <= CLOSE_ENOUGH and relative <= CLOSE_ENOUGH and their_gradient.norm() > 0)

    what = "policy update, sharing alone" if sharing_alone else "policy update"
    return Case(what, "same model, prompts repeated", lambda: update(True), lambda: update(False), equal)


def sample(world: World, steps: int, greedy: bool = False) -> Rollouts:
    """Grouped rollouts whose blocks all have the same number of words."""
    sizes = world.sizes
    prompts = world.prompts(sizes.prompts, sizes.prompt_tokens)
    words = sizes.new_tokens // steps
    return grouped_rollouts(
        world.model,
        prompts,
        torch.ones_like(prompts),
        world.layout(steps),
        world.trie(sizes.items, steps),
        sizes.group_size,
        block_budget=words,
        min_block_tokens=words,
        generator=torch.Generator(world.device).manual_seed(4),
        pad_id=PAD,
        greedy=greedy,
    )


def rollout_case(world: World) -> Case:
    """Words of one block after an opening delimiter. Ours closes the block and names an item on top of it."""
    sizes, model = world.sizes, world.model
    prompts = world.prompts(sizes.prompts, sizes.prompt_tokens)
    rows = torch.cat([prompts, torch.full_like(prompts[:, :1], OPEN)], 1).repeat_interleave(sizes.group_size, 0)
    excluded = [PAD, EOS, OPEN, CLOSE, *world.layout(1).sid_ids.tolist()]

    def generate(greedy: bool) -> Any:
        model.set_attn_implementation("sdpa")
        model.eval()
        config = GenerationConfig(
            max_new_tokens=sizes.new_tokens,
            do_sample=not greedy,
            top_k=None if greedy else 0,
            pad_token_id=PAD,
            eos_token_id=None,
            suppress_tokens=excluded,
            return_dict_in_generate=greedy,
            output_scores=greedy,
        )
        with torch.no_grad():
            return model.generate(rows, attention_mask=torch.ones_like(rows), generation_config=config)

    def equal() -> bool:
        mine, theirs = sample(world, 1, greedy=True), generate(greedy=True)
        width, words = rows.shape[1], slice(1, 1 + sizes.new_tokens)
        tokens = theirs.sequences[:, width:]
        logps = torch.stack(theirs.scores, 1).float().log_softmax(-1).gather(2, tokens[..., None])[..., 0]
        same = (mine.completion_ids[:, words] == tokens).all()
        return bool(same and (mine.logps[:, words] - logps).abs().max() <= CLOSE_ENOUGH)

    return Case("sampling rollouts", "HF generate", lambda: sample(world, 1), lambda: generate(False), equal)


def beam_case(world: World, beams: int, batch: int = 64, prompt_tokens: int = 64) -> Case:
    """K steps of beam search over the catalogue; each side has a model of its own, set up once."""
    sizes, model = world.sizes, world.model
    sharing = copy.deepcopy(model).eval()
    share_prompts(sharing)
    ids, trie = world.token_ids(sizes.levels), world.trie(sizes.items, sizes.levels)
    prompts = world.prompts(batch, prompt_tokens)
    mask = torch.ones_like(prompts)
    children = functools.cache(lambda: dict_of_sets(world.sids(sizes.items, sizes.levels)))  # not if never asked
    first = [int(level[0]) for level in ids]

    def callback(row: int, sequence: Tensor) -> list[int]:
        codes = tuple(token - first[level] for level, token in enumerate(sequence[prompt_tokens:].tolist()))
        # a beam that transformers keeps although its score is -inf has left the tree
        return [first[len(codes)] + code for code in children().get(codes, ())] or [PAD]

    def ours() -> Beams:
        return constrained_beam_search(sharing, prompts, mask, trie, ids, beams)

    def theirs(scores: bool = False) -> Any:
        model.set_attn_implementation("sdpa")
        model.eval()
        config = GenerationConfig(
            num_beams=beams,
            num_return_sequences=beams,
            max_new_tokens=sizes.levels,
            min_new_tokens=sizes.levels,
            do_sample=False,
            length_penalty=0.0,
            early_stopping=False,
            pad_token_id=PAD,
            eos_token_id=EOS,
            return_dict_in_generate=scores,
            output_scores=scores,
        )
        return model.generate(prompts, attention_mask=mask, generation_config=config, prefix_allowed_tokens_fn=callback)

    def equal() -> bool:
        mine, other = ours(), theirs(scores=True)
        codes = other.sequences.view(batch, beams, -1)[..., prompt_tokens:].cpu() - torch.tensor(first)
        scores = other.sequences_scores.view(batch, beams).cpu()
        return same_lists(mine, codes, scores)

    # the sizes stand in the name of the first of its rows
    where = f" ({sizes.items / 1000:g}k items, batch {batch}, prompt {prompt_tokens})" if beams == 10 else ""
    return Case(f"beam search {beams} beams{where}", "HF generate + callback", ours, theirs, equal)


def same_lists(mine: Beams, codes: Tensor, scores: Tensor) -> bool:
    """Same SIDs in the same order, but for neighbours whose scores differ by rounding alone."""
    apart = (mine.scores.cpu() - scores).abs()
    differs = (mine.sids.cpu() != codes).any(-1)
    gap = (scores[:, 1:] - scores[:, :-1]).abs()
    tied = torch.zeros_like(differs)
    tied[:, 1:] |= gap <= CLOSE_ENOUGH
    tied[:, :-1] |= gap <= CLOSE_ENOUGH
    tied[:, -1] = True  # its neighbour may be just outside the list
    return bool((apart <= CLOSE_ENOUGH * 10).all() and not (differs & ~tied).any())


def dict_of_sets(sids: Tensor) -> dict[tuple[int, ...], set[int]]:
    """The trie as it is written in most repositories."""
    children: dict[tuple[int, ...], set[int]] = defaultdict(set)
    for sid in sids.tolist():
        for depth, code in enumerate(sid):
            children[tuple(sid[:depth])].add(code)
    return children


def trie_build_case(world: World, items: int = 1_000_000, levels: int = 4) -> Case:
    """From SIDs to what can be asked."""
    sids, sizes = world.sids(items, levels), (world.sizes.codes,) * levels

    def equal() -> bool:
        trie, children = SidTrie(sids, sizes), dict_of_sets(sids)
        sampled = sids[:1000]
        return all(
            trie.allowed(sampled[:, :depth])[row].nonzero()[:, 0].tolist() == sorted(children[tuple(sid[:depth])])
            for depth in range(levels)
            for row, sid in enumerate(sampled.tolist())
        )

    what = f"trie build ({count(items)} items, {levels} levels of {world.sizes.codes})"
    return Case(what, "dict of sets", lambda: SidTrie(sids, sizes), lambda: dict_of_sets(sids), equal, tensors=False)


def trie_allowed_case(world: World, items: int = 1_000_000, levels: int = 4, prefixes: int = 10_000) -> Case:
    """Which codes may follow each prefix: one gather, against a dict behind the callback that transformers asks row by
    row. Codes stand for tokens, so that the mask has no more columns than ours."""
    sids, sizes = world.sids(items, levels), (world.sizes.codes,) * levels
    trie, children = SidTrie(sids, sizes).to(world.device), dict_of_sets(sids)
    asked = sids[:prefixes, :-1].contiguous()
    on_device, scores = asked.to(world.device), torch.zeros(prefixes, sizes[-1])
    constraint = PrefixConstrainedLogitsProcessor(lambda row, codes: list(children[tuple(codes.tolist())]), num_beams=1)

    def theirs() -> Tensor:
        return constraint(asked, scores)

    def equal() -> bool:
        return torch.equal(trie.allowed(on_device).cpu(), theirs() == 0)

    what = f"trie allowed ({prefixes:,} prefixes of it)"
    return Case(what, "dict of sets", lambda: trie.allowed(on_device), theirs, equal, tensors=False)


def advantages_case(world: World, prompts: int = 4096, group: int = 16, steps: int = 3, tokens: int = 256) -> Case:
    """Group-relative advantages of each step, handed to tokens."""
    generator = torch.Generator().manual_seed(5)
    rewards = torch.randint(0, 2, (prompts * group, steps), generator=generator).float().to(world.device)
    token_steps = torch.randint(-1, steps, (prompts * group, tokens), generator=generator).to(world.device)
    index = [row // group for row in range(prompts * group)]

    def ours() -> Tensor:
        return to_tokens(step_advantages(rewards, group), token_steps)

    def theirs() -> Tensor:
        """The shape of verl's estimators: scores gathered by prompt in a dict, one row after the other, and all rows
        handed to tokens at once."""
        advantages = torch.zeros_like(rewards)
        for step in range(steps):
            scores: dict[int, list[Tensor]] = defaultdict(list)
            for row, prompt in enumerate(index):
                scores[prompt].append(rewards[row, step])
            mean = {prompt: torch.stack(of_group).mean() for prompt, of_group in scores.items()}
            std = {prompt: torch.stack(of_group).std() for prompt, of_group in scores.items()}
            for row, prompt in enumerate(index):
                advantages[row, step] = (rewards[row, step] - mean[prompt]) / (std[prompt] + 1e-4)
        return advantages.gather(1, token_steps.clamp(min=0)) * (token_steps >= 0)

    def equal() -> bool:
        return bool((ours() - theirs()).abs().max() <= CLOSE_ENOUGH)

    what = f"step advantages ({prompts} x {group} completions, K = {steps}, T = {tokens})"
    return Case(what, "per-sample loops", ours, theirs, equal, tensors=False)


def count(number: int) -> str:
    """A number of items as one says it."""
    return f"{number / 1e6:g} million" if number >= 1e6 else f"{number:,}"


class Stopwatch(TrainerCallback):
    """Seconds of every optimizer step, rollouts included."""

    def __init__(self, world: World):
        self.world, self.seconds, self.start = world, list[float](), 0.0

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self.world.synchronize()
        self.start = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **rest: Any) -> None:
        self.world.synchronize()
        self.seconds.append(time.perf_counter() - self.start)


class Steps:
    """A trainer, some steps of it at a time."""

    def __init__(self, world: World, trainer: GRPOTrainer):
        self.trainer, self.watch = trainer, Stopwatch(world)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(self.watch)

    def run(self) -> float:
        """Seconds of the last step."""
        self.trainer.train()
        return self.watch.seconds[-1]


class Trainers:
    """Ours and TRL's on the same model, prompts and settings, in a folder that goes away."""

    def __init__(self, world: World, parent: Path):
        self.world, self.sizes, self.parent = world, world.sizes, parent
        self.folder = world.folder(parent)

    def settings(self, **options: Any) -> dict[str, Any]:
        sizes = self.sizes
        return {
            "output_dir": str(self.parent / "out"),
            "per_device_train_batch_size": sizes.prompts * sizes.group_size,
            "num_generations": sizes.group_size,
            "max_steps": 1,
            "learning_rate": 1e-4,
            "beta": BETA,
            "use_bias_correction_kl": False,
            "logging_strategy": "no",
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "bf16": self.world.dtype == torch.bfloat16,
            "gradient_checkpointing": False,
            "use_cpu": self.world.device == "cpu",
        } | options

    def dataset(self, targets: Tensor) -> Dataset:
        sizes = self.sizes
        texts = self.world.tokenizer.batch_decode(self.world.prompts(sizes.prompts, sizes.prompt_tokens))
        return Dataset.from_dict({"prompt": texts, "target_sid": targets.tolist()})

    def load(self) -> Any:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=self.world.dtype)

    def ours(self, objective: str, targets: Tensor, rollout_func: Any = None, **options: Any) -> SAPOTrainer:
        sizes = self.sizes
        words = sizes.new_tokens // sizes.steps
        return SAPOTrainer(
            self.load(),
            SAPOConfig(objective=objective, block_budget=words, min_block_tokens=words, **self.settings(**options)),
            self.dataset(targets),
            self.world.tokenizer,
            self.world.layout(sizes.steps),
            self.world.trie(sizes.items, sizes.steps),
            rollout_func=rollout_func,
        )

    def theirs(
        self, targets: Tensor, rollout_func: Any = None, new_tokens: int | None = None, **options: Any
    ) -> GRPOTrainer:
        sizes, layout = self.sizes, self.world.layout(self.sizes.steps)

        def exact(completion_ids: list[list[int]], target_sid: list[list[int]], **columns: Any) -> list[float]:
            return [
                float(ids[-sizes.steps :] == [int(layout.sid_token_ids[k][c]) for k, c in enumerate(sid)])
                for ids, sid in zip(completion_ids, target_sid, strict=True)
            ]

        return GRPOTrainer(
            model=self.load(),
            reward_funcs=exact,
            args=GRPOConfig(
                loss_type="grpo", max_completion_length=new_tokens or sizes.new_tokens, **self.settings(**options)
            ),
            train_dataset=self.dataset(targets),
            processing_class=self.world.tokenizer,
            rollout_func=rollout_func,
        )


def training_case(world: World, parent: Path) -> Case:
    """One whole step: rollouts, rewards, reference, loss, gradients, optimizer."""
    trainers, sizes = Trainers(world, parent), world.sizes
    rollouts = sample(world, sizes.steps)
    # every prompt wants what its first rollout names, so that every group has a hit
    targets = rollouts.sids[:: sizes.group_size].cpu()
    mine, other = Steps(world, trainers.ours("grpo", targets)), Steps(world, trainers.theirs(targets))

    def fixed(prompts: list[str], trainer: GRPOTrainer) -> dict[str, Any]:
        ids = trainer.processing_class(prompts, add_special_tokens=False)["input_ids"]
        texts = world.tokenizer.batch_decode(world.prompts(sizes.prompts, sizes.prompt_tokens))
        rows = [texts.index(prompt) * sizes.group_size + i % sizes.group_size for i, prompt in enumerate(prompts)]
        return {
            "prompt_ids": ids,
            "completion_ids": [rollouts.completion_ids[row].tolist() for row in rows],
            "logprobs": [rollouts.logps[row].tolist() for row in rows],
            "env_mask": [rollouts.sampled[row].long().tolist() for row in rows],
        }

    def parameters(trainer: GRPOTrainer) -> Tensor:
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])

    def equal() -> bool:
        # Adam would make whole steps of gradients that are nothing but rounding
        options: dict[str, Any] = {"optim": "sgd", "learning_rate": 10.0, "rollout_func": fixed}
        before = torch.cat([parameter.detach().flatten() for parameter in world.model.parameters()])
        ours = parameters(trainers.ours("grpo", targets, sid_logps="full", **options))
        theirs = parameters(trainers.theirs(targets, **options))
        moved = (theirs - before.to(theirs.device)).abs().max()
        return bool((ours - theirs).abs().max() <= CLOSE_ENOUGH < 100 * CLOSE_ENOUGH <= moved)

    return Case("training step", "stock TRL GRPOTrainer, one whole step", mine.run, other.run, equal, seconds=float)
