"""The other recommenders on a data set: each is fitted on the first seed with every setting of its grid, of which
validation chooses one, then on the other seeds, and then tested, once. Finished runs are skipped. Fusions are made of
those of one seed, and of counting.

Their rows of results.csv have the preset "baseline", whatever our policies were trained with.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import Tensor

from sapo.analysis.ranks import add_ranks
from sapo.analysis.results import add_results
from sapo.baselines.caser import Caser
from sapo.baselines.fitting import FitConfig, Recommender, fit
from sapo.baselines.fusion import Fusion
from sapo.baselines.gru4rec import GRU4Rec
from sapo.baselines.hstu import HSTU
from sapo.baselines.rearec import ReaRec
from sapo.baselines.sasrec import SASRec
from sapo.baselines.tiger import Tiger
from sapo.common.files import updating, write_csv
from sapo.data.interactions import Rows, SplitName
from sapo.errors import InputError
from sapo.evaluation.evaluate import evaluate_ranking, places, ranking_metrics
from sapo.experiments.folders import references_folder
from sapo.experiments.pool import Crew, Task
from sapo.experiments.recipes import QUICK, EvaluationConfig
from sapo.experiments.run_folder import Job, RunFolder
from sapo.experiments.runner import check_out, reference_ranks, run_ranks
from sapo.experiments.stages import REFERENCES, run_references
from sapo.semantic_ids.config import TokenizerConfig
from sapo.semantic_ids.tokenizer import ItemTokenizer
from sapo.semantic_ids.vectors import item_texts

KS = (1, 3, 5, 10)
MODELS: dict[str, Callable[..., Recommender]] = {
    "sasrec": SASRec,
    "gru4rec": GRU4Rec,
    "caser": Caser,
    "hstu": HSTU,
    "rearec": ReaRec,
    "tiger": Tiger,
}
OF_SIDS = ("tiger",)  # models of codes, not of items and users


@dataclass(frozen=True)
class Baseline:
    """One recommender: what it is made of, how it is fitted, and what validation chooses from."""

    model: str
    """Of MODELS."""
    options: dict[str, Any] = field(default_factory=dict)
    """Arguments of the model."""
    fit: FitConfig = field(default_factory=FitConfig)
    """Of the loop."""
    grid: tuple[dict[str, Any], ...] = ({},)
    """Each replaces some options, or fields of `fit`."""
    tokenizer: TokenizerConfig | None = None
    """How items get the SIDs of a model of codes, for each seed its own; those of the data where None."""

    def chosen(self, number: int) -> "Baseline":
        """Itself with one setting of the grid."""
        changes = self.grid[number]
        of_fit = {name: value for name, value in changes.items() if name in asdict(self.fit)}
        options = {name: value for name, value in changes.items() if name not in of_fit}
        return replace(self, options=self.options | options, fit=replace(self.fit, **of_fit), grid=())


DROPOUTS = tuple({"dropout": rate} for rate in (0.2, 0.5, 0.7))  # with 0.7 and one negative some seeds learn nothing
CASERS = ({"dropout": 0.5}, {"dropout": 0.5, "personal": False}, {"dropout": 0.7, "personal": False})
VALID = 5000  # rows that validation reads at most
ADAM = FitConfig(half=True, valid_rows=VALID)
SASREC = replace(ADAM, beta2=0.98)
# One negative at a time learns slowly: on Beauty it still gained after 300 epochs, with stretches of 50 without a gain.
PAIRS = replace(SASREC, loss="bce", epochs=400, patience=20, validate_every=5)
ROWS = replace(ADAM, patience=5, batch_size=512)  # of models whose examples are rows, not sequences
# With rivals "all" it spends most of its training on which SIDs exist. On three data sets a dropout of 0.3 was worse
# than T5's 0.1. Half of the paper's layers, with a third of its attention and half of its feed-forward, take a quarter
# of the time: .0755 in validation NDCG@10 on Industrial (three seeds), .0770 with the paper's at a constant rate.
T5 = {"user_tokens": 0, "rivals": "trie", "layers": 2, "heads": 4, "head_size": 32, "feed_forward": 512}
CODES = replace(ADAM, epochs=30, patience=30, validate_every=2, learning_rate=5e-4, schedule="linear", valid_rows=2000)
THOUGHTS = tuple({"dropout": rate, "temperature": heat} for rate in (0.5, 0.7) for heat in (1.0, 0.5))
LETTER = TokenizerConfig("letter", collisions="share_out")
BASELINES: dict[str, Baseline] = {
    "SASRec": Baseline("sasrec", {"size": 64, "heads": 2}, PAIRS, DROPOUTS[:2]),
    "SASRec softmax": Baseline("sasrec", {"size": 128, "heads": 2}, SASREC, DROPOUTS),
    "GRU4Rec": Baseline("gru4rec", {"size": 64, "hidden": 128}, ADAM, DROPOUTS),
    "Caser": Baseline("caser", {"size": 64}, replace(ADAM, weight_decay=1e-6), CASERS),
    "HSTU": Baseline("hstu", {"size": 128, "heads": 2}, SASREC, DROPOUTS),
    "TIGER": Baseline("tiger", T5, CODES),
    "LETTER-TIGER": Baseline("tiger", T5 | {"temperature": 0.7}, CODES, tokenizer=LETTER),
    "ReaRec ERL": Baseline("rearec", {"size": 128}, ROWS, THOUGHTS),
    "ReaRec PRL": Baseline("rearec", {"size": 128, "way": "prl"}, ROWS, THOUGHTS),
}

COUNTING = ("cooccurrence", "item_knn")
FITTED = ("SASRec softmax", "Caser", "HSTU", "ReaRec ERL", "ReaRec PRL")
FUSIONS: dict[str, tuple[str, ...]] = {
    "Fusion": (*COUNTING, *FITTED),
    "Fusion of counting": COUNTING,
    "Fusion of fitted": FITTED,
    "Fusion with TIGER": (*COUNTING, *FITTED, "TIGER"),
}
FUSED = 200  # items of every recommender, as far as it reaches


def sids_folder(job: Job, tokenizer: TokenizerConfig) -> RunFolder:
    """Where SIDs live that baselines share."""
    return RunFolder(job, f"seed{tokenizer.seed}/sids_{tokenizer.method}", tokenizer.seed, "sids", asdict(tokenizer))


def make_sids(job: Job, tokenizer: TokenizerConfig) -> None:
    """Learn SIDs from the items' texts and, if the method looks at them, the training sequences."""
    folder = sids_folder(job, tokenizer)
    folder.start()
    began, world = time.monotonic(), job.world
    sids = ItemTokenizer(tokenizer).fit(item_texts(world.catalog.texts), world.split)
    save_file({"sids": sids}, folder.path / "sids.safetensors")
    folder.finish(time.monotonic() - began, 0, {}, {})


