"""Beam search over the catalogue: the R most likely SIDs after a prompt, every one of them an item."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sapo.decoding.prompt_cache import PromptCache
from sapo.decoding.shared_prefix import sharing_prompts
from sapo.errors import BROKEN_WEIGHTS, InputError
from sapo.semantic_ids.trie import SidTrie

if TYPE_CHECKING:
    from transformers import PreTrainedModel

StepFunction = Callable[[Int[Tensor, "M"], Int[Tensor, "M d"]], Float[Tensor, "M V"]]


class Beams(NamedTuple):
    """Best first. Places that do not exist have codes -1 and score -inf."""

    sids: Int[Tensor, "B R K"]
    scores: Float[Tensor, "B R"]  # sum of log-probabilities


@torch.no_grad()
def constrained_beam_search(
    model: "PreTrainedModel | None",
    input_ids: Int[Tensor, "B P"],
    attention_mask: Int[Tensor, "B P"],
    trie: SidTrie,
    sid_token_ids: Sequence[Int[Tensor, "V"]],
    num_beams: int,
    num_return: int | None = None,
    normalize: Literal["full", "trie"] = "full",
    step_fn: StepFunction | None = None,
) -> Beams:
    """K steps of beam search over the codes that the trie allows. A prompt is read once, and its beams share it.

    Args:
        input_ids, attention_mask: prompts, padded on the left.
        sid_token_ids: for each level, code -> token id, as many as the trie's level sizes say.
        num_return: R, at most `num_beams`, which is the default.
        normalize: log-probabilities of the "full" softmax, or renormalised over the allowed codes ("trie").
        step_fn: replaces the model: rows (M,) of the batch and the tokens (M, d) chosen so far -> logits (M, V) of the
            next token. It serves encoder-decoders, which keep the prompt in the encoder.

    With `normalize="full"` ids and scores are those of transformers' `generate` with the same constraint and a length
    penalty of 0.

    Raises:
        InputError: num_return outside 1..num_beams, or tokens that are not those of the trie's levels.
        FloatingPointError: logits that are not a number.
    """
    if step_fn is not None:
        return _search(_StepReader(step_fn, input_ids), trie, sid_token_ids, num_beams, num_return, normalize)
    assert model is not None
    with sharing_prompts(model):
        cache = PromptCache(model, input_ids, attention_mask)
        return search_beams(cache, trie, sid_token_ids, num_beams, num_return, normalize)


@torch.no_grad()
def search_beams(
    cache: PromptCache,
    trie: SidTrie,
    sid_token_ids: Sequence[Int[Tensor, "V"]],
    num_beams: int,
    num_return: int | None = None,
    normalize: Literal["full", "trie"] = "full",
) -> Beams:
    """`constrained_beam_search` after prompts that have been read; the cache can be searched again."""
    return _search(_CacheReader(cache, len(sid_token_ids)), trie, sid_token_ids, num_beams, num_return, normalize)


def _search(
    reader: "_CacheReader | _StepReader",
    trie: SidTrie,
    sid_token_ids: Sequence[Int[Tensor, "V"]],
    num_beams: int,
    num_return: int | None,
    normalize: Literal["full", "trie"],
) -> Beams:
    num_return = num_beams if num_return is None else num_return
    if not 1 <= num_return <= num_beams:
        raise InputError(f"num_return is {num_return}; it must lie between 1 and num_beams ({num_beams}).")
    trie.check_levels([len(ids) for ids in sid_token_ids])
    logits = reader.first()
    trie = trie.to(logits.device)
    device, batch, levels = logits.device, len(logits), len(sid_token_ids)
    sids = torch.zeros(batch, 1, 0, dtype=torch.long, device=device)
    tokens = torch.zeros(batch, 1, 0, dtype=torch.long, device=device)
    nodes = torch.zeros(batch, 1, dtype=torch.long, device=device)
    scores = torch.zeros(batch, 1, device=device)
    for level, token_ids in enumerate(ids.to(device) for ids in sid_token_ids):
        exists = scores > float("-inf")
        codes, children = trie.children(nodes[exists], level)
        # only children can follow, so a step looks at as many columns as a node has children, not codes
        there, following = codes >= 0, token_ids[codes.clamp(min=0)]
        if normalize == "full":
            logps = logits.float().log_softmax(-1).gather(1, following).masked_fill(~there, float("-inf"))
        else:
            logps = logits.gather(1, following).float().masked_fill(~there, float("-inf")).log_softmax(-1)
        if logps.isnan().any():
            raise FloatingPointError(BROKEN_WEIGHTS)
        width, fan = scores.shape[1], codes.shape[1]
        candidates = scores.new_full((batch, width, fan), float("-inf"))
        candidates[exists] = scores[exists][:, None] + logps
        scores, best = candidates.flatten(1).topk(min(num_beams, width * fan), dim=1)
        parent, child = best // fan, best % fan
        row = (exists.flatten().cumsum(0) - 1).view(exists.shape).gather(1, parent).clamp(min=0)
        missing = scores.isneginf()
        code, nodes = codes[row, child].masked_fill(missing, -1), children[row, child]
        sids = torch.cat([sids.gather(1, parent[..., None].expand(-1, -1, level)), code[..., None]], 2)
        tokens = torch.cat(
            [tokens.gather(1, parent[..., None].expand(-1, -1, level)), token_ids[code.clamp(min=0)][..., None]], 2
        )
        sids = sids.masked_fill(missing[..., None], -1)
        if level + 1 < levels:
            logits = reader.next(tokens, parent, ~missing)
    absent = num_return - sids.shape[1]
    if absent > 0:
        sids = torch.cat([sids, sids.new_full((batch, absent, levels), -1)], 1)
        scores = torch.cat([scores, scores.new_full((batch, absent), float("-inf"))], 1)
    return Beams(sids[:, :num_return], scores[:, :num_return])


class _CacheReader:
    """Logits of a decoder-only model whose prompts have been read."""

    def __init__(self, cache: PromptCache, num_levels: int):
        self.cache, self.longest = cache, num_levels - 1

    def first(self) -> Float[Tensor, "B V"]:
        return self.cache.logits

    def next(self, tokens: Int[Tensor, "B W d"], parent: Int[Tensor, "B W"], exists: Tensor) -> Float[Tensor, "M V"]:
        """Logits after each beam that exists."""
        if tokens.shape[2] == 1:
            self.cache.start(tokens.shape[1], self.longest)
        else:
            self.cache.select(parent)
        rows = tokens.flatten(0, 1)
        return self.cache.read(rows, torch.full_like(rows[:, 0], rows.shape[1]), exists.flatten())


class _StepReader:
    """Logits of a function."""

    def __init__(self, step_fn: StepFunction, input_ids: Int[Tensor, "B P"]):
        self.step_fn, self.input_ids = step_fn, input_ids

    def first(self) -> Float[Tensor, "B V"]:
        rows = torch.arange(len(self.input_ids), device=self.input_ids.device)
        return self.step_fn(rows, rows.new_zeros(len(rows), 0))

    def next(self, tokens: Int[Tensor, "B W d"], parent: Int[Tensor, "B W"], exists: Tensor) -> Float[Tensor, "M V"]:
        return self.step_fn(exists.nonzero()[:, 0], tokens[exists])
