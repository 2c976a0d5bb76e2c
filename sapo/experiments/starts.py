"""What stage 3 starts from: the words and thoughts of a policy, and what the stage-2 policy can do."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pandas as pd
import torch

from sapo.analysis.results import others
from sapo.common.files import write_csv
from sapo.data.reasoning import ReasoningWorld
from sapo.errors import InputError
from sapo.evaluation.allowed_mass import allowed_mass
from sapo.evaluation.gradients import measure_gradients
from sapo.experiments.folders import pretrained, supervised_folder
from sapo.experiments.run_folder import Job, RunFolder
from sapo.policy.backbone import Pretrained, add_item_tokens, build_backbone, load_pretrained
from sapo.policy.policy import Policy
from sapo.policy.prompts import build_tokenizer, common_words, frequent_words
from sapo.training.rationales import RationaleTraces, read_rationales
from sapo.training.traces import NodeDescriptors, Traces, leaks


def mass_table(job: Job, folder: RunFolder, policy: Policy) -> pd.DataFrame:
    """How much of the full softmax a policy keeps on what the decoder allows, as rows of results.csv: of completions of
    validation prompts, `allowed_mass/block` and `allowed_mass/level_1` to K."""
    evaluation, settings = job.recipe.evaluation, job.recipe.stage3
    prompts = policy.prompts(job.world.split.valid.sample(evaluation.rollout_prompts).history)
    generator = torch.Generator(policy.model.device).manual_seed(folder.seed)
    found = allowed_mass(policy, prompts, settings.group_size, generator, temperature=settings.temperature)
    names = [f"allowed_mass/{kind.replace(' ', '_')}" for kind in found["kind"]]
    return folder.results("measured", dict(zip(names, found["mass"], strict=True)), len(prompts))


def start_policy(job: Job, words: list[str], seed: int) -> Policy:
    """What stage 1 starts from: a small model of random weights, or a pretrained one that knows the tokens of items."""
    recipe, world = job.recipe, job.world
    settings = (world.split.name, world.split.data_hash, recipe.block_budget, recipe.max_history)
    if isinstance(recipe.backbone, Pretrained):
        model, tokenizer = load_pretrained(recipe.backbone)
        add_item_tokens(model, tokenizer, world.catalog)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        return Policy(model, tokenizer, world.catalog, *settings, thinking=False, chat=True)
    tokenizer = build_tokenizer(world.catalog, words)
    model = build_backbone(recipe.backbone, tokenizer, seed)
    return Policy(model, tokenizer, world.catalog, *settings, thinking=False)


def words_and_traces(job: Job) -> tuple[list[str], Traces]:
    """The words that a small policy is to know, and what a policy is to think: the states of a reasoning world, words
    of the SID tree, or those of a teacher.

    A pretrained policy knows all words, and thinks in a teacher's sentences.
    """
    recipe, catalog, made = job.recipe, job.world.catalog, job.world.synthetic
    if job.rationales is None and isinstance(made, ReasoningWorld):
        return [*dict.fromkeys([*frequent_words(catalog, recipe.vocabulary), *chain(*made.words)])], made.traces
    if pretrained(job) is not None:
        if job.rationales is None:
            return [], NodeDescriptors(catalog, recipe.words_per_block)
        return [], RationaleTraces(read_rationales(job.rationales, catalog), catalog.num_levels)
    words = frequent_words(catalog, recipe.vocabulary)
    if job.rationales is None:
        return words, NodeDescriptors(catalog, recipe.words_per_block, words)
    rationales = read_rationales(job.rationales, catalog)
    words = [*dict.fromkeys([*words, *common_words(rationales.values(), recipe.vocabulary)])]
    return words, RationaleTraces(rationales, catalog.num_levels, recipe.words_per_block, words)


def trace_leaks(job: Job, traces: Traces, most: int = 2000) -> dict[str, float]:
    """What the blocks that stage 2 learns give away of their targets' titles (`leaks`), of so many training rows."""
    rows = traces.rows(job.world.split.train).sample(most)
    pairs = zip(rows.history, rows.target, strict=True)
    texts = [" ".join(traces.of_row(history, target)) for history, target in pairs]
    found = leaks(texts, [job.world.catalog.titles[target] for target in rows.target])
    return {f"traces/{name}": value for name, value in found.items()}


