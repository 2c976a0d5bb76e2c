"""The one loss that reads every objective: the clipped surrogate plus KL, averaged as the objective says."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sapo.credit.advantages import to_tokens
from sapo.credit.objectives import Objective
from sapo.errors import InputError


class PolicyLoss(NamedTuple):
    """A scalar with a graph, and plain numbers to log."""

    loss: Float[Tensor, ""]
    metrics: dict[str, float]


def policy_loss(
    objective: Objective,
    logps: Float[Tensor, "B T"],
    old_logps: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    token_steps: Int[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    *,
    num_steps: int,
    ref_logps: Float[Tensor, "B T"] | None = None,
    beta: float | int | None = None,
    max_length: int | None = None,
    num_tokens: float | int | Tensor | None = None,
    kept_share: float | Tensor = 1.0,
    kl_mask: Bool[Tensor, "B T"] | None = None,
) -> PolicyLoss:
    """The clipped surrogate plus KL, averaged as the objective says; minimise it.

    Args:
        logps, old_logps, ref_logps: log-probabilities of the tokens under policy, behaviour policy and reference.
        mask: the trained tokens: part of the completion, and sampled rather than forced by the decoder.
        num_steps: K, the divisor of the "step" average; a step without trained tokens adds 0.
        beta: weight of the KL; the objective's own where None. An objective that has it in the reward adds none here.
        max_length: divisor of the "constant" average.
        num_tokens: divisor of the "token" average; the trained tokens of this batch where None. Give the count of all
            micro-batches, or accumulation changes the objective.
        kept_share: divides the loss: the share of the batch that its divisor counts (`advantages.kept_share`).
        kl_mask: the tokens whose KL is in the loss; all that are trained where None. The metric `kl` is of all.

    Nothing trained at all gives a loss of 0 that still has a graph, and the metric `nothing_trained` 1.

    Raises:
        InputError: a KL weight without `ref_logps`, or the "constant" average without `max_length`.
    """
    beta = objective.beta if beta is None else beta
    trained = mask.bool()
    counted = trained.to(torch.promote_types(logps.dtype, torch.float32))
    weights = _token_weights(objective.average, counted, token_steps, num_steps, max_length, num_tokens)
    # Positions outside the mask may hold anything, infinities included; 0 x inf would poison the sum.
    advantages = torch.where(trained, advantages, 0.0)
    log_ratio = torch.where(trained, logps - old_logps, 0.0)
    ratio = _pool_log_ratio(objective.ratio, log_ratio, trained, token_steps, num_steps).exp()
    clipped = ratio.clamp(1 - objective.epsilon, 1 + objective.epsilon_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    token_loss = torch.where(trained, -surrogate, 0.0)
    metrics: dict[str, float] = {}
    if beta:
        if ref_logps is None:
            raise InputError(f"beta is {beta}, so the loss needs ref_logps: the reference policy's log-probabilities.")
        # k3 under samples of the policy: r - log r - 1 with r = reference / policy; its mean is KL(policy || reference)
        log_r = torch.where(trained, ref_logps - logps, 0.0)
        kl = log_r.exp() - log_r - 1
        metrics["kl"] = _mean(kl.detach(), trained)
        if "kl_in_reward" not in objective.extras:
            token_loss = token_loss + beta * (kl if kl_mask is None else torch.where(kl_mask, kl, 0.0))
    loss = (weights * token_loss).sum() / kept_share

    outside = ((ratio < 1 - objective.epsilon) & (advantages < 0)) | (
        (ratio > 1 + objective.epsilon_high) & (advantages > 0)
    )
    metrics["clip_ratio/region_mean"] = _mean(outside.float(), trained)
    metrics["nothing_trained"] = float(not trained.any())
    credit = advantages.detach().abs() * weights
    mass = torch.stack([credit[token_steps == k].sum() for k in range(num_steps)])
    share = (mass / mass.sum().clamp(min=torch.finfo(mass.dtype).tiny)).tolist()
    metrics |= {f"step/{k + 1}/credit_mass": share[k] for k in range(num_steps)}
    return PolicyLoss(loss, metrics)


def _token_weights(
    average: str,
    weights: Float[Tensor, "B T"],
    token_steps: Int[Tensor, "B T"],
    num_steps: int,
    max_length: int | None,
    num_tokens: float | int | Tensor | None,
) -> Float[Tensor, "B T"]:
    """w such that the loss is the sum of w x token loss: an average is nothing but these weights.

    `weights` comes in as 1 on trained tokens and 0 elsewhere.
    """
    batch = len(weights)
    if average == "sequence":
        return weights / weights.sum(1, keepdim=True).clamp(min=1) / batch
    if average == "token":
        total = weights.sum() if num_tokens is None else torch.as_tensor(num_tokens, device=weights.device)
        return weights / total.clamp(min=1)
    if average == "constant":
        if not max_length:
            raise InputError("the 'constant' average divides by the maximal completion length: give max_length > 0.")
        return weights / max_length / batch
    counts = _sum_over_steps(weights, token_steps, num_steps)
    weights = weights / to_tokens(counts, token_steps).clamp(min=1) / num_steps / batch
    return weights.masked_fill(token_steps < 0, 0.0)


def _pool_log_ratio(
    unit: str,
    log_ratio: Float[Tensor, "B T"],
    trained: Bool[Tensor, "B T"],
    token_steps: Int[Tensor, "B T"],
    num_steps: int,
) -> Float[Tensor, "B T"]:
    """Replace every token's log-ratio by that of its unit; a mean over it makes the ratio a geometric mean."""
    if unit == "token":
        return log_ratio
    if unit in ("sequence", "sequence_sum"):
        total = log_ratio.sum(1, keepdim=True)
        if unit == "sequence":
            total = total / trained.sum(1, keepdim=True).clamp(min=1)
        return total.expand(log_ratio.shape)
    sums = _sum_over_steps(log_ratio, token_steps, num_steps)
    counts = _sum_over_steps(trained.float(), token_steps, num_steps)
    return to_tokens(sums / counts.clamp(min=1), token_steps)


def _sum_over_steps(
    values: Float[Tensor, "B T"], token_steps: Int[Tensor, "B T"], num_steps: int
) -> Float[Tensor, "B K"]:
    inside = torch.where(token_steps < 0, 0.0, values)
    return values.new_zeros(len(values), num_steps).scatter_add(1, token_steps.clamp(min=0), inside)


def _mean(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> float:
    return float((values * mask).sum() / mask.sum().clamp(min=1))
