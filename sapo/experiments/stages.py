"""What one run does, from data to a folder with its numbers: a supervised stage, stage 3, what systems do instead, and
the test. A run that is finished is not done again.
"""

import gc
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import pandas as pd
import torch
from safetensors.torch import load_model, save_model
from transformers import PreTrainedModel

from sapo.baselines.cooccurrence import CoOccurrence
from sapo.baselines.fitting import fit
from sapo.baselines.knn import ItemKNN
from sapo.baselines.popularity import Popularity
from sapo.baselines.r2ec import R2ec
from sapo.baselines.rec_cot import RecCoT
from sapo.baselines.rec_r1 import RecR1
from sapo.common import distributed
from sapo.common.files import disk_errors, write_csv
from sapo.credit.objectives import OBJECTIVES
from sapo.data.interactions import Split
from sapo.evaluation.evaluate import evaluate_policy, evaluate_ranking, places
from sapo.experiments.folders import pretrained, references_folder, stage3_folder, supervised_folder, system_folder
from sapo.experiments.run_folder import Job, RunFolder
from sapo.experiments.starts import (
    mass_table,
    sampled_matches,
    stage2_rollouts,
    start_policy,
    start_remark,
    trace_leaks,
    words_and_traces,
)
from sapo.experiments.systems import STAGES, SYSTEMS, objective_of, stage_of
from sapo.policy.policy import Policy
from sapo.training.adapters import item_rows, merged, rows_alone
from sapo.training.conversations import read_conversations
from sapo.training.looks import ValidationLooks, collapsed, reached
from sapo.training.progress import tidy_log
from sapo.training.sft import SFTConfig, train_supervised
from sapo.training.traces import OneBlock

KS = (1, 5, 10)
LOOK_ROWS = 500  # validation rows that may end stage 2
REFERENCES: dict[str, Popularity | CoOccurrence] = {
    "popularity": Popularity(),
    "cooccurrence": CoOccurrence(),
    "item_knn": ItemKNN(),
}
RECOMMENDERS: dict[str, Callable[[Policy, Split], RecR1 | R2ec | RecCoT]] = {
    "R2ec": R2ec,
    "Rec-R1": RecR1,
    "RecCoT": RecCoT,
    "RecCoT blind": partial(RecCoT, explained=False),
}


def train_supervised_stage(job: Job, seed: int, name: str) -> None:
    """One of STAGES, from the folder of the one it goes on from; what another preset has of it is copied."""
    folder = supervised_folder(job, seed, name)
    if folder.finished or distributed.of_first(folder.take_over):
        return
    recipe, world, stage = job.recipe, job.world, STAGES[name]
    config = recipe.stage1 if stage.parent is None else recipe.stage2
    goes_on = stage.parent is not None and STAGES[stage.parent].task == stage.task
    if goes_on:  # with stage 1's share of titles too
        config = replace(config, title_share=recipe.stage1.title_share)
    resume, began = distributed.of_first(lambda: folder.start(config.updates)), time.monotonic()
    words, traces = words_and_traces(job)
    said = [] if job.conversations is None else read_conversations(job.conversations)
    thinking, given = stage.task == "thinking", pretrained(job)
    if stage.parent is None:
        policy = start_policy(job, words, seed)
        if given is not None and given.row_updates and not resume:
            first = SFTConfig(
                given.row_updates,
                config.batch_size,
                config.learning_rate,
                config.schedule,
                weight_decay=0.0,
                micro_batch=config.micro_batch,
                half=config.half,
                checkpointing=config.checkpointing,
            )
            with rows_alone(policy.model, item_rows(policy)):
                rows = folder.path / "rows"
                train_supervised(policy, world.split, first, stage.task, rows, seed, conversations=said)
            shutil.rmtree(rows, ignore_errors=True)
    else:
        policy = Policy.load(supervised_folder(job, seed, stage.parent).policy, world.catalog)
        policy = replace(policy, thinking=thinking)
        if stage.one_block:  # the words of all blocks
            policy = replace(policy, num_blocks=1, block_budget=world.catalog.num_levels * recipe.block_budget)
            traces = OneBlock(traces)
    before = supervised_folder(job, seed, stage.parent).manifest["updates"] if stage.parent is not None else 0
    looks = None
    if thinking and config.until_exact is not None:
        look = partial(_look, replace(policy), world.split, LOOK_ROWS)
        looks = ValidationLooks(look, config.look_every, reached("valid/recall@1", config.until_exact))
    history = train_supervised(
        policy,
        world.split,
        config,
        stage.task,
        folder.path / "checkpoints",
        seed,
        traces if thinking else None,
        resume,
        first=before * recipe.stage1.batch_size if goes_on else 0,
        lora_rank=None if given is None else given.lora_rank,
        conversations=said,
        looks=looks,
    )
    if looks is not None and (last := history[-1]["step"]) == config.updates:
        print(f"{name} seed {seed} ended after its {last:,} updates, below an exact match of {config.until_exact:g}")
    metrics: dict[str, float] = {}
    counts: dict[str, int] = {}
    if stage.parent is not None:
        metrics, counts = _validate(job, policy)
    if not distributed.is_first():
        return
    policy.save(folder.policy)
    write_csv(tidy_log(history), folder.path / "log.csv")
    if name == "stage2":
        rollouts = stage2_rollouts(job, policy, seed)
        write_csv(rollouts, folder.path / "rollouts.csv.gz")
        metrics |= sampled_matches(rollouts)
    folder.write_card(metrics)
    if name == "stage2":
        metrics |= trace_leaks(job, traces)
        if world.synthetic is not None:
            best = world.synthetic.optimum(world.split.valid.sample(recipe.evaluation.valid_rows), KS)
            said_of_start = start_remark(metrics["exact_match/unseen_rows"], best, world.catalog.num_items)
            if said_of_start is not None:
                print(f"seed {seed}: {said_of_start}")
    metrics["parameters"] = float(policy.model.num_parameters())
    parent = None if stage.parent is None else supervised_folder(job, seed, stage.parent)
    _finish(folder, parent, began, int(history[-1]["step"]), metrics, counts)


