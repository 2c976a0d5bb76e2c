"""Asking a policy for items in words: titles or product ids in, its thinking and ranked items out."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from sapo.errors import InputError
from sapo.policy.policy import Policy, recommend
from sapo.policy.prompts import THINK_END, THINK_START

_BLOCK = re.compile(f"{re.escape(THINK_START)}(.*?){re.escape(THINK_END)}", re.DOTALL)
MOST_BEAMS = 200


@dataclass(frozen=True)
class Answer:
    """What came back for one history.

    Args:
        history: items that were asked after, oldest first.
        thinking: the text of each block; none of a policy that does not think.
        items: best first; a column each for item, title, asin, sid (K codes) and score: the logarithm of the SID's
            probability among all of the catalogue's after this thinking, or, of a policy that contrasts, what it ranks
            by. Items that share a SID follow each other.
    """

    history: list[int]
    thinking: list[str]
    items: pd.DataFrame

    def __str__(self) -> str:
        """For people."""
        thought = [f"thinks {block}" for block in self.thinking]
        titles = [title or asin or f"item {item}" for item, title, asin in self.items[["item", "title", "asin"]].values]
        rows = zip(titles, self.items["sid"], self.items["score"], strict=True)
        ranked = [f"{rank:3}  {score:8.3f}  {title}  {sid}" for rank, (title, sid, score) in enumerate(rows, 1)]
        return "\n".join([*thought, *ranked])

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        items = self.items.assign(sid=self.items["sid"].map(list)).to_dict("records")
        return {"history": self.history, "thinking": self.thinking, "items": items}


def ask(policy: Policy, histories: Sequence[Sequence[int | str]], k: int = 10, new: bool = False) -> list[Answer]:
    """Think greedily after each history, search the catalogue with at least ten beams, and name the k best items.

    A catalogue of fewer items gives them all.

    Args:
        histories: items, oldest first, each as `Catalog.find` knows them.
        new: leave out the items of the history.

    Raises:
        InputError: an empty history; an item that is not to be found; a k outside 1..MOST_BEAMS.
    """
    catalog = policy.catalog
    found = [[catalog.find(name) for name in history] for history in histories]
    if not all(found):
        raise InputError("a history is empty; what comes next is read from its items.")
    if not 1 <= k <= MOST_BEAMS:
        raise InputError(f"k is {k}; 1 to {MOST_BEAMS} items can be asked for.")
    held = max((len(set(history)) for history in found), default=0) if new else 0
    beams, answers = min(max(10, k + held), MOST_BEAMS), []
    said = recommend(policy, found, beams, beams)
    for history, sids, scores, thinking in zip(found, said.sids, said.scores, said.thinking, strict=True):
        rows = [
            (item, catalog.titles[item], catalog.asins[item], tuple(sid.tolist()), score.item())
            for sid, score in zip(sids, scores, strict=True)
            for item in catalog.items_of(sid)
            if not (new and item in history)
        ]
        items = pd.DataFrame(rows[:k], columns=["item", "title", "asin", "sid", "score"])
        answers.append(Answer(history, [block.strip() for block in _BLOCK.findall(thinking)], items))
    return answers
