"""The catalogue as a tree of codes, in flat arrays: which codes may follow each prefix of a batch."""

import math
from collections.abc import Sequence
from typing import Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sapo.errors import InputError


class SidTrie:
    """All SIDs of a catalogue. Duplicate SIDs are fine; a prefix that no item has allows nothing.

    A prefix of d codes is one integer, its codes read as digits. The prefixes in use are sorted, so a batch of prefixes
    finds its rows by binary search, and one gather reads the allowed codes.

    Args:
        sids: codes of every item, 0-based.
        level_sizes: number of codes of each level; codes outside it are errors here and simply not allowed later.
    """

    def __init__(self, sids: Int[Tensor, "N K"], level_sizes: tuple[int, ...] | list[int]):
        sizes = tuple(int(size) for size in level_sizes)
        if sids.dim() != 2 or sids.shape[1] != len(sizes) or not len(sids):
            raise InputError(
                f"sids has shape {tuple(sids.shape)}; with {len(sizes)} level sizes it must be (N > 0, {len(sizes)})."
            )
        if sids.is_floating_point():
            raise InputError(f"sids has dtype {sids.dtype}; codes are integers.")
        if (sids < 0).any() or (sids >= torch.tensor(sizes, device=sids.device)).any():
            raise InputError(f"sids holds codes from {int(sids.min())} to {int(sids.max())}; level sizes are {sizes}.")
        if math.prod(sizes) >= 2**63:
            raise InputError(f"level sizes {sizes} have a product of 2^63 or more; prefixes would not fit an integer.")
        self.level_sizes = sizes
        self.num_levels = len(sizes)
        self._prefixes: list[Tensor] = [
            torch.zeros(1, dtype=torch.long, device=sids.device)
        ]  # by depth: sorted prefix numbers
        self._children: list[Tensor] = []  # by depth: (prefixes + 1, level size), the last row all False
        for depth, size in enumerate(sizes):
            longer = torch.unique(self._number(sids[:, : depth + 1].long()))
            children = torch.zeros(len(self._prefixes[-1]) + 1, size, dtype=torch.bool, device=sids.device)
            children[torch.searchsorted(self._prefixes[-1], longer // size), longer % size] = True
            self._children.append(children)
            self._prefixes.append(longer)

    def allowed(self, prefixes: Int[Tensor, "M d"]) -> Bool[Tensor, "M V"]:
        """Which of the V = level_sizes[d] codes continue each prefix to an item; all False for an unknown prefix."""
        depth = prefixes.shape[1]
        if depth >= self.num_levels:
            raise InputError(
                f"prefixes have {depth} codes; this trie continues prefixes of 0 to {self.num_levels - 1}."
            )
        return self._children[depth][self._rows(prefixes)]

    def contains(self, sids: Int[Tensor, "M K"]) -> Bool[Tensor, "M"]:
        """Whether each SID belongs to the catalogue."""
        if sids.shape[1] != self.num_levels:
            raise InputError(f"sids have {sids.shape[1]} codes; this trie has {self.num_levels} levels.")
        return self._rows(sids) < len(self._prefixes[-1])

    def check_levels(self, level_sizes: Sequence[int]) -> None:
        """Refuse a layout of other levels, whose tokens would be read as other codes.

        Raises:
            InputError: another number of levels, or another number of codes in one.
        """
        if tuple(level_sizes) != self.level_sizes:
            raise InputError(
                f"the SID tokens have K = {len(level_sizes)} levels of sizes {tuple(level_sizes)}; the catalogue has "
                f"K = {self.num_levels}, of sizes {self.level_sizes}."
            )

    def to(self, device: torch.device | str) -> Self:
        """Move the arrays; returns the trie itself."""
        self._prefixes = [numbers.to(device) for numbers in self._prefixes]
        self._children = [children.to(device) for children in self._children]
        return self

    def _number(self, prefixes: Int[Tensor, "M d"]) -> Int[Tensor, "M"]:
        number = torch.zeros(len(prefixes), dtype=torch.long, device=prefixes.device)
        for depth in range(prefixes.shape[1]):
            number = number * self.level_sizes[depth] + prefixes[:, depth]
        return number

    def _rows(self, prefixes: Int[Tensor, "M d"]) -> Int[Tensor, "M"]:
        """Row of each prefix among the sorted ones of its depth; their count where it is unknown."""
        depth = prefixes.shape[1]
        known = self._prefixes[depth]
        prefixes = prefixes.long()
        sizes = torch.tensor(self.level_sizes[:depth], dtype=torch.long, device=prefixes.device)
        in_range = ((prefixes >= 0) & (prefixes < sizes)).all(dim=1)
        numbers = self._number(prefixes)
        rows = torch.searchsorted(known, numbers)
        found = in_range & (known[rows.clamp(max=len(known) - 1)] == numbers)
        return torch.where(found, rows, len(known))
