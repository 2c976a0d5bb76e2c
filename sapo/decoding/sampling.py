"""Sample G completions of K budgeted thinking blocks and K trie-constrained SID tokens for each prompt.

At every position the decoder allows a set of tokens, and log-probabilities are those of that set, for the policy that
samples, the policy that trains and the reference alike:

    opening delimiter      itself                                                forced
    inside a block         all but pad, EOS, the opening delimiter, SID tokens   sampled
    at a block's budget    the closing delimiter                                 forced
    after a block          the layout's separator, if it has one                 forced
    SID token k            the codes that continue the prefix to an item         sampled, unless an only child

A position whose set has one member is forced: it was no choice, so it is never trained on and its log-probability is 0.
The decoder writes it down without asking the model, and reads it together with the next choice.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.decoding.beam_search import search_beams
from sapo.decoding.layout import ReasoningLayout
from sapo.decoding.prompt_cache import PromptCache
from sapo.decoding.shared_prefix import sharing_prompts
from sapo.errors import BROKEN_WEIGHTS, InputError
from sapo.semantic_ids.trie import SidTrie

if TYPE_CHECKING:
    from transformers import PreTrainedModel
from sapo.decoding.logprobs import NEVER, block_tokens, end_ids


class Rollouts(NamedTuple):
    """M = prompts x G completions, a prompt's G contiguous; T is the longest of them."""

    completion_ids: Int[Tensor, "M T"]  # padded on the right
    completion_mask: Bool[Tensor, "M T"]
    logps: Float[Tensor, "M T"]  # of the sampled tokens; 0 where forced or padding
    sampled: Bool[Tensor, "M T"]
    sids: Int[Tensor, "M K"]


@dataclass(eq=False)
class Drafts:
    """R completions in the making. Rows are filled from the left, each at its own pace."""

    ids: Int[Tensor, "R T"]
    logps: Float[Tensor, "R T"]
    sampled: Bool[Tensor, "R T"]
    length: Int[Tensor, "R"]
    uniform: Float[Tensor, "R T"] | None
    """What decides each choice, drawn before the first: a completion does not depend on when others end. None takes the
    likeliest."""
    logits: Float[Tensor, "R V"]
    """After the last token that was read."""

    def write(
        self,
        rows: Bool[Tensor, "R"],
        token: Int[Tensor, "M"],
        logp: Float[Tensor, "M"] | None = None,
        sampled: Bool[Tensor, "M"] | None = None,
    ) -> None:
        """One more token in each of the M rows; without the rest, it was no choice."""
        row = rows.nonzero()[:, 0]
        column = self.length[row]
        self.ids[row, column] = token
        if logp is not None and sampled is not None:
            self.logps[row, column] = logp
            self.sampled[row, column] = sampled
        self.length = self.length + rows

    def choose(
        self, rows: Bool[Tensor, "R"], options: Float[Tensor, "M C"]
    ) -> tuple[Int[Tensor, "M"], Float[Tensor, "M"]]:
        """A column for each of the M rows, drawn by the softmax of its options, and its log-probability."""
        logps = options.log_softmax(-1)
        if logps.isnan().any():
            raise FloatingPointError(BROKEN_WEIGHTS)
        if self.uniform is None:
            choice = logps.argmax(-1, keepdim=True)
        else:
            below = logps.exp().cumsum(-1)
            total = below[:, -1:]
            point = self.uniform[rows, self.length[rows]][:, None] * total
            # below the total, which rounding could reach; and an option of probability 0 is never the first above it
            point = torch.minimum(point, torch.nextafter(total, torch.zeros_like(total)))
            choice = torch.searchsorted(below, point, right=True)
        return choice[:, 0], logps.gather(1, choice)[:, 0]


