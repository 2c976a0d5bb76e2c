"""Item kNN over sequences: items are near each other if the same users took them, in whatever order."""

from collections.abc import Sequence

import numpy as np
from numpy import ndarray
from scipy import sparse

from sapo.baselines.cooccurrence import CoOccurrence


class ItemKNN(CoOccurrence):
    """Scores a candidate by its cosines with the last items of the history, as `CoOccurrence` does by its pairs.

    The cosine of two items is that of their columns in the table of who took what (1 or 0, however often). `damping` is
    added to the root that it is divided by, so that pairs seen once count little; the reference of the GRU4Rec paper
    adds it to both counts under the root, and counts events.
    """

    def __init__(self, seed: int = 0, damping: float = 20.0):
        super().__init__(seed)
        self.damping = damping

    def pairs(self, sequences: Sequence[Sequence[int]], num_items: int) -> tuple[ndarray, ndarray, ndarray]:
        """Items that a user had in common, and their cosines."""
        taken = [sorted(set(sequence)) for sequence in sequences]
        items = np.array([item for sequence in taken for item in sequence], dtype=np.int64)
        ends = np.cumsum([0, *map(len, taken)])
        who = sparse.csr_array((np.ones(len(items)), items, ends), shape=(len(taken), num_items))
        both = (who.T @ who).tocoo()
        (left, right), counts = both.coords, np.bincount(items, minlength=num_items)
        cosines = both.data / (np.sqrt(counts[left] * counts[right]) + self.damping)
        apart = left != right
        return left[apart], right[apart], cosines[apart]
