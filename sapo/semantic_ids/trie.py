"""The catalogue as a tree of codes, in flat arrays: which codes may follow each prefix of a batch."""

import copy
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
    nodes of a depth lie one behind the other in one array, so a node's are found by where they begin; where no node has
    many, they lie in a table of a row a node. Either way a batch of nodes reads its children in one gather. Who walks
    down the tree carries nodes and searches nothing. A prefix of codes is found as an integer, its codes read as
    digits: in the first levels, which are dense, by counting the set bits of a bitmap before it, below them by binary
    search. Built by one sort (compare STATIC, arXiv 2602.22647).

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
        self._codes: list[Tensor] = []  # the code of each child, one behind the other or in a table
        self._widest: list[int] = []  # most children of a node
        self._finder: list[Tensor] = []  # a bitmap, or the sorted prefixes
        self._is_dense: list[bool] = []
        self._copies: dict[torch.device, Self] = {}  # on other devices
        numbers = _distinct(_numbers(sids, sizes).sort().values)
        for depth in reversed(range(len(sizes))):
            size, parents = sizes[depth], numbers // sizes[depth]
            begins = _changes(parents).nonzero()[:, 0]
            first = torch.cat([begins, begins.new_full((2,), len(numbers))]).int()
            widest = int(first.diff().max())
            codes = (numbers - parents * size).to(_smallest_dtype(size))
            codes = torch.nn.functional.pad(codes, (0, widest))  # so that every window is as wide
            if len(first) * widest * codes.element_size() <= _bytes(codes) + _bytes(first):
                codes = _windows(codes, first[:-1], first[1:], widest)
            self._first.insert(0, first)
            self._codes.insert(0, codes)
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
        sizes = self.level_sizes[:depth]
        out_of_range = ((prefixes < 0) | (prefixes >= torch.tensor(sizes, device=prefixes.device))).any(1)
        number = _numbers(prefixes, sizes).masked_fill_(out_of_range, math.prod(sizes))  # which is no prefix's
        unknown, finder = self._unknown(depth), self._finder[depth]
        if self._is_dense[depth]:
            word, bit = finder.index_select(0, number >> 5), number & 31
            node = (word >> 32) + _set_bits(word & ((1 << bit) - 1))
            found = (word >> bit & 1).bool()
        else:
            node = torch.searchsorted(finder, number)
            found = finder[node.clamp(max=unknown - 1)] == number
        return torch.where(found, node, unknown)

    def children(self, nodes: Int[Tensor, "M"], depth: int) -> Children:
        """The codes that continue nodes of a depth, and the nodes that they lead to. The root is node 0 of depth 0."""
        begin, end = (self._first[depth].index_select(0, at).long()[:, None] for at in (nodes, nodes + 1))
        codes = self._codes_of(nodes, depth)
        place = begin + torch.arange(codes.shape[1], device=codes.device)
        return Children(codes.masked_fill_(place >= end, -1), place.masked_fill(place >= end, -1))

    def allowed(self, prefixes: Int[Tensor, "M d"]) -> Bool[Tensor, "M V"]:
        """Which of the V = level_sizes[d] codes continue each prefix to an item; all False for an unknown prefix."""
        depth = prefixes.shape[1]
        nodes = self.find(prefixes)
        codes = self._codes_of(nodes, depth)
        known = (nodes < self._unknown(depth))[:, None].expand_as(codes)
        mask = torch.zeros(len(codes), self.level_sizes[depth], dtype=torch.bool, device=codes.device)
        return mask.scatter_(1, codes, known)

    def contains(self, sids: Int[Tensor, "M K"]) -> Bool[Tensor, "M"]:
        """Whether each SID belongs to the catalogue."""
        if sids.shape[1] != self.num_levels:
            raise InputError(f"sids have {sids.shape[1]} codes; this trie has {self.num_levels} levels.")
        last = self.num_levels - 1
        nodes = self.find(sids[:, :-1])
        return (self._codes_of(nodes, last) == sids[:, -1:]).any(1) & (nodes < self._unknown(last))

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
        return sum(_bytes(array) for array in (*self._first, *self._codes, *self._finder))

    def to(self, device: torch.device | str) -> Self:
        """The same trie with its arrays there, made once; this one stays where it is, for those who share it."""
        device = torch.device(device)
        if device == self._first[0].device:
            return self
        if device not in self._copies:
            moved = copy.copy(self)
            moved._copies = {}
            for name in ("_first", "_codes", "_finder"):
                setattr(moved, name, [array.to(device) for array in getattr(self, name)])
            self._copies[device] = moved
        return self._copies[device]

    def _unknown(self, depth: int) -> int:
        """The node of prefixes that no item has."""
        return len(self._first[depth]) - 2

    def _codes_of(self, nodes: Int[Tensor, "M"], depth: int) -> Int[Tensor, "M C"]:
        """The codes of the children of each node, the first again behind the last; anything for the unknown node."""
        codes, first = self._codes[depth], self._first[depth]
        if codes.dim() == 2:
            return codes.index_select(0, nodes).long()
        begin, end = (first.index_select(0, at) for at in (nodes, nodes + 1))
        return _windows(codes, begin, end, self._widest[depth]).long()


def _windows(codes: Int[Tensor, "L"], begin: Int[Tensor, "M"], end: Int[Tensor, "M"], width: int) -> Int[Tensor, "M C"]:
    """The C = `width` codes from each place on, the first again where the place ends."""
    windows = codes.unfold(0, width, 1).index_select(0, begin)
    there = torch.arange(width, device=codes.device) < (end - begin)[:, None]
    return windows.where(there, windows[:, :1])


def _smallest_dtype(size: int) -> torch.dtype:
    return torch.uint8 if size <= 2**8 else torch.int16 if size <= 2**15 else torch.int32


def _bytes(array: Tensor) -> int:
    return array.numel() * array.element_size()


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
