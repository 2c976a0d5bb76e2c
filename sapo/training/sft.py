"""Stages 1 and 2: supervised training, before any reward.

Stage 1 teaches what SIDs are: the next item after a history, without thinking, and SIDs to and from titles.
Stage 2 teaches to think in blocks first, on traces that lead to the target.
The control without thinking goes on with stage 1's task for as many updates.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from sapo.data.interactions import Split
from sapo.files import disk_errors
from sapo.policy.policy import Policy
from sapo.policy.shared_prompt import PackedGroups
from sapo.policy.traces import Traces
from sapo.processes import shares
from sapo.training.adapters import adapted, merged
from sapo.training.examples import ALIGNED, IGNORED, ChatExamples, Examples, SFTTask, collate
from sapo.training.progress import ProgressLine, StopAtNonFiniteLoss


@dataclass(frozen=True)
class SFTConfig:
    """Settings of one supervised stage."""

    updates: int
    """Optimizer steps."""
    batch_size: int = 64
    """Examples an update."""
    learning_rate: float = 3e-3
    """Peak of a cosine schedule."""
    warmup: int | None = None
    """Updates that warm up; 5 % where None."""
    weight_decay: float = 0.01
    """AdamW's decay."""
    title_share: float = 0.2
    """Share of compact stage-1 examples that translate between SIDs and title words."""
    micro_batch: int | None = None
    """Examples that a process reads at a time; all of its share of an update where None."""
    half: bool = False
    """Multiply matrices in bfloat16 (`torch.autocast`); weights stay in float32."""
    checkpointing: bool = False
    """Compute activations again in the backward pass, to save memory."""


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
        mask = inputs["attention_mask"].bool()
        packed = PackedGroups(inputs["input_ids"], mask)
        labels = inputs["labels"][mask]
        place = (labels != IGNORED).nonzero()[:, 0]
        logits = packed.logits(model, place - 1)  # a token is predicted by the one before it; the first has no label
        total = torch.nn.functional.cross_entropy(logits.float(), labels[place], reduction="sum")
        if num_items_in_batch is None:
            return total / len(place)
        return total * self.accelerator.num_processes / num_items_in_batch  # gradients are averaged over processes


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
) -> list[dict[str, float]]:
    """Train `policy.model` in place; returns the trainer's log.

    Args:
        folder: where checkpoints go while training runs.
        resume: go on from the checkpoint in `folder`.
        first: how many examples of the task the policy has seen in a stage before.
        lora_rank: train adapters and the rows of delimiters and SID tokens, which are merged in the end.

    Raises:
        InputError: a batch that does not divide among processes and micro-batches.
        FloatingPointError: a loss that is not finite.
    """
    length = config.updates * config.batch_size
    if policy.chat:
        examples: Examples | ChatExamples = ChatExamples(policy, split, task, length, seed, traces, first)
    else:
        share = {"next_item": config.title_share, "alignment": ALIGNED, "thinking": 0.0}[task]
        examples = Examples(policy, split, task, length, seed, traces, share, first)
    pad_id = policy.tokenizer.pad_token_id
    micro, accumulated = shares("examples", config.batch_size, config.micro_batch)
    trainer = SupervisedTrainer(
        model=policy.model if lora_rank is None else adapted(policy, lora_rank),
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=config.updates,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=accumulated,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, config.updates // 20) if config.warmup is None else config.warmup,
            logging_steps=max(1, config.updates // 20),
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=max(1, config.updates // 4),
            save_total_limit=2,
            bf16=config.half,
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
        data_collator=lambda rows: collate(rows, pad_id),
        callbacks=[ProgressLine(f"{task} seed {seed}", {"loss": "loss"}), StopAtNonFiniteLoss()],
    )
    trainer.remove_callback(PrinterCallback)
    with disk_errors(folder):
        trainer.train(resume_from_checkpoint=resume)
    policy.model = merged(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    return trainer.state.log_history