@dataclass(frozen=True, eq=False)
class Decoder:
    """What may be written, and how it is chosen.

    Args:
        block_budget: most words of a block, one number for all blocks or one each; the block is closed at it.
        min_block_tokens: fewest words of a block.
        temperature: divides the logits.
        greedy: take the most likely allowed token instead of sampling.
        sid_logps: "trie" for log-probabilities of the allowed set at every position, "full" for the full softmax.

    Raises:
        InputError: a budget below `min_block_tokens`, or a number of budgets other than K; a temperature that is not
            positive.
    """

    layout: ReasoningLayout
    pad_id: int
    block_budget: int | Sequence[int]
    min_block_tokens: int = 0
    temperature: float = 1.0
    greedy: bool = False
    sid_logps: Literal["trie", "full"] = "trie"

    def __post_init__(self) -> None:
        block_budgets(self.block_budget, self.layout.blocks, self.min_block_tokens)
        if not self.temperature > 0:
            raise InputError(
                f"temperature is {self.temperature}; it must be positive. For the most likely tokens use greedy=True."
            )

    def think(self, cache: PromptCache, group_size: int, generator: torch.Generator | None) -> Drafts:
        """Write the blocks of `group_size` completions of every prompt, and read them.

        Raises:
            InputError: `min_block_tokens` where no word can stand in a block.
            FloatingPointError: logits that are not a number.
        """
        model, layout, device = cache.model, self.layout, cache.logits.device
        may_stand = block_tokens(layout, model.config.get_text_config().vocab_size, self.pad_id, end_ids(model))
        vocabulary = may_stand.nonzero()[:, 0].to(device)
        if self.min_block_tokens and len(vocabulary) == 1:
            raise InputError(
                f"min_block_tokens is {self.min_block_tokens}, but the vocabulary has no word for a block."
            )
        closing = int((vocabulary == layout.think_end_id).nonzero())
        blocks = layout.blocks
        budgets = torch.tensor(block_budgets(self.block_budget, blocks, self.min_block_tokens), device=device)
        shape = (len(cache.logits) * group_size, layout.longest(budgets.tolist()))
        drafts = Drafts(
            torch.full(shape, self.pad_id, device=device),
            torch.zeros(shape, device=device),
            torch.zeros(shape, dtype=torch.bool, device=device),
            torch.zeros(shape[0], dtype=torch.long, device=device),
            None if self.greedy else torch.rand(shape, generator=generator, device=device),
            cache.logits.repeat_interleave(group_size, 0),
        )
        cache.start(group_size, shape[1])
        if not blocks:
            return drafts
        block = torch.zeros_like(drafts.length)  # blocks closed so far
        words = torch.zeros_like(drafts.length)  # of the open block
        is_open = torch.zeros_like(drafts.length, dtype=torch.bool)
        while True:
            while True:  # what leaves no choice: open the next block, close one that is full
                forced = torch.where(is_open, words == budgets[block.clamp(max=blocks - 1)], block < blocks)
                if not forced.any():
                    break
                drafts.write(forced, torch.where(is_open, layout.think_end_id, layout.think_start_id)[forced])
                self._separate(drafts, forced & is_open)
                block, words, is_open = block + (forced & is_open), words.masked_fill(forced, 0), is_open ^ forced
            if not is_open.any():
                drafts.logits = cache.read(drafts.ids, drafts.length)
                return drafts
            logits = cache.read(drafts.ids, drafts.length, is_open)
            options = self._scaled(logits[:, vocabulary])
            early = words[is_open] < self.min_block_tokens
            options[early, closing] = NEVER
            token = vocabulary[
                self._write(drafts, is_open, logits, options, vocabulary, len(vocabulary) - early.long())
            ]
            closes = is_open.masked_scatter(is_open, token == layout.think_end_id)
            self._separate(drafts, closes)
            block, words, is_open = block + closes, words + is_open, is_open & ~closes

    def name(self, cache: PromptCache, drafts: Drafts, trie: SidTrie) -> Int[Tensor, "R K"]:
        """Write the K SID tokens after each thought; returns their codes."""
        every = torch.ones_like(drafts.length, dtype=torch.bool)
        node = torch.zeros_like(drafts.length)
        logits: Tensor | None = drafts.logits
        sids = []
        for level, ids in enumerate(self.layout.sid_token_ids):
            codes, nodes = trie.children(node, level)
            there = codes >= 0
            count = there.sum(1)
            if logits is None and (count > 1).any():
                logits = cache.read(drafts.ids, drafts.length)
            tokens = ids.to(codes.device)[codes.clamp(min=0)]
            options = torch.zeros_like(tokens, dtype=torch.float) if logits is None else logits.gather(1, tokens)
            child = self._write(drafts, every, logits, self._scaled(options).masked_fill(~there, NEVER), tokens, count)
            code, node = codes.gather(1, child[:, None])[:, 0], nodes.gather(1, child[:, None])[:, 0]
            sids.append(code)
            logits = None
        return torch.stack(sids, 1)

    def _separate(self, drafts: Drafts, closed: Bool[Tensor, "R"]) -> None:
        if self.layout.separator_id is not None:
            drafts.write(closed, torch.full_like(drafts.length[closed], self.layout.separator_id))

    def _scaled(self, logits: Float[Tensor, "M C"]) -> Float[Tensor, "M C"]:
        return logits.float() / self.temperature

    def _write(
        self,
        drafts: Drafts,
        rows: Bool[Tensor, "R"],
        logits: Float[Tensor, "M V"] | None,
        options: Float[Tensor, "M C"],
        tokens: Int[Tensor, "C"] | Int[Tensor, "M C"],
        count: Int[Tensor, "M"],
    ) -> Int[Tensor, "M"]:
        """Choose among the options of each row, which stand for `tokens`, and write it down; returns the column."""
        column, logp = drafts.choose(rows, options)
        token = tokens[column] if tokens.dim() == 1 else tokens.gather(1, column[:, None])[:, 0]
        if self.sid_logps == "full" and logits is not None:
            logp = self._scaled(logits).log_softmax(-1).gather(1, token[:, None])[:, 0]
        drafts.write(rows, token, logp.masked_fill(count == 1, 0.0), count > 1)
        return column


