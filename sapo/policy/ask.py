"""Asking a policy for items in words: titles or product ids in, its thinking and ranked items out."""

import json
import operator
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from functools import lru_cache
from typing import Any, SupportsIndex

import pandas as pd

from sapo.data.catalog import Catalog
from sapo.errors import InputError
from sapo.policy.policy import Policy, recommend
from sapo.policy.prompts import THINK_END, THINK_START, split_words

FEWEST_BEAMS = 10
MOST = 200  # items that can be asked for
SHOWN = 3  # suggestions, and items of one name

_BLOCK = re.compile(f"{re.escape(THINK_START)}(.*?){re.escape(THINK_END)}", re.DOTALL)


@dataclass(frozen=True)
class Answer:
    """What came back for one history.

    Args:
        history: what was asked after, a row an item, oldest first.
        thinking: the text of each block; none of a policy that does not think.
        items: best first, with a column each for item, title, asin, sid (K codes) and score: the logarithm of the SID's
            probability among all of the catalogue's after this thinking; of a policy that contrasts, what it ranks by
            (beyond 32 items that depends on how many are asked for). Items that share a SID follow each other, in the
            order of their titles.
    """

    history: pd.DataFrame
    thinking: list[str]
    items: pd.DataFrame

    def __str__(self) -> str:
        """For people."""
        lines = [f"after {'; '.join(map(_shown, self.history.itertuples()))}"]
        lines += [f"thinks {block or '(nothing)'}" for block in self.thinking]
        for rank, row in enumerate(self.items.itertuples(), start=1):
            lines.append(f"{rank:3}  {row.score:8.3f}  {_shown(row)}  {row.sid}")
        return "\n".join(lines)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        items = self.items.assign(sid=self.items["sid"].map(list)).to_dict("records")
        return {"history": self.history["item"].tolist(), "thinking": self.thinking, "items": items}


class ItemNames:
    """What the items of a catalogue are called: by title, by product id, or "#12" by number."""

    def __init__(self, catalog: Catalog):
        self.catalog = catalog
        self._exact: dict[str, set[int]] = defaultdict(set)
        self._folded: dict[str, set[int]] = defaultdict(set)
        for item, names in enumerate(zip(catalog.titles, catalog.asins, strict=True)):
            for name in filter(None, map(str.strip, names)):
                self._exact[name].add(item)
                self._folded[name.casefold()].add(item)

    def find(self, name: SupportsIndex | str) -> int:
        """The item of a name, whose outer spaces do not count, nor its case where no other is spelt so; of an integer,
        or of digits that are no name, the item of that number.

        Raises:
            InputError: no such item, with names that come close; or several, with their numbers.
        """
        if not isinstance(name, str):
            if isinstance(name, bool) or not hasattr(name, "__index__"):
                raise InputError(f"{name!r} names no item: titles, product ids and numbers do.")
            return self._numbered(str(operator.index(name)), name)
        text = name.strip()
        items = sorted(self._exact.get(text) or self._folded.get(text.casefold()) or ())
        if len(items) > 1:
            others = f" and {len(items) - SHOWN} more" if len(items) > SHOWN else ""
            numbers = ", ".join(f"#{item}" for item in items[:SHOWN])
            raise InputError(f"{len(items)} items are called {name!r}: ask by number, {numbers}{others}.")
        if items:
            return items[0]
        if text.removeprefix("#").isdecimal():
            return self._numbered(text.removeprefix("#"), name)
        near = " or ".join(map(repr, self._near(text)))
        raise InputError(
            f"no item of {self.catalog.name!r} is called {name!r}{f'; did you mean {near}?' if near else '.'}"
        )

    def _numbered(self, digits: str, name: object) -> int:
        last = self.catalog.num_items - 1
        if len(digits) > len(str(last)) or not 0 <= int(digits) <= last:
            raise InputError(f"there is no item {name}; the items of {self.catalog.name!r} are 0..{last}.")
        return int(digits)

    def _near(self, text: str) -> list[str]:
        """Titles with all of the words, the shortest first; else what is spelt alike."""
        words = set(split_words(text))
        titles = self.catalog.titles
        holding = {title for title in titles if words and words <= set(split_words(title))}
        if holding:
            return sorted(holding, key=lambda title: (len(title), title))[:SHOWN]
        spelt = get_close_matches(text.casefold(), [name for name in self._folded if not name.isdecimal()], SHOWN)
        return [titles[item] or self.catalog.asins[item] for item in (min(self._folded[name]) for name in spelt)]


