"""Log-probabilities of given completions under the sets of tokens that the decoder allowed."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

from sapo.decoding.layout import ReasoningLayout
from sapo.semantic_ids.trie import SidTrie

if TYPE_CHECKING:
    from transformers import PreTrainedModel


NEVER = float("-inf")


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
