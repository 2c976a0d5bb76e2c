"""The study of the reasoning world: what step credit does where thinking pays, one axis at a time from a base point.

Rules that were set before any run of it was looked at:

- Every objective gets the same rates, `RATES`; validation chooses, tests are read once. Where the lowest rate is the
  best, lower ones are tried too.
- Two methods that are compared have five seeds, others three. The first `grid_seeds` try every rate.
- A run ends as collapsed where validation NDCG@10 falls below half of its start, from a quarter of its updates on. It
  keeps the number that it ended with.
- Starts are told by what they can do: stage 2 ends when a given share of validation rows is named right.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sapo.data.reasoning import ReasoningConfig
from sapo.errors import InputError
from sapo.evaluation.gradients import learns_from_given_rollouts
from sapo.experiments.recipes import EvaluationConfig, Recipe, RLConfig, in_world
from sapo.experiments.run_folder import Job
from sapo.experiments.runner import measure_starts, publish, run
from sapo.training.sft import SFTConfig

RATES = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
STARTS = (0.02, 0.05, 0.15, 0.4)  # exact match of the greedy answers, of at most 0.656
SWITCHES: dict[str, dict[str, Any]] = {
    "without-kl": {"beta": 0.0},
    "strong-kl": {"beta": 0.04},
    "unclipped": {"max_grad_norm": 0.0},
    "zero-variance-dropped": {"drop_zero_variance": "both"},  # TRL PR 6365 and 7068
}
BASE = in_world(
    Recipe(
        preset="study",
        stage1=SFTConfig(updates=200, batch_size=128, learning_rate=3e-3, title_share=0.1),
        stage2=SFTConfig(updates=600, batch_size=128, learning_rate=3e-3, until_exact=0.05),
        stage3=RLConfig(
            updates=400,
            prompts=32,
            group_size=16,
            learning_rates=RATES,
            weight_decay=0.0,
            log_every=20,
            look_every=20,
            give_up_below=0.5,
        ),
        evaluation=EvaluationConfig(valid_rows=2000, rollout_prompts=256),
        objectives=("sapo", "grpo"),
        ablations=(),
        seeds=(0, 1, 2, 3, 4),
        ablation_seeds=3,
    ),
    ReasoningConfig(),
)


@dataclass(frozen=True)
class Axis:
    """Recipes that differ from the base point in one thing."""

    question: str
    recipes: tuple[Recipe, ...]

    @property
    def places(self) -> set[tuple[str, str]]:
        """Data set and preset of each recipe."""
        worlds = ((recipe.world, recipe.preset) for recipe in self.recipes)
        return {(world.name, preset) for world, preset in worlds if isinstance(world, ReasoningConfig)}

    @property
    def methods(self) -> tuple[str, ...]:
        """The objectives that it trains."""
        return tuple(dict.fromkeys(name for recipe in self.recipes for name in recipe.objectives + recipe.ablations))


def _starting_at(exact: float) -> Recipe:
    """The base point with a stage 2 that ends sooner or later on the same schedule."""
    return replace(BASE, preset=f"study-start{exact:g}", stage2=replace(BASE.stage2, until_exact=exact))


def _others(*objectives: str, seeds: int = BASE.ablation_seeds, lower: tuple[float, ...] = ()) -> Recipe:
    """At the base point, beside what it compares."""
    stage3 = replace(BASE.stage3, learning_rates=(*lower, *RATES))
    return replace(BASE, objectives=(), ablations=objectives, ablation_seeds=seeds, stage3=stage3)


def _in_world(**knobs: float) -> Recipe:
    return in_world(BASE, ReasoningConfig(**knobs))  # type: ignore[arg-type]


AXES: dict[str, Axis] = {
    "base": Axis("Does step credit gain more than outcome credit, and is it stabler?", (replace(BASE, grid_seeds=3),)),
    "components": Axis(
        "Does it take both the step reward and the step advantage?",
        (
            _others("grpo_step_reward", "sapo_outcome_reward", seeds=5),
            _others("grpo_graded", lower=(3e-6, 1e-5)),
            _others("sapo_sequence_mean"),
        ),
    ),
    "sparsity": Axis(
        "Is the gain largest where exact matches are rarest?",
        tuple(_starting_at(exact) for exact in STARTS if exact != BASE.stage2.until_exact),
    ),
    "coupling": Axis("What if an early error spoils the later steps?", (_in_world(coupled=True),)),
    "trie": Axis("What if the catalogue forces codes?", (_in_world(item_share=0.25),)),
    "teacher": Axis("What if the teacher errs?", (_in_world(teacher_error=0.2),)),
    "objectives": Axis(
        "How do the field's other objectives fare?",
        (
            _others(
                *("sapo_gated", "sapo_suffix", "sapo_fallback", "process_grpo", "gdpo", "dr_grpo", "dapo", "rloo"),
                *("reinforce_plus_plus", "sign", "vppo", "rlvr", "sapo_no_std", "sapo_batch_std"),
            ),
        ),
    ),
    "switches": Axis(
        "What do the settings that the field argues about change?",
        tuple(
            replace(BASE, preset=f"study-{name}", stage3=replace(BASE.stage3, **change), seeds=(0, 1, 2))
            for name, change in SWITCHES.items()
        ),
    ),
    "optimizer": Axis(
        "Is it Adam that makes the difference?",
        (
            replace(
                BASE,
                preset="study-sgd",
                stage3=replace(BASE.stage3, optimizer="sgd", learning_rates=(0.1, 0.3, 1.0, 3.0, 10.0)),
                ablations=("grpo_step_reward",),
                seeds=(0, 1, 2),
            ),
        ),
    ),
}


class Countdown:
    """Says after each task what is left, and how long that takes if it goes on as it went.

    Args:
        what: is being done.
    """

    def __init__(self, what: str):
        self.what, self.began, self.before = what, time.monotonic(), 0

    def __call__(self, done: int, of: int) -> None:
        if done <= self.before or not self.before:  # a first call, or one of another list of tasks
            self.before, self.began = done, time.monotonic()
            left = "?"
        else:
            left = f"{(time.monotonic() - self.began) / 60 / (done - self.before) * (of - done):.0f}"
        print(f"{self.what}: {done} of {of} tasks are done, {left} minutes left", flush=True)


def run_study(
    names: Sequence[str],
    out: str,
    workers: int | None = None,
    record: str | Path | None = None,
    gradients: int | None = None,
) -> None:
    """Do what is left of some axes, all where none is named; each line says what is left and how long it takes.

    Args:
        record: where the results of each recipe are published to once it is finished; nowhere where None.
        gradients: batches of rollouts on which the gradients of the axis's objectives are measured at each start; none
            where None.

    Raises:
        InputError: an axis that there is not.
    """
    if unknown := set(names) - set(AXES):
        raise InputError(f"there is no axis {min(unknown)!r}; there are {', '.join(AXES)}.")
    for name in names or AXES:
        for recipe in AXES[name].recipes:
            job = Job(recipe, out)
            where = f"{name}, {job.world.name}, {recipe.preset}"
            run(job, workers, Countdown(where))
            if gradients is not None:
                measured = [method for method in AXES[name].methods if learns_from_given_rollouts(method)]
                measure_starts(job, measured, gradients, workers, Countdown(f"{where}, gradients"))
            if record is not None:
                publish(out, record)
