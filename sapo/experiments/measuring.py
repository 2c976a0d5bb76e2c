"""What an update takes on this machine: the times that a plan is made of, and the memory that it must agree with.

A model of random weights goes through the trainers themselves, in micro-batches and batches of rollouts as large as a
recipe's. Time is that of examples and completions of mean length, memory that of the longest.
"""

import gc
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.trainer_utils import SaveStrategy

from sapo.errors import InputError
from sapo.experiments.planning import GIB, SAMPLED, Lengths, StagePlan
from sapo.experiments.recipes import Recipe
from sapo.experiments.run_folder import World
from sapo.policy.backbone import Pretrained
from sapo.policy.policy import Policy
from sapo.training.adapters import merged
from sapo.training.config import SAPOConfig
from sapo.training.conversations import Conversation
from sapo.training.examples import ChatExamples, SFTTask
from sapo.training.sft import SFTConfig, supervised_trainer
from sapo.training.traces import Traces
from sapo.training.trainer import SAPOTrainer

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

UPDATES = 3  # the first of which warms up
PASSES = 8  # at most, of micro-batches in an update, so that the optimizer's share is small


@dataclass(frozen=True)
class Measured:
    """What one process found."""

    seconds: float
    """Of an example of stages 1 and 2, or of a prompt of stage 3 with all of its completions."""
    memory: int | None
    """Most bytes that tensors held; None on a CPU."""

    def describe(self, planned: StagePlan) -> str:
        """In words, beside what was planned for one process."""
        unit = "prompt with its completions" if planned.name == "3" else "example"
        text = f"stage {planned.name}: {self.seconds:.3g} s a{'n' * (unit == 'example')} {unit}"
        if self.memory is None:
            return text
        apart = planned.memory / self.memory - 1
        return f"{text}; {self.memory / GIB:.1f} GiB, by the formula {planned.memory / GIB:.1f} ({apart:+.0%})"


