"""Contrastive inference (arXiv 2602.16587, "why thinking hurts"): SIDs scored by what a thought adds to a history.

A thought can speak louder than the history that it came from. So candidates found after the thought are scored in three
contexts, each score is standardised over a user's candidates, and what the thought says alone is taken off:

    expert    history and thought
    amateur   the thought without its history
    baseline  the history without the thought
    S = z(expert) - weight (z(amateur) - z(baseline))

The authors let a language model shorten the thought first; those of small policies are some words already. They do not
give their coefficients: one weight for both differences is a form that works. It reads every candidate three times.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.decoding.beam_search import Beams
from sapo.decoding.prompt_cache import PromptCache
from sapo.semantic_ids.trie import SidTrie

if TYPE_CHECKING:
    from sapo.policy.policy import Policy

CANDIDATES = 32  # of each user, as many as the authors' beams


def contrast(policy: "Policy", found: Beams, prompts: Sequence[str], thoughts: Sequence[str], weight: float) -> Beams:
    """The candidates in the order of S, which becomes their score.

    Args:
        found: candidates of B users and their scores as of the expert, best first.
        prompts, thoughts: texts of the histories and of what was thought after them.
    """
    nothing = policy.prompts([[]])[0]  # a prompt without a history
    amateur = score_sids(policy, [f"{nothing}{policy.wording.glue}{thought}" for thought in thoughts], found.sids)
    baseline = score_sids(policy, prompts, found.sids)
    exists = found.scores > float("-inf")
    z = [standardised(scores, exists) for scores in (found.scores, amateur, baseline)]
    scores = (z[0] - weight * (z[1] - z[2])).masked_fill(~exists, float("-inf"))
    order = scores.argsort(dim=1, descending=True, stable=True)
    return Beams(found.sids.gather(1, order[..., None].expand_as(found.sids)), scores.gather(1, order))


def standardised(scores: Float[Tensor, "B R"], exists: Bool[Tensor, "B R"]) -> Float[Tensor, "B R"]:
    """Less the mean, divided by the standard deviation, over the candidates that exist; 0 where these are all alike,
    and for others."""
    count = exists.sum(1, keepdim=True).clamp(min=1)
    centred = torch.where(exists, scores, 0.0)
    centred = torch.where(exists, centred - centred.sum(1, keepdim=True) / count, 0.0)
    deviation = (centred.pow(2).sum(1, keepdim=True) / count).sqrt()
    return torch.where(deviation > 1e-6, centred / deviation.clamp(min=1e-6), 0.0)


@torch.no_grad()
def score_sids(policy: "Policy", texts: Sequence[str], sids: Int[Tensor, "B R K"]) -> Float[Tensor, "B R"]:
    """Log-probabilities of given SIDs after each of B texts, by the softmax over the codes that the trie allows; of
    candidates that do not exist (-1), anything."""
    batch = policy.encode(texts)
    cache = PromptCache(policy.model, batch["input_ids"], batch["attention_mask"])
    users, width, levels = sids.shape
    rows = sids.flatten(0, 1).clamp(min=0)
    tokens = torch.stack(
        [ids.to(rows.device)[rows[:, level]] for level, ids in enumerate(policy.layout.sid_token_ids)], 1
    )
    cache.start(width, levels)
    logits, scores = cache.logits.repeat_interleave(width, 0), torch.zeros(users * width, device=rows.device)
    for level in range(levels):
        scores = scores + _of_codes(policy.trie, policy.layout.sid_token_ids[level], logits, rows, level)
        if level + 1 < levels:
            logits = cache.read(tokens, torch.full_like(rows[:, 0], level + 1))
    return scores.view(users, width)


def _of_codes(
    trie: SidTrie, token_ids: Int[Tensor, "V"], logits: Float[Tensor, "M V"], sids: Int[Tensor, "M K"], level: int
) -> Float[Tensor, "M"]:
    """Log-probability of each row's code at a level among those that may stand there."""
    trie = trie.to(sids.device)
    codes = trie.children(trie.find(sids[:, :level]), level).codes
    tokens = token_ids.to(logits.device)
    options = logits.gather(1, tokens[codes.clamp(min=0)]).float().masked_fill(codes < 0, float("-inf"))
    chosen = logits.gather(1, tokens[sids[:, level, None]])[:, 0].float()
    return chosen - options.logsumexp(-1)