def baseline_folder(job: Job, name: str, number: int, seed: int) -> RunFolder:
    """Where a fit lives; `number` is that of the setting in the grid."""
    config = asdict(BASELINES[name].chosen(number)) | {"seed": seed}
    return RunFolder(job, f"seed{seed}/{name.replace(' ', '_')}-{number}", seed, name, config)


def fit_baseline(job: Job, name: str, number: int, seed: int) -> None:
    """One fit; leaves the weights, a log, and validation metrics."""
    folder = baseline_folder(job, name, number, seed)
    folder.start()
    split, settings = job.world.split, BASELINES[name].chosen(number)
    model, checkpoint = build(job, name, number, seed).to(_device()), folder.path / "checkpoints" / "fit.pt"
    try:
        log = fit(model, split, settings.fit, seed, f"{folder.path.name} seed {seed}", checkpoint)
    except FloatingPointError as error:
        folder.give_up(error)
        return
    # cuDNN keeps a GRU's weights in one tensor, which safetensors neither writes nor reads
    save_model(model.cpu(), str(folder.path / "model.safetensors"))
    write_csv(pd.DataFrame(log).drop(columns="seconds"), folder.path / "log.csv")
    best = max(log, key=lambda row: row["ndcg@10"])
    metrics = {"valid/ndcg@10": best["ndcg@10"], "parameters": float(sum(p.numel() for p in model.parameters()))}
    counts = {"valid/ndcg@10": len(split.valid.sample(settings.fit.valid_rows))}
    seconds = log[-1]["seconds"]
    folder.finish(seconds, int(best["updates"]), metrics | {"seconds": seconds}, counts)


def rank_test_rows(job: Job, name: str, number: int, seed: int) -> None:
    """Rank the catalogue for all test rows; of a fit that diverged nothing is left to rank with."""
    folder, rows, sids = baseline_folder(job, name, number, seed), job.world.split.test, job.world.catalog.sids
    if folder.diverged:
        return
    model = _fitted(job, name, number, seed)
    _write_test(folder, model.rank(rows.history, min(places(rows, KS, sids), model.reach), rows.user), rows, sids)


