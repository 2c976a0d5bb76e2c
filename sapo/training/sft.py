"""Stages 1 and 2: supervised training, before any reward.

Stage 1 teaches what SIDs are: the next item after a history, without thinking, and SIDs to and from titles.
Stage 2 teaches to think in blocks first, on traces that lead to the target.
The control without thinking goes on with stage 1's task for as many updates, if validation rows do not end one sooner.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    PreTrainedModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainingArguments,
)

from sapo.common.distributed import shares
from sapo.common.files import disk_errors
from sapo.data.interactions import Split
from sapo.decoding.shared_prefix import PackedGroups
from sapo.errors import InputError
from sapo.policy.policy import Policy
from sapo.training.adapters import adapted, merged
from sapo.training.conversations import Conversation
from sapo.training.examples import ALIGNED, IGNORED, ChatExamples, Examples, NextItems, SFTTask, collate
from sapo.training.progress import KeepBest, ProgressLine, StopAtNonFiniteLoss
from sapo.training.sharding import gathered, prepare_sharding, whole_weights
from sapo.training.traces import Traces


@dataclass(frozen=True)
class SFTConfig:
    """Settings of one supervised stage."""

    updates: int
    """Optimizer steps."""
    batch_size: int = 64
    """Examples an update."""
    learning_rate: float = 3e-3
    """Its peak."""
    schedule: Literal["cosine", "linear"] = "cosine"
    """How it falls to 0."""
    warmup: int | None = None
    """Updates that warm up; 5 % where None."""
    weight_decay: float = 0.01
    """AdamW's decay."""
    title_share: float = 0.2
    """Share of compact stage-1 examples that translate between SIDs and title words."""
    micro_batch: int | None = None
    """Examples that a process reads at a time; all of its share of an update where None."""
    half: bool = False
    """On a GPU, multiply matrices in bfloat16 (`torch.autocast`); weights stay in float32."""
    checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""
    validate_every: int | None = None
    """Updates between two looks at the loss of the next items of validation rows, asked for without thinking. The
    weights of the best look are kept; those of the last update where None."""
    validate_rows: int | None = None
    """Most validation rows of a look; all where None."""
    patience: int | None = None
    """Looks in a row without gain that end the stage."""
    until_exact: float | None = None
    """Share of validation rows whose item a thinking policy names, at which its stage 2 ends; all updates where None.
    Seeds learn to think at different times, so a start is better told by what it can do."""
    look_every: int = 10
    """Updates between two looks at it."""

    def __post_init__(self) -> None:
        if self.patience is not None and self.validate_every is None:
            raise InputError(f"patience is {self.patience}, and validate_every says nothing of when to look.")
        if self.warmup is not None and not 0 <= self.warmup < self.updates:
            raise InputError(f"warmup is {self.warmup}, of {self.updates} updates; at least 0, and fewer than these.")
        if self.until_exact is not None and not 0 < self.until_exact < 1:
            raise InputError(f"until_exact is {self.until_exact}; a share between 0 and 1.")
        for name in ("updates", "validate_every", "patience", "look_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name} of a supervised stage is {value}; at least 1.")


