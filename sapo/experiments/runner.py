"""The main job: stages 1 to 3 for several seeds, evaluation, and one tidy table of what came out.

A recipe says everything that decides a result. It unfolds into runs, each with a folder of its own. A run whose
identity (config, data, code, parent run) is finished under OUT is skipped; one that was stopped is resumed.

    references ──────────────────────────────────────────────┐
    seed s: stage 1 ─┬─ stage 2 ─┬─ sapo, each learning rate ─┼─ results, dynamics and rollouts
                     │           └─ grpo, each learning rate ─┤
                     └─ stage 2 without thinking ─────────────┘

Systems of the field (`sapo.experiments.systems`) add supervised stages of their own, and go on from them.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import pandas as pd

from sapo.analysis.ranks import RANKS, ROWS, add_ranks, merge_ranks
from sapo.analysis.results import WORLD, add_results, others, read_results
from sapo.common import distributed
from sapo.common.files import updating, write_csv
from sapo.credit.objectives import OBJECTIVES
from sapo.errors import InputError
from sapo.experiments.folders import pretrained, references_folder, stage3_folder, supervised_folder, system_folder
from sapo.experiments.pool import Crew, Task
from sapo.experiments.recipes import Recipe
from sapo.experiments.run_folder import Job, RunFolder, read_recorded_runs, read_runs
from sapo.experiments.stages import (
    choose_contrast,
    fit_recommender,
    run_references,
    run_test,
    train_stage3,
    train_supervised_stage,
)
from sapo.experiments.starts import measure_start, unmeasured, words_and_traces
from sapo.experiments.systems import COMPACT, STAGES, SYSTEMS, stage_of

GRADIENTS = "gradients.csv"
KEYS = {"dynamics.csv.gz": [*WORLD, "method"], "rollouts.csv.gz": WORLD, "looks.csv.gz": [*WORLD, "method"]}
KEYS[GRADIENTS] = [*WORLD, "objective"]
LOOKS = r"^valid/|^kl$|^grad_norm$|^rollouts$|^rewards/exact/mean$"  # what looks.csv.gz keeps of every rate of a grid
BOOKKEEPING = r"^completions/|/std$|^num_tokens$|^step_time$"  # stays in a run's log.csv
# Of validation the record keeps what choices were made by, of other ways to search the ten first places, of one place
# the recall, which NDCG equals there; runs keep the rest.
UNRECORDED = (
    r"^valid/(?!ndcg@10$)|^(?:beams50|full)/\w+@(?!10$)|(?:^|/)ndcg@1$"  # of searches
    r"|^(?:valid|duplicate)_share$"  # 1 and 0 under the trie
)
DIGITS, CURVE_DIGITS = 9, 5  # of the record's numbers, and of its curves; runs keep all
CONTROLS = ("stage2", "stage2_no_thinking")  # supervised stages that every job reports


def run(job: Job, workers: int | None = None, tell: Callable[[int, int], None] | None = None) -> pd.DataFrame:
    """Do what is not done yet, then write `results.csv`, `dynamics.csv.gz`, `rollouts.csv.gz` and, where stage 3 looks
    at validation rows, `looks.csv.gz` under `job.out`.

    Args:
        workers, tell: as of `Crew`.

    Returns:
        The rows of results.csv that belong to this recipe and data.

    Raises:
        InputError: bad settings or input; whatever a run raised. Finished runs stay, and stopped ones are resumed.
    """
    recipe, train = job.recipe, job.world.split.train
    if job.rationales is not None:
        explained = len(words_and_traces(job)[1].rows(train))
        print(f"{explained:,} of {len(train):,} training rows have a rationale; stage 2 learns from these")
    if unknown := set(recipe.objectives + recipe.ablations) - set(OBJECTIVES):
        raise InputError(f"unknown objectives {sorted(unknown)}; known are {', '.join(OBJECTIVES)}.")
    if unknown := set(recipe.systems) - set(SYSTEMS):
        raise InputError(f"unknown systems {sorted(unknown)}; known are {', '.join(SYSTEMS)}.")
    whole = [name for name in recipe.objectives + recipe.ablations if OBJECTIVES[name].credit == "token"]
    if whole and distributed.in_parts():
        raise InputError(f"the values of {', '.join(whole)} need the whole model on each GPU: launch with DDP.")
    if pretrained(job) is not None and (compact := sorted({*recipe.systems} & {*COMPACT})):
        raise InputError(f"{', '.join(compact)} are made for the prompts of small models: leave them out.")
    if not 1 <= recipe.ablation_seeds <= len(recipe.seeds):
        raise InputError(f"ablation_seeds is {recipe.ablation_seeds}; there are {len(recipe.seeds)} seeds.")
    if not 1 <= recipe.grid_seeds <= len(recipe.seeds):
        raise InputError(f"grid_seeds is {recipe.grid_seeds}; there are {len(recipe.seeds)} seeds.")
    distributed.of_first(lambda: check_out(job))
    with Crew(workers) as crew:
        stages = [task for seed in recipe.seeds for task in _supervised_tasks(job, seed)]
        grid = [
            _stage3_task(job, seed, name, rate, stages)
            for name, seeds in _trained(recipe).items()
            for seed in seeds[: recipe.grid_seeds]
            for rate in recipe.rates(name)
        ]
        more = [_system_task(job, seed, name, stages) for seed in recipe.seeds for name in _without_stage3(recipe)]
        crew.work([Task(run_references, (job,), references_folder(job).finished), *stages, *more, *grid], tell)
        chosen = {name: choose_learning_rate(job, name) for name in _trained(recipe)}
        others = [
            _stage3_task(job, seed, name, chosen[name])
            for name, seeds in _trained(recipe).items()
            for seed in seeds[recipe.grid_seeds :]
        ]
        tests = [_test_task(job, folder, others) for folder in result_runs(job, chosen)]
        crew.work([*others, *tests], tell)
    return distributed.of_first(lambda: collect(job, chosen))


def check_out(job: Job) -> None:
    """Whether what results.csv under `job.out` says of this data set was made of the same files.

    Raises:
        InputError: of others.
    """
    if (path := Path(job.out) / "results.csv").is_file():
        results = read_results(path)
        runs = _with_numbers(read_runs(Path(job.out)), results)
        ours = references_folder(job)
        now = {"dataset": ours.row["dataset"], "split": ours.row["split"], "run": "this run", "data": ours.data}
        check_data(pd.concat([pd.DataFrame([now]), runs]), job.out)


def choose_learning_rate(job: Job, method: str) -> float:
    """The rate with the best validation NDCG@10, the mean over the seeds of the grid; ties go to the smaller one.

    A rate at which one of them diverged is not chosen.
    """
    scores, seeds = {}, _trained(job.recipe)[method][: job.recipe.grid_seeds]
    for rate in sorted(job.recipe.rates(method)):
        folders = [stage3_folder(job, seed, method, rate) for seed in seeds]
        if not any(folder.diverged for folder in folders):
            tables = [folder.table("metrics.csv").set_index("metric")["value"] for folder in folders]
            scores[rate] = sum(table["valid/ndcg@10"] for table in tables) / len(tables)
    if not scores:
        rates = ", ".join(f"{rate:g}" for rate in job.recipe.rates(method))
        raise FloatingPointError(f"{method} diverged at every learning rate of the grid ({rates}): give lower ones.")
    return max(scores, key=lambda rate: scores[rate])


def result_runs(job: Job, chosen: dict[str, float]) -> list[RunFolder]:
    """The runs that results are read from: stage 2 and its control, every objective at its chosen rate, every system
    and the supervised stage that it goes on from.

    A seed that diverged at that rate has no result, and fewer seeds are reported.
    """
    recipe = job.recipe
    reported = dict.fromkeys([*CONTROLS, *map(stage_of, recipe.systems)])
    stages = [supervised_folder(job, seed, name) for seed in recipe.seeds for name in reported]
    stages += [system_folder(job, seed, name) for seed in recipe.seeds for name in _without_stage3(recipe)]
    return stages + [
        stage3_folder(job, seed, name, chosen[name]) for name, seeds in _trained(job.recipe).items() for seed in seeds
    ]


def collect(job: Job, chosen: dict[str, float]) -> pd.DataFrame:
    """Gather the tables of the runs; what OUT held of the same methods is replaced, other rows stay."""
    out = Path(job.out)
    runs = [folder for folder in result_runs(job, chosen) if not folder.diverged]
    tables = [pd.read_csv(references_folder(job).path / "test.csv")]
    tables += [pd.read_csv(folder.path / name) for folder in runs for name in ("metrics.csv", "test.csv")]
    results = pd.concat(tables)
    curves = [
        curve[~curve["metric"].str.contains(BOOKKEEPING)]
        for curve in (folder.table("log.csv") for folder in runs if folder.row["method"] in chosen)
    ]
    no_curves = pd.DataFrame(columns=[*WORLD, "method", "seed", "step", "metric", "value"])
    looks = _looks(job, chosen)
    stage2 = [folder.table("rollouts.csv.gz") for folder in runs if folder.row["method"] == "stage2"]
    with updating(out):
        add_results(results, out / "results.csv")
        add_ranks([*reference_ranks(job), *map(run_ranks, runs)], out)
        _add(pd.concat(curves) if curves else no_curves, out / "dynamics.csv.gz")
        _add(pd.concat(stage2).drop(columns="method"), out / "rollouts.csv.gz")
        if looks is not None:
            _add(looks, out / "looks.csv.gz")
    return results


def _looks(job: Job, chosen: dict[str, float]) -> pd.DataFrame | None:
    """What every run of stage 3 showed at its looks, at chosen rates and others; None where there were no looks."""
    if job.recipe.stage3.look_every is None:
        return None
    tables = []
    for method, seeds in _trained(job.recipe).items():
        for place, seed in enumerate(seeds):
            on_grid = place < job.recipe.grid_seeds
            for rate in job.recipe.rates(method) if on_grid else (chosen[method],):
                folder = stage3_folder(job, seed, method, rate)
                if not folder.diverged:
                    tables.append(folder.table("log.csv").assign(learning_rate=rate))
    if not tables:
        return None
    table = pd.concat(tables)
    return table[table["metric"].str.contains(LOOKS)]


def measure_starts(
    job: Job,
    objectives: Sequence[str],
    batches: int,
    workers: int | None = None,
    tell: Callable[[int, int], None] | None = None,
) -> pd.DataFrame:
    """What an update of each objective is worth to each seed's stage-2 policy (`sapo.evaluation.gradients`), added to
    `gradients.csv` under `job.out`.

    Raises:
        InputError: as `measure_gradients`; a stage 2 that is not finished.
    """
    folders = {seed: supervised_folder(job, seed, "stage2") for seed in job.recipe.seeds}
    how = tuple(objectives), batches
    with Crew(workers) as crew:
        tasks = [
            Task(measure_start, (job, seed, *how), not unmeasured(folder, *how, job.recipe.stage3.prompts))
            for seed, folder in folders.items()
        ]
        crew.work(tasks, tell)
    table = pd.concat([folder.table(GRADIENTS).drop(columns="method") for folder in folders.values()])
    table = table[table["objective"].isin(list(objectives))]
    with updating(job.out):
        _add(table, Path(job.out) / GRADIENTS)
    return table


def run_ranks(folder: RunFolder) -> tuple[pd.DataFrame, dict[str, object]]:
    """The ranks of a run that was tested, for `add_ranks`."""
    return pd.read_csv(folder.path / "per_user.csv.gz"), folder.row


def reference_ranks(job: Job) -> list[tuple[pd.DataFrame, dict[str, object]]]:
    """The same of every method without training."""
    users, row = run_ranks(references_folder(job))
    return [(of, row | {"method": method}) for method, of in users.groupby("method", sort=False)]


def publish(out: str | Path, record: str | Path) -> list[Path]:
    """Add the tables under `out` to the committed record, in place of what it held of the same methods.

    `runs.csv` says of every run with a number in them when, where and by which code it was made.

    Raises:
        InputError: nothing finished under `out`; a run that went on from other weights than those of the stage-2 row
            that it would stand beside.
    """
    out, record = Path(out), Path(record)
    if not (out / "results.csv").is_file():
        raise InputError(f"{out} holds no results.csv: `sapo run --out {out}` writes it once its runs are finished.")
    results = read_results(out / "results.csv")
    results = results[~results["metric"].str.contains(UNRECORDED)]
    results = results.assign(value=[float(f"{value:.{DIGITS}g}") for value in results["value"]])
    runs = _with_numbers(read_runs(out), results)
    written = ["results.csv", *(name for name in KEYS if (out / name).is_file())]  # baselines have no curves
    with updating(record):
        runs = pd.concat([others(read_recorded_runs(record), runs, [*WORLD, "method"]), runs])
        check_parents(runs)
        check_data(runs, record)
        add_results(results, record / "results.csv")
        for name in written[1:]:
            table = pd.read_csv(out / name)
            for column in table.select_dtypes("float"):
                table[column] = [float(f"{value:.{CURVE_DIGITS}g}") for value in table[column]]
            _add(table, record / name)
        merge_ranks(out, record)
        write_csv(runs, record / "runs.csv")
    return [record / name for name in (*written, RANKS, ROWS, "runs.csv")]


def check_parents(runs: pd.DataFrame) -> None:
    """Whether every run of stage 3 went on from the weights of the supervised run beside it; those that say nothing of
    weights are passed over.

    Args:
        runs: as of `read_runs`.

    Raises:
        InputError: naming the first that did not.
    """
    started = dict(zip(_keys(runs), runs.to_dict("records"), strict=True))
    for (*world, seed, method), run in started.items():
        if method not in OBJECTIVES and (method not in SYSTEMS or SYSTEMS[method].kind == "supervised"):
            continue
        stage = stage_of(method)
        start = started.get((*world, seed, STAGES[stage].method or stage), {})
        told = all(isinstance(weights, str) for weights in (run["parent"], start.get("weights")))
        if told and run["parent"] != start["weights"]:
            raise InputError(
                f"{run['run']} went on from other weights than {start['run']} has, which it would stand beside: their "
                f"difference would compare two starts. Train it from these, or give it a preset of its own."
            )


def check_data(runs: pd.DataFrame, where: str | Path) -> None:
    """Whether all runs of one name and split saw the same files; those that do not say are passed over.

    Args:
        runs: as of `read_runs`; `where` they stand.

    Raises:
        InputError: naming two that did not.
    """
    for (dataset, split), of_data in runs[runs["data"].notna()].groupby(["dataset", "split"]):
        different = of_data.drop_duplicates("data")
        if len(different) > 1:
            one, other = different["run"].iloc[:2]
            raise InputError(
                f"{where}: {one} and {other} saw different files under the one name {dataset!r} ({split}), and their "
                f"rows must not be compared. Use another --out, or give one of the folders another name."
            )


def _with_numbers(runs: pd.DataFrame, results: pd.DataFrame) -> pd.DataFrame:
    """The runs that rows of results name; presets may have runs of one name."""
    named = set(results[[*WORLD, "run"]].astype(str).itertuples(index=False, name=None))
    ours = runs[WORLD].astype(str).assign(run=runs["run"].map(lambda run: Path(run).name))
    return runs[[key in named for key in ours.itertuples(index=False, name=None)]]


def _keys(runs: pd.DataFrame) -> list[tuple[str, ...]]:
    return list(runs[[*WORLD, "seed", "method"]].astype(str).itertuples(index=False, name=None))


def _supervised_tasks(job: Job, seed: int) -> list[Task]:
    """The supervised stages of a seed that something is reported of or goes on from, each after its parent."""
    tasks: dict[str, Task] = {}

    def add(name: str) -> tuple[Task, ...]:
        parent = STAGES[name].parent
        needs = () if parent is None else add(parent)
        if name not in tasks:
            finished = supervised_folder(job, seed, name).finished
            tasks[name] = Task(train_supervised_stage, (job, seed, name), finished, needs, together=True)
        return (tasks[name],)

    for name in (*CONTROLS, *map(stage_of, job.recipe.systems)):
        add(name)
    return [*tasks.values()]


def _stage3_task(job: Job, seed: int, method: str, rate: float, before: Sequence[Task] = ()) -> Task:
    done = stage3_folder(job, seed, method, rate).finished
    return Task(train_stage3, (job, seed, method, rate), done, _start(before, seed, method), together=True)


def _system_task(job: Job, seed: int, system: str, before: Sequence[Task]) -> Task:
    contrast = SYSTEMS[system].kind == "contrast"
    make, done = choose_contrast if contrast else fit_recommender, system_folder(job, seed, system).finished
    return Task(make, (job, seed, system), done, _start(before, seed, system), together=contrast)


def _start(stages: Sequence[Task], seed: int, method: str) -> tuple[Task, ...]:
    return tuple(task for task in stages if task.arguments[1:] == (seed, stage_of(method)))


def _test_task(job: Job, folder: RunFolder, before: Sequence[Task]) -> Task:
    method, seed = folder.row["method"], folder.row["seed"]
    needs = tuple(task for task in before if task.arguments[1:3] == (seed, method))
    return Task(run_test, (job, folder), folder.diverged or (folder.path / "test.csv").is_file(), needs, together=True)


def _without_stage3(recipe: Recipe) -> list[str]:
    """Systems that are made of a supervised stage in another way than by stage 3."""
    return [name for name in recipe.systems if SYSTEMS[name].kind in ("contrast", "recommender")]


def _trained(recipe: Recipe) -> dict[str, tuple[int, ...]]:
    """What has a stage 3, and with which seeds."""
    ablations = dict.fromkeys(recipe.ablations, recipe.seeds[: recipe.ablation_seeds])
    systems = (name for name in recipe.systems if SYSTEMS[name].kind == "stage3")
    return ablations | dict.fromkeys((*recipe.objectives, *systems), recipe.seeds)


def _add(table: pd.DataFrame, path: Path) -> None:
    """Write a table beside what its file holds of other data sets, presets and methods."""
    kept = [others(pd.read_csv(path), table, KEYS[path.name])] if path.is_file() else []
    write_csv(pd.concat([*kept, table]), path)