def stage2_rollouts(job: Job, policy: Policy, seed: int) -> pd.DataFrame:
    """G rollouts of the stage-2 policy on validation prompts: which levels match. What advantages are computed from."""
    evaluation, settings = job.recipe.evaluation, job.recipe.stage3
    rows = job.world.split.valid.sample(evaluation.rollout_prompts)
    generator = torch.Generator(policy.model.device).manual_seed(seed)
    prompts, sids = policy.prompts(rows.history), []
    count = settings.rollout_prompts or len(prompts)
    for start in range(0, len(prompts), count):
        batch = policy.encode(prompts[start : start + count])
        rollouts = policy.sample(batch, settings.group_size, generator, settings.temperature)
        sids.append(rollouts.sids.cpu())
    target = policy.catalog.sids[rows.target].repeat_interleave(settings.group_size, 0)
    match = (torch.cat(sids) == target).long()
    prompt, rollout, level = np.indices((len(rows), settings.group_size, policy.catalog.num_levels)).reshape(3, -1)
    return pd.DataFrame({"prompt": prompt, "rollout": rollout, "level": level + 1, "match": match.flatten().numpy()})


def measure_start(job: Job, seed: int, objectives: Sequence[str], batches: int) -> None:
    """`measure_gradients` of a seed's stage-2 policy, those objectives that its folder does not have yet.

    Raises:
        InputError: a stage 2 that is not finished.
    """
    folder, settings = supervised_folder(job, seed, "stage2"), job.recipe.stage3
    missing = unmeasured(folder, objectives, batches, settings.prompts)
    if not folder.finished:
        raise InputError(f"{folder.path}: stage 2 is not finished, so its gradients cannot be measured.")
    found = measure_gradients(
        Policy.load(folder.policy, job.world.catalog),
        job.world.split.train,
        missing,
        prompts=settings.prompts,
        group_size=settings.group_size,
        batches=batches,
        seed=seed,
        temperature=settings.temperature,
        title=f"gradients seed {seed}",
    )
    path = folder.path / "gradients.csv"
    parts = [others(pd.read_csv(path), found, ["objective"])] if path.is_file() else []
    write_csv(pd.concat([*parts, found.assign(batches=batches, prompts=settings.prompts)]), path)


def unmeasured(folder: RunFolder, objectives: Sequence[str], batches: int, prompts: int) -> list[str]:
    """Those of the objectives whose gradients a stage-2 folder lacks from so many batches of so many prompts."""
    path = folder.path / "gradients.csv"
    table = pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=["objective", "batches", "prompts"])
    known = set(table.loc[(table["batches"] >= batches) & (table["prompts"] == prompts), "objective"])
    return [name for name in objectives if name not in known]


def start_remark(exact: float, optimum: dict[str, float], items: int) -> str | None:
    """What makes a start useless for comparing objectives, in a sentence; None for one that is neither.

    Args:
        exact: share of validation rows whose item the start names; `optimum` of the same rows, `items` of the world.
    """
    best = optimum["exact_match_greedy"]
    if exact >= 0.95 * best:
        return (
            f"stage 2 names {exact:.1%} right, of at most {best:.1%}: it is at the optimum, nothing is left to learn."
        )
    if exact < 3 / items:
        return (
            f"stage 2 names {exact:.2%} right, and who guesses {1 / items:.2%}: it is at chance, where no objective "
            f"hears anything. A longer stage 2 is the cure."
        )
    return None


def sampled_matches(rollouts: pd.DataFrame) -> dict[str, float]:
    """How often sampled completions are right: what the start of reinforcement learning can do."""
    by_level = rollouts.pivot(index=["prompt", "rollout"], columns="level", values="match")
    rates = {f"rollouts/match_level_{level}": float(rate) for level, rate in by_level.mean().items()}
    return {"rollouts/exact": float(by_level.prod(axis=1).mean())} | rates
