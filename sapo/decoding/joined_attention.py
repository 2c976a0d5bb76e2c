"""Attention of completions to two lots of keys, their prompt's and their own, without a copy of the prompt's.

Flash attention is told its queries and one lot of keys. Asked about either lot it returns an average of values and the
logarithm of the sum of their weights; the softmax over both is the two averages in proportion to the two sums. The
backward pass of flash attention recomputes weights as exp(score - log of the sum), so that given the output and the
sum *of both lots* it returns for each lot the gradient of the whole. (The splitting of keys is that of flash-decoding
and ring attention, arXiv 2310.01889; the joining is FlashInfer's `merge_state`, arXiv 2501.01005.)
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable

# torch's public attention keeps the sums to itself
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = f"{_FORWARD}_backward"


def can_join(states: Sequence[Tensor], dropout: float) -> bool:
    """Whether `joined_attention` can take these queries, keys and values: on a CPU, without dropout, of one dtype.

    Autocast makes one dtype of them only later.
    """
    has_sums = hasattr(torch.ops.aten, _FORWARD) and hasattr(torch.ops.aten, _BACKWARD)
    alike = len({x.dtype for x in states}) == 1 and all(x.device.type == "cpu" for x in states)
    return has_sums and alike and not dropout


def joined_attention(
    own: Sequence[Float[Tensor, "R _ T D"]],
    shared: Sequence[Float[Tensor, "B h P D"]],
    lengths: Int[Tensor, "B"],
    scaling: float,
) -> Float[Tensor, "R H T D"]:
    """What the tokens of R = B x G completions see of their prompt and, causally, of themselves.

    Args:
        own: queries, of H heads, keys and values, of h heads, of the completions.
        shared: keys and values of the prompts.
        lengths: tokens of each prompt, one or more, which stand on the left.
    """
    padding = torch.arange(shared[0].shape[2], device=lengths.device) >= lengths[:, None]
    mask = None
    if padding.any():
        mask = torch.zeros_like(padding, dtype=own[0].dtype).masked_fill_(padding, float("-inf"))[:, None, None]
    output: Tensor = _JoinedAttention.apply(*own, *shared, mask, scaling)
    return output


class _JoinedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Float[Tensor, "R H T D"],
        own_key: Float[Tensor, "R h T D"],
        own_value: Float[Tensor, "R h T D"],
        shared_key: Float[Tensor, "B h P D"],
        shared_value: Float[Tensor, "B h P D"],
        mask: Float[Tensor, "B 1 1 P"] | None,
        scaling: float,
    ) -> Float[Tensor, "R H T D"]:
        attend = getattr(torch.ops.aten, _FORWARD)
        by_prompt, by_row = _folding(query, shared_key)
        shared, shared_sum = attend(by_prompt(query), shared_key, shared_value, 0.0, attn_mask=mask, scale=scaling)
        keys, values = (_for_heads(states, query) for states in (own_key, own_value))
        own, own_sum = attend(query, keys, values, 0.0, True, scale=scaling)
        shared, shared_sum, own_sum = by_row(shared), by_row(shared_sum[..., None]), own_sum[..., None]
        share = (shared_sum - own_sum).sigmoid()  # of the prompt in all weights; sums are float32 at least
        output = torch.lerp(own.to(share.dtype), shared.to(share.dtype), share).to(query.dtype)
        both_sum = torch.logaddexp(shared_sum, own_sum)
        ctx.save_for_backward(query, own_key, own_value, shared_key, shared_value, mask, output, both_sum)
        ctx.scaling = scaling
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Float[Tensor, "R H T D"]) -> tuple[Tensor | None, ...]:
        query, own_key, own_value, shared_key, shared_value, mask, output, both_sum = ctx.saved_tensors
        attend_backward = getattr(torch.ops.aten, _BACKWARD)
        scaling = ctx.scaling
        by_prompt, by_row = _folding(query, shared_key)
        of_query, of_shared_key, of_shared_value = attend_backward(
            by_prompt(gradient),
            by_prompt(query),
            shared_key,
            shared_value,
            by_prompt(output),
            by_prompt(both_sum)[..., 0],
            0.0,
            False,
            attn_mask=mask,
            scale=scaling,
        )
        keys, values = (_for_heads(states, query) for states in (own_key, own_value))
        of_own_query, *of_own = attend_backward(
            gradient, query, keys, values, output, both_sum[..., 0], 0.0, True, scale=scaling
        )
        heads = own_key.shape[1]
        if heads < query.shape[1]:
            of_own = [states.unflatten(1, (heads, -1)).sum(2) for states in of_own]
        return by_row(of_query) + of_own_query, *of_own, of_shared_key, of_shared_value, None, None


def _for_heads(states: Float[Tensor, "R h T D"], query: Float[Tensor, "R H T D"]) -> Float[Tensor, "R H T D"]:
    """Keys or values once for each query head; no copy if there is one each."""
    repeats = query.shape[1] // states.shape[1]
    return states[:, :, None].expand(-1, -1, repeats, -1, -1).flatten(1, 2)


def _folding(query: Float[Tensor, "R H T D"], shared: Float[Tensor, "B h P D"]) -> Any:
    """(R, H, T, x) as all queries of a prompt's key head, (B, h, G T r, x), and back; r query heads a key head."""
    (prompts, heads), (_, query_heads, time, _) = shared.shape[:2], query.shape
    repeats = query_heads // heads

    def by_prompt(states: Float[Tensor, "R H T x"]) -> Float[Tensor, "B h q x"]:
        states = states.unflatten(0, (prompts, -1)).unflatten(2, (heads, repeats))
        return states.permute(0, 2, 1, 4, 3, 5).flatten(2, 4)

    def by_row(states: Float[Tensor, "B h q x"]) -> Float[Tensor, "R H T x"]:
        states = states.unflatten(2, (-1, time, repeats)).permute(0, 2, 1, 4, 3, 5)
        return states.flatten(0, 1).flatten(1, 2)

    return by_prompt, by_row
