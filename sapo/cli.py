"""The command `sapo`. Every option is a field of a dataclass below; `sapo COMMAND --help` explains them."""

import io
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from sapo.errors import InputError
from sapo.semantic_ids.config import TokenizerConfig

if TYPE_CHECKING:
    import pandas as pd

    from sapo.training.conversations import Conversation

Split = Literal["auto", "leave_one_out", "published_test"]


@dataclass(frozen=True)
class Run:
    """Train all stages for all seeds, evaluate, and write results under OUT. Finished runs are skipped."""

    preset: Literal["quick", "small", "paper"] = "quick"
    """quick: minutes on a CPU for a world that is made, under an hour for real data. small: hours. paper: a
    pretrained model with the settings of the paper's fork, on GPUs (`sapo plan` says what it takes)."""
    data: Path | None = None
    """Folder of TSV files, or a world that is made: `reasoning`, where thinking pays, also where left out, or
    `synthetic`, the control where it is pointless."""
    out: Path = Path("paper_figures/out")
    """Where runs and results go. Nothing is written elsewhere."""
    sids: str = "sids"
    """Which semantic IDs of the folder, for instance sids_rqvae."""
    split: Split = "auto"
    """auto takes the published chronological pairs where the folder has them, else leave-one-out."""
    rationales: Path | None = None
    """Learn to think from this file of a teacher (`sapo data explain`) instead of from the words of the SID tree."""
    conversations: Path | None = None
    """JSON lines of conversations about anything (`messages` of role and content), which stage 1 of the preset paper
    reads too."""
    backbone: str | None = None
    """Pretrained model of the preset paper: a folder, or a name on the Hugging Face hub; Qwen/Qwen3-1.7B where left
    out."""
    lora: int | None = None
    """Train adapters of this rank of the pretrained model; all weights where left out."""
    row_updates: int | None = None
    """Updates that train the rows of SID tokens alone, before all others, of the preset paper; none where left out."""
    fraction: float = 1.0
    """Share of the preset's updates, in all stages: less of it for a trial."""
    rows: int | None = None
    """Most rows of validation and test that are looked at; the preset's where left out."""
    seeds: int | None = None
    """How many seeds; the preset's where left out."""
    objectives: tuple[str, ...] | None = None
    """Objectives trained with every seed; the preset's where left out. With none after the option, stages 1 and 2 are
    trained alone."""
    ablations: tuple[str, ...] | None = None
    """Objectives trained with the first seeds; the preset's where left out."""
    systems: tuple[str, ...] = ()
    """Other reasoning recommenders, trained with every seed: LC-Rec, MiniOneRec, SIDReasoner, OneRec-Think,
    LICD, R2ec, Rec-R1, RecCoT, "RecCoT blind"."""
    updates: int | None = None
    """Updates of stage 3; the preset's where left out."""
    iterations: int | None = None
    """Updates from each batch of rollouts; the preset's where left out. With more than one, ratios and clips act."""
    workers: int | None = None
    """Processes side by side, one thread each; by default one a core, at most 4, and 1 with a GPU."""

    def __call__(self) -> None:
        from dataclasses import replace

        from sapo.common import distributed
        from sapo.experiments import recipes
        from sapo.experiments.run_folder import Job
        from sapo.experiments.runner import run
        from sapo.policy.backbone import PAPER_BACKBONE, Pretrained

        for name in ("seeds", "updates", "iterations", "workers", "lora", "row_updates", "rows"):
            _at_least_one(name, getattr(self, name))
        for_pretrained = {
            "--backbone": self.backbone,
            "--lora": self.lora,
            "--row-updates": self.row_updates,
            "--conversations": self.conversations,
        }
        if self.preset == "paper":
            start = Pretrained(self.backbone or PAPER_BACKBONE, None, self.row_updates or 0, self.lora)
            start.check()
            sizes = _sizes(self.data, self.sids, self.split, self.rationales)
            recipe = recipes.paper(*sizes, start, len(_conversations(self.conversations)))
        elif given := [name for name, value in for_pretrained.items() if value is not None]:
            raise InputError(f"--preset {self.preset} trains small models; {given[0]} is of --preset paper.")
        else:
            recipe = recipes.preset(self.preset, None if self.data is None else str(self.data))
        if self.seeds is not None:
            recipe = replace(
                recipe, seeds=tuple(range(self.seeds)), ablation_seeds=min(self.seeds, recipe.ablation_seeds)
            )
        if self.objectives is not None:
            recipe = replace(recipe, objectives=self.objectives)
        if self.ablations is not None:
            recipe = replace(recipe, ablations=self.ablations)
        recipe = replace(recipe, systems=self.systems)
        if self.backbone is not None:
            recipe = replace(recipe, preset=f"{recipe.preset}-{Path(self.backbone).name}")
        for word, number in (("lora", self.lora), ("rows", self.row_updates)):
            if number:
                recipe = replace(recipe, preset=f"{recipe.preset}-{word}{number}")
        if self.fraction != 1:
            recipe = recipe.shortened(self.fraction)
        if self.rows is not None:
            recipe = recipe.evaluated(self.rows)
        stage3, name = recipe.stage3, recipe.preset  # another name, so that its rows are not taken for the preset's
        if self.updates is not None:
            stage3, name = replace(stage3, updates=self.updates), f"{name}-{self.updates}updates"
        if self.iterations is not None:
            stage3, name = replace(stage3, num_iterations=self.iterations), f"{name}-{self.iterations}iterations"
        for what in ("rationales", "conversations"):
            if getattr(self, what) is not None:
                name = f"{name}-{what}"
        recipe = replace(recipe, preset=name, stage3=stage3)
        data, rationales, said = _names(self.data, self.rationales, self.conversations)
        results = run(Job(recipe, str(self.out), data, self.sids, self.split, rationales, said), self.workers)
        if not distributed.is_first():
            return
        print(_means(results, ["item/recall@10", "item/ndcg@10", "sid/recall@10", "sid/ndcg@10"]))
        print(self.out / "results.csv")


