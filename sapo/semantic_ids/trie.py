"""The catalogue as a tree of codes, in flat arrays: which codes may follow each prefix of a batch."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sapo.errors import InputError

# A level whose prefixes fill this share of all that could be is looked up in a bitmap, which then takes no more memory
# than the sorted prefixes that another level is searched in.
DENSE = 1 / 32


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
        self._finder: list[Tensor] = []  # a bitmap, or the sorted prefixes
        self._is_dense: list[bool] = []
        numbers = _distinct(_numbers(sids, sizes).sort().values)
        for depth in reversed(range(len(sizes))):
            size, parents = sizes[depth], numbers // sizes[depth]
            begins = _changes(parents).nonzero()[:, 0]
            first = torch.cat([begins, begins.new_full((2,), len(numbers))])
            self._first.insert(0, first.int())
            widest = int(first.diff().max())
            codes = (numbers - parents * size).to(torch.int16 if size <= 2**15 else torch.int32)
            self._codes.insert(0, torch.nn.functional.pad(codes, (0, widest)))  # so that every window is as wide
            self._widest.insert(0, widest)
            numbers, possible = parents[begins], math.prod(sizes[:depth])
            self._is_dense.insert(0, len(numbers) >= DENSE * possible)
            self._finder.insert(0, _bitmap(numbers, possible) if self._is_dense[0] else numbers)

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
        unknown, finder = len(self._first[depth]) - 2, self._finder[depth]
        if self._is_dense[depth]:
            word, bit = finder.index_select(0, number >> 5), number & 31
            node = (word >> 32) + _set_bits(word & ((1 << bit) - 1))
            found = (word >> bit) & 1 == 1
        else:
            node = torch.searchsorted(finder, number)
            found = finder[node.clamp(max=unknown - 1)] == number
        return torch.where(found & in_range, node, unknown)

    def children(self, nodes: Int[Tensor, "M"], depth: int) -> Children:
        """The codes that continue nodes of a depth, and the nodes that they lead to. The root is node 0 of depth 0."""
        begin, codes, there = self._windows(nodes, depth)
        place = begin[:, None] + torch.arange(codes.shape[1], device=begin.device)
        return Children(codes.long().masked_fill_(~there, -1), place.masked_fill_(~there, -1))

    def allowed(self, prefixes: Int[Tensor, "M d"]) -> Bool[Tensor, "M V"]:
        """Which of the V = level_sizes[d] codes continue each prefix to an item; all False for an unknown prefix."""
        depth = prefixes.shape[1]
        _, codes, there = self._windows(self.find(prefixes), depth)
        size = self.level_sizes[depth]
        mask = torch.zeros(len(codes), size + 1, dtype=torch.bool, device=codes.device)  # the last column is no code
        return mask.scatter_(1, codes.long().masked_fill_(~there, size), True)[:, :size]

    def contains(self, sids: Int[Tensor, "M K"]) -> Bool[Tensor, "M"]:
        """Whether each SID belongs to the catalogue."""
        if sids.shape[1] != self.num_levels:
            raise InputError(f"sids have {sids.shape[1]} codes; this trie has {self.num_levels} levels.")
        _, codes, there = self._windows(self.find(sids[:, :-1]), self.num_levels - 1)
        return ((codes == sids[:, -1:].long()) & there).any(1)

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
        arrays = [*self._first, *self._codes, *self._finder]
        return sum(array.numel() * array.element_size() for array in arrays)

    def to(self, device: torch.device | str) -> Self:
        """Move the arrays; returns the trie itself."""
        self._first, self._codes, self._finder = (
            [array.to(device) for array in arrays] for arrays in (self._first, self._codes, self._finder)
        )
        return self

    def _windows(
        self, nodes: Int[Tensor, "M"], depth: int
    ) -> tuple[Int[Tensor, "M"], Int[Tensor, "M C"], Bool[Tensor, "M C"]]:
        """Where the children of each node begin, the C codes from there on, and which of them are its children's."""
        first, widest = self._first[depth], self._widest[depth]
        begin, end = (first.index_select(0, at).long() for at in (nodes, nodes + 1))
        codes = self._codes[depth].unfold(0, widest, 1).index_select(0, begin)
        return begin, codes, torch.arange(widest, device=begin.device) < (end - begin)[:, None]


def _numbers(prefixes: Int[Tensor, "M d"], sizes: Sequence[int]) -> Int[Tensor, "M"]:
    """Each prefix as one integer, its codes read as digits."""
    weights = [math.prod(sizes[depth + 1 :]) for depth in range(len(sizes))]
    return (prefixes.long() * torch.tensor(weights, dtype=torch.long, device=prefixes.device)).sum(1)


def _changes(ascending: Int[Tensor, "M"]) -> Bool[Tensor, "M"]:
    """Whether each number is the first of its kind."""
    first = torch.ones_like(ascending, dtype=torch.bool)
    first[1:] = ascending[1:] != ascending[:-1]
    return first


def _distinct(ascending: Int[Tensor, "M"]) -> Int[Tensor, "n"]:
    return ascending[_changes(ascending)]


def _bitmap(numbers: Int[Tensor, "n"], possible: int) -> Int[Tensor, "words"]:
    """A word for 32 numbers that could be: a bit for each that is, and above them how many are set in earlier words."""
    word, size = numbers >> 5, possible // 32 + 1
    bits = numbers.new_zeros(size).scatter_add_(0, word, 1 << (numbers & 31))
    counts = torch.bincount(word, minlength=size)
    return (counts.cumsum(0) - counts << 32) | bits


def _set_bits(words: Int[Tensor, "M"]) -> Int[Tensor, "M"]:
    """How many bits are set in each word of 32: sums of 2, 4, 8, then all bits, side by side in one word."""
    words = words - ((words >> 1) & 0x55555555)
    words = (words & 0x33333333) + ((words >> 2) & 0x33333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F
    return (words * 0x01010101 >> 24) & 0xFF
