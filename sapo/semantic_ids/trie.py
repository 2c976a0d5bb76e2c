"""The catalogue as a tree of codes, in flat arrays: which codes may follow each prefix of a batch."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sapo.errors import InputError

# A level whose prefixes fill this share of all that could be is looked up in a bitmap, which then takes about as much
# memory as the sorted prefixes that another level is searched in.
DENSE = 1 / 20
_SET = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
_BELOW = _SET.cumsum(1) - _SET  # (256, 8): how many bits of a byte are set below each of its bits


class Children(NamedTuple):
    """What follows each of M nodes; -1 behind the last child. C = most children of any node of that depth."""

    codes: Int[Tensor, "M C"]  # ascending
    nodes: Int[Tensor, "M C"]


class SidTrie:
    """All SIDs of a catalogue. Duplicate SIDs are fine; a prefix that no item has allows nothing.

    The prefixes of d codes that items have, in ascending order, are the nodes 0 .. n-1 of depth d. The children of all
    nodes of a depth lie one behind the other in one array, so a node's are found by where they begin, and a batch of
    nodes reads its children in one gather. Who walks down the tree carries nodes and searches nothing. A prefix of
    codes is found as an integer, its codes read as digits: in the first levels, which are dense, by counting the set
    bits of a bitmap before it, below them by binary search. Built by one sort (compare STATIC, arXiv 2602.22647).

    Args:
        sids: codes of every item, 0-based.
        level_sizes: number of codes of each level; codes outside it are errors here and simply not allowed later.

    Raises:
        InputError: no items, another number of levels than sizes, codes that are no integers or out of range.
    """

    def __init__(self, sids: Int[Tensor, "N K"], level_sizes: Sequence[int]):
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
        # by depth d = 0 .. K-1; one node more than there are stands for all unknown prefixes and has no children
        self._first: list[Tensor] = []  # (n + 2,) where the children of each node begin
        self._codes: list[Tensor] = []  # the code of each child, all nodes one behind the other
        self._widest: list[int] = []  # most children of a node
        self._finder: list[tuple[Tensor, ...]] = []  # a bitmap and how many bits are set before each byte; or prefixes
        numbers = _distinct(_numbers(sids, sizes).sort().values)
        for depth in reversed(range(len(sizes))):
            size, parents = sizes[depth], numbers // sizes[depth]
            begins = _changes(parents).nonzero()[:, 0]
            first = torch.cat([begins, begins.new_full((2,), len(numbers))])
            self._first.insert(0, first.int())
            self._codes.insert(0, (numbers - parents * size).to(torch.int16 if size <= 2**15 else torch.int32))
            self._widest.insert(0, int(first.diff().max()))
            numbers, possible = parents[begins], math.prod(sizes[:depth])
            self._finder.insert(0, _bitmap(numbers, possible) if len(numbers) >= DENSE * possible else (numbers,))
        self.to(sids.device)

    def find(self, prefixes: Int[Tensor, "M d"]) -> Int[Tensor, "M"]:
        """The node of each prefix; for an unknown one the node that has no children. d < K."""
        depth = prefixes.shape[1]
        if depth >= self.num_levels:
            raise InputError(
                f"prefixes have {depth} codes; this trie continues prefixes of 0 to {self.num_levels - 1}."
            )
        prefixes = prefixes.long()
        in_range = torch.ones(len(prefixes), dtype=torch.bool, device=prefixes.device)
        for code, size in zip(prefixes.unbind(1), self.level_sizes, strict=False):
            in_range &= (code >= 0) & (code < size)
        number = _numbers(prefixes, self.level_sizes[:depth]).masked_fill(~in_range, 0)
        unknown = len(self._first[depth]) - 2
        if len(self._finder[depth]) == 1:
            known = self._finder[depth][0]
            node = torch.searchsorted(known, number)
            found = known[node.clamp(max=unknown - 1)] == number
        else:
            bitmap, before = self._finder[depth]
            place, bit = number >> 3, number & 7
            byte = bitmap[place].long()
            node = before[place] + self._below[byte, bit]
            found = (byte >> bit) & 1 == 1
        return torch.where(found & in_range, node, unknown)

    def children(self, nodes: Int[Tensor, "M"], depth: int) -> Children:
        """The codes that continue nodes of a depth, and the nodes that they lead to. The root is node 0 of depth 0."""
        place, there = self._places(nodes, depth)
        codes = self._codes[depth][place].long()
        return Children(codes.masked_fill_(~there, -1), place.long().masked_fill_(~there, -1))

    def allowed(self, prefixes: Int[Tensor, "M d"]) -> Bool[Tensor, "M V"]:
        """Which of the V = level_sizes[d] codes continue each prefix to an item; all False for an unknown prefix."""
        depth = prefixes.shape[1]
        place, there = self._places(self.find(prefixes), depth)
        size = self.level_sizes[depth]
        mask = torch.zeros(len(place), size + 1, dtype=torch.bool, device=place.device)  # the last column is no code
        return mask.scatter_(1, torch.where(there, self._codes[depth][place], size).long(), True)[:, :size]

    def contains(self, sids: Int[Tensor, "M K"]) -> Bool[Tensor, "M"]:
        """Whether each SID belongs to the catalogue."""
        if sids.shape[1] != self.num_levels:
            raise InputError(f"sids have {sids.shape[1]} codes; this trie has {self.num_levels} levels.")
        place, there = self._places(self.find(sids[:, :-1]), self.num_levels - 1)
        return ((self._codes[-1][place] == sids[:, -1:].long()) & there).any(1)

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

    @property
    def num_bytes(self) -> int:
        """Memory of all arrays."""
        arrays = [*self._first, *self._codes, *(array for finder in self._finder for array in finder)]
        return sum(array.numel() * array.element_size() for array in arrays)

    def to(self, device: torch.device | str) -> Self:
        """Move the arrays; returns the trie itself."""
        self._first = [array.to(device) for array in self._first]
        self._codes = [array.to(device) for array in self._codes]
        self._finder = [tuple(array.to(device) for array in arrays) for arrays in self._finder]
        self._below = _BELOW.to(device)
        return self

    def _places(self, nodes: Int[Tensor, "M"], depth: int) -> tuple[Int[Tensor, "M C"], Bool[Tensor, "M C"]]:
        """Where in the array the children of each node are, and which of these places are theirs."""
        begin, end = self._first[depth][nodes], self._first[depth][nodes + 1]
        place = begin[:, None] + torch.arange(self._widest[depth], dtype=begin.dtype, device=begin.device)
        return place.clamp(max=len(self._codes[depth]) - 1), place < end[:, None]


def _numbers(prefixes: Int[Tensor, "M d"], sizes: Sequence[int]) -> Int[Tensor, "M"]:
    """Each prefix as one integer, its codes read as digits."""
    number = torch.zeros(len(prefixes), dtype=torch.long, device=prefixes.device)
    for code, size in zip(prefixes.unbind(1), sizes, strict=True):
        number = number * size + code
    return number


def _changes(ascending: Int[Tensor, "M"]) -> Bool[Tensor, "M"]:
    """Whether each number is the first of its kind."""
    first = torch.ones_like(ascending, dtype=torch.bool)
    first[1:] = ascending[1:] != ascending[:-1]
    return first


def _distinct(ascending: Int[Tensor, "M"]) -> Int[Tensor, "n"]:
    return ascending[_changes(ascending)]


def _bitmap(numbers: Int[Tensor, "n"], possible: int) -> tuple[Tensor, Tensor]:
    """One bit for each number that could be, and for each byte how many bits are set before it."""
    byte, size = numbers >> 3, possible // 8 + 1
    bitmap = torch.zeros(size, dtype=torch.uint8, device=numbers.device)
    bitmap.scatter_add_(0, byte, (1 << (numbers & 7)).to(torch.uint8))
    set_bits = torch.bincount(byte, minlength=size)
    return bitmap, (set_bits.cumsum(0) - set_bits).int()
