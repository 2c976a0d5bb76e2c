"""Recipes: everything that decides a result, as dataclasses, and the presets."""

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from sapo.data.reasoning import ReasoningConfig
from sapo.data.synthetic import SyntheticConfig
from sapo.errors import InputError
from sapo.policy.backbone import BackboneConfig, Pretrained
from sapo.training.sft import SFTConfig


@dataclass(frozen=True)
class RLConfig:
    """Settings of stage 3, the same for every objective."""

    updates: int = 100
    """Optimizer steps."""
    prompts: int = 16
    """Prompts an update."""
    group_size: int = 16
    """G, completions a prompt."""
    learning_rates: tuple[float, ...] = (1e-4, 3e-4)
    """The grid. Each objective gets all of it; validation NDCG@10 chooses."""
    num_iterations: int = 1
    """Updates from each batch of rollouts. With one the ratio is 1, and clipping and its units change nothing."""
    temperature: float = 1.0
    """Of rollouts and log-probabilities."""
    weight_decay: float = 0.01
    """AdamW's decay."""
    optimizer: Literal["adamw_torch", "sgd"] = "adamw_torch"
    """AdamW divides a gradient by the size that it usually has; plain gradient descent does not."""
    max_grad_norm: float = 1.0
    """Longest gradient; longer ones are shortened to it. 0 shortens none."""
    drop_zero_variance: Literal["divisor", "kl", "both"] | None = None
    """Where groups without credit do not count, as of `SAPOConfig`; they do everywhere where None."""
    log_every: int = 5
    """Updates between two points of the curves."""
    beta: float | None = None
    """Weight of the KL of objectives that have one; their own where None."""
    micro_prompts: int | None = None
    """Prompts whose completions a process trains on at a time; all of its share where None."""
    rollout_prompts: int | None = None
    """Prompts whose completions a process writes at a time; all of its share where None."""
    look_every: int | None = None
    """Updates between two looks at validation rows; none where None."""
    look_rows: int = 500
    """Validation rows of a look."""
    give_up_below: float | None = None
    """Share of the start's validation NDCG@10 below which a look ends a run as collapsed, from a quarter of its updates
    on; none is ended where None."""

    def __post_init__(self) -> None:
        if self.give_up_below is not None and self.look_every is None:
            raise InputError(f"give_up_below is {self.give_up_below}, and look_every says nothing of when to look.")
        if self.look_every is not None and self.look_every < 1:
            raise InputError(f"look_every is {self.look_every}; at least 1 update.")