def train_stage3(job: Job, seed: int, method: str, learning_rate: float) -> None:
    """Reinforcement learning with an objective from the seed's stage-2 folder, or as a system does it."""
    from transformers import PrinterCallback, TrainerCallback

    from sapo.training.config import SAPOConfig
    from sapo.training.progress import ProgressLine
    from sapo.training.sharding import gathered
    from sapo.training.trainer import SAPOTrainer

    folder = stage3_folder(job, seed, method, learning_rate)
    if folder.finished:
        return
    recipe, world = job.recipe, job.world
    settings, objective = recipe.stage3, objective_of(method)
    resume, began = distributed.of_first(lambda: folder.start(settings.updates)), time.monotonic()
    micro, accumulated = distributed.shares("prompts", settings.prompts, settings.micro_prompts)
    args = SAPOConfig(
        output_dir=str(folder.path / "checkpoints"),
        objective=objective,
        beta=settings.beta if OBJECTIVES[objective].beta else None,
        max_steps=settings.updates,
        per_device_train_batch_size=micro * settings.group_size,
        gradient_accumulation_steps=accumulated,
        rollout_prompts=settings.rollout_prompts,
        num_generations=settings.group_size,
        num_iterations=settings.num_iterations,
        lora_rank=None if (given := pretrained(job)) is None else given.lora_rank,
        temperature=settings.temperature,
        learning_rate=learning_rate,
        weight_decay=settings.weight_decay,
        optim=settings.optimizer,
        lr_scheduler_type="constant",
        max_grad_norm=settings.max_grad_norm,
        drop_zero_variance=settings.drop_zero_variance,
        logging_steps=settings.log_every,
        log_completions=True,
        num_completions_to_print=0,
        save_strategy="steps",
        save_steps=max(1, settings.updates // settings.num_iterations // 4) * settings.num_iterations,
        save_total_limit=2,
        seed=seed,
        disable_tqdm=True,
    )
    watch = {"reward": "reward", "rewards/exact/mean": "exact", "kl": "kl"}
    bar = ProgressLine(f"{method} seed {seed} lr {learning_rate:g}", watch)
    before = supervised_folder(job, seed, stage_of(method)).policy
    callbacks: list[TrainerCallback] = [bar]
    if settings.look_every is not None:
        look = partial(_look, Policy.load(before, world.catalog), world.split, settings.look_rows)
        share = settings.give_up_below
        rule = None if share is None else collapsed("valid/ndcg@10", share)
        callbacks.append(ValidationLooks(look, settings.look_every, rule))
    trainer = SAPOTrainer.from_catalog(before, world.catalog, args, world.split, callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    try:
        with disk_errors(args.output_dir):
            trainer.train(resume_from_checkpoint=resume)
        log, updates = trainer.state.log_history, trainer.state.global_step
        model = merged(gathered(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)))
        if distributed.is_first():
            replace(Policy.load(before, world.catalog, "cpu"), model=model.cpu()).save(folder.policy)
        trainer.accelerator.free_memory()  # of a GPU, what the optimizer and the reference hold
        del trainer, model
        gc.collect()
        distributed.wait()
        trained = Policy.load(folder.policy, world.catalog)
        metrics, counts = _validate(job, trained)  # the last update may break it too
    except FloatingPointError as error:
        distributed.of_first(partial(folder.give_up, error))
        return
    if not distributed.is_first():
        return
    write_csv(tidy_log(log), folder.path / "log.csv")
    (folder.path / "completions").mkdir(exist_ok=True)
    for part in (folder.path / "checkpoints" / "completions").glob("*.parquet"):
        shutil.copy2(part, folder.path / "completions")
    metrics["learning_rate"] = learning_rate
    folder.write_card(metrics)
    metrics["parameters"] = float(trained.model.num_parameters())
    parent = supervised_folder(job, seed, stage_of(method))
    _finish(folder, parent, began, updates, metrics, counts)


def choose_contrast(job: Job, seed: int, system: str) -> None:
    """The policy that a system starts from, asked by contrastive inference with the weight that validation chooses."""
    folder = system_folder(job, seed, system)
    if folder.finished:
        return
    distributed.of_first(folder.start)
    began, start = time.monotonic(), supervised_folder(job, seed, stage_of(system)).policy
    policy = Policy.load(start, job.world.catalog)
    limit, tried = job.recipe.evaluation.valid_rows, []
    for weight in SYSTEMS[system].contrast:
        policy.contrast = weight
        metrics, _ = evaluate_policy(policy, job.world.split, "valid", limit, beams=(10,), title=f"weight {weight:g}")
        tried.append({"contrast": weight, "ndcg@10": metrics["ndcg@10"]})
    policy.contrast = max(tried, key=lambda row: row["ndcg@10"])["contrast"]
    metrics, counts = _validate(job, policy)
    if not distributed.is_first():
        return
    write_csv(pd.DataFrame(tried), folder.path / "tried.csv")
    policy.save(folder.policy)
    folder.write_card(metrics)
    metrics |= {"contrast": policy.contrast, "parameters": float(policy.model.num_parameters())}
    _finish(folder, supervised_folder(job, seed, stage_of(system)), began, 0, metrics, counts)


def fit_recommender(job: Job, seed: int, system: str) -> None:
    """A system that recommends by more than naming SIDs, fitted to the thoughts of the policy it starts from."""
    folder = system_folder(job, seed, system)
    if folder.finished:
        return
    folder.start()
    began, model, log = time.monotonic(), _recommender(job, seed, system), []
    updates = 0
    for number, config in enumerate(SYSTEMS[system].fits, start=1):
        checkpoint = folder.path / "checkpoints" / f"fit{number}.pt"
        try:
            history = fit(model, job.world.split, config, seed, f"{system} seed {seed}", checkpoint)
        except FloatingPointError as error:
            folder.give_up(error)
            return
        log += [{"fit": number} | row for row in history]
        best = max(history, key=lambda row: row["ndcg@10"])
        updates += int(best["updates"])
    save_model(model, str(folder.path / "model.safetensors"))
    write_csv(pd.DataFrame(log).drop(columns="seconds"), folder.path / "fits.csv")
    policy = 0 if model.policy is None else model.policy.model.num_parameters()
    own = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("model."))
    metrics = {"valid/ndcg@10": best["ndcg@10"], "parameters": float(policy + own)}
    parent = None if model.policy is None else supervised_folder(job, seed, stage_of(system))
    counts = {"valid/ndcg@10": len(job.world.split.valid.sample(config.valid_rows))}
    _finish(folder, parent, began, updates, metrics, counts)