def ask(
    policy: Policy, histories: Sequence[Sequence[SupportsIndex | str]], k: int = 10, new: bool = False
) -> list[Answer]:
    """Think greedily after each history, search the catalogue with at least ten beams, and name the k best items.

    A catalogue of fewer items gives them all.

    Args:
        histories: items, oldest first, each as `ItemNames.find` knows them.
        new: leave out the items of the history.

    Raises:
        InputError: an empty history; an item that is not to be found; a k outside 1..200.
    """
    if not 1 <= k <= MOST:
        raise InputError(f"k is {k}; 1 to {MOST} items can be asked for.")
    names = _names_of(policy.catalog)
    found = [[names.find(name) for name in history] for history in histories]
    if not all(found):
        raise InputError("a history is empty; what comes next is read from its items.")
    # a history's items fill at most as many places
    widths = [max(FEWEST_BEAMS, k + (len(set(history)) if new else 0)) for history in found]
    answers: dict[int, Answer] = {}
    for width in set(widths):
        rows = [row for row, own in enumerate(widths) if own == width]
        said = recommend(policy, [found[row] for row in rows], width, width)
        for row, sids, scores, thinking in zip(rows, said.sids, said.scores, said.thinking, strict=True):
            held = set(found[row]) if new else set()
            ranked = [
                (item, score)
                for sid, score in zip(sids.tolist(), scores.tolist(), strict=True)
                for item in sorted(policy.catalog.items_of(sid), key=lambda item: policy.catalog.titles[item])
                if item not in held
            ][:k]
            items = _rows(policy.catalog, [item for item, _ in ranked])
            items["score"] = pd.Series([score for _, score in ranked], dtype=float)
            blocks = [block.strip() for block in _BLOCK.findall(thinking)]
            answers[row] = Answer(_rows(policy.catalog, found[row]), blocks, items)
    return [answers[row] for row in range(len(found))]


def answer_lines(
    policy: Policy, lines: Iterable[str | bytes], k: int = 10, new: bool = False
) -> Iterator[tuple[int, Answer | InputError]]:
    """An answer to each line, a JSON list of items, before the next is read; a mistake is an answer too.

    Yields:
        the line's number, from 1, and what there is to say. Empty lines are passed over.

    Raises:
        InputError: a k outside 1..200, before anything is read.
    """
    ask(policy, [], k)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            (answer,) = ask(policy, [_history(line)], k, new)
        except InputError as error:
            yield number, error
        else:
            yield number, answer


def _history(line: str | bytes) -> list[int | str]:
    try:
        history = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"not JSON: {error}") from None
    if not isinstance(history, list) or not all(type(item) in (int, str) for item in history):
        raise InputError('a history is a JSON list of titles, product ids or numbers, as ["Scotch tape", 12].')
    return history


@lru_cache(maxsize=1)
def _names_of(catalog: Catalog) -> ItemNames:
    return ItemNames(catalog)


def _rows(catalog: Catalog, items: Sequence[int]) -> pd.DataFrame:
    columns = [(item, catalog.titles[item], catalog.asins[item], tuple(catalog.sids[item].tolist())) for item in items]
    return pd.DataFrame(columns, columns=["item", "title", "asin", "sid"])


def _shown(row: Any) -> str:
    return row.title or row.asin or f"#{row.item}"
