"""User sequences, the two ways to cut them into training, validation and test rows, and what a cut lets through.

A row is a history (item indices, oldest first) and the item that came next. Each cut has a training part of its own: a
third of the published test targets are training targets under leave-one-out, so a policy of one must not be tested on
the other.
"""

import math
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Self

import numpy as np
import pandas as pd

from sapo.data.tsv import Row, Table, fingerprint, write_table
from sapo.errors import InputError

SplitName = Literal["auto", "leave_one_out", "published_test"]
DAY_LIMIT = 10**6


@dataclass(frozen=True)
class Rows:
    """R rows: whose they are, what came before, and what came next."""

    user: list[str]
    history: list[list[int]]
    target: list[int]

    def __len__(self) -> int:
        return len(self.target)

    def take(self, indices: Sequence[int]) -> "Rows":
        """The rows at `indices`, in their order."""
        return Rows(
            [self.user[index] for index in indices],
            [self.history[index] for index in indices],
            [self.target[index] for index in indices],
        )

    def sample(self, count: int | None) -> "Rows":
        """`count` of the rows, always the same ones, so that methods are compared on them; all where None."""
        if count is None or count >= len(self):
            return self
        return self.take(np.random.default_rng(0).choice(len(self), count, replace=False).tolist())


@dataclass(frozen=True)
class Split:
    """One way to cut: "leave_one_out" or "published_test".

    `train` has a row for every item of a training sequence that follows another one; its history is all of them, uncut.
    `data_hash` (SHA-256) is of the name and all rows: checkpoints record it.
    """

    name: str
    users: list[str]  # whose sequences may be trained on
    sequences: list[list[int]]
    train: Rows
    valid: Rows
    test: Rows
    data_hash: str


@dataclass(frozen=True)
class PublishedPairs:
    """A chronological cut made by others: users and sequences to train on, and rows that came later."""

    users: list[str]
    sequences: list[list[int]]
    valid: Rows
    test: Rows