def run_test(job: Job, folder: RunFolder) -> None:
    """Read the test rows, once for a finished run: `test.csv` and the ranks of every user. None if it diverged."""
    if folder.diverged or (folder.path / "test.csv").is_file():
        return
    world, limit, mass = job.world, job.recipe.evaluation.test_rows, None
    if (system := str(folder.row["method"])) in RECOMMENDERS:
        model = _recommender(job, folder.seed, system)
        load_model(model, str(folder.path / "model.safetensors"))
        rows = world.split.test.sample(limit)
        sids = world.catalog.sids
        ranked = model.rank(rows.history, min(places(rows, KS, sids), model.reach), rows.user)
        metrics, users = evaluate_ranking(ranked, rows, KS, sids)
    else:
        policy = Policy.load(folder.policy, world.catalog)
        batch = job.recipe.evaluation.batch_size
        title = f"test {folder.path.name}"
        metrics, users = evaluate_policy(policy, world.split, "test", limit, batch_size=batch, title=title)
        if pretrained(job) is None:  # a large model would sample for long
            mass = mass_table(job, folder, policy)
    if not distributed.is_first():
        return
    folder.clear()
    write_csv(users, folder.path / "per_user.csv.gz")
    table = folder.results("measured", metrics, len(users))
    write_csv(table if mass is None else pd.concat([table, mass]), folder.path / "test.csv")


