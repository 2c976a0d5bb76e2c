"""Commands that look at data and make them."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from sapo.cli.options import Split, at_least_one, rounded
from sapo.errors import InputError
from sapo.semantic_ids.config import TokenizerConfig


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

        at_least_one("k", self.k)
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

        at_least_one("seeds", self.seeds)
        path = self.to / "tokenizers.csv"
        for rows in compare(self.folders, Comparison(seeds=tuple(range(self.seeds)), epochs=self.epochs)):
            with updating(self.to):
                if path.is_file():
                    old = pd.read_csv(path)
                    rows = pd.concat([old[old["dataset"] != rows["dataset"].iloc[0]], rows])
                write_csv(rounded(rows, 6), path)
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
            at_least_one(name, getattr(self, name))
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
