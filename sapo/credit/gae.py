"""Advantages from a learned value: what proximal policy optimisation (PPO, arXiv 1707.06347) does where the other
objectives compare completions. B completions, T completion tokens; a value belongs to the state before its token.
"""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


class Estimates(NamedTuple):
    """Both 0 where nothing is trained."""

    advantages: Float[Tensor, "B T"]
    returns: Float[Tensor, "B T"]  # what the value should have been: value + advantage


def token_rewards(
    rewards: Float[Tensor, "B"],
    logps: Float[Tensor, "B T"],
    ref_logps: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    beta: float,
) -> Float[Tensor, "B T"]:
    """The reward of a completion at its last trained token; -beta log(policy / reference) at every one of them.

    With the divergence in the reward it must not be in the loss as well.
    """
    last = mask & (mask.long().flip(1).cumsum(1).flip(1) == 1)
    return torch.where(mask, rewards[:, None] * last - beta * (logps - ref_logps), 0.0)


def generalized_advantages(
    rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    discount: float = 1.0,
    trace: float = 0.95,
) -> Estimates:
    """A_t = d_t + discount x trace x A_{t+1} with d_t = r_t + discount x V_{t+1} - V_t (GAE, arXiv 1506.02438, eq. 16).

    Tokens outside the mask are skipped: the one after t is the next trained one, and after the last one V is 0.

    Args:
        trace: 1 gives return - value, 0 one step of bootstrap.
    """
    values = values.detach()
    advantages = torch.zeros_like(values)
    after_value, after_advantage = values.new_zeros(len(values)), values.new_zeros(len(values))
    for t in reversed(range(values.shape[1])):
        surprise = rewards[:, t] + discount * after_value - values[:, t]
        advantage = surprise + discount * trace * after_advantage
        trained = mask[:, t]
        advantages[:, t] = torch.where(trained, advantage, 0.0)
        after_value = torch.where(trained, values[:, t], after_value)
        after_advantage = torch.where(trained, advantage, after_advantage)
    return Estimates(advantages, torch.where(mask, advantages + values, 0.0))


def whiten(values: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    """Mean 0 and variance 1 over the trained tokens of the batch; 0 elsewhere, and everywhere if all are equal."""
    inside = values[mask]
    if not len(inside) or inside.max() == inside.min():  # not var == 0: the float mean of equals may miss them
        return torch.zeros_like(values)
    return torch.where(mask, (values - inside.mean()) / (inside.var() + 1e-8).sqrt(), 0.0)


def value_loss(
    values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"] | Int[Tensor, "B T"],
    clip: float,
) -> Float[Tensor, ""]:
    """Half the squared error, the mean over trained tokens, of the value or of the value held within `clip` of the old
    one, whichever is larger: a value that has moved that far towards its return is not pulled further.

    Nothing trained gives 0 with a graph.
    """
    trained = mask.bool()
    held = old_values + (values - old_values).clamp(-clip, clip)
    errors = torch.maximum((values - returns) ** 2, (held - returns) ** 2)
    return 0.5 * torch.where(trained, errors, 0.0).sum() / trained.sum().clamp(min=1)
