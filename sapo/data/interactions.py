"""User sequences, and the two ways to cut them into training, validation and test rows.

A row is a history (item indices, oldest first) and the item that came next. Each cut has a training part of its own: a
third of the published test targets are training targets under leave-one-out, so a policy of one must not be tested on
the other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd

from sapo.data.tsv import Row, Table, fingerprint, write_table
from sapo.errors import InputError


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
    sequences: list[list[int]]  # what may be trained on, one sequence a user
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
            (leave-one-out needs one to train, one to validate and one to test), an item outside 0..num_items-1.
    """

    user_ids: list[str]
    items: list[list[int]]
    num_items: int
    published_pairs: PublishedPairs | None = None

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

    def leave_one_out(self) -> Split:
        """The last item of every user is the test target, the one before it the validation target."""
        return _split(
            "leave_one_out",
            self.user_ids,
            [items[:-2] for items in self.items],
            Rows(self.user_ids, [items[:-2] for items in self.items], [items[-2] for items in self.items]),
            Rows(self.user_ids, [items[:-1] for items in self.items], [items[-1] for items in self.items]),
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

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """Read `sequences.tsv.gz` (user_id, items), and what else there is of the published cut.

        Where there is a `test.tsv.gz`, it and `valid.tsv.gz` (user_id, history, target) are the rows, and training
        stops at the column n_train of `sequences_extended.tsv.gz`, or of `sequences.tsv.gz` where that file does not
        exist.
        The number of items is that of `items.tsv.gz`. Every file may be without .gz.

        Raises:
            InputError: anything that does not fit; the message names the file, the line and the column.
        """
        num_items = sum(1 for _ in Table(folder, "items", required=("item_id",)))
        users, sequences = [], []
        for row, items in _sequences(Table(folder, "sequences", required=("user_id", "items")), num_items):
            if len(items) < 3:
                raise row.error("items", f"{len(items)} items; leave-one-out needs at least 3 of every user.")
            users.append(row.fields["user_id"])
            sequences.append(items)
        if not users:
            raise InputError(
                f"{folder}: the table sequences has no line after the header; it needs one for every user."
            )
        return cls(users, sequences, num_items, _published_pairs(folder, num_items) if _holds(folder, "test") else None)

    def save(self, folder: str | Path) -> None:
        """Write what `load` reads, beside the `items.tsv.gz` that `Catalog.save` writes."""
        write_table(folder, "sequences", ["user_id", "items"], zip(self.user_ids, self.items, strict=True))
        if self.published_pairs:
            pairs = self.published_pairs
            sequences = ([user, len(s), s] for user, s in zip(pairs.users, pairs.sequences, strict=True))
            write_table(folder, "sequences_extended", ["user_id", "n_train", "items"], sequences)
            for stem, rows in (("valid", pairs.valid), ("test", pairs.test)):
                write_table(folder, stem, ["user_id", "history", "target"], zip(*_columns(rows), strict=True))

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


def _split(name: str, users: list[str], sequences: list[list[int]], valid: Rows, test: Rows) -> Split:
    ends = [
        (user, sequence, end)
        for user, sequence in zip(users, sequences, strict=True)
        for end in range(1, len(sequence))
    ]
    train = Rows([user for user, _, _ in ends], [s[:end] for _, s, end in ends], [s[end] for _, s, end in ends])
    # the training rows follow from the sequences
    return Split(
        name, sequences, train, valid, test, fingerprint([name, users, sequences, _columns(valid), _columns(test)])
    )


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
