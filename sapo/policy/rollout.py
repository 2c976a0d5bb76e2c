"""Sample G completions of K budgeted thinking blocks and K trie-constrained SID tokens for each prompt.

At every position the decoder allows a set of tokens, and log-probabilities are those of that set, for the policy that
samples, the policy that trains and the reference alike:

    opening delimiter      itself                                                forced
    inside a block         all but pad, EOS, the opening delimiter, SID tokens   sampled
    at a block's budget    the closing delimiter                                 forced
    SID token k            the codes that continue the prefix to an item         sampled, unless an only child

A position whose set has one member is forced: it was no choice, so it is never trained on and its log-probability is 0.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.errors import BROKEN_WEIGHTS, InputError
from sapo.policy.beam_search import constrained_beam_search
from sapo.policy.layout import ReasoningLayout
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
    """A prompt is read once; its G rollouts go on from a copy of its cache.

    Args:
        input_ids, attention_mask: prompts, padded on the left.
        block_budget: most words of a block, one number for all blocks or one each; the block is closed at it.
        min_block_tokens: fewest words of a block.
        generator: the only source of randomness, on the model's device; not needed when greedy.
        greedy: take the most likely allowed token instead of sampling.
        sid_logps: "trie" for log-probabilities of the allowed set at every position, "full" for the full softmax.

    Raises:
        InputError: a budget below `min_block_tokens`, or a number of budgets other than K; a temperature that is not
            positive; levels that are not the trie's; `min_block_tokens` where no word can stand in a block.
        FloatingPointError: logits that are not a number.
    """
    trie.check_levels([len(ids) for ids in layout.sid_token_ids])
    device = input_ids.device
    trie = trie.to(device)
    steps = layout.num_steps
    budgets = torch.tensor(block_budgets(block_budget, steps, min_block_tokens), device=device)
    if not temperature > 0:
        raise InputError(
            f"temperature is {temperature}; it must be positive. For the most likely tokens use greedy=True."
        )
    model_was_training = model.training
    model.eval()
    rows = len(input_ids) * group_size
    in_block = block_tokens(layout, model.config.vocab_size, pad_id, end_ids(model)).to(device)
    if min_block_tokens and int(in_block.sum()) == 1:
        raise InputError(f"min_block_tokens is {min_block_tokens}, but the vocabulary has no word for a block.")
    sid_ids = [ids.to(device) for ids in layout.sid_token_ids]

    mask = attention_mask.bool()
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    output = model(input_ids, attention_mask=mask.long(), position_ids=positions, use_cache=True, logits_to_keep=1)
    cache = output.past_key_values
    cache.batch_repeat_interleave(group_size)
    logits = output.logits[:, -1].repeat_interleave(group_size, 0)
    mask = mask.repeat_interleave(group_size, 0)
    position = positions[:, -1].repeat_interleave(group_size, 0)

    block = torch.zeros(rows, dtype=torch.long, device=device)  # blocks closed so far
    words = torch.full((rows,), -1, device=device)  # words of the open block, -1 while none is open
    depth = torch.zeros(rows, dtype=torch.long, device=device)  # SID tokens so far
    sids = torch.full((rows, steps), -1, device=device)
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    max_length = int(budgets.sum()) + 3 * steps
    for _ in range(max_length):
        thinking = block < steps
        done = depth == steps
        opens = thinking & (words < 0)
        closes = thinking & (words == budgets[block.clamp(max=steps - 1)])
        writes = thinking & ~opens & ~closes
        logits = logits.float() / temperature

        token = torch.full((rows,), pad_id, device=device)
        token[opens] = layout.think_start_id
        token[closes] = layout.think_end_id
        logp = torch.zeros(rows, device=device)
        sampled = torch.zeros(rows, dtype=torch.bool, device=device)

        if writes.any():
            options = logits[writes].masked_fill(~in_block, NEVER)
            options[words[writes] < min_block_tokens, layout.think_end_id] = NEVER
            token[writes], logp[writes] = _draw(options, greedy, generator)
            sampled[writes] = options.isfinite().sum(1) > 1
        for level in range(steps):
            here = ~thinking & (depth == level)
            if here.any():
                allowed = trie.allowed(sids[here, :level])
                code, logp[here] = _draw(
                    logits[here][:, sid_ids[level]].masked_fill(~allowed, NEVER), greedy, generator
                )
                sids[here, level] = code
                token[here] = sid_ids[level][code]
                sampled[here] = allowed.sum(1) > 1
        if sid_logps == "full":
            logp = torch.where(sampled, logits.log_softmax(-1).gather(1, token[:, None])[:, 0], 0.0)
        columns.append((token, ~done, logp, sampled))

        closed = closes | (writes & (token == layout.think_end_id))
        words = torch.where(opens, 0, torch.where(closed, -1, words + writes.long()))
        block = block + closed.long()
        depth = depth + (~thinking & ~done).long()
        if bool((depth == steps).all()):
            break
        mask = torch.cat([mask, ~done[:, None]], 1)
        position = position + 1
        output = model(
            token[:, None],
            attention_mask=mask.long(),
            position_ids=position[:, None],
            past_key_values=cache,
            use_cache=True,
        )
        logits = output.logits[:, -1]
    model.train(model_was_training)
    token, mask, logp, sampled = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
    return Rollouts(token, mask, logp, sampled, sids)


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
    """One sampled thought a prompt, then the G likeliest SIDs after it, best first: the rollouts of MiniOneRec (arXiv
    2510.24431), which does not think. They are no samples of the policy, so what is made of them is a biased gradient.

    Arguments are those of `grouped_rollouts`. `logps` of the SID tokens are left 0: beams have no sampling probability.

    Raises:
        InputError: as `grouped_rollouts`; a group larger than the number of SIDs.
    """
    drafts = grouped_rollouts(
        model,
        input_ids,
        attention_mask,
        layout,
        trie,
        1,
        block_budget=block_budget,
        min_block_tokens=min_block_tokens,
        temperature=temperature,
        generator=generator,
        pad_id=pad_id,
        sid_logps=sid_logps,
    )
    thought = layout.read(drafts.completion_ids).in_block
    ids, mask = continue_prompts(input_ids, attention_mask, drafts.completion_ids, thought, pad_id)
    sids = constrained_beam_search(model, ids, mask, trie, layout.sid_token_ids, group_size).sids.flatten(0, 1)
    if (sids < 0).any():
        raise InputError(f"a group of {group_size} beams needs as many SIDs, and the catalogue has fewer.")
    repeated = Rollouts(*(values.repeat_interleave(group_size, 0) for values in drafts))
    # every row has its K SID tokens last, so that rows fill in order
    at = repeated.completion_mask & ~thought.repeat_interleave(group_size, 0)
    levels = range(layout.num_steps)
    tokens = torch.stack([layout.sid_token_ids[level].to(sids.device)[sids[:, level]] for level in levels], 1)
    choices = torch.stack([trie.to(sids.device).allowed(sids[:, :level]).sum(1) > 1 for level in levels], 1)
    return repeated._replace(
        completion_ids=repeated.completion_ids.masked_scatter(at, tokens),
        sampled=repeated.sampled.masked_scatter(at, choices),
        logps=repeated.logps.masked_fill(at, 0.0),
        sids=sids,
    )


def continue_prompts(
    input_ids: Int[Tensor, "B P"],
    attention_mask: Int[Tensor, "B P"],
    more: Int[Tensor, "B T"],
    keep: Bool[Tensor, "B T"],
    pad_id: int,
) -> tuple[Int[Tensor, "B L"], Int[Tensor, "B L"]]:
    """Put the kept tokens of `more` behind the prompts and pad on the left again."""
    ids, mask = torch.cat([input_ids, more], 1), torch.cat([attention_mask.bool(), keep], 1)
    order = mask.long().argsort(dim=1, stable=True)  # dropped positions first, kept ones in their order
    ids, mask = ids.gather(1, order), mask.gather(1, order)
    longest = int(mask.sum(1).max())
    ids, mask = ids[:, -longest:], mask[:, -longest:]
    return ids.masked_fill(~mask, pad_id), mask.long()


def completion_logps(
    logits: Float[Tensor, "B T V"],
    completion_ids: Int[Tensor, "B T"],
    layout: ReasoningLayout,
    trie: SidTrie,
    *,
    pad_id: int,
    eos_ids: Sequence[int],
    min_block_tokens: int = 0,
    sid_logps: Literal["trie", "full"] = "trie",
) -> Float[Tensor, "B T"]:
    """Log-probabilities of given completions under the sets that the decoder allowed.

    `logits` are those that predict each token, divided by the temperature. A token that its set does not hold, as other
    engines may emit, is scored by the full softmax. Forced closings cannot be told from chosen ones by the ids; the
    caller's mask of sampled tokens leaves them out.
    """
    logits = logits.float()
    chosen = logits.gather(2, completion_ids[..., None])[..., 0]
    if sid_logps == "full":
        return chosen - logits.logsumexp(-1)
    reading = layout.read(completion_ids)
    sids = layout.parse(completion_ids).sids
    in_block = block_tokens(layout, logits.shape[-1], pad_id, eos_ids).to(logits.device)

    writes = reading.in_block & ~reading.is_open & (in_block[completion_ids])
    options = logits.masked_fill(~in_block, NEVER)
    if min_block_tokens:
        time = torch.arange(logits.shape[1], device=logits.device)
        opened_at = torch.where(reading.is_open, time, -1).cummax(1).values
        too_early = reading.in_block & (time - opened_at - 1 < min_block_tokens)
        options[..., layout.think_end_id].masked_fill_(too_early, NEVER)
        writes &= ~(too_early & reading.is_close)
    normaliser = options.logsumexp(-1)
    plain = ~writes & ~reading.is_open
    for level in range(layout.num_steps):
        at = reading.is_sid & (reading.sid_index == level) & (sids[:, level, None] >= 0)  # at most one a row
        row, column = at.nonzero(as_tuple=True)
        if not len(row):
            continue
        ids = layout.sid_token_ids[level].to(logits.device)
        allowed = trie.allowed(sids[row, :level])
        member = allowed[torch.arange(len(row), device=row.device), sids[row, level]]
        row, column, allowed = row[member], column[member], allowed[member]
        codes = logits[row, column][:, ids].masked_fill(~allowed, NEVER)
        normaliser = normaliser.index_put((row, column), codes.logsumexp(-1))
        plain = plain.index_put((row, column), torch.zeros_like(row, dtype=torch.bool))
    if plain.any():
        normaliser = torch.where(plain, logits.logsumexp(-1), normaliser)
    return (chosen - normaliser).masked_fill(reading.is_open, 0.0)


def forced_tokens(completion_ids: Int[Tensor, "B T"], layout: ReasoningLayout, trie: SidTrie) -> Bool[Tensor, "B T"]:
    """Tokens that were no choice, as far as ids tell: opening delimiters, and SID tokens that are only children.

    A closing delimiter at a budget looks like a chosen one; only the decoder knows.
    """
    reading, sids = layout.read(completion_ids), layout.parse(completion_ids).sids
    forced = reading.is_open.clone()
    for level in range(layout.num_steps):
        only_child = trie.allowed(sids[:, :level]).sum(1) == 1
        forced |= reading.is_sid & (reading.sid_index == level) & (sids[:, level, None] >= 0) & only_child[:, None]
    return forced


def block_budgets(block_budget: int | Sequence[int], num_steps: int, min_block_tokens: int = 0) -> list[int]:
    """One budget a block, checked."""
    budgets = [block_budget] * num_steps if isinstance(block_budget, int) else list(block_budget)
    if len(budgets) != num_steps:
        raise InputError(f"block_budget has {len(budgets)} numbers for {num_steps} blocks: give one, or one each.")
    if min(budgets) < min_block_tokens or min(budgets) < 0:
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


def _draw(
    options: Float[Tensor, "M V"], greedy: bool, generator: torch.Generator | None
) -> tuple[Int[Tensor, "M"], Float[Tensor, "M"]]:
    """A column of each row, drawn by the softmax of the row, and its log-probability."""
    logps = options.log_softmax(-1)
    if logps.isnan().any():
        raise FloatingPointError(BROKEN_WEIGHTS)
    choice = logps.argmax(-1) if greedy else torch.multinomial(logps.exp(), 1, generator=generator)[:, 0]
    return choice, logps.gather(1, choice[:, None])[:, 0]
