"""Commands that train: the whole job, the study, other recommenders."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from sapo.cli.options import Split, at_least_one, conversations, names, sizes
from sapo.errors import InputError

if TYPE_CHECKING:
    import pandas as pd


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
            at_least_one(name, getattr(self, name))
        for_pretrained = {
            "--backbone": self.backbone,
            "--lora": self.lora,
            "--row-updates": self.row_updates,
            "--conversations": self.conversations,
        }
        if self.preset == "paper":
            start = Pretrained(self.backbone or PAPER_BACKBONE, None, self.row_updates or 0, self.lora)
            start.check()
            counted = sizes(self.data, self.sids, self.split, self.rationales)
            recipe = recipes.paper(*counted, start, len(conversations(self.conversations)))
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
        data, rationales, said = names(self.data, self.rationales, self.conversations)
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

        at_least_one("workers", self.workers)
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
            at_least_one(name, getattr(self, name))
        data = None if self.data is None else str(self.data)
        results = run_baselines(str(self.out), data, self.methods, self.seeds, self.split, self.workers)
        by_item = ["item/recall@5", "item/ndcg@5", "item/recall@10", "item/ndcg@10"]
        print(_means(results, [*by_item, "sid/recall@10", "sid/ndcg@10", "valid/ndcg@10"]))
        print(self.out / "results.csv")


def _means(results: "pd.DataFrame", metrics: list[str]) -> str:
    """Means over seeds as text, a line a method, the best NDCG@10 by item last."""
    from sapo.analysis.results import name_hits

    shown = name_hits(results)
    means = shown[shown["metric"].isin(metrics)].groupby(["method", "metric"])["value"].mean().unstack()
    return means.reindex(columns=metrics).sort_values("item/ndcg@10").round(4).to_string()
