"""Progress bars that share a terminal: each process keeps to a line of its own."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm.auto import tqdm

from sapo.common.distributed import is_first

_line = 0


def keep_to_line(number: int) -> None:
    """Draw this process's bars on that line, counted from 0."""
    global _line
    _line = number


def progress_bar(title: str, items: Iterable[Any] | None = None, total: int | None = None, start: int = 0) -> tqdm:
    """A bar that vanishes when it is done. Into a file or a pipe it writes twice a minute; of several processes of one
    command the first draws it."""
    interval = 0.1 if sys.stderr.isatty() else 30.0
    return tqdm(
        items,
        desc=title,
        total=total,
        initial=start,
        leave=False,
        position=_line,
        mininterval=interval,
        disable=not is_first(),
    )
