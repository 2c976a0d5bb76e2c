"""Thinking blocks without a language model: block k says what the SID tree knows of the target's level-k node.

A node is described by the words that set its items apart from those of its siblings (class-based TF-IDF: every child
of a node is one document), of equally telling ones those that more items of the catalogue have. Of a singular and its
plural one is said. A node without words of its own is described by its parent's.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Collection, Sequence
from typing import Protocol

from sapo.data.catalog import Catalog
from sapo.data.interactions import Rows
from sapo.policy.prompts import split_words

# Words that say nothing of a product. Short on purpose: rarity among siblings does most of the work.
STOPWORDS = frozenset(
    [
        "all",
        "an",
        "and",
        "as",
        "at",
        "black",
        "by",
        "color",
        "count",
        "for",
        "free",
        "from",
        "in",
        "inch",
        "inches",
        "is",
        "it",
        "new",
        "no",
        "non",
        "not",
        "of",
        "on",
        "one",
        "or",
        "pack",
        "pcs",
        "per",
        "piece",
        "pieces",
        "set",
        "size",
        "the",
        "to",
        "two",
        "white",
        "with",
        "you",
        "your",
    ]
)


class Traces(Protocol):
    """What stage 2 learns to think."""

    def rows(self, train: Rows) -> Rows:
        """The rows that there is a trace of."""

    def of_row(self, history: Sequence[int], target: int) -> list[str]:
        """The texts of the blocks for one of them."""


class NodeDescriptors:
    """Words for every node of the SID tree.

    Args:
        catalog: titles and categories are the text.
        words_per_node: how many words a node gets at most.
        vocabulary: the words that may be used, for instance the frequent ones; all where None.
    """

    def __init__(self, catalog: Catalog, words_per_node: int = 3, vocabulary: Collection[str] | None = None):
        self.words_per_node, self._sids = words_per_node, catalog.sids
        self._words: dict[tuple[int, ...], list[str]] = {(): []}
        usable = None if vocabulary is None else set(vocabulary)
        counts: dict[tuple[int, ...], Counter[str]] = defaultdict(Counter)
        for sid, title, category in zip(catalog.sids.tolist(), catalog.titles, catalog.categories, strict=True):
            words = set(split_words(f"{title} {category}")) - STOPWORDS
            if usable is not None:
                words &= usable
            for depth in range(catalog.num_levels + 1):
                counts[tuple(sid[:depth])].update(words)
        siblings: dict[tuple[int, ...], list[tuple[int, ...]]] = defaultdict(list)
        for node in sorted(counts):
            if node:
                siblings[node[:-1]].append(node)
        for parent in sorted(siblings, key=len):  # parents before children, so that a fallback exists
            children = siblings[parent]
            spread = Counter(word for node in children for word in counts[node])  # in how many children a word occurs
            for node in children:
                score = {
                    word: count * math.log(1 + len(children) / spread[word]) for word, count in counts[node].items()
                }
                telling = sorted(score, key=lambda word: (-score[word], -counts[()][word], word))
                self._words[node] = _apart(telling, words_per_node) or self._words[parent]

    def words(self, prefix: Sequence[int]) -> list[str]:
        """Words of the node at `prefix` (1 to K codes), most telling first."""
        return self._words[tuple(prefix)]

    def trace(self, sid: Sequence[int]) -> list[str]:
        """What the K blocks say of a target."""
        return [" ".join(self.words(sid[: depth + 1])) for depth in range(len(sid))]

    def rows(self, train: Rows) -> Rows:
        """All: every target has a SID."""
        return train

    def of_row(self, history: Sequence[int], target: int) -> list[str]:
        """The blocks for a target, whatever the history."""
        return self.trace(self._sids[target].tolist())


class OneBlock:
    """The words of other traces in one block, as systems write them that think before the SID and not for each code."""

    def __init__(self, traces: Traces):
        self.traces = traces

    def rows(self, train: Rows) -> Rows:
        """Those of the other traces."""
        return self.traces.rows(train)

    def of_row(self, history: Sequence[int], target: int) -> list[str]:
        """The block for a row."""
        return [" ".join(filter(None, self.traces.of_row(history, target)))]


def leaks(texts: Sequence[str], titles: Sequence[str]) -> dict[str, float]:
    """How much texts give away of the titles of their targets.

    Returns:
        leak_rate: share of texts that name the title outright, and so teach to copy. title_words: the share of a
        title's different words that its text says, on average; a title without words counts as 0.
    """
    pairs = list(zip(texts, titles, strict=True))
    said = [len({*split_words(text)} & (words := {*split_words(title)})) / max(1, len(words)) for text, title in pairs]
    of = max(1, len(pairs))
    return {"leak_rate": sum(names_title(*pair) for pair in pairs) / of, "title_words": sum(said) / of}


def names_title(text: str, title: str) -> bool:
    """Whether the words of a title stand in a text, one after the other.

    Titles of one word do not count: "lamp" may be meant as any lamp.
    """
    words, wanted = split_words(text), split_words(title)
    width = len(wanted)
    return width > 1 and any(words[at : at + width] == wanted for at in range(len(words) - width + 1))


def _apart(words: Sequence[str], most: int) -> list[str]:
    """The first ones, leaving out singulars and plurals of those before."""
    chosen: list[str] = []
    for word in words:
        forms = {word + "s", word + "es", word.removesuffix("s"), word.removesuffix("es")} - {word}
        if len(chosen) < most and not forms.intersection(chosen):
            chosen.append(word)
    return chosen
