"""A catalogue and users whose next-item distribution is known, so that the best possible recommender is too.

Items are leaves of a tree of codes. The next item depends on the last one alone (a first-order Markov chain) and is
drawn level by level: with probability `predictability[k]` code k follows a rule, a fixed child of the prefix so far for
each code the last item has on that level; else it is drawn by the popularity of the children. Every level can be
learned from the history, and targets stay random given it, as in real recommendation.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from sapo.data.catalog import Catalog
from sapo.data.interactions import Interactions, Rows, Split
from sapo.data.optimum import bayes_optimum
from sapo.errors import InputError


@dataclass(frozen=True)
class SyntheticConfig:
    """Knobs of the world. The number of items and the predictability set how sparse exact matches are."""

    branching: tuple[int, ...] = (8, 8, 8)
    """Codes of each level; as many levels as numbers, 2 to 5."""
    num_items: int = 240
    """Leaves in use, at least one under every code of level 1."""
    num_users: int = 1500
    """Sequences drawn."""
    lengths: tuple[int, int] = (5, 10)
    """Shortest and longest sequence, at least 3."""
    predictability: tuple[float, ...] = (0.8, 0.7, 0.7)
    """Probability that a level follows its rule, one for each level."""
    skew: float = 0.7
    """Popularity of a node's r-th child is proportional to r^-skew."""
    seed: int = 0
    """Of the tree, the rules, the texts and the users."""

    def __post_init__(self) -> None:
        levels = len(self.branching)
        if not 2 <= levels <= 5 or min(self.branching) < 1 or math.prod(self.branching) > 10**7:
            raise InputError(f"branching is {self.branching}; 2 to 5 levels with at most 10 million leaves fit.")
        if not self.branching[0] <= self.num_items <= math.prod(self.branching):
            raise InputError(
                f"num_items is {self.num_items}; branching {self.branching} has room for {self.branching[0]} (one "
                f"under every code of level 1) to {math.prod(self.branching)}."
            )
        if len(self.predictability) != levels or not all(0 <= p <= 1 for p in self.predictability):
            raise InputError(f"predictability is {self.predictability}; give {levels} probabilities, one a level.")
        if not 3 <= self.lengths[0] <= self.lengths[1]:
            raise InputError(f"lengths is {self.lengths}; the shortest sequence needs at least 3 items.")
        if self.num_users < 1:
            raise InputError(f"num_users is {self.num_users}; at least 1 fits.")


class SyntheticCatalogue:
    """The world of a config: `catalog`, `interactions`, and their exact next-item distribution."""

    def __init__(self, config: SyntheticConfig | None = None):
        self.config = config or SyntheticConfig()
        tree, text, users = (np.random.default_rng((self.config.seed, stream)) for stream in range(3))
        self.codes = _leaves(self.config, tree)
        self.transitions, self.popularity = _process(self.config, self.codes, tree)
        titles, categories = _texts(self.codes, text)
        self.catalog = Catalog("synthetic", torch.from_numpy(self.codes), titles, categories=categories)
        sequences = _draw(self.config, self.transitions, self.popularity, users)
        names = [f"user{number}" for number in range(len(sequences))]
        self.interactions = Interactions(names, sequences, self.catalog.num_items)

    @property
    def split(self) -> Split:
        """Leave-one-out."""
        return self.interactions.leave_one_out()

    def next_item_probabilities(self, histories: list[list[int]]) -> Float[ndarray, "R N"]:
        """P(next item | history) in float64; rows sum to 1.

        Raises:
            InputError: a history without an item.
        """
        if not all(histories):
            raise InputError("a history is empty; the next item depends on the last one of a history.")
        return self.transitions[[history[-1] for history in histories]]

    def optimum(self, rows: Rows, ks: tuple[int, ...] = (1, 5, 10)) -> dict[str, float]:
        """What the Bayes-optimal recommender scores on these histories (`bayes_optimum`)."""
        last, counts = np.unique([history[-1] for history in rows.history], return_counts=True)
        return bayes_optimum(self.transitions[last], self.codes, ks, counts / counts.sum())


