"""Reasoning recommenders of the field as differences from ours: what stages 1 and 2 teach, and what stage 3 pays for.

All use our data, backbone, numbers of updates and evaluation, so that rows differ in what a system is about. What that
leaves out stands in `scope`.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

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
    """What it leaves out of the system as published."""
    contrast: tuple[float, ...] = ()
    """Weights of contrastive inference, of which validation chooses one; none where empty."""


SYSTEMS: dict[str, System] = {
    "LC-Rec": System(
        "stage2_alignment",
        None,
        "2311.09049",
        "tasks of SIDs, titles and histories; those on intentions, which a language model wrote, are left out",
    ),
    "MiniOneRec": System("stage2_no_thinking", "rank_reward", "2510.24431", "no pretrained language model"),
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
        "thoughts are drafted greedily, once a user; the authors' code draws five for a search each",
    ),
    "LICD": System(
        "stage2",
        None,
        "2602.16587",
        "thoughts of small policies are short, so no language model shortens them",
        contrast=(0.25, 0.5, 1.0, 2.0),
    ),
}


def stage_of(method: str) -> str:
    """The supervised stage that stage 3 of an objective or a system goes on from."""
    return SYSTEMS[method].start if method in SYSTEMS else "stage2"


def objective_of(method: str) -> str:
    """The objective of stage 3; a method that is none of the systems is one."""
    system = SYSTEMS.get(method)
    return method if system is None or system.objective is None else system.objective
