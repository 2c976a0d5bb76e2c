"""Looks at validation rows while a stage runs, and rules that end it by what they saw."""

from collections.abc import Callable, Sequence
from typing import Any

from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

Look = dict[str, float]
Rule = Callable[[Sequence[Look], TrainerState], bool]


def reached(name: str, value: float) -> Rule:
    """Ends a stage at the first look whose number is so large."""
    return lambda looks, state: looks[-1][name] >= value


def collapsed(name: str, share: float) -> Rule:
    """Ends a stage whose number falls below this share of the first look's, from a quarter of the updates on."""
    return lambda looks, state: state.global_step >= state.max_steps / 4 and looks[-1][name] < share * looks[0][name]


class ValidationLooks(TrainerCallback):
    """Logs what `look` says of the model before the first update and after every so many.

    The log, which checkpoints carry, is all that a resumed run needs to go on.

    Args:
        look: numbers by name, of a model in evaluation mode.
        every: updates between two looks.
        ends: the rule that ends the stage; none does where None.
    """

    def __init__(self, look: Callable[[PreTrainedModel], Look], every: int, ends: Rule | None = None):
        self.look, self.every, self.ends = look, every, ends

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        if not state.global_step:
            self._log(more["model"], state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any) -> None:
        if state.global_step % self.every:
            return
        name = self._log(more["model"], state)
        looks = [entry for entry in state.log_history if name in entry]
        if self.ends is not None and self.ends(looks, state):
            control.should_training_stop = True

    def _log(self, model: PreTrainedModel, state: TrainerState) -> str:
        """Returns the name of a number that looks have, and nothing else in the log."""
        was_training = model.training
        model.eval()
        entry = self.look(model)
        model.train(was_training)
        state.log_history.append(entry | {"step": state.global_step})
        return next(iter(entry))
