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

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sapo.decoding.beam_search import search_beams
from sapo.decoding.layout import ReasoningLayout
from sapo.decoding.shared_prefix import PromptCache, sharing_prompts
from sapo.errors import BROKEN_WEIGHTS, InputError
from sapo.semantic_ids.trie import SidTrie

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NEVER = float("-inf")


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


def completion_logps(
    logits: Float[Tensor, "M V"],
    completion_ids: Int[Tensor, "B T"],
    at: Bool[Tensor, "B T"],
    layout: ReasoningLayout,
    trie: SidTrie,
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    temperature: float = 1.0,
    min_block_tokens: int = 0,
    sid_logps: Literal["trie", "full"] = "trie",
) -> Float[Tensor, "B T"]:
    """Log-probabilities of given completions under the sets that the decoder allowed.

    `logits` are those that predict each of the M tokens `at` some places, row by row, before the temperature divides
    them; the backward pass overwrites them. Other places get 0. A token that its set does not hold, as other engines
    may emit, is scored by the full softmax. Forced closings cannot be told from chosen ones by the ids; the caller's
    mask of sampled tokens leaves them out.
    """
    vocabulary = logits.shape[-1]
    # which tokens compete: 0 all, 1 a block's, 2 a block's while it may not end yet, -1 the codes after a prefix
    in_block = block_tokens(layout, vocabulary, pad_id, eos_ids).to(logits.device)
    early = in_block.clone()
    early[layout.think_end_id] = False
    never = torch.zeros(vocabulary, device=logits.device)
    outside = [None, never.masked_fill(~in_block, NEVER), never.masked_fill(~early, NEVER)]
    which = torch.zeros_like(completion_ids)
    codes: list[tuple[Tensor, Tensor]] = []
    if sid_logps == "trie":
        trie = trie.to(completion_ids.device)
        reading, sids = layout.read(completion_ids), layout.parse(completion_ids).sids
        which[reading.in_block & ~reading.is_open & in_block[completion_ids]] = 1
        if min_block_tokens:
            time = torch.arange(completion_ids.shape[1], device=which.device)
            opened_at = torch.where(reading.is_open, time, -1).cummax(1).values
            too_early = (which == 1) & (time - opened_at - 1 < min_block_tokens)
            which[too_early] = torch.where(reading.is_close, 0, 2)[too_early]
        number = (at.flatten().cumsum(0) - 1).view(at.shape)  # row of `logits` for each place
        for level in range(layout.num_steps):
            here = at & reading.is_sid & (reading.sid_index == level) & (sids[:, level, None] >= 0)  # one a row at most
            row = here.any(1).nonzero()[:, 0]
            children = trie.children(trie.find(sids[row, :level]), level).codes
            known = (children == sids[row, level, None]).any(1)
            row, children = row[known], children[known]
            place = here[row].int().argmax(1)
            which[row, place] = -1
            tokens = layout.sid_token_ids[level].to(logits.device)[children.clamp(min=0)]
            codes.append((number[row, place], torch.where(children < 0, -1, tokens)))
    values = _SetLogps.apply(logits, completion_ids[at], which[at], outside, codes, temperature)
    logps = values.new_zeros(at.shape).masked_scatter(at, values)
    return logps if sid_logps == "full" else logps.masked_fill(reading.is_open | reading.is_separator, 0.0)