def _leaves(config: SyntheticConfig, rng: np.random.Generator) -> ndarray:
    """Codes of the items in use, (N, K), in random order: item numbers must say nothing of the tree."""
    below = math.prod(config.branching[1:])
    kept = np.arange(config.branching[0]) * below + rng.integers(below, size=config.branching[0])
    rest = np.setdiff1d(np.arange(math.prod(config.branching)), kept)
    leaves = np.concatenate([kept, rng.choice(rest, config.num_items - len(kept), replace=False)])
    return np.stack(np.unravel_index(rng.permutation(leaves), config.branching), axis=1)


def _process(config: SyntheticConfig, codes: ndarray, rng: np.random.Generator) -> tuple[ndarray, ndarray]:
    """Transition matrix (N, N), from row to column, and the popularity (N,) that first items are drawn by."""
    transitions = np.ones((len(codes), len(codes)))
    popularity = np.ones(len(codes))
    for level, size in enumerate(config.branching):
        nodes, parent = np.unique(codes[:, :level], axis=0, return_inverse=True)
        share = np.zeros((len(nodes), size))  # of each child, by popularity
        rule = np.zeros((len(nodes), size), int)  # the child that follows each code of the last item
        for node in range(len(nodes)):
            children = rng.permutation(np.unique(codes[parent.ravel() == node, level]))
            weights = np.arange(1, len(children) + 1) ** -config.skew
            share[node, children] = weights / weights.sum()
            if len(children) >= size:  # a permutation, so that no child is out of reach of the rule
                rule[node] = rng.permutation(children)
            else:
                rule[node] = rng.choice(children, size)
        chance = share[parent.ravel(), codes[:, level]]
        follows = rule[parent.ravel()][:, codes[:, level]] == codes[:, level][:, None]  # (to, from)
        p = config.predictability[level]
        transitions *= (p * follows + (1 - p) * chance[:, None]).T
        popularity *= chance
    return transitions, popularity


def _draw(
    config: SyntheticConfig, transitions: ndarray, popularity: ndarray, rng: np.random.Generator
) -> list[list[int]]:
    lengths = rng.integers(config.lengths[0], config.lengths[1] + 1, size=config.num_users)
    cumulative = transitions.cumsum(1)
    cumulative /= cumulative[:, -1:]  # the sums miss 1 by rounding
    items = np.empty((config.num_users, lengths.max()), int)
    items[:, 0] = rng.choice(len(popularity), config.num_users, p=popularity / popularity.sum())
    for position in range(1, items.shape[1]):
        draws = rng.random((config.num_users, 1))
        items[:, position] = (cumulative[items[:, position - 1]] <= draws).sum(1)
    return [row[:length].tolist() for row, length in zip(items, lengths, strict=True)]


def _texts(codes: ndarray, rng: np.random.Generator) -> tuple[list[str], list[str]]:
    """Titles and categories in invented words.

    Nodes of level 1 have a word of their own, the category. On each level below, codes 2c and 2c + 1 share a word, so a
    title narrows an item down without naming it, as real ones do. Titles add a word that means nothing.
    """
    words = _invented_words(rng)
    sizes = codes.max(0) + 1
    own = [next(words) for _ in range(sizes[0])]
    shared = [[next(words) for _ in range((size + 1) // 2)] for size in sizes[1:]]
    titles, categories = [], []
    for first, *rest in codes.tolist():
        kinds = [shared[level][code // 2] for level, code in enumerate(rest)]
        titles.append(" ".join([*kinds[::-1], own[first], next(words)]))
        categories.append(own[first])
    return titles, categories


def _invented_words(rng: np.random.Generator) -> Iterator[str]:
    """Pronounceable words, no two alike."""
    consonants, vowels = "bdfgklmnprstvz", "aeiou"
    seen: set[str] = set()
    while True:
        word = "".join(rng.choice(list(letters)) for letters in (consonants, vowels) * int(rng.integers(2, 4)))
        if word not in seen:
            seen.add(word)
            yield word