def _write_test(folder: RunFolder, ranked: Int[Tensor, "U R"], rows: Rows, sids: Int[Tensor, "N K"]) -> None:
    metrics, users = evaluate_ranking(ranked, rows, KS, sids)
    folder.clear()
    write_csv(users, folder.path / "per_user.csv.gz")
    write_csv(folder.results("measured", metrics, len(rows)), folder.path / "test.csv")


def fusion_folder(job: Job, name: str, seed: int, chosen: dict[str, int]) -> RunFolder:
    """Where a fusion lives; `chosen` is the setting of every part that was fitted."""
    fitted = {part: baseline_folder(job, part, chosen[part], seed).identity for part in FUSIONS[name] if part in chosen}
    config = {"parts": FUSIONS[name], "fitted": fitted, "items": FUSED, "rows": VALID}
    return RunFolder(job, f"seed{seed}/{name.replace(' ', '_')}", seed, name, config)


def fuse(job: Job, names: Sequence[str], seed: int, chosen: dict[str, int]) -> None:
    """Choose the weights of fusions on validation rows, and rank the test rows.

    The seconds of a fusion are those of fitting all of its parts, of having them rank the validation rows, and of
    choosing; its parameters those of the parts that have a weight.
    """
    world = job.world
    valid, test = world.split.valid.sample(VALID), world.split.test
    width = min(FUSED, world.catalog.num_items)
    parts = dict.fromkeys(part for name in names for part in FUSIONS[name])
    lists: dict[str, tuple[Tensor, Tensor]] = {}
    fitted: dict[str, dict[str, float]] = {}
    ranking: dict[str, float] = {}
    for part in parts:
        began = time.monotonic()
        if part in COUNTING:
            counted = REFERENCES[part].fit(world.split.sequences, world.catalog.num_items)
            on_valid = counted.rank(valid.history, width)
            ranking[part] = time.monotonic() - began
            lists[part] = on_valid, counted.rank(test.history, width)
            continue
        model = _fitted(job, part, chosen[part], seed)
        reach = min(width, model.reach)
        on_valid = model.rank(valid.history, reach, valid.user)
        ranking[part] = time.monotonic() - began
        lists[part] = on_valid, model.rank(test.history, reach, test.user)
        table = baseline_folder(job, part, chosen[part], seed).table("metrics.csv")
        fitted[part] = table.set_index("metric")["value"].to_dict()
    for name in names:
        folder = fusion_folder(job, name, seed, chosen)
        folder.start()
        began = time.monotonic()
        target = torch.tensor(valid.target)
        own = {part: lists[part][0] for part in FUSIONS[name]}
        fusion = Fusion(world.catalog.num_items).fit(own, target)
        seconds = time.monotonic() - began + sum(ranking[part] for part in own)
        ks = (min(10, width),)
        metrics = {"valid/ndcg@10": ranking_metrics(fusion.rank(own, ks[0]), target, ks)[f"ndcg@{ks[0]}"]}
        metrics |= {f"weight/{part}": weight for part, weight in fusion.weights.items()} | {"offset": fusion.offset}
        metrics["parameters"] = sum(fitted[part]["parameters"] for part in fitted if fusion.weights.get(part))
        metrics["seconds"] = seconds + sum(fitted[part]["seconds"] for part in own if part in fitted)
        on_test = {part: lists[part][1] for part in FUSIONS[name]}
        sids = world.catalog.sids
        _write_test(folder, fusion.rank(on_test, min(places(test, KS, sids), width)), test, sids)
        folder.finish(seconds, 0, metrics, {"valid/ndcg@10": len(valid)})


def build(job: Job, name: str, number: int, seed: int) -> Recommender:
    """A model with the weights it starts from."""
    settings, world = BASELINES[name].chosen(number), job.world
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        given: tuple[Any, ...] = (world.catalog.num_items, world.split.users)
        if settings.tokenizer is not None:
            path = sids_folder(job, replace(settings.tokenizer, seed=seed)).path
            given = (load_file(path / "sids.safetensors")["sids"],)
        elif settings.model in OF_SIDS:
            given = (world.catalog.sids,)
        return MODELS[settings.model](*given, **settings.options)


