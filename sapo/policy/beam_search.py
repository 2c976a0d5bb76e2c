"""Beam search over the catalogue: the R most likely SIDs after a prompt, every one of them an item."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

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
    """K steps of beam search over the codes that the trie allows.

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
    num_return = num_beams if num_return is None else num_return
    if not 1 <= num_return <= num_beams:
        raise InputError(f"num_return is {num_return}; it must lie between 1 and num_beams ({num_beams}).")
    trie.check_levels([len(ids) for ids in sid_token_ids])
    device, batch = input_ids.device, len(input_ids)
    token_ids = [ids.to(device) for ids in sid_token_ids]
    reader = _CachedReader(model, input_ids, attention_mask)
    next_logits = step_fn or reader
    trie = trie.to(device)
    was_training = model is not None and model.training
    if model is not None:
        model.eval()

    sids = torch.zeros(batch, 1, 0, dtype=torch.long, device=device)
    scores = torch.zeros(batch, 1, device=device)
    rows = torch.arange(batch, device=device)
    tokens = torch.zeros(batch, 0, dtype=torch.long, device=device)
    for level, ids in enumerate(token_ids):
        width = sids.shape[1]
        logits = next_logits(rows, tokens).float()
        if logits.isnan().any():
            raise FloatingPointError(BROKEN_WEIGHTS)
        allowed = trie.allowed(sids.flatten(0, 1))
        if normalize == "trie":
            logps = logits[:, ids].masked_fill(~allowed, float("-inf")).log_softmax(-1)
        else:
            logps = logits.log_softmax(-1)[:, ids]
        candidates = scores[..., None] + logps.masked_fill(~allowed, float("-inf")).view(batch, width, -1)
        codes = len(ids)
        scores, best = candidates.flatten(1).topk(min(num_beams, width * codes), dim=1)
        parent, code = best // codes, best % codes
        sids = torch.cat([sids.gather(1, parent[..., None].expand(-1, -1, level)), code[..., None]], 2)
        # Beams that do not exist keep a valid prefix of -1, which the trie continues with nothing.
        sids = sids.masked_fill(scores[..., None].isneginf(), -1)
        rows = torch.arange(batch, device=device).repeat_interleave(parent.shape[1])
        tokens = torch.stack(
            [token_ids[depth][sids[..., depth].clamp(min=0)] for depth in range(level + 1)], -1
        ).flatten(0, 1)
        if step_fn is None and level + 1 < len(token_ids):
            reader.reorder((torch.arange(batch, device=device)[:, None] * width + parent).flatten())
    if model is not None:
        model.train(was_training)
    missing = num_return - sids.shape[1]
    if missing > 0:
        sids = torch.cat([sids, sids.new_full((batch, missing, len(token_ids)), -1)], 1)
        scores = torch.cat([scores, scores.new_full((batch, missing), float("-inf"))], 1)
    return Beams(sids[:, :num_return], scores[:, :num_return])


class _CachedReader:
    """Next-token logits of a decoder-only model that reads each prompt once."""

    def __init__(self, model: Any, input_ids: Int[Tensor, "B P"], attention_mask: Int[Tensor, "B P"]):
        self.model = model
        self.input_ids, self.mask = input_ids, attention_mask.long()
        self.position = (self.mask.cumsum(1) - 1).clamp(min=0)
        self.cache: Any = None

    def __call__(self, rows: Int[Tensor, "M"], tokens: Int[Tensor, "M d"]) -> Float[Tensor, "M V"]:
        ids = self.input_ids if self.cache is None else tokens[:, -1:]
        output = self.model(
            ids,
            attention_mask=self.mask,
            position_ids=self.position,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.cache = output.past_key_values
        return output.logits[:, -1]

    def reorder(self, rows: Int[Tensor, "M"]) -> None:
        """Row i of the next call continues row rows[i] of the last one."""
        self.cache.reorder_cache(rows)
        self.mask = torch.nn.functional.pad(self.mask[rows], (0, 1), value=1)
        self.position = self.position[rows, -1:] + 1
