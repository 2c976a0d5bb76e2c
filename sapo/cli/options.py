"""What several commands take, and how it is read."""

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from sapo.errors import InputError

if TYPE_CHECKING:
    import pandas as pd

    from sapo.training.conversations import Conversation

Split = Literal["auto", "leave_one_out", "published_test"]


def sizes(data: Path | None, sids: str, split: Split, rationales: Path | None) -> tuple[int, int, int]:
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


def conversations(path: Path | None) -> "list[Conversation]":
    from sapo.training.conversations import read_conversations

    return [] if path is None else read_conversations(path)


def names(*paths: Path | None) -> list[str | None]:
    return [None if path is None else str(path) for path in paths]


def at_least_one(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise InputError(f"--{name} is {value}; at least 1 fits.")


def rounded(table: "pd.DataFrame", digits: int) -> "pd.DataFrame":
    """Significant digits of all numbers; the last ones of a float depend on how many threads summed it."""
    return table.map(lambda value: float(f"{value:.{digits}g}") if isinstance(value, float) else value)
