"""Stage 3: `GRPOTrainer` of TRL with the credit of any objective in `OBJECTIVES`.

What differs from TRL's trainer, method by method:

    _generate_and_score_completions           advantages are (B, T): each token has the advantage of its step
    _calculate_rewards                        rewards of the caller's functions are kept, to be added to the objective's
    _get_per_token_logps_and_entropies        log-probabilities of the set that the decoder allowed
    _compute_loss                             the objective's own loss
    _prepare_inputs                           whole groups are shuffled and cut into micro-batches, never torn
    _get_train_sampler                        a resumed run goes on with the rows that an undisturbed one reads
    get_eval_dataloader                       every evaluation draws the same rollouts
    _save_checkpoint                          the critic of PPO is saved too
    _load_optimizer_and_scheduler             and loaded

It also reads and writes what TRL keeps for itself: `_metrics`, `_logs`, `_step`, `_buffered_inputs`.

A prompt is read once, with its G completions behind it, in rollouts and in updates (`sapo.decoding.shared_prefix`).
Rollouts come from TRL's `rollout_func` hook, the one way to tell it which tokens were sampled and which were forced.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from accelerate.utils import gather_object
from datasets import Dataset
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback, set_seed
from trl import GRPOTrainer
from trl.models.utils import disable_gradient_checkpointing

from sapo.common import distributed
from sapo.credit.advantages import kept_share, zero_variance
from sapo.credit.loss import policy_loss
from sapo.credit.objectives import OBJECTIVES, VERIFIED, Objective
from sapo.credit.rewards import step_match
from sapo.data.catalog import Catalog
from sapo.data.interactions import Rows, Split
from sapo.decoding.beam_search import search_beams
from sapo.decoding.layout import ReasoningLayout
from sapo.decoding.logprobs import completion_logps, end_ids, forced_tokens
from sapo.decoding.prompt_cache import PromptCache
from sapo.decoding.sampling import Rollouts, beam_rollouts, grouped_rollouts
from sapo.decoding.shared_prefix import PackedGroups, share_prompts, sharing_prompts
from sapo.errors import InputError
from sapo.policy.policy import Policy
from sapo.semantic_ids.trie import SidTrie
from sapo.training.adapters import lora_config
from sapo.training.config import SAPOConfig
from sapo.training.credit_metrics import credit_metrics
from sapo.training.dataset import check_dataset, exact_reward, predicted_sids
from sapo.training.ppo import Critic
from sapo.training.rollouts import alone_if_broken, as_lists, join_rollouts, mixed_seed, sample_until_spread
from sapo.training.sampler import ResumableSampler
from sapo.training.sharding import prepare_sharding, whole_weights

logger = logging.getLogger(__name__)
SILENT_BATCHES = 50  # without any credit, before a warning
MAX_START_KL = 1e-6  # policy against reference, before the first update


class SAPOTrainer(GRPOTrainer):
    """Trains a policy by group-relative advantages of each reasoning step.

    Args:
        model: a model loaded from a folder (the reference policy is loaded from the same folder), or that folder.
        train_dataset: columns `prompt` (text) and `target_sid` (K codes).
        layout, trie: the shape of completions, and the catalogue.
        reward_funcs: None for the objective's own reward. Given functions are logged, and added with
            `args.reward_weights` to every trajectory's reward (to every step's, for step credit).
        rollout_func: other rollouts than the built-in ones, in TRL's form; `env_mask` marks sampled tokens.

    Raises:
        InputError: bad settings, a policy without a folder to load the reference from, or a reference that is not it.
        FloatingPointError: a loss that is not finite.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        args: SAPOConfig,
        train_dataset: Dataset,
        processing_class: PreTrainedTokenizerBase,
        layout: ReasoningLayout,
        trie: SidTrie,
        reward_funcs: Callable | list[Callable] | None = None,
        rollout_func: Callable | None = None,
        eval_dataset: Dataset | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
    ):
        trie.check_levels([len(ids) for ids in layout.sid_token_ids])
        check_dataset("train_dataset", train_dataset, trie)
        if eval_dataset is not None:
            check_dataset("eval_dataset", eval_dataset, trie)
        args = args.for_layout(layout, len(train_dataset))
        if isinstance(model, PreTrainedModel) and args.beta and not model.config._name_or_path:
            raise InputError(
                "the model was built in memory, so there is no folder to load the reference policy from. Save it "
                "(Policy.save or save_pretrained) and load it from there, or set beta=0."
            )
        self.objective: Objective = OBJECTIVES[args.objective]
        args.check_parts(layout, rollout_func is not None, reward_funcs is not None)
        self.layout, self.trie = layout, trie
        self._prepared: Rollouts | None = None
        self._sampled: Tensor | None = None  # log-probabilities of a batch that was sampled a moment ago
        self._silent_batches = 0
        self._update_began = (-1, 0)  # its number, and the micro-step it began at
        self._evaluated = 0  # batches of the evaluation at hand
        self._start_is_checked = args.beta == 0
        given = [] if reward_funcs is None else reward_funcs if isinstance(reward_funcs, list) else [reward_funcs]
        if args.reward_weights is not None and len(args.reward_weights) != len(given):
            raise InputError(
                f"reward_weights has {len(args.reward_weights)} numbers for {len(given)} reward functions."
            )
        args.reward_weights = [0.0, *(args.reward_weights or [1.0] * len(given))]
        if distributed.in_parts():  # TRL would spread the reference over the GPUs that each process sees
            args.model_init_kwargs = {**(args.model_init_kwargs or {}), "device_map": None}
        if args.lora_rank is not None:
            set_seed(args.seed)  # adapters start from random matrices, before the trainer sets its seed
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*experimental.*")
            super().__init__(
                model=str(model) if isinstance(model, Path) else model,
                reward_funcs=[exact_reward(layout), *given],
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                callbacks=callbacks,
                optimizers=optimizers,
                rollout_func=rollout_func or _own_rollouts,
                peft_config=None if args.lora_rank is None else lora_config(args.lora_rank),
            )
        values = f"the values of objective {args.objective!r}" if self.objective.credit == "token" else None
        prepare_sharding(self.accelerator, values if args.lora_rank is None else "adapters")
        self.trie = trie.to(self.accelerator.device)
        if args.share_prompts:
            for part in (self.model, self.ref_model):
                if part is not None:
                    share_prompts(self.accelerator.unwrap_model(part))
        if args.disable_dropout:  # TRL disables Dropout modules; attention's is a number
            for part in (self.model, self.ref_model):
                for module in part.modules() if part is not None else ():
                    if isinstance(getattr(module, "attention_dropout", None), float):
                        module.attention_dropout = 0.0
        self.critic: Critic | None = None
        if self.objective.credit == "token":
            start = self.accelerator.unwrap_model(self.model)
            rate = 10 * args.learning_rate if args.value_learning_rate is None else args.value_learning_rate
            self.critic = Critic(start, self.accelerator, rate, VERIFIED)

    @classmethod
    def from_catalog(
        cls,
        model: str | Path,
        catalog: Catalog,
        args: SAPOConfig,
        rows: Split | Rows,
        reward_funcs: Callable | list[Callable] | None = None,
        callbacks: list[TrainerCallback] | None = None,
    ) -> Self:
        """Build everything else from a policy folder (stage 2), its catalogue and the rows to train on.

        Args:
            rows: a split, whose training rows are taken once it is known to be the one that the policy was trained on;
                or some rows of it, which cannot be checked.

        Raises:
            InputError: a policy of another split or catalogue, whose training rows may be this one's targets.
        """
        policy = Policy.load(model, catalog)
        if isinstance(rows, Split):
            policy.check_split(rows)
            rows = rows.train
        args = copy.copy(args)
        for name in ("block_budget", "min_block_tokens"):
            if getattr(args, name) is None:
                setattr(args, name, getattr(policy, name))
        dataset = Dataset.from_dict(
            {"prompt": policy.prompts(rows.history), "target_sid": catalog.sids[rows.target].tolist()}
        )
        return cls(
            policy.model, args, dataset, policy.tokenizer, policy.layout, policy.trie, reward_funcs, callbacks=callbacks
        )

    def sample(self, prompts: Sequence[str], group_size: int, seed: Sequence[int]) -> Rollouts:
        """`group_size` completions for each prompt; the seed's numbers are the only source of randomness.

        In lower precision they are written in it too, as what trains reads them.
        """
        device = self.accelerator.device
        generator = torch.Generator(device).manual_seed(mixed_seed(*seed))
        model = self.accelerator.unwrap_model(self.model)
        write = beam_rollouts if "beam_rollouts" in self.objective.extras else grouped_rollouts
        count = self.args.rollout_prompts or len(prompts)
        parts = []
        for start in range(0, len(prompts), count):
            some = list(prompts[start : start + count])
            batch = self.processing_class(
                some, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
            ).to(device)
            with (
                disable_gradient_checkpointing(model, self.args.gradient_checkpointing_kwargs),
                whole_weights(model),
                self.accelerator.autocast(),
                alone_if_broken(self.accelerator.num_processes),
            ):
                rollouts = write(
                    model,
                    batch["input_ids"],
                    batch["attention_mask"],
                    self.layout,
                    self.trie,
                    group_size,
                    block_budget=self.args.block_budget,
                    min_block_tokens=self.args.min_block_tokens,
                    temperature=self.temperature,
                    generator=generator,
                    pad_id=self._tokenizer.pad_token_id,
                    sid_logps=self.args.sid_logps,
                )
            parts.append(rollouts)
        return join_rollouts(parts, self._tokenizer.pad_token_id)

    def _seed(self, purpose: int) -> tuple[int, ...]:
        """Derived, never carried: a resumed run draws what an undisturbed one would have drawn.

        An update may see several generations, so the micro-step within it counts too: from the update's start, since
        the last update of an epoch may be a short one. Of an evaluation, the batch counts.
        """
        if self._update_began[0] != self.state.global_step:
            self._update_began = (self.state.global_step, self._step)
        mode = int(self.model.training)
        within = self._step - self._update_began[1] if mode else self._evaluated
        return (self.args.seed, self.state.global_step, within, mode, self.accelerator.process_index, purpose)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        generated = len(inputs)
        if mode == "train" and "dynamic_sampling" in self.objective.extras:
            with whole_weights(self.accelerator.unwrap_model(self.model)):  # processes need not sample equally often
                inputs, generated = self._sample_until_spread(inputs)
        output = super()._generate_and_score_completions(inputs)
        self._sampled = None
        ids = output["completion_ids"]
        group_size = self.num_generations if mode == "train" else self.num_generations_eval
        target = torch.tensor([row["target_sid"] for row in inputs], device=ids.device)
        steps = self.layout.token_steps(ids).masked_fill(output["completion_mask"] == 0, -1)
        predicted = predicted_sids(self.layout, ids)

        beams = self._beams(output) if self.objective.reward == "best_of_beam" else None
        own = self.objective.rewards(predicted, target, self.trie.contains(predicted), group_size, beams)
        # A group may span processes: normalise over all of them, then keep this one's rows.
        rewards = self.accelerator.gather(own)
        rewards = rewards + (self._given_reward[:, None] if rewards.dim() == 2 else self._given_reward)
        if "tool_mask" not in output:  # an engine that does not say what it forced
            output["tool_mask"] = (~forced_tokens(ids, self.layout, self.trie)).long()
        if "thinking_only" in self.objective.extras:
            output["tool_mask"] = output["tool_mask"] * self.layout.read(ids).in_block
        if not self._start_is_checked:
            self._check_start(output)
        trained = (output["completion_mask"] * output["tool_mask"]).bool()
        first = self.accelerator.process_index * len(ids)
        here = slice(first, first + len(ids))
        # The one change to GRPO: credit belongs to the step of a token, so it has a token axis.
        output["token_steps"] = steps
        if self.critic is None:
            advantages = self.objective.advantages(rewards, group_size)
            output["advantages"] = self.objective.to_tokens(advantages[here], steps)
        else:
            output |= self._judge(self.critic, output, rewards[here], trained)
            advantages = self.accelerator.gather(_by_step(output["advantages"], steps, trained, self.layout.num_steps))

        self._logs["extra"]["target_sid"].extend(gather_object([row["target_sid"] for row in inputs]))
        match = self.accelerator.gather(step_match(predicted, target))
        lengths = torch.stack([(steps == k).sum(1) for k in range(self.layout.num_steps)], 1).float()
        counts = torch.stack([((steps == k) & trained).sum(1) for k in range(self.layout.num_steps)], 1).float()
        lengths, counts = self.accelerator.gather(lengths), self.accelerator.gather(counts)
        if self.args.drop_zero_variance is not None:
            by_unit = advantages if advantages.dim() == 2 else advantages[:, None]
            tokens = counts if advantages.dim() == 2 else self.accelerator.gather(trained.sum(1, keepdim=True).float())
            output |= self._without_zero_variance(zero_variance(by_unit, group_size), tokens, steps, here)
        self._log_credit(mode, rewards, advantages, match, lengths, counts, group_size)
        on_all = self.accelerator.gather(torch.tensor([generated], device=ids.device)).sum()
        self._metrics[mode]["rollouts"].append(on_all.item())
        return output

    def _without_zero_variance(
        self,
        silent: Bool[Tensor, "B C"],
        tokens: Float[Tensor, "B C"],
        steps: Int[Tensor, "b T"],
        here: slice,
    ) -> dict[str, Tensor]:
        """What the loss needs to leave groups out of its divisor and its KL.

        Args:
            silent: of all processes, for each credit unit; `tokens` are the trained ones of that unit.
            here: the rows of this process, whose tokens belong to `steps`.
        """
        left_out = {}
        if self.args.drop_zero_variance != "kl":
            sizes = tokens if self.objective.average == "token" else torch.ones_like(tokens)
            left_out["kept_share"] = kept_share(silent, sizes)
        if self.args.drop_zero_variance != "divisor":
            units = silent[here].float()
            units = units if self.objective.credit == "step" else units[:, 0]
            left_out["kl_mask"] = self.objective.to_tokens(units, steps) == 0
        return left_out

    def _beams(self, batch: dict[str, Any]) -> Int[Tensor, "B W K"]:
        """The likeliest SIDs after each completion's thought."""
        ids, prompts, prompt_mask = batch["completion_ids"], batch["prompt_ids"], batch["prompt_mask"]
        thought = self.layout.read(ids).in_block & batch["completion_mask"].bool()
        ids = ids.gather(1, (~thought).int().argsort(dim=1, stable=True))  # the thought's tokens first
        group = self._group_size(prompts, prompt_mask)
        model = self.accelerator.unwrap_model(self.model)
        with (
            disable_gradient_checkpointing(model, self.args.gradient_checkpointing_kwargs),
            whole_weights(model),
            torch.no_grad(),
            sharing_prompts(model),
        ):
            cache = PromptCache(model, prompts[::group], prompt_mask[::group])
            cache.start(group, ids.shape[1])
            logits = cache.logits.repeat_interleave(group, 0)
            if (some := thought.any(1)).any():  # another engine may have written none
                logits[some] = cache.read(ids, thought.sum(1), some)
            cache.extend_prompts(logits)
            return search_beams(cache, self.trie, self.layout.sid_token_ids, self.args.reward_beams).sids

    def _group_size(self, prompts: Int[Tensor, "B P"], mask: Int[Tensor, "B P"]) -> int:
        """G where all rows of each group have the same prompt, else 1: a group may span processes."""
        size = self.num_generations if self.model.training else self.num_generations_eval
        if len(prompts) % size:
            return 1
        groups = torch.stack([prompts.masked_fill(mask == 0, -1), mask.long()]).view(2, -1, size, prompts.shape[1])
        return size if bool((groups == groups[:, :, :1]).all()) else 1

    @torch.no_grad()
    def _judge(
        self, critic: Critic, batch: dict[str, Any], rewards: Float[Tensor, "B"], trained: Bool[Tensor, "B T"]
    ) -> dict[str, Tensor]:
        """What proximal policy optimisation needs of a batch: values, what they should have been, and advantages."""
        logps, _, _ = self._logps_of(self.model, batch)
        states = _whole(batch, "ids"), _whole(batch, "mask")
        reference, chunk = batch.get("ref_per_token_logps", logps), self.args.per_device_train_batch_size
        judged, metrics = critic.judge(states, logps, reference, rewards, trained, self.beta, chunk)
        for name, value in metrics.items():
            self._metrics["train" if self.model.training else "eval"][name].append(value)
        return judged

    def _save_checkpoint(self, model: PreTrainedModel, trial: Any) -> None:
        if self.critic is not None and self.args.should_save:  # first: what is written last says that all is there
            self.critic.save(Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}")
        super()._save_checkpoint(model, trial)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.critic is not None and checkpoint is not None:
            self.critic.load(Path(checkpoint))

    def _calculate_rewards(self, *args: Any) -> Float[Tensor, "B F"]:
        rewards = super()._calculate_rewards(*args)
        # The exact match comes first and weighs 0: it is only logged.
        self._given_reward = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        return rewards

    def _log_credit(
        self,
        mode: str,
        rewards: Float[Tensor, "B K"] | Float[Tensor, "B"],
        advantages: Float[Tensor, "B K"] | Float[Tensor, "B"],
        match: Float[Tensor, "B K"],
        lengths: Float[Tensor, "B K"],
        trained: Float[Tensor, "B K"],
        group_size: int,
    ) -> None:
        """What TRL logged of its own scalar advantages is replaced by the objective's."""
        by_step = advantages if advantages.dim() == 2 else advantages[:, None]
        log = self._metrics[mode]
        for name, value in credit_metrics(rewards, by_step, match, lengths, trained, group_size).items():
            if name in ("reward", "reward_std", "frac_reward_zero_std"):
                log[name][-1] = value
            else:
                log[name].append(value)
        self._warn_of_silence(mode, bool((by_step == 0).all()))
        tail = len(by_step)
        shown = self._logs["advantages"]
        for _ in range(min(tail, len(shown))):
            shown.pop()
        shown.extend(by_step.mean(1).tolist())
        for k in range(self.layout.num_steps):
            self._logs["extra"][f"sid_level_{k + 1}"].extend(match[:, k].tolist())
            if advantages.dim() == 2:
                self._logs["extra"][f"advantage_step_{k + 1}"].extend(by_step[:, k].tolist())

    def _warn_of_silence(self, mode: str, silent: bool) -> None:
        """Once, where so many batches in a row gave no token any credit: what runs then trains nothing."""
        if mode != "train":
            return
        self._silent_batches = self._silent_batches + 1 if silent else 0
        if self._silent_batches == SILENT_BATCHES:
            logger.warning(
                f"{SILENT_BATCHES} batches in a row gave no completion any credit: every group's rewards are alike "
                f"(objective {self.args.objective!r}, {self.num_generations} completions a prompt). Nothing is trained "
                f"but towards the reference. More completions, an objective with rewards of steps, or a longer stage 2 "
                f"are the usual cures."
            )

    def _sample_until_spread(self, inputs: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], int]:
        """DAPO's dynamic sampling; the rollouts of the groups that are kept go to `_own_rollouts`.

        Returns the rows of the kept groups, one a completion, and how many completions were generated in all.
        """
        size = self.num_generations
        if len(inputs) % size:
            raise InputError(
                f"dynamic sampling needs whole groups on each process: {len(inputs)} completions a process are no "
                f"multiple of num_generations {size}."
            )
        rng = np.random.default_rng(self._seed(1))

        def more(count: int) -> list[dict[str, Any]]:
            return [self.train_dataset[int(row)] for row in rng.integers(len(self.train_dataset), size=count)]

        def sample(rows: list[dict[str, Any]], number: int) -> tuple[Rollouts, Float[Tensor, "M C"]]:
            rollouts = self.sample([row["prompt"] for row in rows], size, (*self._seed(0), number))
            target = torch.tensor([row["target_sid"] for row in rows], device=rollouts.sids.device)
            target = target.repeat_interleave(size, 0)
            rewards = self.objective.rewards(rollouts.sids, target, self.trie.contains(rollouts.sids))
            return rollouts, rewards.view(len(rollouts.sids), -1)

        found = sample_until_spread(inputs[::size], size, sample, more)
        log = self._metrics["train"]
        log["dynamic_sampling/share_with_spread"].append(found.share_with_spread)
        log["dynamic_sampling/rounds"].append(found.rounds)
        self._prepared = join_rollouts(found.rollouts, self._tokenizer.pad_token_id)
        return [dict(row) for row in found.rows for _ in range(size)], found.generated

    def _check_start(self, batch: dict[str, Any]) -> None:
        """Before the first update policy and reference must be the same model."""
        self._start_is_checked = True
        if self.state.global_step or "ref_per_token_logps" not in batch:
            return
        with torch.no_grad():
            logps, _, _ = self._logps_of(self.model, batch)
        log_r = (batch["ref_per_token_logps"] - logps).double()
        mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
        kl = (log_r.exp() - log_r - 1)[mask].mean().item() if mask.any() else 0.0
        if not kl < MAX_START_KL:
            raise InputError(
                f"policy and reference differ before the first update: KL {kl:.2e}, at most {MAX_START_KL:.0e} fits. "
                f"The reference was loaded from {self.model.config._name_or_path!r}; the policy is the "
                f"{type(self.model).__name__} given as `model`. Load the policy from that folder, unchanged."
            )

    def _logps_of(self, model: PreTrainedModel, batch: dict[str, Any]) -> tuple[Tensor, None, None]:
        return self._get_per_token_logps_and_entropies(
            model,
            _whole(batch, "ids"),
            _whole(batch, "mask"),
            batch["completion_ids"].shape[1],
            batch_size=self.args.per_device_train_batch_size,
        )

    def _get_per_token_logps_and_entropies(
        self,
        model: PreTrainedModel,
        input_ids: Int[Tensor, "B L"],
        attention_mask: Int[Tensor, "B L"],
        logits_to_keep: int,
        batch_size: int | None = None,
        **unused_of_other_modalities: Any,
    ) -> tuple[Float[Tensor, "B T"], None, None]:
        """Log-probabilities of the last `logits_to_keep` tokens among those that the decoder allowed.

        Plain logits in chunks of `batch_size`: TRL's fused head returns none, and allowed sets need them. Those of the
        policy that has just sampled are known already.
        """
        if self._sampled is not None and model is self.model:
            sampled, self._sampled = self._sampled, None
            return torch.nn.functional.pad(sampled, (0, logits_to_keep - sampled.shape[1])), None, None
        size = batch_size or len(input_ids)
        logps = [
            self._logps_of_chunk(model, ids, mask, logits_to_keep)
            for ids, mask in zip(input_ids.split(size), attention_mask.split(size), strict=True)
        ]
        return torch.cat(logps), None, None

    def _asks_for_old_logps(self) -> bool:
        """Whether TRL asks for the log-probabilities of a batch before its first update, and sampling has given them.

        In float32 they agree with those of a forward pass to 1e-5; in lower precision the two round differently. Beams
        have none.
        """
        passes = self.args.steps_per_generation * self.num_iterations
        exact = self.accelerator.mixed_precision == "no" and self.model.dtype == torch.float32
        return (
            exact
            and "beam_rollouts" not in self.objective.extras
            and self.args.gradient_accumulation_steps % passes > 0
        )

    def _logps_of_chunk(
        self, model: PreTrainedModel, ids: Int[Tensor, "B L"], mask: Int[Tensor, "B L"], tokens: int
    ) -> Float[Tensor, "B T"]:
        completion, written = ids[:, -tokens:], mask[:, -tokens:].bool()
        with self.accelerator.autocast():
            if self.args.share_prompts:
                prompts, prompt_mask = ids[:, :-tokens], mask[:, :-tokens]
                group = self._group_size(prompts, prompt_mask)
                packed = PackedGroups(prompts[::group], prompt_mask[::group].bool(), completion, written)
                at = written
                if self.args.sid_logps == "trie":  # where no choice was left, the log-probability is 0
                    at = written & ~forced_tokens(completion, self.layout, self.trie)
                logits = packed.logits(model, packed.predictor[at])
            else:
                at = torch.ones_like(written)
                logits = model(
                    input_ids=ids,
                    attention_mask=mask,
                    position_ids=(mask.long().cumsum(1) - 1).clamp(min=0),
                    use_cache=False,
                    logits_to_keep=tokens + 1,
                ).logits[:, :-1]
                logits = logits.flatten(0, 1)
        return completion_logps(
            logits,
            completion,
            at,
            self.layout,
            self.trie,
            pad_id=self._tokenizer.pad_token_id,
            eos_ids=end_ids(self.accelerator.unwrap_model(model)),
            min_block_tokens=self.args.min_block_tokens,
            temperature=self.temperature,
            sid_logps=self.args.sid_logps,
        )

    def _compute_loss(self, model: PreTrainedModel, inputs: dict[str, Any]) -> Float[Tensor, ""]:
        mode = "train" if self.model.training else "eval"
        accumulated = self.current_gradient_accumulation_steps if mode == "train" else 1
        logps, _, _ = self._logps_of(model, inputs)
        old_logps = inputs.get("old_per_token_logps")
        # num_items_in_batch counts the whole generation batch; an update sees this share of it
        num_tokens = inputs["num_items_in_batch"] / self.accelerator.num_processes
        if mode == "train":
            num_tokens = num_tokens * accumulated / self.args.steps_per_generation
        loss, metrics = policy_loss(
            self.objective,
            logps,
            logps.detach() if old_logps is None else old_logps,
            inputs["advantages"],
            inputs["token_steps"],
            inputs["completion_mask"] * inputs["tool_mask"],
            num_steps=self.layout.num_steps,
            ref_logps=inputs.get("ref_per_token_logps"),
            beta=self.beta,
            max_length=self.max_completion_length,
            num_tokens=num_tokens,
            kept_share=inputs.get("kept_share", 1.0),
            kl_mask=inputs.get("kl_mask"),
        )
        # a process that stopped alone would leave the others waiting for its gradients
        if not self.accelerator.gather(loss.detach().isfinite().reshape(1)).all():
            raise FloatingPointError(
                f"the loss is {loss.item()} at update {self.state.global_step} of objective {self.args.objective!r}; "
                f"earlier checkpoints are intact. A lower learning rate than {self.args.learning_rate:g} is the usual "
                f"cure."
            )
        if self.critic is not None and mode == "train":
            metrics["value/loss"] = self.critic.learn(
                _whole(inputs, "ids"),
                _whole(inputs, "mask"),
                inputs["returns"],
                inputs["old_values"],
                inputs["completion_mask"] * inputs["tool_mask"],
                max(1.0, float(num_tokens)),
            )
        names, values = list(metrics), torch.tensor(list(metrics.values()), device=loss.device)
        for name, value in zip(names, self.accelerator.reduce(values, reduction="mean").tolist(), strict=True):
            self._metrics[mode][name].append(value)
        return loss if self.objective.average == "token" else loss / accumulated

    def _get_train_sampler(self, dataset: Dataset | None = None) -> ResumableSampler:
        theirs = super()._get_train_sampler(dataset)
        return ResumableSampler(
            theirs.data_source,
            theirs.mini_repeat_count,
            theirs.batch_size,
            theirs.repeat_count,
            theirs.shuffle,
            seed=theirs.seed,
            epoch=lambda: int(self.state.epoch or 0),
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> Any:
        """The stock one; every evaluation draws from the start."""
        self._evaluated = 0
        return super().get_eval_dataloader(eval_dataset)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if not self.model.training:
            inputs = self._generate_and_score_completions(generation_batch)
            self._evaluated += 1
            return inputs
        buffered: list[dict[str, Any]] | None = self._buffered_inputs  # type: ignore[has-type]
        if self._step % (self.args.steps_per_generation * self.num_iterations) == 0 or buffered is None:
            batch = self._generate_and_score_completions(generation_batch)
            rows = len(batch["completion_ids"])
            groups = torch.randperm(
                rows // self.num_generations, generator=torch.Generator().manual_seed(mixed_seed(*self._seed(2)))
            )
            order = (
                torch.arange(rows).view(-1, self.num_generations)[groups].flatten().to(batch["completion_ids"].device)
            )
            parts = order.chunk(self.args.steps_per_generation)
            self._buffered_inputs = buffered = [
                {name: value if value.dim() == 0 else value[part] for name, value in batch.items()} for part in parts
            ]
        return buffered[self._step % self.args.steps_per_generation]


def _own_rollouts(prompts: list[str], trainer: SAPOTrainer) -> dict[str, Any]:
    """The built-in `rollout_func`: rows of one prompt are contiguous, so each prompt is read once."""
    rollouts, trainer._prepared = trainer._prepared, None
    size = trainer.num_generations if trainer.model.training else trainer.num_generations_eval
    whole = len(prompts) % size == 0 and all(prompts[row] == prompts[row - row % size] for row in range(len(prompts)))
    size = size if whole else 1  # a group may span processes
    if rollouts is None:
        if not whole and "beam_rollouts" in trainer.objective.extras:
            raise InputError(
                f"{len(prompts)} completions a process hold torn groups; beams of one prompt must stay together."
            )
        rollouts = trainer.sample(prompts[::size], size, trainer._seed(0))
    if trainer._asks_for_old_logps():
        trainer._sampled = rollouts.logps
    ids = trainer.processing_class(prompts[::size], add_special_tokens=False)["input_ids"]
    lengths = rollouts.completion_mask.sum(1).tolist()
    return {
        "prompt_ids": [of_prompt for of_prompt in ids for _ in range(size)],
        "completion_ids": as_lists(rollouts.completion_ids, lengths),
        "logprobs": None,  # which TRL would pad for vLLM's correction alone
        "env_mask": as_lists(rollouts.sampled.long(), lengths),
    }


def _whole(batch: dict[str, Any], what: str) -> Int[Tensor, "B L"]:
    """Prompt and completion of a batch in one: "ids" or "mask"."""
    return torch.cat([batch[f"prompt_{what}"], batch[f"completion_{what}"]], 1)


def _by_step(
    values: Float[Tensor, "B T"], steps: Int[Tensor, "B T"], trained: Bool[Tensor, "B T"], num_steps: int
) -> Float[Tensor, "B K"]:
    """Mean over the trained tokens of each step, 0 where it has none."""
    inside = torch.stack([(steps == k) & trained for k in range(num_steps)], 1)
    return (values[:, None] * inside).sum(2) / inside.sum(2).clamp(min=1)