@dataclass(frozen=True)
class EvaluationConfig:
    """How much is evaluated. The rows are drawn once, with a fixed seed, and are the same for every method."""

    test_rows: int | None = None
    """Test rows, None for all."""
    valid_rows: int | None = 2000
    """Validation rows, which choose learning rates."""
    rollout_prompts: int = 64
    """Validation prompts whose stage-2 rollouts are kept for the comparison of advantages."""
    batch_size: int = 128
    """Rows that are drafted and searched at a time."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a result."""

    preset: str
    stage1: SFTConfig
    stage2: SFTConfig
    stage3: RLConfig = field(default_factory=RLConfig)
    backbone: BackboneConfig | Pretrained = field(default_factory=BackboneConfig)
    world: ReasoningConfig | SyntheticConfig = field(default_factory=ReasoningConfig)
    """What is trained on where no data folder is given."""
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    objectives: tuple[str, ...] = ("sapo", "grpo")
    """Trained with every seed."""
    ablations: tuple[str, ...] = ("grpo_step_reward", "sapo_outcome_reward", "sapo_sequence_mean")
    """Trained with the first seed alone, unless `ablation_seeds` says more."""
    systems: tuple[str, ...] = ()
    """Other reasoning recommenders (`sapo.experiments.systems`), trained with every seed."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each has its own stages 1 and 2; all objectives of a seed start from its stage-2 folder."""
    ablation_seeds: int = 1
    """How many of the seeds the ablations get."""
    grid_seeds: int = 1
    """How many of the seeds try every learning rate; the others take the one that is best on these."""
    known_rates: tuple[tuple[str, float], ...] = ()
    """Objectives, or systems, whose best learning rate is known from elsewhere, with that rate: they try no grid."""
    max_history: int = 10
    """Items that a prompt shows."""
    words_per_block: int = 2
    """Words of a stage-2 thinking block."""
    block_budget: int = 4
    """Most words of a thinking block."""
    vocabulary: int = 200
    """Words that traces and titles of small models may use, the catalogue's most frequent ones. Each costs a column of
    the softmax."""

    def rates(self, method: str) -> tuple[float, ...]:
        """The learning rates that an objective, or a system, tries."""
        known = dict(self.known_rates)
        return (known[method],) if method in known else self.stage3.learning_rates

    def shortened(self, fraction: float) -> "Recipe":
        """The same with a share of the updates of every stage, under a name of its own.

        Raises:
            InputError: a share that is not between 0 and 1.
        """
        if not 0 < fraction <= 1:
            raise InputError(f"fraction is {fraction}; above 0, at most 1.")

        def share(updates: int) -> int:
            return max(1, round(updates * fraction))

        short: dict[str, Any] = {"stage3": replace(self.stage3, updates=share(self.stage3.updates))}
        for name in ("stage1", "stage2"):
            stage: SFTConfig = getattr(self, name)
            looks = None if stage.validate_every is None else share(stage.validate_every)
            warmup = None if stage.warmup is None else round(stage.warmup * fraction)
            short[name] = replace(stage, updates=share(stage.updates), validate_every=looks, warmup=warmup)
        return replace(self, preset=f"{self.preset}-{fraction:g}", **short)

    def evaluated(self, rows: int) -> "Recipe":
        """The same that looks at so many rows at most of validation and test, under a name of its own."""
        stages: dict[str, Any] = {
            name: replace(getattr(self, name), validate_rows=rows) for name in ("stage1", "stage2")
        }
        evaluation = replace(self.evaluation, test_rows=rows, valid_rows=rows)
        return replace(self, preset=f"{self.preset}-{rows}rows", evaluation=evaluation, **stages)


# A small reasoning world. Stage 2 ends when one item in twenty is named right: exact matches are rare then, and not
# absent. Rates are those at which validation NDCG@10 of seed 0 ended highest, of 3e-5, 1e-4, 3e-4, 6e-4 and 1e-3.
QUICK = Recipe(
    preset="quick",
    world=ReasoningConfig(codes=6, window=2, num_users=1500, lengths=(5, 8)),
    stage1=SFTConfig(updates=120, batch_size=128, learning_rate=3e-3, title_share=0.1),
    stage2=SFTConfig(updates=300, batch_size=128, learning_rate=3e-3, until_exact=0.05),
    stage3=RLConfig(updates=160, prompts=32, group_size=8, weight_decay=0.0, look_every=20),
    evaluation=EvaluationConfig(valid_rows=500),
    ablations=("grpo_step_reward", "sapo_outcome_reward"),
    ablation_seeds=3,
    known_rates=(("sapo", 6e-4), ("grpo", 3e-5), ("grpo_step_reward", 6e-4), ("sapo_outcome_reward", 3e-5)),
    max_history=2,
    words_per_block=2,
    block_budget=2,
)
# The control, in which thinking is pointless and exact matches are common.
QUICK_ON_SYNTHETIC = Recipe(
    preset="quick",
    world=SyntheticConfig(),
    stage1=SFTConfig(updates=400, learning_rate=3e-3, title_share=0.1),
    stage2=SFTConfig(updates=600, learning_rate=4e-3),
    stage3=RLConfig(updates=64, prompts=32, group_size=8, log_every=4),
    evaluation=EvaluationConfig(test_rows=1000),
    max_history=5,  # the synthetic users depend on their last item alone
)
# Real catalogues have ten times the items and rarer hits: longer stages 1 and 2, larger groups, all test rows. The
# ablations are left to those who ask for them: one seed of a cell says little, and costs as much as one of SAPO.
QUICK_ON_DATA = replace(
    QUICK_ON_SYNTHETIC,
    stage1=SFTConfig(updates=1200, batch_size=128, learning_rate=3e-3, title_share=0.1),
    stage2=SFTConfig(updates=1400, batch_size=128, learning_rate=2e-3),
    stage3=RLConfig(updates=100, learning_rates=(3e-5, 1e-4, 3e-4)),
    backbone=BackboneConfig(intermediate_size=192),
    evaluation=EvaluationConfig(),
    ablations=(),
    max_history=10,
)
SMALL = Recipe(
    preset="small",
    stage1=SFTConfig(updates=4000, batch_size=128, learning_rate=2e-3, title_share=0.1),
    stage2=SFTConfig(updates=3000, batch_size=128, learning_rate=1e-3),
    stage3=RLConfig(updates=200, prompts=32, learning_rates=(3e-5, 1e-4, 3e-4)),
    backbone=BackboneConfig(hidden_size=128, num_layers=3, intermediate_size=384, dropout=0.1),
    evaluation=EvaluationConfig(valid_rows=2000),
    vocabulary=500,
    ablation_seeds=3,
)