@dataclass(frozen=True, eq=False)
class Interactions:
    """Who took what, in time order.

    Raises:
        InputError: users and sequences of different numbers, a user given twice, a sequence of fewer than 3 items
            (leave-one-out needs one to train, one to validate and one to test), an item outside 0..num_items-1,
            another number of days than items.
    """

    user_ids: list[str]
    items: list[list[int]]
    num_items: int
    published_pairs: PublishedPairs | None = None
    days: list[list[int]] | None = None  # since 1970-01-01, one an item, where known; no part of any hash

    def __post_init__(self) -> None:
        if len(self.user_ids) != len(self.items) or not self.items:
            raise InputError(
                f"{len(self.user_ids)} users with {len(self.items)} sequences; give one each, at least one."
            )
        if len(set(self.user_ids)) < len(self.user_ids):
            raise InputError("user_ids holds a user twice; join the sequences of a user.")
        for user, sequence in zip(self.user_ids, self.items, strict=True):
            if len(sequence) < 3:
                raise InputError(f"user {user!r} has {len(sequence)} items; leave-one-out needs at least 3.")
            if min(sequence) < 0 or max(sequence) >= self.num_items:
                raise InputError(f"user {user!r} has an item outside 0..{self.num_items - 1}.")
        if self.days is not None and [len(days) for days in self.days] != [len(items) for items in self.items]:
            raise InputError("days must hold one number for each item of each user.")

    @property
    def has_published(self) -> bool:
        """Whether `published` has a test part to give."""
        return self.published_pairs is not None

    @cached_property
    def content_hash(self) -> str:
        """SHA-256 of everything."""
        pairs = self.published_pairs
        rest = [pairs.users, pairs.sequences, _columns(pairs.valid), _columns(pairs.test)] if pairs else None
        return fingerprint([self.num_items, self.user_ids, self.items, rest])

    def leave_one_out(self, min_history: int = 1) -> Split:
        """The last item of every user is the test target, the one before it the validation target.

        Args:
            min_history: training rows have at least so many items before their target.
        """
        return _split(
            "leave_one_out",
            self.user_ids,
            [items[:-2] for items in self.items],
            Rows(self.user_ids, [items[:-2] for items in self.items], [items[-2] for items in self.items]),
            Rows(self.user_ids, [items[:-1] for items in self.items], [items[-1] for items in self.items]),
            min_history,
        )

    def published(self) -> Split:
        """The chronological cut that came with the data; a user may have several test rows, or none.

        Raises:
            InputError: the data came without one.
        """
        pairs = self.published_pairs
        if pairs is None:
            raise InputError("there is no published test part (test.tsv.gz in the data folder); use leave_one_out().")
        return _split("published_test", pairs.users, pairs.sequences, pairs.valid, pairs.test)

    def split(self, name: SplitName = "auto") -> Split:
        """One of the two by name; "auto" is the published cut where there is one.

        Raises:
            InputError: as `published`.
        """
        published = self.has_published if name == "auto" else name == "published_test"
        return self.published() if published else self.leave_one_out()

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `sequences.tsv.gz` (user_id, items, and days where known), and what else there is of the published cut.

        Where there is a `test.tsv.gz`, it and `valid.tsv.gz` (user_id, history, target) are the rows, and training
        stops at the column n_train of `sequences_extended.tsv.gz`, or of `sequences.tsv.gz` where that file does not
        exist.
        The number of items is that of `items.tsv.gz`. Every file may be without .gz.

        Raises:
            InputError: anything that does not fit; the message names the file, the line and the column.
        """
        num_items = sum(1 for _ in Table(folder, "items", required=("item_id",)))
        users, sequences = [], []
        table = Table(folder, "sequences", required=("user_id", "items"))
        days: list[list[int]] | None = [] if "days" in table.columns else None
        for row, items in _sequences(table, num_items):
            if len(items) < 3:
                raise row.error("items", f"{len(items)} items; leave-one-out needs at least 3 of every user.")
            users.append(row.fields["user_id"])
            sequences.append(items)
            if days is not None:
                days.append(row.integers("days", DAY_LIMIT))
                if len(days[-1]) != len(items):
                    raise row.error("days", f"{len(days[-1])} days for {len(items)} items; give one each.")
        if not users:
            raise InputError(
                f"{folder}: the table sequences has no line after the header; it needs one for every user."
            )
        pairs = _published_pairs(folder, num_items) if _holds(folder, "test") else None
        return cls(users, sequences, num_items, pairs, days)

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads, beside the `items.tsv.gz` that `Catalog.save` writes; an earlier cut goes.

        Where a table cannot be written the folder stays as it was, and half a cut, which would be another split, does
        not load: `sequences.tsv.gz` goes first and comes last.

        Raises:
            InputError: a user id that holds a tab or a line break.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as partial:
            if self.days is None:
                write_table(partial, "sequences", ["user_id", "items"], zip(self.user_ids, self.items, strict=True))
            else:
                dated = zip(self.user_ids, self.items, self.days, strict=True)
                write_table(partial, "sequences", ["user_id", "items", "days"], dated)
            if self.published_pairs:
                pairs = self.published_pairs
                sequences = ([user, len(s), s] for user, s in zip(pairs.users, pairs.sequences, strict=True))
                write_table(partial, "sequences_extended", ["user_id", "n_train", "items"], sequences)
                for stem, rows in (("valid", pairs.valid), ("test", pairs.test)):
                    write_table(partial, stem, ["user_id", "history", "target"], zip(*_columns(rows), strict=True))
            stems = ("sequences", "sequences_extended", "valid", "test")
            for earlier in (f"{stem}{suffix}" for stem in stems for suffix in (".tsv.gz", ".tsv")):
                (folder / earlier).unlink(missing_ok=True)
            for made in (Path(partial) / f"{stem}.tsv.gz" for stem in reversed(stems)):
                if made.exists():
                    made.replace(folder / made.name)

    def describe(self) -> pd.DataFrame:
        """Lengths, repeats and density of the sequences, and the rows of each split: one column, "value".

        Density is interactions / (users x items of the catalogue). A repeat is an item that its user had before.
        """
        lengths = [len(items) for items in self.items]
        facts: dict[str, float] = {
            "users": len(self.items),
            "items in the catalogue": self.num_items,
            "items in sequences": len(set().union(*self.items)),
            "interactions": sum(lengths),
            "mean length": float(np.mean(lengths)),
            "median length": float(np.median(lengths)),
            "90th percentile of lengths": float(np.quantile(lengths, 0.9)),
            "longest": max(lengths),
            "density": sum(lengths) / (len(self.items) * self.num_items),
            "repeats": sum(len(items) - len(set(items)) for items in self.items),
        }
        for split in (self.leave_one_out(), self.published()) if self.has_published else (self.leave_one_out(),):
            for part in ("train", "valid", "test"):
                facts[f"{split.name}: {part} rows"] = len(getattr(split, part))
        return pd.DataFrame({"value": pd.Series(facts, dtype=object)})  # object: counts stay integers

    def leakage(self) -> pd.DataFrame:
        """What the test rows of each split give away, as shares of its rows; a column a split.

        A target that its history holds is repeated, not found. Of items of one day only the file knows the order, so a
        target of the day of the item before might as well have come first. Items that are numbered as they appear make
        |target - item before| small, and then a number must be no feature. What no training sequence holds can only be
        found by content.
        """
        columns = {}
        for split in (self.leave_one_out(), self.published()) if self.has_published else (self.leave_one_out(),):
            rows, trained = split.test, set().union(*split.sequences)
            before = [history[-1] for history in rows.history]
            gaps = [abs(target - last) for target, last in zip(rows.target, before, strict=True)]
            facts: dict[str, float] = {
                "test rows": len(rows),
                "target in its history": float(
                    np.mean([t in h for h, t in zip(rows.history, rows.target, strict=True)])
                ),
                "target of the day of the item before": self._same_day(rows),
                "target numbered 1 to 3 from the item before": float(np.mean([1 <= gap <= 3 for gap in gaps])),
                "the same of items numbered at random": 6 / self.num_items,
                "rows whose target no training sequence holds": sum(target not in trained for target in rows.target),
            }
            columns[split.name] = pd.Series(facts, dtype=object)
        return pd.DataFrame(columns)

    def _same_day(self, rows: Rows) -> float:
        """Share of rows whose target has the day of the item before it; rows are the last of each user's items."""
        if self.days is None:
            return float("nan")
        number = {user: position for position, user in enumerate(self.user_ids)}
        left = Counter(rows.user)  # rows of a user from here on, itself included
        same = []
        for user, target in zip(rows.user, rows.target, strict=True):
            position = len(self.items[number[user]]) - left[user] if user in number else 0
            left[user] -= 1
            if position > 0 and self.items[number[user]][position] == target:
                days = self.days[number[user]]
                same.append(days[position] == days[position - 1])
        return float(np.mean(same)) if same else float("nan")