class _SetLogps(torch.autograd.Function):
    """Log of a token's share of the softmax over the tokens that compete with it.

    What autograd would keep for it is several times as large as the logits. Here it is the logits alone: the softmax is
    computed again in the backward pass, in pieces that fit a cache, and the gradient takes the place of the logits.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits: Float[Tensor, "M V"],
        chosen: Int[Tensor, "M"],
        which: Int[Tensor, "M"],
        outside: list[Float[Tensor, "V"] | None],
        codes: list[tuple[Int[Tensor, "m"], Int[Tensor, "m C"]]],
        temperature: float,
    ) -> Float[Tensor, "M"]:
        """
        Args:
            which, outside: for each row a place in `outside`, -1 for rows of `codes`. There, 0 for tokens that compete
                and -inf for others, or None if all compete.
            codes: rows, and the few tokens that compete there, -1 where there are fewer.
        """
        ctx.save_for_backward(logits, chosen, which)
        ctx.outside, ctx.codes, ctx.temperature = outside, codes, temperature
        result = logits.new_zeros(len(logits), dtype=torch.float)
        for rows, options in _SetLogps.pieces(logits, which, outside, temperature):
            result[rows] = options.log_softmax(-1).gather(1, chosen[rows, None])[:, 0]
        for rows, tokens in codes:
            options = _SetLogps.few(logits, rows, tokens, temperature)
            result[rows] = _SetLogps.few(logits, rows, chosen[rows, None], temperature)[:, 0] - options.logsumexp(-1)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "M"]) -> tuple[Tensor | None, ...]:
        logits, chosen, which = ctx.saved_tensors
        chosen, gradient, temperature = chosen[:, None], gradient[:, None], ctx.temperature
        result = logits.detach()  # the same memory; a second backward pass is refused by autograd
        for rows, options in _SetLogps.pieces(logits, which, ctx.outside, temperature):
            share = options.softmax(-1).mul_(-gradient[rows]).scatter_add_(1, chosen[rows], gradient[rows])
            result[rows] = share.div_(temperature).to(result.dtype)
        for rows, tokens in ctx.codes:
            share = _SetLogps.few(logits, rows, tokens, temperature).softmax(-1).mul_(-gradient[rows])
            share += gradient[rows] * (tokens == chosen[rows])
            share = share.div_(temperature).to(result.dtype)
            result[rows] = torch.zeros_like(result[rows]).scatter_add_(1, tokens.clamp(min=0), share)
        return result, None, None, None, None, None

    @staticmethod
    def pieces(
        logits: Float[Tensor, "M V"],
        which: Int[Tensor, "M"],
        outside: list[Float[Tensor, "V"] | None],
        temperature: float,
    ) -> Iterator[tuple[Int[Tensor, "c"] | slice, Float[Tensor, "c V"]]]:
        """Rows that share a set of tokens, a few at a time, and their logits, -inf for what does not compete."""
        count = max(1, (2**18 if logits.device.type == "cpu" else 2**26) // logits.shape[1])
        for number, excluded in enumerate(outside):
            every = (which == number).nonzero()[:, 0]
            for start in range(0, len(every), count):
                if len(every) == len(which):  # then a piece is no copy
                    rows: Tensor | slice = slice(start, start + count)
                    options = logits[rows]
                else:
                    rows = every[start : start + count]
                    options = logits.index_select(0, rows)
                options = options.float() if temperature == 1 else options.float() / temperature
                yield rows, options if excluded is None else options + excluded

    @staticmethod
    def few(
        logits: Float[Tensor, "M V"], rows: Int[Tensor, "m"], tokens: Int[Tensor, "m C"], temperature: float
    ) -> Float[Tensor, "m C"]:
        options = logits[rows[:, None], tokens.clamp(min=0)].float() / temperature
        return options.masked_fill_(tokens < 0, NEVER)


def forced_tokens(completion_ids: Int[Tensor, "B T"], layout: ReasoningLayout, trie: SidTrie) -> Bool[Tensor, "B T"]:
    """Tokens that were no choice, as far as ids tell: opening delimiters, separators, SID tokens without a rival.

    A closing delimiter at a budget looks like a chosen one; only the decoder knows.
    """
    reading, sids = layout.read(completion_ids), layout.parse(completion_ids).sids
    forced, trie = reading.is_open | reading.is_separator, trie.to(completion_ids.device)
    for level in range(layout.num_steps):
        only_child = trie.allowed(sids[:, :level]).sum(1) == 1
        forced |= reading.is_sid & (reading.sid_index == level) & (sids[:, level, None] >= 0) & only_child[:, None]
    return forced


def block_budgets(block_budget: int | Sequence[int], num_blocks: int, min_block_tokens: int = 0) -> list[int]:
    """One budget a block, checked."""
    budgets = [block_budget] * num_blocks if isinstance(block_budget, int) else list(block_budget)
    if len(budgets) != num_blocks:
        raise InputError(f"block_budget has {len(budgets)} numbers for {num_blocks} blocks: give one, or one each.")
    if budgets and min(budgets) < max(0, min_block_tokens):
        raise InputError(f"block_budget {budgets} lies below min_block_tokens {min_block_tokens}.")
    return budgets


def block_tokens(layout: ReasoningLayout, vocab_size: int, pad_id: int, eos_ids: Sequence[int]) -> Bool[Tensor, "V"]:
    """The tokens that a block may hold, its closing delimiter included."""
    allowed = torch.ones(vocab_size, dtype=torch.bool)
    allowed[[pad_id, layout.think_start_id, *eos_ids]] = False
    if not layout.sid_in_blocks:
        allowed[layout.sid_ids] = False
    allowed[layout.think_end_id] = True
    return allowed


def end_ids(model: "PreTrainedModel") -> list[int]:
    """The EOS ids that the model's config declares."""
    declared = model.config.get_text_config().eos_token_id
    if declared is None:
        return []
    return [declared] if isinstance(declared, int) else list(declared)
