"""Looks at validation rows: when they are taken, what ends a stage, and what a stop leaves of them."""

from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl, TrainerState

from sapo.training.looks import ValidationLooks, collapsed, reached


def train(values, every=2, ends=None, updates=8, state=None):
    """Go through a stage whose looks find these values; returns the log, and the update it ended at."""
    found = iter(values)
    model = torch.nn.Linear(1, 1).train()
    seen = []

    def look(given):
        seen.append(given.training)
        return {"valid/ndcg@10": next(found)}

    looks = ValidationLooks(look, every, ends)
    state, control = state or TrainerState(max_steps=updates), TrainerControl()
    looks.on_train_begin(SimpleNamespace(), state, control, model=model)
    while state.global_step < updates and not control.should_training_stop:
        state.global_step += 1
        looks.on_step_end(SimpleNamespace(), state, control, model=model)
    assert not any(seen)  # looked at in evaluation mode
    assert model.training
    return state.log_history, state.global_step


def test_a_look_before_the_first_update_and_after_every_so_many():
    log, end = train([0.1, 0.2, 0.3, 0.4, 0.5])
    assert log == [{"valid/ndcg@10": value / 10, "step": 2 * place} for place, value in enumerate([1, 2, 3, 4, 5])]
    assert end == 8


def test_a_stage_ends_where_the_number_is_reached():
    assert train([0.1, 0.2, 0.4, 0.5, 0.6], ends=reached("valid/ndcg@10", 0.4))[1] == 4
    assert train([0.9] * 5, ends=reached("valid/ndcg@10", 0.4))[1] == 2  # never before the first update


def test_what_has_collapsed_ends_but_not_before_a_quarter_of_the_updates():
    """Half of .2 is .1: at update 2 of 16 the fall does not count yet, at 4 it does."""
    rule = collapsed("valid/ndcg@10", 0.5)
    assert train([0.2, 0.01, 0.01, 0.01], ends=rule, updates=16)[1] == 4
    assert train([0.2, 0.01, *[0.11] * 7], ends=rule, updates=16)[1] == 16
    assert train([0.2, 0.2, 0.2, 0.2, 0.0999, 0.2], ends=rule, updates=16)[1] == 8


def test_a_resumed_stage_knows_its_start_from_the_log():
    before = TrainerState(max_steps=16, global_step=4)
    before.log_history = [{"valid/ndcg@10": 0.2, "step": 0}, {"loss": 1.0, "step": 4}]
    log, end = train([0.05], ends=collapsed("valid/ndcg@10", 0.5), updates=16, state=before)
    assert end == 6
    assert [row["step"] for row in log] == [0, 4, 6]


@pytest.mark.parametrize("every", [3, 5])
def test_looks_fall_on_multiples(every):
    log, _ = train([0.1] * 9, every=every)
    assert [row["step"] for row in log] == list(range(0, 9, every))
