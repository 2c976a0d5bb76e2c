"""Stages 1 and 2: supervised training, before any reward.

Stage 1 teaches what SIDs are: the next item after a history, without thinking, and SIDs to and from title words.
Stage 2 teaches to think in blocks first, on traces that describe the target's nodes. The control without thinking
goes on with stage 1's next-item task for as many updates.

LC-Rec (arXiv 2311.09049) aligns SIDs with language by more tasks: what the next item is called after a history of SIDs,
and the next SID after a history of titles.

    next item     <bos> SID SID ... SID
    SID to words  <bos> SID <title> words <eos>                and     <bos> <item> words SID <eos>
    alignment     <bos> SID ... SID <item> words <eos>         and     <bos> <title> words ... <title> words SID <eos>
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments

from sapo.data.interactions import Split
from sapo.errors import InputError
from sapo.files import disk_errors
from sapo.policy.policy import Policy
from sapo.policy.prompts import BOS, EOS, ITEM_OF, TITLE_OF, sid_text, title_words
from sapo.policy.shared_prompt import PackedGroups
from sapo.policy.traces import Traces
from sapo.training.progress import ProgressLine, StopAtNonFiniteLoss

SFTTask = Literal["next_item", "alignment", "thinking"]
IGNORED = -100  # the label that the loss skips
# Of the examples of "alignment": title words after a history, and a SID after a history of title words. As many
# translate single items; half are next items.
ALIGNED = 0.25
SHOWN_TITLES = 5  # of such a history, the last items


@dataclass(frozen=True)
class SFTConfig:
    """Settings of one supervised stage."""

    updates: int
    """Optimizer steps."""
    batch_size: int = 64
    """Examples an update."""
    learning_rate: float = 3e-3
    """Peak of a cosine schedule; the first 5 % of the updates warm up."""
    weight_decay: float = 0.01
    """AdamW's decay."""
    title_share: float = 0.2
    """Share of stage-1 examples that translate between SIDs and title words."""


class Examples(torch.utils.data.Dataset):
    """Token ids and labels, made when asked for.

    Row i depends on (seed, first + i) alone, so a resumed run sees the same rows, and a stage that goes on with a task
    sees others than the stage before it.

    Args:
        task: "next_item" (stage 1 and the control), "alignment" (both stages of LC-Rec) or "thinking" (stage 2).
    """

    def __init__(
        self,
        policy: Policy,
        split: Split,
        task: SFTTask,
        length: int,
        seed: int,
        traces: Traces | None = None,
        title_share: float = 0.0,
        first: int = 0,
    ):
        self.policy, self.task, self.length, self.seed = policy, task, length, seed
        self.traces, self.title_share, self.first = traces, title_share, first
        self.known = policy.tokenizer.get_vocab()
        self.sequences = [sequence for sequence in split.sequences if len(sequence) > 1]
        if not len(split.train):
            raise InputError(f"the split {split.name!r} has no training row: every training sequence has one item.")
        if task == "thinking":
            if traces is None:
                raise InputError("the task 'thinking' needs traces: those of the SID tree, or rationales of a teacher.")
            self.rows = traces.rows(split.train)
        if task == "alignment":
            self.rows = split.train

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        rng = np.random.default_rng((self.seed, self.first + index))
        catalog = self.policy.catalog
        share = rng.random()
        if share < self.title_share:
            item = int(rng.integers(catalog.num_items))
            sid, words = sid_text(catalog, item), self._words(item)
            if words and rng.random() < 0.5:
                return self._encode(" ".join([BOS, ITEM_OF, *words]), f"{sid} {EOS}")
            return self._encode(f"{BOS} {sid} {TITLE_OF}", " ".join([*words, EOS]))
        if self.task == "alignment" and share < self.title_share + ALIGNED:
            row = int(rng.integers(len(self.rows)))
            history, target = self.rows.history[row], self.rows.target[row]
            if rng.random() < 0.5:
                titles = (" ".join([TITLE_OF, *self._words(item)]) for item in history[-SHOWN_TITLES:])
                return self._encode(" ".join([BOS, *titles]), f"{sid_text(catalog, target)} {EOS}")
            prompt = self.policy.prompts([history])[0]
            return self._encode(f"{prompt} {ITEM_OF}", " ".join([*self._words(target), EOS]))
        if self.traces is not None and self.task == "thinking":
            row = int(rng.integers(len(self.rows)))
            history, target = self.rows.history[row], self.rows.target[row]
            answer = f"{self.traces.of_row(history, target)} {sid_text(catalog, target)} {EOS}"
            return self._encode(self.policy.prompts([history])[0], answer)
        # A window of a sequence trains every next item in it at once.
        sequence = self.sequences[int(rng.integers(len(self.sequences)))]
        end = int(rng.integers(2, len(sequence) + 1)) if len(sequence) > self.policy.max_history + 1 else len(sequence)
        first, *rest = sequence[max(0, end - self.policy.max_history - 1) : end]
        return self._encode(f"{BOS} {sid_text(catalog, first)}", " ".join(sid_text(catalog, item) for item in rest))

    def _words(self, item: int) -> list[str]:
        return title_words(self.policy.catalog.titles[item], self.known)

    def _encode(self, prompt: str, answer: str) -> dict[str, list[int]]:
        prompt_ids, answer_ids = (self.policy.tokenizer(text)["input_ids"] for text in (prompt, answer))
        return {"input_ids": prompt_ids + answer_ids, "labels": [IGNORED] * len(prompt_ids) + answer_ids}


