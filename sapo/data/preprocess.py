"""What is done to interactions before anything is trained: the k-core, numbering."""

import hashlib
from collections.abc import Collection

import numpy as np
from jaxtyping import Bool, Int
from numpy import ndarray


def k_core(users: Int[ndarray, "R"], items: Int[ndarray, "R"], k: int) -> Bool[ndarray, "R"]:
    """The largest set of interactions in which every user and every item has at least k; it is unique."""
    kept = np.ones(len(users), bool)
    while True:
        enough = np.ones(len(users), bool)
        for numbers in (users, items):
            counts = np.bincount(numbers[kept], minlength=int(numbers.max(initial=-1)) + 1)
            enough &= counts[numbers] >= k
        if not (kept & ~enough).any():
            return kept
        kept &= enough


def numbered(names: Collection[str]) -> dict[str, int]:
    """Numbers 0..N-1 in the order of hashes, so that a number says nothing of who came first."""
    return {
        name: number for number, name in enumerate(sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest()))
    }