def run_references(job: Job) -> None:
    """Rows that need no training: popularity, co-occurrence, item kNN, and the optimum where it is known."""
    folder = references_folder(job)
    if folder.finished:
        return
    folder.start()
    began, world = time.monotonic(), job.world
    rows = world.split.test.sample(job.recipe.evaluation.test_rows)
    sids, target = world.catalog.sids, torch.tensor(rows.target)
    tables, ranks = [], []
    for name, method in REFERENCES.items():
        width = min(places(rows, KS, sids), world.catalog.num_items)
        ranked = method.fit(world.split.sequences, world.catalog.num_items).rank(rows.history, width)
        metrics, users = evaluate_ranking(ranked, rows, KS, sids)
        metrics |= {
            f"match_level_{k + 1}": rate
            for k, rate in enumerate((sids[ranked[:, 0]] == sids[target]).float().mean(0).tolist())
        }
        tables.append(folder.results("measured", metrics, len(rows)).assign(method=name))
        ranks.append(users.assign(method=name))
    if world.synthetic is not None:
        optimum = world.synthetic.optimum(rows, KS)
        tables.append(folder.results("exact", optimum, len(rows)).assign(method="optimum"))
    write_csv(pd.concat(ranks), folder.path / "per_user.csv.gz")
    write_csv(pd.concat(tables), folder.path / "test.csv")
    folder.finish(time.monotonic() - began, 0, {}, {})


def _recommender(job: Job, seed: int, system: str) -> RecR1 | R2ec | RecCoT:
    """One with the weights that it starts from."""
    policy = Policy.load(supervised_folder(job, seed, stage_of(system)).policy, job.world.catalog)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return RECOMMENDERS[system](policy, job.world.split).to(policy.model.device)


def _look(policy: Policy, split: Split, rows: int, model: PreTrainedModel) -> dict[str, float]:
    """A few numbers of validation rows, of a model that is being trained."""
    from sapo.training.sharding import whole_weights

    policy.model = model
    with whole_weights(model):
        metrics, _ = evaluate_policy(policy, split, "valid", rows, beams=(10,), title="look")
    levels = range(1, policy.catalog.num_levels + 1)
    shown = ("ndcg@10", "recall@1", *(f"match_level_{level}" for level in levels))
    return {f"valid/{name}": metrics[name] for name in shown}


def _validate(job: Job, policy: Policy) -> tuple[dict[str, float], dict[str, int]]:
    """Validation metrics, and exact match on rows of the training split, which stage 3 draws its prompts from."""
    split, limit, size = job.world.split, job.recipe.evaluation.valid_rows, job.recipe.evaluation.batch_size
    metrics, valid = evaluate_policy(policy, split, "valid", limit, beams=(10,), batch_size=size, title="validation")
    on_seen, seen = evaluate_policy(
        policy, split, "train", len(valid), beams=(10,), batch_size=size, title="training rows"
    )
    metrics = {f"valid/{name}": value for name, value in metrics.items()}
    metrics["exact_match/unseen_rows"] = metrics["valid/recall@1"]
    metrics["exact_match/seen_rows"] = on_seen["recall@1"]
    counts = dict.fromkeys(metrics, len(valid)) | {"exact_match/seen_rows": len(seen)}
    return metrics, counts


def _finish(
    folder: RunFolder,
    parent: RunFolder | None,
    began: float,
    updates: int,
    metrics: dict[str, float],
    counts: dict[str, int],
) -> None:
    """Finish a run; the metric "seconds" counts the stages before it too. What was done before a stop is not in it."""
    own = time.monotonic() - began
    before = 0.0 if parent is None else parent.table("metrics.csv").set_index("metric")["value"]["seconds"]
    folder.finish(own, updates, metrics | {"seconds": own + before}, counts, parent)