def _fitted(job: Job, name: str, number: int, seed: int) -> Recommender:
    """A model with the weights of its fit."""
    model = build(job, name, number, seed)
    load_model(model, str(baseline_folder(job, name, number, seed).path / "model.safetensors"))
    return model.to(_device())


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def run_baselines(
    out: str,
    data: str | None,
    names: Sequence[str] = (),
    seeds: int = 3,
    split: SplitName = "auto",
    workers: int | None = None,
) -> pd.DataFrame:
    """Fit, choose, test, and add the rows to results.csv under `out`; returns them.

    Args:
        names: of BASELINES and FUSIONS; all where empty. A fusion brings its parts.
        workers: as of `Crew`.

    Raises:
        InputError: an unknown name; data that do not fit.
        FloatingPointError: a recommender diverged with every setting of its grid; the others' results are written.
    """
    names = list(names) or [*BASELINES, *FUSIONS]
    if unknown := set(names) - set(BASELINES) - set(FUSIONS):
        raise InputError(f"no baselines {sorted(unknown)}; there are {', '.join([*BASELINES, *FUSIONS])}.")
    fusions = [name for name in names if name in FUSIONS]
    parts = [part for name in fusions for part in FUSIONS[name] if part not in COUNTING]
    names = [*dict.fromkeys([name for name in names if name in BASELINES] + parts)]
    job = Job(replace(QUICK, preset="baseline", evaluation=EvaluationConfig()), out, data, split=split)
    check_out(job)
    with Crew(workers) as crew:
        references = Task(run_references, (job,), references_folder(job).finished)
        tokenizers = dict.fromkeys(t for name in names if (t := BASELINES[name].tokenizer) is not None)
        seeded = [replace(tokenizer, seed=seed) for tokenizer in tokenizers for seed in range(seeds)]
        sids = [Task(make_sids, (job, t), sids_folder(job, t).finished) for t in seeded]
        grid = [  # and all seeds of what leaves nothing to choose
            _fit_task(job, name, at, seed, sids)
            for name in names
            for at in range(len(BASELINES[name].grid))
            for seed in range(seeds if len(BASELINES[name].grid) == 1 else 1)
        ]
        crew.work([references, *sids, *grid])
        chosen, lost = {}, []
        for name in names:
            try:
                chosen[name] = choose(job, name)
            except FloatingPointError as error:
                lost.append(str(error))
        fits = [_fit_task(job, name, number, seed) for seed in range(seeds) for name, number in chosen.items()]
        tests = []
        for task in fits:
            folder = baseline_folder(*task.arguments)
            tests.append(Task(rank_test_rows, task.arguments, (folder.path / "test.csv").is_file(), (task,)))
        crew.work([*fits, *tests])
        made_of = [baseline_folder(*task.arguments) for task in fits]
        folders = [folder for folder in made_of if not folder.diverged]
        whole = {(folder.row["method"], folder.seed) for folder in folders}
        fused = []
        for seed in range(seeds):
            there = [
                name for name in fusions if all(part in COUNTING or (part, seed) in whole for part in FUSIONS[name])
            ]
            made = [fusion_folder(job, name, seed, chosen) for name in there]
            fused.append(Task(fuse, (job, there, seed, chosen), all(folder.finished for folder in made)))
            folders += made
        crew.work(fused)
    tables = [f.path / table for f in folders for table in ("metrics.csv", "test.csv")]
    results = pd.concat([pd.read_csv(path) for path in (references_folder(job).path / "test.csv", *tables)])
    with updating(out):
        add_results(results, Path(out) / "results.csv")
        add_ranks([*reference_ranks(job), *(run_ranks(folder) for folder in folders)], out)
    if lost:
        raise FloatingPointError(" ".join(lost))
    return results


def choose(job: Job, name: str) -> int:
    """The setting of the grid with the best validation NDCG@10 on the first seed; of equal ones the first."""
    scores = {}
    for number in range(len(BASELINES[name].grid)):
        folder = baseline_folder(job, name, number, 0)
        if not folder.diverged:
            scores[number] = folder.table("metrics.csv").set_index("metric")["value"]["valid/ndcg@10"]
    if not scores:
        raise FloatingPointError(f"{name} diverged with every setting of its grid: give it lower learning rates.")
    return max(scores, key=lambda number: scores[number])


def _fit_task(job: Job, name: str, number: int, seed: int, sids: Sequence[Task] = ()) -> Task:
    arguments = (job, name, number, seed)
    tokenizer = BASELINES[name].tokenizer
    own = None if tokenizer is None else replace(tokenizer, seed=seed)
    needs = tuple(task for task in sids if task.arguments == (job, own))
    return Task(fit_baseline, arguments, baseline_folder(*arguments).finished, needs)
