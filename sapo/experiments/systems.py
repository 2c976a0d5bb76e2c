"""Reasoning recommenders of the field as differences from ours: what stages 1 and 2 teach, and what comes after.

All use our data, backbone, supervised stages and test rows, and those with a stage 3 its numbers of updates and grid of
rates, so that rows differ in what a system is about. Recommenders made of a policy are fitted until validation stops
rising instead, at one rate, and name items, where a policy names SIDs, which a few items share. How a system differs
from the published one stands in `scope`.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from sapo.baselines.fitting import FitConfig

if TYPE_CHECKING:
    from sapo.training.sft import SFTTask


@dataclass(frozen=True)
class Stage:
    """A supervised stage: what it teaches, to which folder's policy, and under which name its numbers are reported."""

    task: "SFTTask"
    parent: str | None = None
    """The stage it goes on from; a model without training where None."""
    one_block: bool = False
    """Whether all thinking goes into one block."""
    method: str | None = None
    """Name in tables; that of the stage where None."""


STAGES: dict[str, Stage] = {
    "stage1": Stage("next_item"),
    "stage2": Stage("thinking", "stage1"),
    "stage2_no_thinking": Stage("next_item", "stage1"),
    "stage2_one_block": Stage("thinking", "stage1", one_block=True),
    "stage1_alignment": Stage("alignment"),
    "stage2_alignment": Stage("alignment", "stage1_alignment", method="LC-Rec"),
    "stage2_aligned": Stage("thinking", "stage1_alignment"),
}


@dataclass(frozen=True)
class System:
    """One recommender."""

    start: str
    """Of STAGES: the supervised stage it ends with, or goes on from."""
    objective: str | None
    """Of stage 3; None where there is no stage 3."""
    source: str
    scope: str
    """How it differs from the system as published."""
    contrast: tuple[float, ...] = ()
    """Weights of contrastive inference, of which validation chooses one; none where empty."""
    fits: tuple[FitConfig, ...] = ()
    """One after the other, of a recommender that is made of the policy; none where empty."""

    @property
    def kind(self) -> Literal["stage3", "contrast", "recommender", "supervised"]:
        """What is done after the supervised stage."""
        if self.objective is not None:
            return "stage3"
        return "contrast" if self.contrast else "recommender" if self.fits else "supervised"


# Policy gradients of recommenders that think: 64 updates of 32 histories between two validations.
REWARDED = FitConfig(
    loss="reward",
    epochs=8,
    patience=3,
    examples=2048,
    keep_start=True,
    valid_rows=1000,
    batch_size=32,
    learning_rate=3e-4,
)
TOWERS = FitConfig(patience=5, batch_size=512)
SYSTEMS: dict[str, System] = {
    "LC-Rec": System(
        "stage2_alignment",
        None,
        "2311.09049",
        "no tasks on intentions, which a language model wrote; titles alone, one wording a task, 10 beams; no "
        "pretrained language model",
    ),
    "MiniOneRec": System(
        "stage2_no_thinking",
        "rank_reward",
        "2510.24431",
        "no pretrained language model; of its alignment tasks the titles of items, in stage 1; 10 beams, not 50; "
        "log-probabilities among the codes that may follow",
    ),
    "SIDReasoner": System(
        "stage2_one_block",
        "grpo_graded",
        "2603.23183",
        "the block says what the SID tree says of the target; the published ones are those of a large language model",
    ),
    "OneRec-Think": System(
        "stage2_aligned",
        "best_of_beam",
        "2510.11639",
        "histories are SIDs without titles; thoughts are drafted greedily, once a user; the authors' code draws "
        "five for a search each",
    ),
    "LICD": System(
        "stage2",
        None,
        "2602.16587",
        "no language model shortens the thought; 32 candidates, read three times, where others have 10 beams",
        contrast=(0.0, 0.25, 0.5, 1.0, 2.0),  # 0 is the wider search alone
    ),
    "R2ec": System(
        "stage2",
        None,
        "2505.16994",
        "matching is learnt before rewards; no history is masked; cosines / 0.05; sampling at temperature 1",
        fits=(
            FitConfig(epochs=8, patience=2, valid_rows=1000, learning_rate=1e-3),
            replace(REWARDED, learning_rate=1e-4),
        ),
    ),
    "Rec-R1": System(
        "stage2_one_block",
        None,
        "2503.24289",
        "the query is a thought of few words; TF-IDF in place of BM25; 8 queries in place of 12; no KL",
        fits=(REWARDED,),
    ),
    "RecCoT": System(
        "stage2",
        None,
        "2506.21032",
        "next items in place of ratings, thoughts after histories in place of explained reviews; the policy is fixed",
        fits=(TOWERS,),
    ),
    "RecCoT blind": System(
        "stage2", None, "2506.21032", "the same towers without the thought: a control", fits=(TOWERS,)
    ),
}


# They speak in the words of small models, or align these with SIDs by tasks that pretrained ones learn in stage 1.
COMPACT = ("LC-Rec", "OneRec-Think", "LICD", "R2ec")


def stage_of(method: str) -> str:
    """The supervised stage that stage 3 of an objective or a system goes on from."""
    return SYSTEMS[method].start if method in SYSTEMS else "stage2"


def objective_of(method: str) -> str:
    """The objective of stage 3; a method that is none of the systems is one."""
    system = SYSTEMS.get(method)
    return method if system is None or system.objective is None else system.objective
