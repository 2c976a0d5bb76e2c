"""What the results pages share: the record they read, the numbers they compare, and how Markdown is made of them.

A page is made of the committed record alone. No number and no verdict in it is typed.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
from artefacts import ONE_WORLD

from sapo.analysis.plots.results import WITHOUT_SEEDS
from sapo.analysis.ranks import Ranks
from sapo.analysis.results import read_csv, read_results, to_numbers
from sapo.analysis.statistics import Difference, Interval, seed_difference, seed_interval
from sapo.analysis.style import METHOD_COLORS, method_label
from sapo.analysis.verdicts import mean_half
from sapo.errors import InputError
from sapo.experiments.study import AXES
from sapo.experiments.suite import BASELINES, FUSIONS
from sapo.experiments.systems import SYSTEMS

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
PRESETS = ("quick", "study")  # the first ones of a data set; others follow by name
INTERVALS = (
    "After ± stands half of the 95 % t interval over seeds, each of which has its own supervised stages. Differences "
    "are paired, by user and seed where the record has the ranks of both methods in every test row, else by seed; "
    "their 95 % intervals are not corrected for their number, and who is ahead or behind is said after Holm's "
    "correction over the list or table that it stands in."
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
    def axes(self) -> tuple[str, ...]:
        """The axes of the study that train in it."""
        return tuple(name for name, axis in AXES.items() if (self.dataset, self.preset) in axis.places)

    @property
    def command(self) -> str:
        """What trains its policies again, up to the folder of results; of a world of the study, its first axis."""
        if self.axes:
            return study_command(self.axes[0])
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
    def looks(self) -> pd.DataFrame:
        """What validation saw at every learning rate; without rows where no run looked."""
        path = self.folder / "looks.csv.gz"
        columns = [*ONE_WORLD, "method", "seed", "learning_rate", "step", "metric", "value"]
        return pd.read_csv(path) if path.is_file() else pd.DataFrame(columns=columns)

    @cached_property
    def rollouts(self) -> pd.DataFrame:
        """Which levels of stage-2 rollouts match."""
        return pd.read_csv(self.folder / "rollouts.csv.gz")

    @cached_property
    def gradients(self) -> pd.DataFrame | None:
        """What an update of each objective is worth at each start; None where it was not measured."""
        path = self.folder / "gradients.csv"
        return pd.read_csv(path) if path.is_file() else None

    @cached_property
    def ranks(self) -> Ranks:
        """The rank of the target in every test row."""
        return Ranks(self.folder, self.results)

    @cached_property
    def claims(self) -> pd.DataFrame:
        """The ledger."""
        texts = ("claim", "said_by", "experiment", "verdict", "command")
        path = self.folder / "claims.csv"
        return to_numbers(read_csv(path, (*texts, "value", "low", "high")), ["value", "low", "high"], str(path))

    def worlds(self, prefix: str) -> Iterator[tuple[World, pd.DataFrame]]:
        """Rows of every world whose data set's name begins so, in the order of `PRESETS`."""
        rows = self.results[self.results["dataset"].str.startswith(prefix)]
        place = lambda preset: PRESETS.index(preset) if preset in PRESETS else len(PRESETS)  # noqa: E731
        for key, of_world in sorted(rows.groupby(ONE_WORLD), key=lambda group: (place(group[0][2]), group[0])):
            yield World(*key), of_world

    def scores(self, rows: pd.DataFrame, metric: str, by: str = "item") -> "Scores":
        """A metric of one world's methods.

        Args:
            rows: of one world.
            by: as of `by_seed`.
        """
        world = World(*rows.iloc[0][ONE_WORLD])
        ruler = metric if made_up(world.dataset) else f"{by.lower()}/{metric}"  # where items are SIDs, either will do
        return Scores(by_seed(rows, metric, by), world, ruler, self.ranks)

    def curves(self, world: World) -> pd.DataFrame:
        """Rows of `dynamics` of one world."""
        return of_world(self.dynamics, world)


@dataclass(frozen=True)
class Scores:
    """A metric of one world's methods, and what one of them has over another.

    Args:
        values: a row a seed, a column a method.
        world: whose methods they are.
        metric: as `ranks` calls it.
        ranks: of the test rows.
    """

    values: pd.DataFrame
    world: World
    metric: str
    ranks: Ranks

    def __contains__(self, method: str) -> bool:
        return method in self.values

    @property
    def methods(self) -> list[str]:
        """The measured ones, the best first."""
        return list(self.values.mean().sort_values(ascending=False, kind="stable").index)

    def mean(self, method: str) -> Interval:
        """Of a method, over its seeds; without an interval where nothing in it is random."""
        of_method = self.values[method].dropna().to_numpy(float)
        if method in WITHOUT_SEEDS:
            return Interval(float(of_method[0]), np.nan, np.nan)
        return seed_interval(of_method)

    def cell(self, method: str) -> str:
        """The mean for a table; nothing where the method is not measured."""
        return mean_half(self.mean(method)) if method in self else ""

    def gain(self, one: str, other: str) -> Difference | None:
        """What a method has over another one; None where they share no seed.

        Over users and seeds where both have ranks, else over seeds alone. A single seed leaves no interval: users alone
        do not tell what another training run would change.
        """
        if one not in self or other not in self:
            return None
        differences = (self.values[one] - self.values[other]).dropna().to_numpy(float)
        if not len(differences):
            return None
        ours, theirs = ((self.world.dataset, self.world.split, self.world.preset, name) for name in (one, other))
        if len(differences) > 1 and all(self.ranks.holds(key, self.metric) for key in (ours, theirs)):
            return self.ranks.gain(ours, theirs, self.metric)
        return seed_difference(differences)

    def gains(self, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], Difference]:
        """Of the pairs, those that are both measured."""
        return {pair: gain for pair in pairs if (gain := self.gain(*pair)) is not None}


def study_command(axis: str, batches: int | None = None) -> str:
    """What runs an axis of the study again and adds it to the record, with gradients on so many batches."""
    gradients = "" if batches is None else f" --gradients {batches}"
    return f"sapo study {axis}{gradients} --out my/results --record paper_figures/data"


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
