"""Settings of stage 3: TRL's, most of which an objective decides."""

import copy
from dataclasses import dataclass
from typing import Literal, Self

import torch
from trl import GRPOConfig

from sapo.credit.objectives import OBJECTIVES
from sapo.decoding.layout import ReasoningLayout
from sapo.decoding.sampling import block_budgets
from sapo.errors import InputError

# Options of TRL's trainer that the built-in decoder and losses do not read: better refused than ignored.
UNUSED = (
    *("top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs"),
    *("delta", "off_policy_mask_threshold", "multi_objective_aggregation"),
)
_LOSS_TYPES = {"sequence": "grpo", "token": "dapo", "constant": "dr_grpo", "step": "grpo"}
_SCALES = {"group": "group", "batch": "batch", "batch_centred": "batch", "none": "none"}
_RATIO_LEVELS = {"token": "token", "sequence": "sequence", "sequence_sum": "sequence", "step": "token"}


@dataclass
class SAPOConfig(GRPOConfig):
    """`GRPOConfig` whose loss is named by an objective.

    `objective` decides `loss_type`, `importance_sampling_level`, `scale_rewards`, `epsilon`, `epsilon_high` and `beta`.
    They may be left out; a value that contradicts the objective raises. `beta` may be given to weigh the KL of an
    objective that has one.
    """

    objective: str = "sapo"
    """A key of `OBJECTIVES`."""
    block_budget: int | list[int] | None = None
    """Most words of a thinking block, one number or one a block; the block is closed at it. `from_catalog` takes the
    policy's own where None, which is what `recommend` decodes with; otherwise 8."""
    min_block_tokens: int | None = None
    """Fewest words of a thinking block. `from_catalog` takes the policy's own where None; otherwise 0."""
    reward_beams: int = 32
    """SIDs after each thought that the objective "best_of_beam" looks at. As many as the catalogue has would always
    hold the right one."""
    value_learning_rate: float | None = None
    """Rate of the values that the objective "rlvr" learns; 10 times the policy's where None, since they start at 0."""
    sid_logps: Literal["trie", "full"] = "trie"
    """Log-probabilities of the tokens that the decoder allowed ("trie"), or of the full softmax ("full")."""
    lora_rank: int | None = None
    """Train low-rank adapters of this rank (peft); the reference is then the model without them. All weights where
    None."""
    rollout_prompts: int | None = None
    """Prompts whose completions are written at a time, which bounds memory; all of a batch where None."""
    share_prompts: bool = True
    """Read each prompt once for the log-probabilities of its completions, of the policy and of the reference. The
    numbers are the same; False reads it with every completion, as TRL does."""
    drop_zero_variance: Literal["divisor", "kl", "both"] | None = None
    """What zero-variance groups, those whose advantages are all 0, are left out of; nothing where None.

    "divisor": the loss, its KL included, is divided by the share of groups with credit, over a generation batch (TRL
    pull request 6365). With step credit a group counts once a step, with the "token" average by its trained tokens.
    "kl": their KL is not in the loss (TRL pull request 7068; issue 5588 there argues for keeping it); with step credit
    that of the steps without credit. "both": as if they were not in the batch."""

    loss_type: str | None = None
    importance_sampling_level: str | None = None
    scale_rewards: str | None = None
    epsilon: float | None = None
    epsilon_high: float | None = None
    beta: float | None = None
    max_completion_length: int | None = None
    use_bias_correction_kl: bool = False
    disable_dropout: bool = True
    gradient_checkpointing: bool | None = None
    bf16: bool | None = None
    dataloader_pin_memory: bool | None = None
    ddp_find_unused_parameters: bool | None = False
    report_to: str | list[str] | None = "none"

    def __post_init__(self) -> None:
        if self.loss_type == "sapo":
            raise InputError(
                "loss_type='sapo' is Soft Adaptive Policy Optimization (arXiv 2511.20347), which replaces the clip "
                "by a soft gate. Step-Aligned Policy Optimization (arXiv 2605.17648) is objective='sapo'."
            )
        if self.objective not in OBJECTIVES:
            raise InputError(f"objective is {self.objective!r}; known are {', '.join(OBJECTIVES)}.")
        chosen = OBJECTIVES[self.objective]
        if isinstance(self.scale_rewards, bool):  # TRL's other spelling
            self.scale_rewards = "group" if self.scale_rewards else "none"
        decided = {
            "loss_type": _LOSS_TYPES[chosen.average],
            "importance_sampling_level": _RATIO_LEVELS[chosen.ratio],
            "scale_rewards": _SCALES[chosen.scale],
            "epsilon": chosen.epsilon,
            "epsilon_high": chosen.epsilon_high,
        }
        for name, value in decided.items():
            given = getattr(self, name)
            if given is not None and given != value:
                raise InputError(f"{name}={given!r} contradicts objective={self.objective!r}, which sets {value!r}.")
            setattr(self, name, value)
        if self.beta is None:
            self.beta = chosen.beta
        elif self.beta and not chosen.beta:
            raise InputError(f"beta={self.beta} contradicts objective={self.objective!r}, which has no KL term.")
        if self.mask_truncated_completions:
            raise InputError("mask_truncated_completions would drop every completion: a SID ends without EOS.")
        if self.top_entropy_quantile < 1 or self.entropy_coef or self.use_adaptive_entropy:
            raise InputError(
                "top_entropy_quantile, entropy_coef and use_adaptive_entropy are not part of any objective here."
            )
        if self.drop_zero_variance not in (None, "divisor", "kl", "both"):
            raise InputError(f"drop_zero_variance is {self.drop_zero_variance!r}; use 'divisor', 'kl', 'both' or None.")
        if self.drop_zero_variance and chosen.credit == "token":
            raise InputError(f"objective {self.objective!r} compares no groups: leave drop_zero_variance out.")
        if self.drop_zero_variance == "kl" and not self.beta:
            raise InputError("drop_zero_variance='kl' leaves groups out of the KL, and beta=0 means there is none.")
        if self.max_grad_norm is None:
            raise InputError("max_grad_norm is None; give 0 for gradients that are not clipped.")
        for name in ("reward_beams", "rollout_prompts", "lora_rank"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} is {value}; at least 1.")
        if self.lora_rank is not None and chosen.credit == "token":
            raise InputError(f"objective {self.objective!r} copies the policy for its values: leave lora_rank out.")
        if self.sid_logps not in ("trie", "full"):
            raise InputError(f"sid_logps is {self.sid_logps!r}; use 'trie' or 'full'.")
        if self.use_vllm or self.use_transformers_continuous_batching:
            raise InputError(
                "use_vllm and use_transformers_continuous_batching write completions that nothing holds to K closed "
                "blocks and a SID of the catalogue. Leave them out for the decoder that does; or ask a server of yours "
                "from rollout_func, whose malformed completions are paid 0."
            )
        for name in UNUSED:
            default = GRPOConfig.__dataclass_fields__[name].default
            if getattr(self, name) != default:
                raise InputError(
                    f"{name}={getattr(self, name)!r} has no effect on these objectives and rollouts: leave it "
                    f"{default!r}."
                )
        if self.use_bias_correction_kl:
            raise InputError(
                "use_bias_correction_kl changes the KL gradient; the objectives here use the papers' plain k3."
            )
        on_gpu = torch.cuda.is_available() and not self.use_cpu
        if self.bf16 is None and not self.fp16:
            self.bf16 = on_gpu and torch.cuda.is_bf16_supported()
        if self.gradient_checkpointing is None:
            self.gradient_checkpointing = on_gpu
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = on_gpu
        for name in ("num_generations", "num_generations_eval"):
            size = getattr(self, name)
            if size is not None and size < 2:
                raise InputError(f"{name} is {size}: a group-relative advantage needs at least 2 completions a prompt.")
        if self.per_device_train_batch_size % self.num_generations:
            group = self.num_generations
            nearest = max(1, round(self.per_device_train_batch_size / group)) * group
            raise InputError(
                f"per_device_train_batch_size {self.per_device_train_batch_size} is no multiple of num_generations "
                f"{group}, so a micro-batch would tear a group. {nearest} = {nearest // group} prompts x {group} "
                f"completions fits; gradient_accumulation_steps multiplies the prompts of an update."
            )
        super().__post_init__()
        self._check_checkpoints()

    def for_layout(self, layout: ReasoningLayout, rows: int) -> Self:
        """A copy with what a policy's layout and the number of training rows decide.

        Raises:
            InputError: fewer rows than prompts of a generation batch; a `max_completion_length` that contradicts the
                budgets.
        """
        args = copy.copy(self)
        args.block_budget = 8 if args.block_budget is None else args.block_budget
        args.min_block_tokens = args.min_block_tokens or 0
        prompts = args.generation_batch_size // args.num_generations
        if rows < prompts:
            raise InputError(
                f"train_dataset has {rows} rows, fewer than the {prompts} prompts of a generation batch "
                f"(generation_batch_size {args.generation_batch_size} / num_generations {args.num_generations})."
            )
        budgets = block_budgets(args.block_budget, layout.blocks, args.min_block_tokens)
        derived = layout.longest(budgets)
        if args.max_completion_length not in (None, derived):
            raise InputError(
                f"max_completion_length is {args.max_completion_length}; budgets {budgets}, the delimiters of "
                f"{layout.blocks} blocks and {layout.num_steps} SID tokens make {derived}. Leave it out."
            )
        args.max_completion_length = derived
        return args

    def check_parts(self, layout: ReasoningLayout, own_rollouts: bool, own_rewards: bool) -> None:
        """Whether the objective can do with a policy's layout, and with rollouts and rewards of the caller's.

        Raises:
            InputError: it cannot.
        """
        objective = OBJECTIVES[self.objective]
        if own_rollouts and {"dynamic_sampling", "beam_rollouts"} & set(objective.extras):
            raise InputError(f"objective {self.objective!r} makes its rollouts in its own way: leave rollout_func out.")
        if own_rewards and "outcome_first" in objective.extras:
            raise InputError(
                f"objective {self.objective!r} reads the exact match off its rewards: leave reward_funcs out."
            )
        if objective.credit == "step" and layout.blocks not in (0, layout.num_steps):
            raise InputError(
                f"objective {self.objective!r} credits steps, and a policy of {layout.blocks} thinking blocks for "
                f"{layout.num_steps} SID tokens has none: take one of K blocks, or an objective of trajectory credit."
            )
        if "thinking_only" in objective.extras and not layout.blocks:
            raise InputError(f"objective {self.objective!r} trains thoughts, and this policy does not think.")

    def _check_checkpoints(self) -> None:
        """A checkpoint between two generations could not be resumed: its rollouts are gone."""
        accumulated = self.gradient_accumulation_steps
        passes = self.steps_per_generation * self.num_iterations  # micro-batches that one generation feeds
        if passes % accumulated and accumulated % passes:
            raise InputError(
                f"steps_per_generation {self.steps_per_generation} x num_iterations {self.num_iterations} = {passes} "
                f"micro-batches a generation and gradient_accumulation_steps {accumulated}: one must divide the other, "
                f"or an update would end within a generation."
            )
        updates = max(1, passes // accumulated)
        if self.save_strategy != "steps" or updates == 1:
            return
        for name in ("save_steps", "max_steps"):  # the trainer saves at the last update too
            value = getattr(self, name)
            if value > 0 and value % updates:
                raise InputError(
                    f"{name} is {value}, but rollouts are made every {updates} updates: use a multiple of {updates}."
                )