def collate(examples: Sequence[dict[str, list[int]]], pad_id: int) -> dict[str, Tensor]:
    """Pad on the right to the longest example; labels of padding are ignored."""
    longest = max(len(example["input_ids"]) for example in examples)
    batch = {}
    for name, filler in (("input_ids", pad_id), ("labels", IGNORED)):
        batch[name] = torch.tensor([example[name] + [filler] * (longest - len(example[name])) for example in examples])
    lengths = torch.tensor([len(example["input_ids"]) for example in examples])
    batch["attention_mask"] = (torch.arange(longest) < lengths[:, None]).long()
    return batch


class SupervisedTrainer(Trainer):
    """`Trainer` whose model reads no padding, and makes logits only where there is a label."""

    def compute_loss(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Float[Tensor, ""]:
        """Mean cross-entropy of the labels, of the whole update where it is accumulated."""
        mask = inputs["attention_mask"].bool()
        packed = PackedGroups(inputs["input_ids"], mask)
        labels = inputs["labels"][mask]
        place = (labels != IGNORED).nonzero()[:, 0]
        logits = packed.logits(model, place - 1)  # a token is predicted by the one before it; the first has no label
        total = torch.nn.functional.cross_entropy(logits.float(), labels[place], reduction="sum")
        return total / (len(place) if num_items_in_batch is None else num_items_in_batch)


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
) -> list[dict[str, float]]:
    """Train `policy.model` in place; returns the trainer's log.

    Args:
        folder: where checkpoints go while training runs.
        resume: go on from the checkpoint in `folder`.
        first: how many examples of the task the policy has seen in a stage before.

    Raises:
        FloatingPointError: a loss that is not finite.
    """
    examples = Examples(
        policy,
        split,
        task,
        length=config.updates * config.batch_size,
        seed=seed,
        traces=traces,
        first=first,
        title_share={"next_item": config.title_share, "alignment": ALIGNED, "thinking": 0.0}[task],
    )
    pad_id = policy.tokenizer.pad_token_id
    trainer = SupervisedTrainer(
        model=policy.model,
        args=TrainingArguments(
            output_dir=str(folder),
            max_steps=config.updates,
            per_device_train_batch_size=config.batch_size,
            learning_rate=config.learning_rate,
            weight_decay=config.weight_decay,
            lr_scheduler_type="cosine",
            warmup_steps=max(1, config.updates // 20),
            logging_steps=max(1, config.updates // 20),
            logging_nan_inf_filter=False,
            save_strategy="steps",
            save_steps=max(1, config.updates // 4),
            save_total_limit=2,
            seed=seed,
            data_seed=seed,
            disable_tqdm=True,
            report_to="none",
            remove_unused_columns=False,
            dataloader_pin_memory=False,
        ),
        train_dataset=examples,
        data_collator=lambda rows: collate(rows, pad_id),
        callbacks=[ProgressLine(f"{task} seed {seed}", {"loss": "loss"}), StopAtNonFiniteLoss()],
    )
    trainer.remove_callback(PrinterCallback)
    with disk_errors(folder):
        trainer.train(resume_from_checkpoint=resume)
    return trainer.state.log_history