@torch.no_grad()
def grouped_rollouts(
    model: "PreTrainedModel",
    input_ids: Int[Tensor, "B P"],
    attention_mask: Int[Tensor, "B P"],
    layout: ReasoningLayout,
    trie: SidTrie,
    group_size: int,
    *,
    block_budget: int | Sequence[int],
    min_block_tokens: int = 0,
    temperature: float = 1.0,
    generator: torch.Generator | None,
    pad_id: int,
    greedy: bool = False,
    sid_logps: Literal["trie", "full"] = "trie",
) -> Rollouts:
    """A prompt is read once and its G rollouts share it; a finished rollout reads nothing more.

    Args:
        input_ids, attention_mask: prompts, padded on the left.
        block_budget, min_block_tokens, temperature, greedy, sid_logps: as those of `Decoder`.
        generator: the only source of randomness, on the model's device; not needed when greedy.

    Raises:
        InputError: as `Decoder`; levels that are not the trie's; `min_block_tokens` where no word can stand in a block.
        FloatingPointError: logits that are not a number.
    """
    trie.check_levels([len(ids) for ids in layout.sid_token_ids])
    decoder = Decoder(layout, pad_id, block_budget, min_block_tokens, temperature, greedy, sid_logps)
    with sharing_prompts(model):
        cache = PromptCache(model, input_ids, attention_mask)
        drafts = decoder.think(cache, group_size, generator)
        sids = decoder.name(cache, drafts, trie.to(input_ids.device))
    return _rollouts(drafts, sids)


@torch.no_grad()
def beam_rollouts(
    model: "PreTrainedModel",
    input_ids: Int[Tensor, "B P"],
    attention_mask: Int[Tensor, "B P"],
    layout: ReasoningLayout,
    trie: SidTrie,
    group_size: int,
    *,
    block_budget: int | Sequence[int],
    min_block_tokens: int = 0,
    temperature: float = 1.0,
    generator: torch.Generator | None,
    pad_id: int,
    sid_logps: Literal["trie", "full"] = "trie",
) -> Rollouts:
    """One sampled thought a prompt, then the G likeliest SIDs after it by the full softmax, best first: the rollouts of
    MiniOneRec (arXiv 2510.24431), which does not think. They are no samples of the policy, so what is made of them is a
    biased gradient.

    The thought is the same in all G: to the beams it is part of the prompt, so its tokens count as forced. `logps` are
    all 0: beams have no sampling probability. Arguments are those of `grouped_rollouts`.

    Raises:
        InputError: as `grouped_rollouts`; a group larger than the number of SIDs.
    """
    trie.check_levels([len(ids) for ids in layout.sid_token_ids])
    decoder = Decoder(layout, pad_id, block_budget, min_block_tokens, temperature, sid_logps=sid_logps)
    trie = trie.to(input_ids.device)
    with sharing_prompts(model):
        cache = PromptCache(model, input_ids, attention_mask)
        drafts = decoder.think(cache, 1, generator)
        cache.extend_prompts(drafts.logits)
        sids = search_beams(cache, trie, layout.sid_token_ids, group_size).sids.flatten(0, 1)
    if (sids < 0).any():
        raise InputError(f"a group of {group_size} beams needs as many SIDs, and the catalogue has fewer.")
    for name in ("ids", "logps", "sampled", "length"):
        setattr(drafts, name, getattr(drafts, name).repeat_interleave(group_size, 0))
    drafts.logps.zero_()
    drafts.sampled.zero_()
    every = torch.ones_like(drafts.length, dtype=torch.bool)
    for level, ids in enumerate(layout.sid_token_ids):
        rivals = trie.allowed(sids[:, :level]).sum(1) > 1
        drafts.write(every, ids.to(sids.device)[sids[:, level]], torch.zeros_like(drafts.logps[:, 0]), rivals)
    return _rollouts(drafts, sids)


def _rollouts(drafts: Drafts, sids: Int[Tensor, "M K"]) -> Rollouts:
    longest = int(drafts.length.max())
    mask = torch.arange(longest, device=sids.device) < drafts.length[:, None]
    return Rollouts(drafts.ids[:, :longest], mask, drafts.logps[:, :longest], drafts.sampled[:, :longest], sids)


def block_budgets(block_budget: int | Sequence[int], num_blocks: int, min_block_tokens: int = 0) -> list[int]:
    """One budget a block, checked."""
    budgets = [block_budget] * num_blocks if isinstance(block_budget, int) else list(block_budget)
    if len(budgets) != num_blocks:
        raise InputError(f"block_budget has {len(budgets)} numbers for {num_blocks} blocks: give one, or one each.")
    if budgets and min(budgets) < max(0, min_block_tokens):
        raise InputError(f"block_budget {budgets} lies below min_block_tokens {min_block_tokens}.")
    return budgets
