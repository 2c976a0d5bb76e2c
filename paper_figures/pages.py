"""What the results pages share: the record they read, the numbers they compare, and how Markdown is made of them.

A page is made of the committed record alone. No number and no verdict in it is typed.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from artefacts import ONE_WORLD

from sapo.analysis.plots import METHOD_COLORS, WITHOUT_SEEDS, method_label
from sapo.analysis.ranks import Ranks
from sapo.analysis.results import read_csv, read_results, to_numbers
from sapo.analysis.statistics import Interval, seed_interval
from sapo.errors import InputError
from sapo.suite import BASELINES, FUSIONS
from sapo.systems import SYSTEMS

REASONING, CONTROL = "reasoning", "synthetic"  # how data sets of worlds that are made up are named
DATASETS = {
    CONTROL: "control world",
    "industrial": "Industrial",
    "industrial_full": "Industrial (complete)",
    "office": "Office",
    "beauty": "Beauty",
}
SPLITS = {"leave_one_out": "leave-one-out", "published_test": "chronological pairs"}
ITEM_NAMERS = {*WITHOUT_SEEDS, *BASELINES, *FUSIONS} | {n for n, system in SYSTEMS.items() if system.fits}
OVER_SEEDS = (
    "Intervals are 95 % t intervals over seeds, each seed with its own supervised stages; differences are paired by "
    "seed, and intervals are not corrected for their number."
)
MARKER = "<!-- generated: {name} -->", "<!-- /generated -->"


@dataclass(frozen=True)
class World:
    """Runs that may be compared with each other."""

    dataset: str
    split: str
    preset: str

    @property
    def suffix(self) -> str:
        """What its figures' file names end in."""
        return f"-{self.dataset}-{self.split}-{self.preset}"

    @property
    def name(self) -> str:
        """How sentences and tables call it."""
        where = "" if made_up(self.dataset) else f", {SPLITS[self.split]}"
        return f"{dataset_name(self.dataset)}{where}, preset {self.preset}"

    @property
    def command(self) -> str:
        """What trains its policies again, up to the folder of results."""
        given = f"--data {self.dataset}"
        if self.dataset.startswith(REASONING):
            given = ""
        elif self.dataset != CONTROL:
            given = f"--data data/{self.dataset} --split {self.split}"
        several = re.fullmatch(r"(.+)-(\d+)iterations", self.preset)
        options = f"{several[1]} {given} --iterations {several[2]}" if several else f"{self.preset} {given}"
        return " ".join(f"sapo run --preset {options} --out my/results".split())


@dataclass(frozen=True)
class Page:
    """One question, and what the record says of it.

    Args:
        name: of the file, without its ending.
        answer: one line for the index, generated like the rest.
        blocks: of Markdown, between which an empty line stands.
        figures: names of the artefacts whose pictures the blocks show.
    """

    name: str
    title: str
    question: str
    answer: str
    blocks: tuple[str, ...]
    figures: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        """The file."""
        note = "<!-- Made by `make results` from paper_figures/data. Edit the script, not this page. -->"
        return "\n\n".join([f"# {self.title}", note, f"**{self.question}**", *self.blocks]) + "\n"


class Record:
    """The tables of a folder that `sapo publish`, `sapo lab`, `sapo claims`, `make bench` and `sapo data compare` fill.

    Each is read when first asked for.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    @cached_property
    def results(self) -> pd.DataFrame:
        """Measured and exact numbers."""
        rows = read_results(self.folder / "results.csv")
        return rows[rows["source"] != "published"]

    @cached_property
    def published(self) -> pd.DataFrame:
        """Other people's numbers."""
        return read_results(self.folder / "published.csv")

    @cached_property
    def dynamics(self) -> pd.DataFrame:
        """Curves of training."""
        return pd.read_csv(self.folder / "dynamics.csv.gz")

    @cached_property
    def rollouts(self) -> pd.DataFrame:
        """Which levels of stage-2 rollouts match."""
        return pd.read_csv(self.folder / "rollouts.csv.gz")

    @cached_property
    def ranks(self) -> Ranks:
        """The rank of the target in every test row."""
        return Ranks(self.folder)

    @cached_property
    def claims(self) -> pd.DataFrame:
        """The ledger."""
        texts = ("claim", "said_by", "experiment", "verdict", "command")
        path = self.folder / "claims.csv"
        return to_numbers(read_csv(path, (*texts, "value", "low", "high")), ["value", "low", "high"], str(path))

    def worlds(self, prefix: str) -> Iterator[tuple[World, pd.DataFrame]]:
        """Rows of every world whose data set's name begins so, first the preset `quick`."""
        rows = self.results[self.results["dataset"].str.startswith(prefix)]
        groups = sorted(rows.groupby(ONE_WORLD), key=lambda group: (group[0][2] != "quick", group[0]))
        for key, of_world in groups:
            yield World(*key), of_world

    def curves(self, world: World) -> pd.DataFrame:
        """Rows of `dynamics` of one world."""
        return of_world(self.dynamics, world)