class SupervisedTrainer(Trainer):
    """`Trainer` whose model reads no padding, and makes logits only where there is a label."""

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of the labels, of the whole update where it is accumulated or spans processes."""
        total, labels = self._sum(model, inputs)
        if num_items_in_batch is None:
            return total / labels
        return total * self.accelerator.num_processes / num_items_in_batch  # gradients are averaged over processes

    @torch.no_grad()
    def evaluate(self, eval_dataset: Any = None, *unused: Any, **more: Any) -> dict[str, float]:
        """The same mean over the labels of all rows, of which each process reads a share."""
        model, rows = self.accelerator.unwrap_model(self.model), eval_dataset or self.eval_dataset
        own = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        size, found = self.args.per_device_eval_batch_size, torch.zeros(2, dtype=torch.float64)
        model.eval()
        with whole_weights(model), self.accelerator.autocast():
            for start in range(0, len(own), size):
                batch = self.data_collator([rows[index] for index in own[start : start + size]])
                total, labels = self._sum(model, {name: value.to(model.device) for name, value in batch.items()})
                found += torch.tensor([total.item(), labels], dtype=torch.float64)
        total, labels = self.accelerator.reduce(found.to(self.accelerator.device)).tolist()
        metrics = {"eval_loss": total / labels}
        self.log(metrics)
        control: TrainerControl = self.control  # type: ignore[has-type]
        self.control = self.callback_handler.on_evaluate(self.args, self.state, control, metrics)
        return metrics

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        if set(load_result.missing_keys) != {"lm_head.weight"}:  # which is the table of embeddings
            super()._issue_warnings_after_load(load_result)

    def _sum(self, model: PreTrainedModel, inputs: dict[str, Tensor]) -> tuple[Float[Tensor, ""], int]:
        """Cross-entropy summed over the labels, and how many these are."""
        mask = inputs["attention_mask"].bool()
        packed = PackedGroups(inputs["input_ids"], mask)
        labels = inputs["labels"][mask]
        place = (labels != IGNORED).nonzero()[:, 0]
        logits = packed.logits(model, place - 1)  # a token is predicted by the one before it; the first has no label
        return torch.nn.functional.cross_entropy(logits.float(), labels[place], reduction="sum"), len(place)


def train_supervised(
    policy: Policy,
    split: Split,
    config: SFTConfig,
    task: SFTTask,
    folder: str | Path,
    seed: int,
    traces: Traces | None = None,
    resume: bool = False,
    first: int = 0,
    lora_rank: int | None = None,
    conversations: Sequence[Conversation] = (),
    looks: TrainerCallback | None = None,
) -> list[dict[str, float]]:
    """Train `policy.model` in place; returns the trainer's log.

    Args:
        folder: where checkpoints go while training runs.
        resume: go on from the checkpoint in `folder`.
        first: how many examples of the task the policy has seen in a stage before.
        lora_rank: train adapters and the rows of delimiters and SID tokens, which are merged in the end.
        conversations: what a pretrained model also reads in the task "next_item".
        looks: what looks at the model meanwhile, and may end the stage.

    Raises:
        InputError: a batch that does not divide among processes and micro-batches; looks without validation rows; a
            folder whose best checkpoint is gone.
        FloatingPointError: a loss that is not finite.
    """
    length = config.updates * config.batch_size
    if policy.chat:
        examples: Examples | ChatExamples = ChatExamples(
            policy, split, task, length, seed, traces, first, conversations
        )
    else:
        share = {"next_item": config.title_share, "alignment": ALIGNED, "thinking": 0.0}[task]
        examples = Examples(policy, split, task, length, seed, traces, share, first)
    valid = None if config.validate_every is None else NextItems(policy, split.valid.sample(config.validate_rows))
    trainer = supervised_trainer(policy, examples, config, folder, seed, valid, lora_rank)
    trainer.add_callback(ProgressLine(f"{task} seed {seed}", {"loss": "loss"}))
    trainer.add_callback(StopAtNonFiniteLoss())
    if looks is not None:
        trainer.add_callback(looks)
    if config.validate_every is not None:
        trainer.add_callback(KeepBest(config.patience))
    whole = all(parameter.requires_grad for parameter in policy.model.parameters())
    alone = None if whole else "rows that are trained alone"
    prepare_sharding(trainer.accelerator, alone if lora_rank is None else "adapters")
    with disk_errors(folder):
        trainer.train(resume_from_checkpoint=resume)
    if trainer.state.best_metric is not None and trainer.state.best_model_checkpoint is None:
        best = f"checkpoint-{trainer.state.best_global_step}"
        raise InputError(f"{best}, whose weights were the best, is gone: remove {folder} to begin the stage again.")
    policy.model = merged(gathered(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)))
    return trainer.state.log_history


def supervised_trainer(
    policy: Policy,
    examples: Dataset | Sequence[dict[str, list[int]]],
    config: SFTConfig,
    folder: str | Path,
    seed: int,
    valid: Dataset | None = None,
    lora_rank: int | None = None,
) -> SupervisedTrainer:
    """The trainer of a stage; `train_supervised` explains the arguments.

    Args:
        examples, valid: token ids and labels.
    """
    pad_id, every = policy.tokenizer.pad_token_id, config.validate_every
    micro, accumulated = shares("examples", config.batch_size, config.micro_batch)
    trainer = SupervisedTrainer(
        model=policy.model if lora_rank is None else adapted(policy, lora_rank, seed),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=config.updates,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulated,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            lr_scheduler_type=config.schedule,
            warmup_steps=max(1, config.updates // 20) if config.warmup is None else config.warmup,
            logging_steps=max(1, config.updates // 20),
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=max(1, config.updates // 4) if every is None else every,
            save_total_limit=2,
            eval_strategy="no" if every is None else "steps",
            eval_steps=every,
            per_device_eval_batch_size=micro,
            load_best_model_at_end=every is not None,
            metric_for_best_model=None if every is None else "loss",
            bf16=config.half and torch.cuda.is_available(),
            gradient_checkpointing=config.checkpointing,
            seed=seed,
            data_seed=seed,
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            ddp_find_unused_parameters=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=examples,
        eval_dataset=valid,
        data_collator=lambda rows: collate(rows, pad_id),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
