"""One progress line a run, with the numbers one wants to watch, and the log as a tidy table."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sapo.common.progress import progress_bar


class ProgressLine(TrainerCallback):
    """A tqdm bar in place of the trainer's own.

    Args:
        title: what is being trained.
        watch: names in the log, and how to call them on the line.
    """

    def __init__(self, title: str, watch: dict[str, str]):
        self.title, self.watch = title, watch

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        self.bar = progress_bar(self.title, total=state.max_steps, start=state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **unused: Any,
    ) -> None:
        shown = {word: f"{logs[name]:.3g}" for name, word in self.watch.items() if logs and name in logs}
        if shown:
            self.bar.set_postfix(shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        self.bar.close()


class StopAtNonFiniteLoss(TrainerCallback):
    """Ends a run whose loss is no number any more; its earlier checkpoints stay."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **unused: Any,
    ) -> None:
        loss = (logs or {}).get("loss", 0.0)
        if not math.isfinite(loss):
            raise FloatingPointError(
                f"the loss is {loss} at update {state.global_step}; earlier checkpoints are intact. "
                f"A lower learning rate than {args.learning_rate:g} is the usual cure."
            )


class KeepBest(TrainerCallback):
    """Ends a run whose validation loss has not gained for so many looks (never where None), and keeps the best one's
    checkpoint in mind.

    What it knows is in the log, which checkpoints carry. The last look leaves no checkpoint: a run that is stopped
    between it and the end comes by it again.
    """

    def __init__(self, patience: int | None):
        self.patience = patience

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any
    ) -> None:
        best = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"  # the folder may have moved since
        if best.is_dir():
            state.best_model_checkpoint = str(best)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **unused: Any) -> None:
        losses = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        if self.patience is not None and len(losses) - 1 - losses.index(min(losses)) >= self.patience:
            control.should_training_stop, control.should_save = True, False


def tidy_log(history: Sequence[dict[str, float]]) -> pd.DataFrame:
    """A trainer's `state.log_history` as rows (step, metric, value); the summary at the end of training is left out."""
    rows = [
        (entry["step"], metric, value)
        for entry in history
        if "train_runtime" not in entry
        for metric, value in sorted(entry.items())  # as a checkpoint has them
        if metric not in ("step", "epoch") and value is not None
    ]
    return pd.DataFrame(rows, columns=["step", "metric", "value"])
