"""The most popular items, the same for everybody."""

from collections.abc import Sequence
from typing import Self

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from sapo.errors import InputError


class Popularity:
    """Ranks items by how often they occur in training; ties in a random order that `seed` fixes."""

    def __init__(self, seed: int = 0):
        self.seed = seed

    def fit(self, sequences: Sequence[Sequence[int]], num_items: int) -> Self:
        """Count the items of the training sequences.

        Raises:
            InputError: no item at all, or one outside 0..num_items-1.
        """
        items = np.fromiter((item for sequence in sequences for item in sequence), dtype=np.int64)
        if not len(items) or items.min() < 0 or items.max() >= num_items:
            raise InputError(f"sequences must hold items, all of them from 0 to {num_items - 1}.")
        counts = np.bincount(items, minlength=num_items)
        # Item numbers follow first appearance, so they must never break a tie.
        shuffled = np.random.default_rng(self.seed).permutation(num_items)
        self.order = torch.from_numpy(np.lexsort((shuffled, -counts)))
        return self

    def rank(self, histories: Sequence[Sequence[int]], k: int) -> Int[Tensor, "R k"]:
        """The k most popular items for every history, best first; items of the history are not removed.

        Raises:
            InputError: k outside 1..num_items.
        """
        if not 1 <= k <= len(self.order):
            raise InputError(f"k is {k}; there are {len(self.order)} items to rank.")
        return self.order[:k].repeat(len(histories), 1)