def chronological_pairs(
    user_ids: list[str],
    items: list[list[int]],
    times: list[list[int]],
    parts: tuple[int, int, int] = (8, 1, 1),
    longest: int = 10,
) -> PublishedPairs:
    """Cut as MiniOneRec (arXiv 2510.24431) does: every item of every user that follows another one is a row, all rows
    are sorted by time, and the first 8 of 10 parts are for training, the next for validation, the last for testing.

    Rows of the same time keep the order of users and sequences. Histories of validation and test rows are cut to the
    `longest` last items. A user's training sequence is what it took up to its last training row; of a user without one,
    its first item, if that is not later than the last training row of all.
    """
    users = [user for user, sequence in enumerate(items) for _ in sequence[1:]]
    ends = [end for sequence in items for end in range(1, len(sequence))]
    order = np.argsort([times[user][end] for user, end in zip(users, ends, strict=True)], kind="stable").tolist()
    cuts = [len(order) * sum(parts[:count]) // sum(parts) for count in (1, 2)]
    trained = Counter(users[row] for row in order[: cuts[0]])

    def rows(chosen: list[int]) -> Rows:
        places = [(users[row], ends[row]) for row in chosen]
        return Rows(
            [user_ids[user] for user, _ in places],
            [items[user][max(0, end - longest) : end] for user, end in places],
            [items[user][end] for user, end in places],
        )

    last = max((times[users[row]][ends[row]] for row in order[: cuts[0]]), default=-math.inf)
    early = [user for user in range(len(items)) if trained[user] or times[user][0] <= last]
    return PublishedPairs(
        [user_ids[user] for user in early],
        [items[user][: 1 + trained[user]] for user in early],
        rows(order[cuts[0] : cuts[1]]),
        rows(order[cuts[1] :]),
    )


def _split(
    name: str, users: list[str], sequences: list[list[int]], valid: Rows, test: Rows, min_history: int = 1
) -> Split:
    ends = [
        (user, sequence, end)
        for user, sequence in zip(users, sequences, strict=True)
        for end in range(min_history, len(sequence))
    ]
    train = Rows([user for user, _, _ in ends], [s[:end] for _, s, end in ends], [s[end] for _, s, end in ends])
    # the training rows follow from the sequences and the shortest history
    content = [name, users, sequences, _columns(valid), _columns(test), *([min_history] if min_history > 1 else [])]
    return Split(name, users, sequences, train, valid, test, fingerprint(content))


def _sequences(table: Table, num_items: int) -> Iterator[tuple[Row, list[int]]]:
    """Every line with its items; a user may have only one."""
    lines: dict[str, int] = {}
    for row in table:
        user = row.fields["user_id"]
        if user in lines:
            raise row.error(
                "user_id", f"user {user!r} already stands in line {lines[user]}; join the sequences of a user."
            )
        lines[user] = row.line
        yield row, row.integers("items", num_items)


def _published_pairs(folder: str | Path, num_items: int) -> PublishedPairs:
    stem = "sequences_extended" if _holds(folder, "sequences_extended") else "sequences"
    users, sequences = [], []
    for row, items in _sequences(Table(folder, stem, required=("user_id", "n_train", "items")), num_items):
        kept = row.integer("n_train", len(items) + 1)
        if not kept:
            raise row.error("n_train", f"0 of {len(items)} items; the first item of a user is always before the cut.")
        users.append(row.fields["user_id"])
        sequences.append(items[:kept])
    return PublishedPairs(users, sequences, _rows(folder, "valid", num_items), _rows(folder, "test", num_items))


def _rows(folder: str | Path, stem: str, num_items: int) -> Rows:
    rows = Rows([], [], [])
    for row in Table(folder, stem, required=("user_id", "history", "target")):
        rows.user.append(row.fields["user_id"])
        rows.history.append(row.integers("history", num_items))
        rows.target.append(row.integer("target", num_items))
    if not len(rows):
        raise InputError(f"{folder}: the table {stem} has no line after the header; it needs one for every row.")
    return rows


def _columns(rows: Rows) -> list[list]:
    return [rows.user, rows.history, rows.target]


def _holds(folder: str | Path, stem: str) -> bool:
    return any((Path(folder) / f"{stem}{suffix}").is_file() for suffix in (".tsv.gz", ".tsv"))