@dataclass(frozen=True)
class Study:
    """Run the study of the reasoning world, one axis at a time from a base point: base, components, sparsity, coupling,
    trie, teacher, objectives, switches, optimizer. Hours; the same command goes on after a stop, and says what is left.
    """

    axes: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which; all where left out."""
    out: Path = Path("paper_figures/out/study")
    """Where runs and results go."""
    record: Path | None = None
    """Publish to this record what is finished, axis by axis."""
    workers: int | None = None
    """Processes side by side, as of `sapo run`."""
    gradients: int | None = None
    """Also measure, on so many batches of rollouts of each start, where an update of each objective leads."""

    def __call__(self) -> None:
        from sapo.experiments.study import run_study

        _at_least_one("workers", self.workers)
        if self.gradients is not None and self.gradients < 2:
            raise InputError(f"--gradients {self.gradients}: at least 2 batches tell noise from direction.")
        run_study(self.axes, str(self.out), self.workers, self.record, self.gradients)


@dataclass(frozen=True)
class Baselines:
    """Fit other recommenders, each with the setting that validation chooses, and test them: SASRec, "SASRec softmax",
    GRU4Rec, Caser, HSTU, "ReaRec ERL", "ReaRec PRL", "Fusion" (of most of these, and of counting; also "... of
    counting", "... of fitted", "... with TIGER"), TIGER and LETTER-TIGER.

    Their rows, and those of popularity, co-occurrence and item kNN, are added to OUT/results.csv. Finished runs are
    skipped.
    """

    methods: tyro.conf.Positional[tuple[str, ...]] = ()
    """Which; all where left out."""
    data: Path | None = None
    """Folder of TSV files, or a world that is made: `reasoning`, where thinking pays, also where left out, or
    `synthetic`, the control where it is pointless."""
    out: Path = Path("paper_figures/out")
    """Where runs and results go."""
    split: Split = "auto"
    """auto takes the published chronological pairs where the folder has them, else leave-one-out."""
    seeds: int = 3
    """How many seeds; the first tries all settings."""
    workers: int | None = None
    """Processes side by side, as of `sapo run`."""

    def __call__(self) -> None:
        from sapo.experiments.suite import run_baselines

        for name in ("seeds", "workers"):
            _at_least_one(name, getattr(self, name))
        data = None if self.data is None else str(self.data)
        results = run_baselines(str(self.out), data, self.methods, self.seeds, self.split, self.workers)
        by_item = ["item/recall@5", "item/ndcg@5", "item/recall@10", "item/ndcg@10"]
        print(_means(results, [*by_item, "sid/recall@10", "sid/ndcg@10", "valid/ndcg@10"]))
        print(self.out / "results.csv")


@dataclass(frozen=True)
class Evaluate:
    """Rank the catalogue for the test or validation rows with a trained policy, and print its metrics."""

    model: Path
    """Folder of a policy, for instance OUT/runs/.../seed0/stage2-.../policy."""
    data: Path | None = None
    """What the policy was trained on: a folder of TSV files, `reasoning` (also where left out) or `synthetic`."""
    sids: str = "sids"
    """Which semantic IDs of the folder."""
    split: Split = "auto"
    """A policy is refused on a split that it was not trained for."""
    rows: Literal["test", "valid"] = "test"
    """Which rows of the split."""
    limit: int | None = None
    """Evaluate so many rows, drawn with a fixed seed; all where left out."""
    thinking: bool | None = None
    """Let the policy think before it names an item; as it was trained where left out."""

    def __call__(self) -> None:
        from sapo.common import distributed
        from sapo.evaluation.evaluate import evaluate_policy
        from sapo.experiments.recipes import QUICK
        from sapo.experiments.run_folder import Job, load_world
        from sapo.policy.policy import Policy

        _at_least_one("limit", self.limit)
        data = None if self.data is None else str(self.data)
        world = load_world(Job(QUICK, "", data, self.sids, self.split))
        policy = Policy.load(self.model, world.catalog)
        metrics, users = evaluate_policy(policy, world.split, self.rows, self.limit, thinking=self.thinking)
        if not distributed.is_first():
            return
        print(f"{world.name}, {world.split.name}, {len(users)} {self.rows} rows")
        for name, value in metrics.items():
            print(f"{name:24}{value:.4f}")


@dataclass(frozen=True)
class Recommend:
    """Ask a trained policy what comes next after a history: its thinking and its ranked items."""

    model: Path
    """Folder of a policy, for instance OUT/runs/.../seed0/sapo-lr0.0001-.../policy."""
    history: tuple[str, ...] = ()
    """Items, oldest first, each by title, product id or number (#12 where a product id is spelt like it). Where left
    out, every line of standard input is a JSON list of them, and is answered before the next is read."""
    data: Path | None = None
    """What the policy was trained on: a folder of TSV files, `reasoning` (also where left out) or `synthetic`."""
    sids: str = "sids"
    """Which semantic IDs of the folder."""
    k: int = 10
    """How many items."""
    new: bool = False
    """Leave out the items of the history."""
    json: bool = False
    """A line of JSON an answer, instead of text."""

    def __call__(self) -> None:
        import json
        import os

        from transformers.utils.logging import disable_progress_bar

        from sapo.data.catalog import Catalog
        from sapo.experiments.recipes import QUICK
        from sapo.experiments.run_folder import MADE, Job, load_world
        from sapo.policy.ask import Answer, answer_lines, ask
        from sapo.policy.policy import Policy

        disable_progress_bar()
        data = None if self.data is None else str(self.data)
        if data is None or data in MADE:
            catalog = load_world(Job(QUICK, "", data)).catalog
        else:
            catalog = Catalog.load(data, self.sids)
        policy = Policy.load(self.model, catalog)
        if self.history:
            (answer,) = ask(policy, [self.history], self.k, self.new)
            print(json.dumps(answer.as_dict()) if self.json else answer)
            return
        if sys.stdin.isatty():
            print('sapo: a JSON list of items a line, as ["a title", 12]; Ctrl-D ends.', file=sys.stderr)
        mistakes = 0
        try:
            for number, said in answer_lines(policy, sys.stdin.buffer, self.k, self.new):
                if isinstance(said, Answer):
                    print(json.dumps(said.as_dict()) if self.json else f"{said}\n", flush=True)
                    continue
                mistakes += 1
                if self.json:
                    print(json.dumps({"line": number, "error": str(said)}), flush=True)
                else:
                    print(f"sapo: line {number}: {said}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            sys.exit(130)
        except BrokenPipeError:  # who read the answers is gone; what is left to flush has nowhere to go
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        sys.exit(1 if mistakes else 0)


@dataclass(frozen=True)
class Plan:
    """Say what the preset paper takes for a data set: tokens, arithmetic, the memory of a GPU, and how to start it."""

    data: Path | None = None
    """Folder of TSV files, or a world that is made: `reasoning`, where thinking pays, also where left out, or
    `synthetic`, the control where it is pointless."""
    backbone: str | None = None
    """Pretrained model: a folder, or a name on the Hugging Face hub; Qwen/Qwen3-1.7B where left out. It and Qwen3 of
    0.6B and 4B need no network."""
    lora: int | None = None
    """Train adapters of this rank."""
    rationales: Path | None = None
    """A teacher's file (`sapo data explain`), whose sentences are the thoughts."""
    conversations: Path | None = None
    """JSON lines of conversations that stage 1 reads too."""
    sids: str = "sids"
    """Which semantic IDs of the folder."""
    split: Split = "auto"
    """Which split."""
    gpus: tuple[int, ...] = (1, 4, 8)
    """Numbers of GPUs."""
    tflops: float | None = None
    """What a GPU does, 10^12 operations a second, of which times are made. Writing completions is slower than that."""
    measure: bool = False
    """Also run a few updates of each stage on this machine, with random weights of this shape, and make times of them.
    On a GPU the memory that they took is said beside the formula's. The weights are written to the system's folder of
    temporary files meanwhile."""

    def __call__(self) -> None:
        from transformers.utils.logging import disable_progress_bar

        from sapo.experiments import measuring, planning, recipes
        from sapo.experiments.run_folder import Job
        from sapo.experiments.stages import words_and_traces
        from sapo.policy.backbone import PAPER_BACKBONE, Pretrained

        _at_least_one("lora", self.lora)
        start = Pretrained(self.backbone or PAPER_BACKBONE, lora_rank=self.lora)
        start.check()
        disable_progress_bar()
        is_folder = Path(start.name).is_dir()
        sizes, said = _sizes(self.data, self.sids, self.split, self.rationales), _conversations(self.conversations)
        recipe = recipes.paper(*sizes, start, len(said))
        data, rationales = _names(self.data, self.rationales)
        job = Job(recipe, "", data, self.sids, self.split, rationales)
        config, tokenizer = planning.model_config(start), planning.plan_tokenizer(start, job.world)
        before = len(tokenizer)
        traces = words_and_traces(job)[1]
        lengths = planning.measure_lengths(recipe, job.world, traces, tokenizer, said)
        added = len(tokenizer) - before
        vocabulary = added + (before if is_folder else config.get_text_config().vocab_size)
        size = planning.Size.of(config, vocabulary)
        plans = {}
        for gpus in self.gpus:
            _at_least_one("gpus", gpus)
            try:
                plans[gpus] = planning.plan(recipe, size, lengths, gpus)
            except InputError as error:
                raise InputError(f"--gpus {gpus}: {error}") from error
        print(f"{start.name}: {size.parameters:,} parameters, {vocabulary:,} tokens")
        exact = "" if is_folder else ", by a tokenizer learnt from the titles"
        print(
            f"mean tokens{exact}: stage 1 {lengths.stage1:.0f}, stage 2 {lengths.stage2:.0f}, prompt "
            f"{lengths.prompt:.0f}, completion {lengths.stage2_learnt:.0f} (at most {lengths.longest_completion})"
        )
        command = ["run", "--preset", "paper", "--backbone", start.name]
        for name in ("data", "lora", "rationales", "conversations"):
            command += [] if getattr(self, name) is None else [f"--{name}", str(getattr(self, name))]
        command += ["--sids", self.sids] if self.sids != "sids" else []
        command += ["--split", self.split] if self.split != "auto" else []
        for gpus, stages in plans.items():
            print(f"\n{gpus} GPU{'s' * (gpus > 1)}: {planning.launch(command, gpus)}")
            if stages[0].in_parts is not None:
                print(f"or in parts: {planning.launch(command, gpus, in_parts=True)}")
            for stage in stages:
                line = (
                    f"  stage {stage.name}  {stage.updates:6,} updates  {stage.tokens / 1e6:8,.0f} M tokens  "
                    f"{stage.operations / 1e18:8.1f} x 10^18 operations  {stage.memory / planning.GIB:6.1f} GiB a GPU"
                )
                if stage.in_parts is not None:
                    line += f", {stage.in_parts / planning.GIB:.1f} in parts"
                hours = "" if self.tflops is None else f"  {stage.operations / gpus / self.tflops / 3.6e15:8.1f} h"
                print(line + hours)
        seeds, objectives = len(recipe.seeds), len(recipe.objectives)
        print(
            f"\nThe command runs stage 1 {seeds} times, stage 2 {2 * seeds} (with thinking and without) and stage 3 "
            f"{seeds * objectives} ({', '.join(recipe.objectives)}); with `--seeds 1 --objectives sapo` 1, 2 and 1."
            f"\nValidation rows may end stage 1 sooner. Not counted: looks at them, the test, and some 2 GiB that CUDA "
            f"and its allocator keep."
        )
        longest = lengths.longest_prompt + lengths.longest_completion
        if longest > (most := getattr(config.get_text_config(), "max_position_embeddings", longest)):
            print(f"Prompts and completions have up to {longest:,} tokens; this model is made for {most:,}.")
        if not self.measure:
            return
        mean = f"completions of {lengths.stage2_learnt:.0f} tokens, as stage 2 has them"
        print(f"\nMeasured here with random weights of this shape and {mean}; GPUs share it evenly:", flush=True)
        policy = measuring.random_policy(recipe, job.world, config, tokenizer, vocabulary)
        found = measuring.measure(recipe, job.world, traces, policy, lengths, said)
        for stage in planning.plan(recipe, size, lengths, 1):
            of_stage = found[stage.name]
            hours = ", ".join(f"{stage.units * of_stage.seconds / n / 3600:.1f} h on {n}" for n in self.gpus)
            print(f"  {of_stage.describe(stage)}: {hours}")


@dataclass(frozen=True)
class Figures:
    """Draw all figures and tables from the results under OUT, and an index page. Nothing is trained."""

    out: Path = Path("paper_figures/out")
    """Folder with results.csv; figures, tables and index.html go there."""

    def __call__(self) -> None:
        import runpy

        folder = Path(__file__).resolve().parent.parent / "paper_figures"
        if not (folder / "make_all.py").is_file():
            raise InputError(
                f"no figure scripts in {folder}: this command needs a checkout, installed with `pip install -e`."
            )
        sys.path.insert(0, str(folder))
        runpy.run_path(str(folder / "make_all.py"))["main"](self.out)


@dataclass(frozen=True)
class Publish:
    """Add the finished results under OUT to the committed record that figures fall back on."""

    out: Path = Path("paper_figures/out")
    """Folder with results.csv, dynamics.csv.gz and rollouts.csv.gz."""
    to: Path = Path("paper_figures/data")
    """The record."""

    def __call__(self) -> None:
        from sapo.experiments.runner import publish

        for path in publish(self.out, self.to):
            print(path)


@dataclass(frozen=True)
class Claims:
    """Test the claims of the paper and its critics: each a number with an interval and a computed verdict.

    1 an outcome reward makes step credit trajectory credit, 2 signs differ within a completion, 3 starvation, 4 who
    maximises matches maximises exact match, 5 sparsity, 6 chance matches, 7 division by the std, 8 the layout; of
    training 9 stability, 10 gains over the start, 11 gains where exact matches are rarest, 12 step against outcome
    credit, 13 both components, 14 graded credit, 15 whether thinking pays; 16 steps whose number the policy decides.
    """

    only: int | None = None
    """Number of one claim, which is printed and not written; all, into RECORD/claims.csv, where left out."""
    record: Path = Path(__file__).resolve().parent.parent / "paper_figures" / "data"
    """Folder of the recorded rollouts.csv.gz and dynamics.csv.gz, and of claims.csv."""
    data: tuple[Path, ...] = ()
    """Folders of TSV files, for what claim 4 says of real data. Recorded rows of others stay."""

    def __call__(self) -> None:
        import pandas as pd

        from sapo.common.files import write_csv
        from sapo.lab.claims import ledger

        rows = ledger(self.record, self.only, self.data)
        for claim, of_claim in rows.groupby("claim", sort=False):
            print(claim)
            for row in of_claim.itertuples():
                print(f"    {row.experiment}\n        {row.value:.4g} [{row.low:.4g}, {row.high:.4g}]: {row.verdict}")
        if self.only is None:
            path = self.record / "claims.csv"
            if path.is_file():
                old = pd.read_csv(path)
                others = old["command"].str.contains("--data") & ~old["command"].isin(rows["command"])
                rows = pd.concat([rows, old[others]])
            write_csv(_rounded(rows, 9), path)
            print(path)


@dataclass(frozen=True)
class Lab:
    """Sweep the laboratory: exact efficiency, bias and silence of objectives, from dense to sparse. Some minutes."""

    to: Path = Path("paper_figures/out")
    """Folder of exact.csv, from which `sapo figures --out` of the same folder draws."""
    worlds: int = 8
    """Worlds a cell, over which intervals are taken."""

    def __call__(self) -> None:
        from sapo.common.files import write_csv
        from sapo.lab.sweep import Sweep, sweep

        _at_least_one("worlds", self.worlds)
        rows = sweep(Sweep(seeds=tuple(range(self.worlds))))
        write_csv(_rounded(rows, 6), self.to / "exact.csv")
        print(self.to / "exact.csv")


@dataclass(frozen=True)
class Describe:
    """Check a data folder and print what is in it, and what its test rows give away."""

    folder: tyro.conf.Positional[Path]
    """Folder of TSV files."""
    sids: str = "sids"
    """Which semantic IDs of the folder."""

    def __call__(self) -> None:
        from sapo.data.catalog import Catalog
        from sapo.data.interactions import Interactions

        print(Catalog.load(self.folder, self.sids).describe().to_string(header=False))
        interactions = Interactions.load(self.folder)
        print(interactions.describe().to_string(header=False))
        print(interactions.leakage().to_string(float_format="{:.4f}".format))


@dataclass(frozen=True)
class Amazon:
    """Make data folders of raw Amazon reviews, SIDs included. The same command goes on after a stop."""

    categories: tyro.conf.Positional[tuple[str, ...]] = ("Office_Products", "Video_Games", "Industrial_and_Scientific")
    """Names of categories in the release, for instance Office_Products or, of 2014, Beauty; the paper's three where
    left out."""
    out: Path | None = None
    """The folder of one category; data/CATEGORY where left out."""
    raw: Path = Path("data/raw")
    """Folder of downloads."""
    reviews: Path | None = None
    """A file to read instead of downloading one: JSON lines with reviewerID, asin and unixReviewTime, or a CSV of user,
    item, rating and time, compressed by gzip or not."""
    products: Path | None = None
    """A file to read instead of downloading one: JSON lines, or Python literals, with asin, title, brand, category and
    description."""
    release: Literal["2018", "2014"] = "2018"
    """Which Amazon Reviews to download; files of your own are read whichever they are of."""
    k: int = 5
    """Users and items keep at least so many interactions with each other (k-core)."""
    since: str | None = None
    """First day of the time window, as 2016-10-01."""
    until: str | None = None
    """Day after the last of the time window."""
    repeats: Literal["first", "keep"] = "first"
    """Of several reviews of an item by a user keep the first, or all, as MiniOneRec does."""
    max_title_words: int | None = None
    """Leave out items without a title or with a longer one (MiniOneRec: 20)."""
    chronological: bool = True
    """Write the rows of MiniOneRec's 8:1:1 cut in time as the published split, beside leave-one-out."""
    tokenizer: Annotated[TokenizerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=TokenizerConfig)
    """How items get their SIDs."""

    def __call__(self) -> None:
        from dataclasses import replace

        from sapo.data.amazon import Filter, build
        from sapo.semantic_ids.tokenizer import ItemTokenizer

        _at_least_one("k", self.k)
        of_one = [name for name in ("out", "reviews", "products") if getattr(self, name) is not None]
        if of_one and len(self.categories) != 1:
            raise InputError(
                f"--{of_one[0]} is of one category, and there are {len(self.categories)}: name one. Of files of your "
                "own any word is the name, as in `sapo data amazon Mine --reviews ... --products ...`."
            )
        kept = Filter(self.k, self.since, self.until, self.repeats, self.max_title_words)
        for category in self.categories:
            folder = self.out or Path("data") / category
            for line in build(
                category, folder, self.raw, kept, self.release, self.reviews, self.products, self.chronological
            ):
                print(line)
            if not any(folder.glob("sids.tsv*")):
                Tokenize(folder, tokenizer=self.tokenizer)()
                continue
            made = ItemTokenizer.load(folder / "sids.safetensors").config
            if made != replace(self.tokenizer, levels=self.tokenizer.levels or made.levels):
                raise InputError(
                    f"{folder} has SIDs of other settings ({made.method}); `sapo data tokenize {folder} --name ...` "
                    "makes others beside them."
                )
            print(f"{folder} has its SIDs")


@dataclass(frozen=True)
class Tokenize:
    """Give the items of a data folder SIDs learnt from their texts, and print what they are like."""

    folder: tyro.conf.Positional[Path]
    """Folder of TSV files."""
    name: str = "sids"
    """Of the SIDs: writes NAME.tsv.gz and NAME.safetensors, the tokenizer for items to come."""
    split: Split = "auto"
    """Whose training sequences letter looks at; `sapo run` refuses its SIDs on another split."""
    replace: bool = False
    """Let SIDs of this name go, if a tokenizer of ours made them."""
    tokenizer: Annotated[TokenizerConfig, tyro.conf.OmitArgPrefixes] = field(default_factory=TokenizerConfig)
    """How items get their SIDs."""

    def __call__(self) -> None:
        from sapo.data.interactions import Interactions
        from sapo.semantic_ids.report import report_table, sid_report
        from sapo.semantic_ids.tokenizer import tokenize_folder

        split = Interactions.load(self.folder).split(self.split) if self.tokenizer.method == "letter" else None
        catalog, tokenizer = tokenize_folder(self.folder, self.name, self.tokenizer, split, self.replace)
        facts = sid_report(catalog.sids, tokenizer.vectors, catalog.categories) | tokenizer.losses()
        print(report_table(facts).to_string(na_rep="", float_format="{:.4g}".format))
        print(self.folder / f"{self.name}.tsv.gz")


@dataclass(frozen=True)
class Compare:
    """Fit every tokenizer to data folders, three seeds each, and describe its SIDs beside those of the folders."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of TSV files."""
    to: Path = Path("paper_figures/out")
    """Folder of tokenizers.csv, from which `sapo figures --out` of it draws. Rows of other data folders stay."""
    seeds: int = 3
    """How many seeds."""
    epochs: int = 100
    """Of the methods that learn by gradients."""

    def __call__(self) -> None:
        import pandas as pd

        from sapo.analysis.tokenizers import Comparison, compare
        from sapo.common.files import updating, write_csv

        _at_least_one("seeds", self.seeds)
        path = self.to / "tokenizers.csv"
        for rows in compare(self.folders, Comparison(seeds=tuple(range(self.seeds)), epochs=self.epochs)):
            with updating(self.to):
                if path.is_file():
                    old = pd.read_csv(path)
                    rows = pd.concat([old[old["dataset"] != rows["dataset"].iloc[0]], rows])
                write_csv(_rounded(rows, 6), path)
        print(path)


@dataclass(frozen=True)
class Explain:
    """Let a teacher say why each training history leads to its next item; an answer is asked for once, and kept."""

    folder: tyro.conf.Positional[Path]
    """Folder of TSV files."""
    model: str
    """Name of the teacher, at the URL or, without one, of the hub or as a folder."""
    url: str | None = None
    """OpenAI-compatible address, for instance http://localhost:8000/v1."""
    key: str = ""
    """Key of the address."""
    to: Path | None = None
    """The file of answers; FOLDER/rationales.jsonl where left out."""
    sids: str = "sids"
    """Which semantic IDs of the folder; a rationale has a step for each level."""
    split: Split = "auto"
    """Whose training rows."""
    rows: int | None = None
    """How many of them, drawn with a fixed seed; all where left out."""
    parallel: int = 8
    """Questions at a time."""
    max_tokens: int = 1000
    """Of an answer, with what the model thinks before it."""

    def __call__(self) -> None:
        from sapo.data.catalog import Catalog
        from sapo.data.interactions import Interactions
        from sapo.training.rationales import OpenAITeacher, Teacher, ask_teacher, local_teacher
        from sapo.training.traces import leaks

        for name in ("rows", "parallel", "max_tokens"):
            _at_least_one(name, getattr(self, name))
        catalog, split = Catalog.load(self.folder, self.sids), Interactions.load(self.folder).split(self.split)
        path = self.to or self.folder / "rationales.jsonl"
        if self.url:
            teacher: Teacher = OpenAITeacher(self.url, self.model, self.key, max_tokens=self.max_tokens)
        else:
            teacher = local_teacher(self.model, self.max_tokens)
        rows = split.train.sample(self.rows)
        answers = ask_teacher(teacher, catalog, rows, path, self.model, self.parallel if self.url else 1)
        found = leaks(list(answers.values()), [catalog.titles[target] for _, target in answers])
        print(
            f"{len(answers):,} rationales in {path}; {found['leak_rate']:.1%} name their target's title, and "
            f"{found['title_words']:.1%} of its words are said"
        )


@dataclass(frozen=True)
class RowsForVerl:
    """Write the rows of a split as verl reads them, asked as a policy asks."""

    folder: tyro.conf.Positional[Path]
    """Folder of TSV files."""
    model: Path
    """Folder of a policy of the preset paper, for instance OUT/runs/.../seed0/stage2-.../policy."""
    to: Path
    """The parquet file."""
    rows: Literal["train", "valid", "test"] = "train"
    """Which rows of the split."""
    sids: str = "sids"
    """Which semantic IDs of the folder."""
    split: Split = "auto"
    """A policy is refused on a split that it was not trained for."""

    def __call__(self) -> None:
        from sapo.experiments.recipes import QUICK
        from sapo.experiments.run_folder import Job, load_world
        from sapo.integrations.rows import write_rows
        from sapo.policy.policy import Policy

        world = load_world(Job(QUICK, "", str(self.folder), self.sids, self.split))
        policy = Policy.load(self.model, world.catalog, "cpu")
        policy.check_split(world.split)
        write_rows(policy, getattr(world.split, self.rows), self.to)
        print(self.to)


@dataclass(frozen=True)
class Data:
    """Look at a data folder, make one of raw Amazon reviews, give its items SIDs and rationales, compare SIDs, write
    rows for verl."""

    action: tyro.conf.OmitArgPrefixes[
        Annotated[Describe, tyro.conf.subcommand("describe", prefix_name=False)]
        | Annotated[Amazon, tyro.conf.subcommand("amazon", prefix_name=False)]
        | Annotated[Tokenize, tyro.conf.subcommand("tokenize", prefix_name=False)]
        | Annotated[Compare, tyro.conf.subcommand("compare", prefix_name=False)]
        | Annotated[Explain, tyro.conf.subcommand("explain", prefix_name=False)]
        | Annotated[RowsForVerl, tyro.conf.subcommand("verl", prefix_name=False)]
    ]

    def __call__(self) -> None:
        self.action()


Command = (
    Annotated[Run, tyro.conf.subcommand("run")]
    | Annotated[Study, tyro.conf.subcommand("study")]
    | Annotated[Baselines, tyro.conf.subcommand("baselines")]
    | Annotated[Evaluate, tyro.conf.subcommand("evaluate")]
    | Annotated[Recommend, tyro.conf.subcommand("recommend")]
    | Annotated[Plan, tyro.conf.subcommand("plan")]
    | Annotated[Figures, tyro.conf.subcommand("figures")]
    | Annotated[Publish, tyro.conf.subcommand("publish")]
    | Annotated[Claims, tyro.conf.subcommand("claims")]
    | Annotated[Lab, tyro.conf.subcommand("lab")]
    | Annotated[Data, tyro.conf.subcommand("data")]
)


def _means(results: "pd.DataFrame", metrics: list[str]) -> str:
    """Means over seeds as text, a line a method, the best NDCG@10 by item last."""
    from sapo.analysis.results import name_hits

    shown = name_hits(results)
    means = shown[shown["metric"].isin(metrics)].groupby(["method", "metric"])["value"].mean().unstack()
    return means.reindex(columns=metrics).sort_values("item/ndcg@10").round(4).to_string()


def _rounded(table: "pd.DataFrame", digits: int) -> "pd.DataFrame":
    """Significant digits of all numbers; the last ones of a float depend on how many threads summed it."""
    return table.map(lambda value: float(f"{value:.{digits}g}") if isinstance(value, float) else value)


def _sizes(data: Path | None, sids: str, split: Split, rationales: Path | None) -> tuple[int, int, int]:
    """Training rows, how many of them a teacher has explained (all where nobody was asked), and items."""
    from sapo.experiments.recipes import preset
    from sapo.experiments.run_folder import Job, load_world
    from sapo.training.rationales import RationaleTraces, read_rationales

    name = None if data is None else str(data)
    world = load_world(Job(preset("small", name), "", name, sids, split))  # made, it is as large as the paper preset's
    rows = explained = world.split.train
    if rationales is not None:
        traces = RationaleTraces(read_rationales(rationales, world.catalog), world.catalog.num_levels)
        explained = traces.rows(rows)
    return len(rows), len(explained), world.catalog.num_items


def _conversations(path: Path | None) -> "list[Conversation]":
    from sapo.training.conversations import read_conversations

    return [] if path is None else read_conversations(path)


def _names(*paths: Path | None) -> list[str | None]:
    return [None if path is None else str(path) for path in paths]


def _at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise InputError(f"--{name} is {value}; at least 1 fits.")


def main() -> None:
    """Run a command; a mistake in the input is one message on stderr and exit code 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # where the terminal's alphabet lacks a sign, as on stderr
    try:
        tyro.cli(Command, prog="sapo", description="Step-Aligned Policy Optimization for recommenders that think.")()
    except (InputError, FloatingPointError) as error:
        sys.exit(f"sapo: {error}")
    except OSError as error:
        sys.exit(f"sapo: {error.strerror or error}: {error.filename or 'no file named'}. Finished runs are intact.")
    except KeyboardInterrupt:
        print("\nsapo: stopped. The same command goes on from the last checkpoint.", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