def headings(worlds: Sequence[tuple[World, pd.DataFrame]]) -> list[str]:
    """The shortest names of worlds for the columns of a table; one of a data set that has several says its preset."""
    names = [dataset_name(world.dataset) for world, _ in worlds]
    return [
        name if names.count(name) == 1 else f"{name}, {world.preset}"
        for name, (world, _) in zip(names, worlds, strict=True)
    ]


def of_world(table: pd.DataFrame, world: World) -> pd.DataFrame:
    """The rows of a table that one world has."""
    key = (world.dataset, world.split, world.preset)
    return table[np.logical_and.reduce([table[name] == value for name, value in zip(ONE_WORLD, key, strict=True)])]


def made_up(dataset: str) -> bool:
    """Whether a data set is a world of ours, in which every item has a SID of its own."""
    return dataset.startswith((REASONING, CONTROL))


def dataset_name(dataset: str) -> str:
    """How sentences and tables call a data set."""
    if dataset.startswith(REASONING):
        return f"{dataset.replace('_', ' ').replace('-', ' ')} world"
    return DATASETS.get(dataset, dataset)


def by_seed(rows: pd.DataFrame, metric: str, by: str = "item") -> pd.DataFrame:
    """A metric of one world, a row a seed and a column a method; methods that are not measured so are left out.

    Args:
        by: what counts as a hit. "item": the item itself; of a policy, which names a SID that a few items may share,
            the item that is drawn for its SID. "SID": the target's SID.
    """
    plain, by_item, by_sid = (
        rows[rows["metric"] == name].pivot(index="seed", columns="method", values="value")
        for name in (metric, f"item/{metric}", f"sid/{metric}")
    )
    one_to_one = made_up(str(rows["dataset"].iloc[0]))
    if by == "item":
        other, kept = by_item, [name for name in plain if name in ITEM_NAMERS or one_to_one]
    else:
        other, kept = by_sid, [name for name in plain if name not in ITEM_NAMERS or one_to_one]
    return pd.concat([plain[[name for name in kept if name not in other]], other], axis=1)


def gain(values: pd.DataFrame, one: str, other: str) -> tuple[Interval, str] | None:
    """What a method has over another one and the replicates; None where they share no seed.

    The one place that decides which interval the pages of policies show.
    """
    if one not in values or other not in values:
        return None
    difference = values[one] - values[other]
    difference = difference.dropna().to_numpy(float)
    if not len(difference):
        return None
    return seed_interval(difference), f"{len(difference)} seed{'s' if len(difference) > 1 else ''}"


def mean(values: pd.DataFrame, method: str) -> Interval:
    """Of a method, over its seeds; without an interval where nothing in it is random."""
    of_method = values[method].dropna().to_numpy(float)
    if method in WITHOUT_SEEDS:
        return Interval(float(of_method[0]), np.nan, np.nan)
    return seed_interval(of_method)


def label(method: str) -> str:
    """The name of a method on these pages, where "(step-aligned)" need not be repeated."""
    return method_label(method).removesuffix(" (step-aligned)")


def in_order(methods: Sequence[str]) -> list[str]:
    """Objectives first, then what they are compared with."""
    order = list(METHOD_COLORS)
    return sorted(methods, key=lambda name: (order.index(name) if name in order else len(order), name))


def markdown_table(table: pd.DataFrame) -> str:
    """Cells as they are, empty where nothing is known."""
    cells = table.astype(object).where(table.notna(), "").astype(str).map(lambda cell: cell.replace("|", "\\|"))
    lines = [list(cells.columns), ["---"] * len(cells.columns), *cells.to_numpy().tolist()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def picture(name: str, caption: str) -> str:
    """A figure and what it shows."""
    return f"![{caption}](figures/{name}.png)\n\n*{caption}*"


def bullets(sentences: Sequence[str]) -> str:
    """A list of sentences."""
    return "\n".join(f"- {sentence}" for sentence in sentences)


def commands(lines: Sequence[str]) -> str:
    """What makes the numbers again, and then the pages."""
    return "\n".join(["```", *lines, "make results", "```"])


def fill(text: str, name: str, content: str) -> str:
    """`text` with its block of that name filled anew.

    Raises:
        InputError: there is no such block, or more than one.
    """
    start, end = MARKER[0].format(name=name), MARKER[1]
    pattern = re.compile(f"{re.escape(start)}.*?{re.escape(end)}", re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise InputError(f"a text needs one block {start} ... {end}; it has {len(pattern.findall(text))}.")
    return pattern.sub(lambda _: f"{start}\n\n{content}\n\n{end}", text)