def paper(rows: int, explained: int, items: int, backbone: Pretrained, conversations: int = 0) -> Recipe:
    """The settings of the paper's fork (zhengzaiyi/SIDReasoner), for so many training rows, items and conversations.

    Stage 2 reads the rows that a teacher has `explained`, or all.
    Epochs are turned into updates. Stage 1 reads five streams of rows, three of items and the conversations, ten times
    at most, and stage 2 its rows five times; after each time the validation loss decides whether stage 1 goes on, and
    whose weights are kept. Stage 2 never ends sooner: its patience is as long as it is.
    What the paper itself sets is not known.
    """
    batch, prompts = 1024, 256
    streams = 5 * rows + 3 * items + conversations
    epoch1, epoch2 = (max(1, examples // batch) for examples in (streams, explained))
    stage1 = SFTConfig(
        updates=10 * epoch1,
        batch_size=batch,
        learning_rate=3e-4,
        schedule="linear",
        warmup=min(20, 10 * epoch1 // 4),  # where a teacher has explained few rows, theirs would be all warm-up
        weight_decay=0.0,
        micro_batch=16,
        half=True,
        checkpointing=True,
        validate_every=epoch1,
        patience=3,
    )
    stage2 = replace(
        stage1,
        updates=5 * epoch2,
        learning_rate=1e-5,
        warmup=min(10, 5 * epoch2 // 4),
        validate_every=epoch2,
        patience=5,
    )
    return Recipe(
        preset="paper",
        stage1=stage1,
        stage2=stage2,
        stage3=RLConfig(
            updates=max(1, 10 * rows // prompts),
            prompts=prompts,
            group_size=16,
            learning_rates=(5e-7,),
            beta=1e-3,
            micro_prompts=1,
            rollout_prompts=8,
        ),
        backbone=backbone,
        evaluation=EvaluationConfig(valid_rows=1000, batch_size=16),
        ablations=(),
        block_budget=336,  # three of them, delimiters, line breaks and a SID make 1,020 tokens of their 1,024
        words_per_block=8,  # without a teacher
    )


def preset(name: str, data: str | None = None) -> Recipe:
    """The recipe of "quick" or "small", which train small models.

    Args:
        data: "reasoning" or None for the reasoning world, "synthetic" for the control world, or a folder.
    """
    if data in (None, "reasoning"):
        return QUICK if name == "quick" else in_world(SMALL, ReasoningConfig())
    if name != "quick":
        return replace(SMALL, world=SyntheticConfig())
    return QUICK_ON_SYNTHETIC if data == "synthetic" else QUICK_ON_DATA


def in_world(recipe: Recipe, world: ReasoningConfig) -> Recipe:
    """The same recipe in a reasoning world, whose window is what prompts show and how long a block is."""
    return replace(
        recipe, world=world, max_history=world.window, words_per_block=world.window, block_budget=world.window
    )
