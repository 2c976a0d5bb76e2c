"""Item-to-item co-occurrence: what followed the items taken last. No learning, and hard to beat."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from scipy import sparse
from torch import Tensor

from sapo.baselines.popularity import Popularity
from sapo.errors import InputError

# All weights are whole multiples, so scores are integers and ties are exact.
PAIRS = (6, 3, 2)  # 1 / distance, times 6: items at most 3 apart in a training sequence are a pair
VOTES = (625, 500, 400, 320, 256)  # 0.8^age, times 5^4: the last 5 items of a history vote


class CoOccurrence:
    """Scores a candidate by its pairs with the last items of the history.

    A pair counts from the earlier item to the later one only, since a ranker is asked what comes next; an item that
    follows itself is a pair too. Ties go to the more popular item, then to a random order that `seed` fixes.
    """

    def __init__(self, seed: int = 0):
        self.seed = seed

    def fit(self, sequences: Sequence[Sequence[int]], num_items: int) -> Self:
        """Count the pairs of the training sequences.

        Raises:
            InputError: no item at all, or one outside 0..num_items-1.
        """
        self.order = Popularity(self.seed).fit(sequences, num_items).order  # item of each place
        place = self.order.argsort().numpy()
        item, other, weight = self.pairs(sequences, num_items)
        # (item, place of the other one); pairs that stand twice are added
        self.counts = sparse.csr_array((weight, (item, place[other])), shape=(num_items, num_items))
        return self

    def pairs(self, sequences: Sequence[Sequence[int]], num_items: int) -> tuple[ndarray, ndarray, ndarray]:
        """Items, what each speaks for, and how loudly."""
        items = np.concatenate([np.asarray(sequence, dtype=np.int64) for sequence in sequences])
        user = np.repeat(np.arange(len(sequences)), [len(sequence) for sequence in sequences])
        earlier, later, weights = [], [], []
        for distance, weight in enumerate(PAIRS, start=1):
            together = user[:-distance] == user[distance:]
            earlier.append(items[:-distance][together])
            later.append(items[distance:][together])
            weights.append(np.full(together.sum(), weight))
        return np.concatenate(earlier), np.concatenate(later), np.concatenate(weights)

    def rank(self, histories: Sequence[Sequence[int]], k: int, batch_size: int = 1024) -> Int[Tensor, "R k"]:
        """The k best items for every history, best first; items of the history are not removed.

        Raises:
            InputError: k outside 1..num_items, or an item that was not there to fit.
        """
        num_items = len(self.order)
        if not 1 <= k <= num_items:
            raise InputError(f"k is {k}; there are {num_items} items to rank.")
        ranked = [torch.zeros(0, k, dtype=torch.long)]
        for start in range(0, len(histories), batch_size):
            recent = [history[: -len(VOTES) - 1 : -1] for history in histories[start : start + batch_size]]
            ends = np.cumsum([0, *map(len, recent)])
            items = np.array([item for history in recent for item in history], dtype=np.int64)
            if len(items) and not 0 <= items.min() <= items.max() < num_items:
                raise InputError(f"histories hold items {items.min()}..{items.max()}; there are 0..{num_items - 1}.")
            votes = np.array([vote for history in recent for vote in VOTES[: len(history)]], dtype=np.int64)
            scored = (sparse.csr_array((votes, items, ends), shape=(len(recent), num_items)) @ self.counts).tocoo()
            # The first k places join with score 0: they are what a row ranks once its scored places are used up.
            row = np.concatenate([scored.coords[0], np.repeat(np.arange(len(recent)), k)])
            place = np.concatenate([scored.coords[1], np.tile(np.arange(k), len(recent))])
            score = np.concatenate([scored.data, np.zeros(len(recent) * k, dtype=np.int64)])
            best = sparse.csr_array((score, (row, place)), shape=scored.shape)  # joins what stands twice
            order = np.lexsort((best.indices, -best.data, np.repeat(np.arange(len(recent)), np.diff(best.indptr))))
            ranked.append(self.order[best.indices[order[best.indptr[:-1, None] + np.arange(k)]]])
        return torch.cat(ranked)
