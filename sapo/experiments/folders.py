"""Where each run of a job lives: a folder depends on everything that decides its result."""

import hashlib
from dataclasses import asdict
from pathlib import Path

from sapo.experiments.identity import objective_identity
from sapo.experiments.run_folder import Job, RunFolder
from sapo.experiments.systems import STAGES, SYSTEMS, objective_of, stage_of
from sapo.policy.backbone import Pretrained


def supervised_folder(job: Job, seed: int, name: str) -> RunFolder:
    """Where one of STAGES of a seed lives."""
    recipe, stage = job.recipe, STAGES[name]
    names = ("backbone", "max_history", "words_per_block", "block_budget", "vocabulary", "stage1")
    config = {name: asdict(recipe)[name] for name in names} | {"seed": seed, "stage": asdict(stage)}
    if (given := pretrained(job)) is not None:
        config["weights"] = given.content
    for what in ("rationales", "conversations"):
        if (path := getattr(job, what)) is not None:
            config[what] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    if stage.parent is not None:
        ends = {} if stage.task == "thinking" else {"until_exact": None, "look_every": None}  # of no use there
        config |= {"stage2": asdict(recipe.stage2) | ends, "evaluation": asdict(recipe.evaluation)}
        config["parent"] = supervised_folder(job, seed, stage.parent).identity
    if name == "stage2":  # its rollouts are kept
        config |= {"group_size": recipe.stage3.group_size, "temperature": recipe.stage3.temperature}
    return RunFolder(job, f"seed{seed}/{name}", seed, stage.method or name, config)


def stage3_folder(job: Job, seed: int, method: str, learning_rate: float) -> RunFolder:
    """Where a run of reinforcement learning lives."""
    settings = {name: value for name, value in asdict(job.recipe.stage3).items() if name != "learning_rates"}
    config = {
        "objective": objective_identity(objective_of(method)),
        "learning_rate": learning_rate,
        "stage3": settings,
        "seed": seed,
        "parent": supervised_folder(job, seed, stage_of(method)).identity,
    }
    return RunFolder(job, f"seed{seed}/{method}-lr{learning_rate:g}", seed, method, config)


def system_folder(job: Job, seed: int, system: str) -> RunFolder:
    """Where a system lives that is made of a supervised stage in another way than by stage 3."""
    config = {
        "contrast": SYSTEMS[system].contrast,
        "fits": [asdict(config) for config in SYSTEMS[system].fits],
        "evaluation": asdict(job.recipe.evaluation),
        "parent": supervised_folder(job, seed, stage_of(system)).identity,
    }
    return RunFolder(job, f"seed{seed}/{system.replace(' ', '_')}", seed, system, config)


def references_folder(job: Job) -> RunFolder:
    """Where the rows without training live."""
    return RunFolder(job, "references", 0, "references", {"evaluation": asdict(job.recipe.evaluation)})


def pretrained(job: Job) -> Pretrained | None:
    """The pretrained model of a job; None where its policies are small ones."""
    return job.recipe.backbone if isinstance(job.recipe.backbone, Pretrained) else None
