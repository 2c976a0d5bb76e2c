"""The shape of a completion: K thinking blocks, then K SID tokens. Step k is block k together with SID token k.

    <think> block 1 </think> ... <think> block K </think> <a_3> <b_1> <c_7>
    |------- step 1 -------|     |------- step K -------| step 1 ... step K

The two parts of a step are not adjacent. Everything is read from token ids, never from text.

Other recommenders think in one block before the SID, or not at all: then a block belongs to no step, and step k is SID
token k alone. A token may stand after each block, as a line break does in the paper's fork; it belongs to no step.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from sapo.errors import InputError


class ParsedCompletions(NamedTuple):
    """Codes of each level, -1 where missing or of the wrong level; and whether the whole completion has the layout."""

    sids: Int[Tensor, "B K"]
    well_formed: Bool[Tensor, "B"]


class Reading(NamedTuple):
    """What each token of a batch of completions is."""

    is_open: Bool[Tensor, "B T"]  # an opening delimiter that begins a block
    is_close: Bool[Tensor, "B T"]  # a closing delimiter that ends one
    in_block: Bool[Tensor, "B T"]  # inside a block, both delimiters included
    block: Int[Tensor, "B T"]  # blocks begun so far, minus 1
    is_sid: Bool[Tensor, "B T"]  # a SID token outside blocks
    sid_index: Int[Tensor, "B T"]  # SID tokens after the last block so far, minus 1
    nested: Bool[Tensor, "B"]
    is_separator: Bool[Tensor, "B T"]  # the token that stands after a block, where the layout has one


@dataclass(frozen=True, eq=False)
class ReasoningLayout:
    """Which token ids delimit blocks and which name codes.

    Args:
        num_steps: K.
        think_start_id, think_end_id: delimiters of a block. They are ordinary added tokens: special ones vanish from
            decoded text.
        sid_token_ids: for each level a LongTensor, code -> token id. Levels share no token.
        sid_in_blocks: whether a block may mention SID tokens. Compact prompts forbid it, chat prompts allow it.
        num_blocks: how many blocks come before the SID; K where None.
        separator_id: the token that the decoder writes after every block; none where None.
    """

    num_steps: int
    think_start_id: int
    think_end_id: int
    sid_token_ids: list[Tensor]
    sid_in_blocks: bool = False
    num_blocks: int | None = None
    separator_id: int | None = None

    def __post_init__(self) -> None:
        if self.blocks < 0:
            raise InputError(f"num_blocks is {self.num_blocks}; 0 or more fit.")
        if self.num_steps != len(self.sid_token_ids):
            raise InputError(f"num_steps is {self.num_steps}, but sid_token_ids has {len(self.sid_token_ids)} levels.")
        own = [self.think_start_id, self.think_end_id, *([] if self.separator_id is None else [self.separator_id])]
        ids = torch.cat([self.sid_ids, torch.tensor(own)])
        if len(ids.unique()) != len(ids):
            raise InputError(
                "think_start_id, think_end_id, separator_id and the SID tokens of all levels must be distinct ids."
            )

    @property
    def blocks(self) -> int:
        """How many blocks a completion has."""
        return self.num_steps if self.num_blocks is None else self.num_blocks

    def longest(self, budgets: Sequence[int]) -> int:
        """Tokens of the longest completion whose blocks have so many words each."""
        around = 2 if self.separator_id is None else 3
        return sum(budgets) + around * self.blocks + self.num_steps

    @property
    def sid_ids(self) -> Int[Tensor, "S"]:
        """Token ids of all codes of all levels."""
        return torch.cat([ids.cpu().long() for ids in self.sid_token_ids])

    def token_steps(self, completion_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
        """The step (0-based) that each token belongs to, -1 for none.

        Block k spans its delimiters, and belongs to no step where there are other than K of them; the j-th SID token
        after the last block belongs to step j, whatever its level.
        """
        reading = self.read(completion_ids)
        block = reading.block if self.blocks == self.num_steps else torch.full_like(reading.block, -1)
        steps = torch.where(reading.in_block, block, torch.where(reading.is_sid, reading.sid_index, -1))
        return steps.masked_fill(steps >= self.num_steps, -1)

    def parse(self, completion_ids: Int[Tensor, "B T"]) -> ParsedCompletions:
        """Read the SID. Malformed: a nested or unclosed block, other than `blocks` blocks or K SID tokens, a wrong
        level, a block after a SID token."""
        reading = self.read(completion_ids)
        levels, codes = self._levels_and_codes(completion_ids)
        sids = torch.full((len(completion_ids), self.num_steps), -1, device=completion_ids.device)
        for k in range(self.num_steps):
            here = reading.is_sid & (reading.sid_index == k) & (levels == k)
            sids[:, k] = torch.where(here.any(1), torch.where(here, codes, 0).sum(1), -1)
        # An unclosed block swallows the SID, and a SID token before a block is missing after the last: both leave a -1.
        malformed = (
            reading.nested
            | (reading.is_open.sum(1) != self.blocks)
            | (reading.is_sid.sum(1) != self.num_steps)
            | (sids < 0).any(1)
        )
        return ParsedCompletions(sids, ~malformed)

    def read(self, completion_ids: Int[Tensor, "B T"]) -> Reading:
        """Classify every token. Whether a position is inside a block depends on the last delimiter before it alone."""
        opening = completion_ids == self.think_start_id
        closing = completion_ids == self.think_end_id
        time = torch.arange(completion_ids.shape[1], device=completion_ids.device).expand_as(completion_ids)
        last_open = torch.where(opening, time, -1).cummax(1).values
        last_close = torch.where(closing, time, -1).cummax(1).values
        inside_after = last_open > last_close
        inside_before = inside_after.roll(1, dims=1)
        inside_before[:, :1] = False
        begins, ends = opening & ~inside_before, closing & inside_before
        in_block = inside_after | ends
        block = begins.cumsum(1) - 1

        is_sid = (self._levels_and_codes(completion_ids)[0] >= 0) & ~in_block
        before_a_block = block < block[:, -1:]
        after_last = is_sid & ~before_a_block
        separator = torch.zeros_like(ends)
        if self.separator_id is not None:
            separator[:, 1:] = ends[:, :-1] & (completion_ids[:, 1:] == self.separator_id)
        return Reading(
            is_open=begins,
            is_close=ends,
            in_block=in_block,
            block=block,
            is_sid=is_sid,
            sid_index=torch.where(before_a_block, -1, after_last.cumsum(1) - 1),
            nested=(opening & inside_before).any(1),
            is_separator=separator,
        )

    def _levels_and_codes(self, token_ids: Int[Tensor, "B T"]) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
        """Level and code of each token, -1 for tokens that name no code."""
        table = self._table.to(token_ids.device)
        size = table.shape[1]
        rows = token_ids.clamp(0, size - 1)
        rows = rows.masked_fill(token_ids < 0, size - 1)
        return table[0][rows], table[1][rows]

    @cached_property
    def _table(self) -> Int[Tensor, "2 S"]:
        """Level and code by token id, with one column more than the largest id of a code: where all later ids look."""
        table = torch.full((2, int(self.sid_ids.max()) + 2), -1)
        for level, ids in enumerate(self.sid_token_ids):
            table[0, ids.cpu()] = level
            table[1, ids.cpu()] = torch.arange(len(ids))
        return table