class Watch(TrainerCallback):
    """The clock and the memory of updates after the first."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []
        self.memory: int | None = None

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def on_step_begin(self, *unused: Any, **more: Any) -> None:
        self._synchronize()
        self.began = time.perf_counter()

    def on_step_end(self, *unused: Any, **more: Any) -> None:
        self._synchronize()
        self.seconds.append(time.perf_counter() - self.began)

    def on_train_end(self, *unused: Any, **more: Any) -> None:
        if self.device.type == "cuda":
            self.memory = torch.cuda.max_memory_allocated(self.device)


def random_policy(recipe: Recipe, world: World, config: "PreTrainedConfig", tokenizer: Any, vocabulary: int) -> Policy:
    """A policy of the shape of a pretrained one, on the GPU where there is one. The tokenizer knows the items."""
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    text.vocab_size, text.pad_token_id, text.eos_token_id = vocabulary, tokenizer.pad_token_id, tokenizer.eos_token_id
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(text, dtype=torch.float32)
    settings = (world.split.name, world.split.data_hash, recipe.block_budget, recipe.max_history)
    return Policy(model, tokenizer, world.catalog, *settings, chat=True)


def measure(
    recipe: Recipe,
    world: World,
    traces: Traces,
    policy: Policy,
    lengths: Lengths,
    conversations: Sequence[Conversation] = (),
) -> dict[str, Measured]:
    """Run the three stages for a few updates each; by their names in a plan. The policy's weights are used up.

    Raises:
        InputError: the GPU has too little memory.
    """
    found = {}
    with tempfile.TemporaryDirectory(prefix="sapo-measure-") as temporary:
        folder = Path(temporary)
        policy.save(folder / "policy")
        asked: list[tuple[str, SFTConfig, SFTTask, float]] = [
            ("1", recipe.stage1, "next_item", lengths.stage1),
            ("2", recipe.stage2, "thinking", lengths.stage2),
        ]
        for name, config, task, tokens in asked:
            examples = ChatExamples(policy, world.split, task, SAMPLED, 0, traces, conversations=conversations)
            found[name] = _supervised(recipe, config, policy, examples, tokens, folder)
        device = policy.model.device
        del policy.model
        gc.collect()
        delimiters = lengths.longest_completion - world.catalog.num_levels * recipe.block_budget
        words = max(1, round((lengths.stage2_learnt - delimiters) / world.catalog.num_levels))
        usual = _reinforced(recipe, world, folder, device, words, longest=False)
        most = _reinforced(recipe, world, folder, device, recipe.block_budget, longest=True)
        found["3"] = Measured(usual.seconds, most.memory)
    return found


def _supervised(
    recipe: Recipe, config: SFTConfig, policy: Policy, examples: ChatExamples, tokens: float, folder: Path
) -> Measured:
    """A few micro-batches an update."""
    rows = sorted((examples[index] for index in range(SAMPLED)), key=lambda row: -len(row["input_ids"]))
    micro = min(SAMPLED, config.micro_batch or config.batch_size)
    passes = min(PASSES, max(1, config.batch_size // micro))
    short = replace(
        config,
        updates=UPDATES,
        batch_size=passes * micro,
        micro_batch=micro,
        warmup=0,
        validate_every=None,
        patience=None,
    )
    some = [rows[place] for place in np.linspace(0, SAMPLED - 1, micro).round().astype(int)]
    watches = []
    for chosen in (some, rows[:micro]):
        trainer = supervised_trainer(policy, chosen * passes * UPDATES, short, folder, 0, lora_rank=_rank(recipe))
        trainer.args.save_strategy = SaveStrategy.NO
        trainer.args.train_sampling_strategy = "sequential"  # every micro-batch is the same
        watches.append(_run(trainer, policy.model.device))
        policy.model = merged(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
        _free(trainer)
        del trainer
    of_some = sum(len(row["input_ids"]) for row in some)
    return Measured(watches[0].seconds / passes * tokens / of_some, watches[1].memory)


def _reinforced(
    recipe: Recipe, world: World, folder: Path, device: torch.device, words: int, longest: bool
) -> Measured:
    """A batch of rollouts an update, all blocks of so many words."""
    settings = recipe.stage3
    at_once = min(settings.prompts, settings.rollout_prompts or settings.prompts)
    micro = min(at_once, settings.micro_prompts or at_once)
    args = SAPOConfig(
        output_dir=str(folder / "checkpoints"),
        max_steps=UPDATES,
        beta=settings.beta,
        per_device_train_batch_size=micro * settings.group_size,
        gradient_accumulation_steps=at_once // micro,
        rollout_prompts=settings.rollout_prompts,
        num_generations=settings.group_size,
        learning_rate=settings.learning_rates[0],
        lora_rank=_rank(recipe),
        block_budget=words,
        min_block_tokens=words,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = world.split.train.sample(SAMPLED)
    if longest:
        by_length = sorted(range(len(rows)), key=lambda row: -len(rows.history[row]))
        rows = rows.take((by_length[:at_once] * at_once)[:at_once])
    trainer = SAPOTrainer.from_catalog(folder / "policy", world.catalog, args, rows)
    trainer.remove_callback(PrinterCallback)
    watch = _run(trainer, device)
    _free(trainer)
    return Measured(watch.seconds / at_once, watch.memory)


def _run(trainer: Trainer, device: torch.device) -> Measured:
    """Train; seconds are of an update after the first.

    Raises:
        InputError: the GPU has too little memory.
    """
    watch = Watch(device)
    trainer.add_callback(watch)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    try:
        trainer.train()
    except torch.OutOfMemoryError as error:
        raise InputError("this GPU has too little memory for that plan, so nothing was measured.") from error
    return Measured(mean(watch.seconds[1:]), watch.memory)


def _free(trainer: Trainer) -> None:
    """Let go of the optimizer's state and of the reference."""
    trainer.accelerator.free_memory()
    trainer.optimizer = None
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _rank(recipe: Recipe) -> int | None:
    return recipe.backbone.lora_rank if isinstance(recipe.backbone, Pretrained) else None
